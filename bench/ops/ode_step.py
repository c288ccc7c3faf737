"""One guided solver step of teacher and auxiliary, the next model inputs of all lanes included."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.harness import OCCFM_ELEMENTS, SANA_ELEMENTS, Case, Operator
from mfd_fast.ops import ode_step_, reference

GUIDANCE = 4.5
TRAJECTORIES, LANES = 2, 3
SHAPES = [(f"sana-1024 x{batch}", batch, SANA_ELEMENTS) for batch in (1, 4, 12)]
SHAPES += [("occfm x8", 8, OCCFM_ELEMENTS)]
KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]  # has history


def eager(x: Tensor, v: Tensor, history: Tensor | None, coef: Tensor, x_in: Tensor) -> tuple:
    """State, history and next inputs out of place, as one would write them."""
    x, h_next = reference.ode_step(x, v, history, coef, GUIDANCE)
    lanes = torch.cat([x[:, :1], x], dim=1).to(x_in.dtype)
    return (x, lanes) if history is None else (x, h_next, lanes)


def in_place(step: Callable, x: Tensor, v: Tensor, history: Tensor | None, coef, x_in) -> tuple:
    step(x, v, history, coef, GUIDANCE, x_in)
    return (x, x_in) if history is None else (x, history, x_in)


def ours(*args: Tensor | None) -> tuple:
    return in_place(lambda *a: ode_step_(*a[:4], guidance=a[4], x_in=a[5]), *args)


def inputs(batch: int, n: int, dtype: torch.dtype, has_history: bool, device: str) -> tuple:
    x = torch.randn(batch, TRAJECTORIES, n, device=device)
    v = torch.randn(batch, LANES, n, device=device).to(dtype)
    history = torch.randn_like(x) if has_history else None
    row = (1.0, -0.03, 0.01, 0.0, 1.0) if has_history else (1.0, -0.02, 0.0, 0.0, 1.0)
    coef = torch.tensor(row, device=device).repeat(batch, 1)
    return x, v, history, coef, torch.empty_like(v)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    for (name, batch, n), (dtype, has_history) in product(SHAPES[:1] if smoke else SHAPES, KINDS):
        of_states, of_lanes = 16 if has_history else 8, 2 * dtype.itemsize
        yield Case(
            f"{name} {'ab2' if has_history else 'euler'}",
            dtype,
            partial(inputs, batch, n, dtype, has_history, device),
            bytes_moved=batch * n * (of_states * TRAJECTORIES + of_lanes * LANES),
        )


OPERATOR = Operator(cases, eager, ours, kernel="ode_step_", device_call=in_place)
