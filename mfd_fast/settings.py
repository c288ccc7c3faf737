"""What all groups of settings have in common: every number is finite and in a range of its type.

    lr: Positive = 1e-4

is a float in every other respect.
"""

import math
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple, get_type_hints

MAX_FLOAT = 3.4028234663852886e38  # of a float32
MAX_INT = 2**31 - 1


class Range(NamedTuple):
    """Where a number may lie; ``text`` says it in an error."""

    text: str
    low: float
    high: float
    has_low: bool = True
    has_high: bool = True
    is_whole: bool = False
    is_optional: bool = False

    def holds(self, value: float) -> bool:
        """Whether a finite number lies in it."""
        is_above = value >= self.low if self.has_low else value > self.low
        return is_above and (value <= self.high if self.has_high else value < self.high)


Number = Annotated[float, Range(f">= -{MAX_FLOAT:g}", -MAX_FLOAT, MAX_FLOAT)]
Positive = Annotated[float, Range("> 0", 0, MAX_FLOAT, has_low=False)]
NotNegative = Annotated[float, Range(">= 0", 0, MAX_FLOAT)]
PositiveOrOff = Annotated[float, Range(">= 0 (0: off)", 0, MAX_FLOAT)]
Share = Annotated[float, Range("in [0, 1]", 0, 1)]
Decay = Annotated[float, Range("in [0, 1)", 0, 1, has_high=False)]
Count = Annotated[int, Range(">= 1", 1, MAX_INT, is_whole=True)]
CountOrOff = Annotated[int, Range(">= 0 (0: off)", 0, MAX_INT, is_whole=True)]
Seed = Annotated[int, Range(">= -2^62", -(2**62), 2**62, is_whole=True)]


class Settings:
    """Base of the frozen dataclasses of settings.

    ``ValueError`` names the setting, what it must be and what came.
    """

    SECTION: ClassVar[str] = ""
    """What stands before the names in an error."""

    def __post_init__(self):
        for name, limits in ranges(type(self)).items():
            value, text = getattr(self, name), limits.text
            if value is None and limits.is_optional:
                continue
            is_number = isinstance(value, int if limits.is_whole else int | float)
            if isinstance(value, bool) or not is_number:
                text, value = f"a {'whole ' * limits.is_whole}number {text}", repr(value)
                is_in = False
            elif isinstance(value, float) and not math.isfinite(value):
                text, is_in = f"finite and {text}", False
            else:
                is_in = limits.holds(value)
                text += f" and <= {limits.high:g}" if value > limits.high else ""
            require(is_in, self.SECTION + name, text, value)


@cache
def ranges(cls: type) -> dict[str, Range]:
    """The numbers among the settings of a class, with their ranges."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: found for name, hint in hints.items() if (found := _range(hint))}


def _range(hint: Any) -> Range | None:
    own = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range)]
    if own:
        return own[0]
    of_parts = [found for part in getattr(hint, "__args__", ()) if (found := _range(part))]
    return of_parts[0]._replace(is_optional=True) if of_parts else None


def require(ok: bool, key: str, expected: str, got: Any) -> None:
    """``ValueError`` in one form unless ``ok``."""
    if not ok:
        raise ValueError(f"{key} must be {expected}, got {got}")
