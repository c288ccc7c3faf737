"""Tensors that are there against those that are wanted, by name and shape."""

from collections.abc import Mapping, Sequence
from typing import Any


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{names[:limit]}{more}"


def differences(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    unknown: str = "unexpected",
    limit: int = 4,
) -> str:
    """What is missing, ``unknown`` or of another shape, in words; nothing if all are alike.

    The values are tensors, or shapes as lists.
    """
    theirs, mine = (
        {name: list(getattr(x, "shape", x)) for name, x in tensors.items()}
        for tensors in (found, wanted)
    )
    faults = {
        "missing": sorted(mine.keys() - theirs.keys()),
        unknown: sorted(theirs.keys() - mine.keys()),
        "of another shape": [
            f"{name} {theirs[name]} in place of {mine[name]}"
            for name in sorted(mine.keys() & theirs.keys())
            if theirs[name] != mine[name]
        ],
    }
    return "; ".join(f"{what}: {some(names, limit)}" for what, names in faults.items() if names)
