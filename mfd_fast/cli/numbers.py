"""Numbers typed after an option; a wrong one is one sentence with an example."""

import math


def count(flag: str, typed: str | None, what: str, example: int) -> int:
    """A whole number >= 1; 0 if the option was not typed (``typed`` is None)."""
    if typed is None:
        return 0
    number = int(typed) if typed.lstrip("+-").isdecimal() else 0
    if number < 1:
        raise ValueError(
            f"{flag}: {what} must be >= 1, a whole number, got {typed!r}; "
            f"type for example {flag} {example}"
        )
    return number


def rate(flag: str, typed: str | None, unit: str, example: float) -> float:
    """A finite number > 0; 0 if the option was not typed (``typed`` is None)."""
    if typed is None:
        return 0.0
    try:
        number = float(typed)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(
            f"{flag}: a number of {unit} must be > 0, got {typed!r}; "
            f"type for example {flag} {example:g}"
        )
    return number
