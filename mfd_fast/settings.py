"""What all groups of settings have in common: every value is of its type, every number finite and
in a range of its type.

    lr: Positive = 1e-4

is a float in every other respect.
"""

import math
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

MAX_FLOAT = 3.4028234663852886e38  # of a float32
MAX_INT = 2**31 - 1
WORDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


class Range(NamedTuple):
    """Where a number may lie; ``text`` says it in an error."""

    text: str
    low: float
    high: float
    has_low: bool = True
    has_high: bool = True

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
Count = Annotated[int, Range(">= 1", 1, MAX_INT)]
CountOrOff = Annotated[int, Range(">= 0 (0: off)", 0, MAX_INT)]
Seed = Annotated[int, Range(">= -2^62", -(2**62), 2**62)]


class Settings:
    """Base of the frozen dataclasses of settings.

    ``ValueError`` names the setting, what it must be and what came.
    """

    SECTION: ClassVar[str] = ""
    """What stands before the names in an error."""

    def __post_init__(self):
        hints, limits = get_type_hints(type(self)), ranges(type(self))
        for name in (field.name for field in fields(self)):
            value, hint, key = getattr(self, name), hints[name], self.SECTION + name
            if is_dataclass(hint):
                require(isinstance(value, hint), key, f"a {hint.__name__}", repr(value))
                continue
            value = check_type(hint, value, key)
            object.__setattr__(self, name, value)
            if name in limits and value is not None:
                check_range(limits[name], value, key)


def check_range(limits: Range, value: float, key: str) -> None:
    text, is_finite = limits.text, isinstance(value, int) or math.isfinite(value)
    if not is_finite:
        text = f"finite and {text}"
    elif value > limits.high:
        text += f" and <= {limits.high:g}"
    require(is_finite and limits.holds(value), key, text, value)


def check_type(hint: Any, value: Any, key: str) -> Any:
    """The value as the setting's type has it, 1 as 1.0; ``ValueError`` if it is of another."""
    if get_origin(hint) in (Union, UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        require(value in choices, key, f"one of {', '.join(map(str, choices))}", repr(value))
        return value
    if hint is float and type(value) is int:
        return float(value) if abs(value) <= MAX_FLOAT else math.inf * (1 if value > 0 else -1)
    hint = get_origin(hint) or hint
    text = WORDS.get(hint, hint.__name__)
    require(type(value) is hint, key, text, f"{value!r} ({type(value).__name__})")
    return value


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
    return of_parts[0] if of_parts else None


def require(ok: bool, key: str, expected: str, got: Any) -> None:
    """``ValueError`` in one form unless ``ok``."""
    if not ok:
        raise ValueError(f"{key} must be {expected}, got {got}")
