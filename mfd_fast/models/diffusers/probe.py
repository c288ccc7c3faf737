"""The start-up probe: does this pipeline still do what its adapter says?

Two steps of the user's own pipeline run with a stub in the network's place.  What the stub was
called with, and what it led the scheduler to get, must be what the adapter does from the same
states, times and conditions.  A diffusers that changed a convention stops the run with a sentence.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mfd_fast.files.whole import first_line
from mfd_fast.models.diffusers.family import Cond, Family
from mfd_fast.models.diffusers.network import FamilyNetwork
from mfd_fast.models.diffusers.record import Step, record, watched

# Rounding of both sides, in units of the coarser dtype; guidance multiplies it.
ROUNDING = 8


def probe(family: Family, cond: Cond) -> None:
    """``ValueError`` names the first thing in which pipeline and adapter differ.

    Args:
        cond: any conditions of the family; the first row is used.
    """
    cond = {name: leaf[:1] for name, leaf in cond.items()}
    null = family.null(cond) if family.guidance != 1.0 else None
    noise = torch.randn(1, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(family.device, family.pipe.transformer.dtype)
    try:
        steps = record(family, cond, noise, 2).steps
        why = next(_differences(family, steps, cond, null), "")
    except (TypeError, RuntimeError, AttributeError, KeyError, ValueError) as error:
        why = f"its call fails ({type(error).__name__}: {first_line(error)})"
    if why:
        import diffusers

        raise ValueError(
            f"{type(family.pipe).__name__} of diffusers {diffusers.__version__} does not do what "
            f"mfd_fast knows of it: {why}. Install diffusers 0.42.1"
        )


def _differences(family: Family, steps: list[Step], cond: Cond, null: Cond | None) -> Iterator[str]:
    lanes = [cond] if null is None else [cond, null]
    for step in steps:
        rows = sum(len(next(iter(call.values()))) for call in step.calls)
        if rows != len(lanes):
            yield f"it evaluates {rows} rows in a step of one image, not {len(lanes)}"
            return
        calls, outputs = _ours(family, step, lanes)
        for theirs in _split(step.calls):
            yield from _nearest(theirs, calls, family.ignored)
        yield from _guidance(family, step, outputs)


def _ours(family: Family, step: Step, lanes: list[Cond]) -> tuple[list[dict], list[Tensor]]:
    """The adapter's calls and velocities, a lane each, at the state and time of a step."""
    network, calls, outputs = FamilyNetwork(family), [], []
    time = torch.tensor([step.time], device=step.sample.device)
    with watched(family.networks, calls, stub=True), torch.no_grad():
        for lane in lanes:
            outputs.append(network(step.sample.to(network.transformer.dtype), time, lane).float())
    return calls, outputs


def _split(calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every row of the calls as a call of its own."""
    for call in calls:
        rows = len(next(iter(call.values())))
        for row in range(rows):
            yield {name: _row(name, value, row, rows) for name, value in call.items()}


def _row(name: str, value: Any, row: int, rows: int) -> Any:
    if isinstance(value, Tensor) and value.ndim > 1 and "llama" in name:
        return value[:, row : row + 1]  # HiDream's layers come before its rows
    if isinstance(value, list | Tensor) and getattr(value, "ndim", 1) and len(value) == rows:
        return value[row : row + 1]
    return value


def _nearest(
    theirs: dict[str, Any], ours: list[dict[str, Any]], ignored: tuple[str, ...]
) -> Iterator[str]:
    """What separates a row from the lane that it is most like."""
    found = [list(_arguments(theirs, call, ignored)) for call in ours]
    yield from min(found, key=len)


def _arguments(
    theirs: dict[str, Any], ours: dict[str, Any], ignored: tuple[str, ...]
) -> Iterator[str]:
    for name in sorted(theirs.keys() | ours.keys()):
        a, b = (_plain(side.get(name)) for side in (theirs, ours))
        if name not in ignored and not _same(a, b):
            yield f"its network is called with {name} {_told(a)}, not {_told(b)}"


def _guidance(family: Family, step: Step, outputs: list[Tensor]) -> Iterator[str]:
    if len(outputs) == 1:
        v = outputs[0]
    elif family.combine is not None:
        v = family.combine(*outputs, family.guidance)
    else:
        v = outputs[1] + family.guidance * (outputs[0] - outputs[1])
    theirs, rounding = step.output.float(), (family.pipe.transformer.dtype, family.rounding)
    if _same(theirs, v, *rounding):
        return
    if _same(theirs, -v, *rounding):
        yield "the velocity that its scheduler gets has the opposite sign"
    else:
        off = float((theirs - v).norm() / v.norm())
        yield (
            f"at {family.scale_name} {family.scale:g} the guided velocity that its scheduler gets "
            f"differs by {off:.2g} of its size"
        )


def _plain(value: Any) -> Any:
    """None for what says nothing: empty arguments, a mask of what is all there."""
    if isinstance(value, Tensor):
        return None if value.dtype == torch.bool and bool(value.all()) else value
    return value or None


def _same(a: Any, b: Any, dtype: torch.dtype | None = None, least: float = 0.0) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
    shapes = [list(x.shape) for x in (a, b)]
    while any(len(shape) > 1 and shape[0] == 1 for shape in shapes):
        shapes = [shape[1:] if len(shape) > 1 and shape[0] == 1 else shape for shape in shapes]
    if shapes[0] != shapes[1]:
        return False
    kinds = [x for x in (a.dtype, b.dtype, dtype) if x is not None and x.is_floating_point]
    eps = max(least, *(torch.finfo(kind).eps for kind in kinds), 0.0)
    a, b = a.double().flatten(), b.double().flatten()
    return bool((a - b).abs().max() <= ROUNDING * eps * max(1e-30, float(b.abs().max())))


def _told(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return f"a list of {list(value[0].shape)}"
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return f"{value.item():g}"
        return f"of shape {list(value.shape)} and mean {float(value.float().mean()):.3g}"
    return repr(value)
