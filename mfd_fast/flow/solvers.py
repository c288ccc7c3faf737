"""A solver is a table of coefficients.

Every solver here is linear in what it has seen.  Evaluation k of a trajectory does

    v   = velocity(x, time_k)
    x  <- a_k x + b_k v + c_k h
    h  <- p_k x + q_k v            (with the old x)

so one fused operator (``ops.ode_step_``) runs them all.  h is the last velocity for Euler, Heun and
AB2 (p = 0, q = 1) and the last data prediction x - sigma v for DPM-Solver++ 2M (p = 1, q = -sigma).

``plan`` makes the table for a batch of intervals [r, t] on the host, where the number of steps has
to be known; nothing of it is read back later.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mfd_fast.flow.times import Schedule, on_grid

Rows = tuple[np.ndarray, np.ndarray]  # times [E, B] and coefficients [E, B, 5]

# Times are float32: an interval longer than n steps by less than one ulp of 1 still takes n steps.
TIME_ULP = 2.0**-23


@dataclass(frozen=True)
class SolverTable:
    """What every evaluation of a batch of trajectories does; samples in descending order of length.

    All but ``order`` is float32, or float64 where the times are.

    times: ``[E, B]``, the time shown to the network.
    coef: ``[E, B, 5]`` rows (a, b, c, p, q); (1, 0, 0, 0, 0) once a sample has arrived.
    active: for each evaluation, how many samples (a prefix) are still moving.
    order: ``[B]`` int64, table row -> sample; None if the samples came in this order already.
    span: ``[B]``, t - r, and 1 where t == r.
    start_weight: ``[B]``: u = (start_weight * x_t - end) / span; 0 where t == r, because
        such a row returns end = -velocity(x, t) exactly.
    has_history: whether c is ever non-zero.
    """

    times: Tensor
    coef: Tensor
    active: tuple[int, ...]
    order: Tensor | None
    span: Tensor
    start_weight: Tensor
    has_history: bool

    @property
    def num_evaluations(self) -> int:
        """Sum over samples of the evaluations one lane needs (sum of N, not batch x max N)."""
        return sum(self.active)

    def assigned_in_order(self) -> "SolverTable":
        """The same trajectories given to samples 0, 1, ... in table order.

        For intervals drawn independently of the samples this is as random as the order they were
        drawn in, and no sample has to move.
        """
        return replace(self, order=None)

    def to(self, device: torch.device | str) -> "SolverTable":
        """The same table on ``device``, without waiting for it."""
        names = ("times", "coef", "span", "start_weight", "order")
        moved = {
            name: to_device(getattr(self, name), device)
            for name in names
            if getattr(self, name) is not None
        }
        return replace(self, **moved)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """The values on ``device``, without waiting for it: the host's go to a GPU by way of pinned
    memory, for a copy of pageable memory may wait.
    """
    goes_up = torch.device(device).type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if goes_up else values).to(device, non_blocking=goes_up)


def _euler(nodes: np.ndarray) -> Rows:
    dt = nodes[:-1] - nodes[1:]
    return nodes[:-1], _rows(1.0, -dt, 0.0, 0.0, 1.0)


def _heun(nodes: np.ndarray) -> Rows:
    """Two evaluations a step: predict with v at t, correct with the mean of both ends."""
    dt = nodes[:-1] - nodes[1:]
    times = np.stack([nodes[:-1], nodes[1:]], axis=1).reshape(-1, nodes.shape[1])
    predict = _rows(1.0, -dt, 0.0, 0.0, 1.0)
    correct = _rows(1.0, -dt / 2, dt / 2, 0.0, 1.0)
    return times, np.stack([predict, correct], axis=1).reshape(-1, nodes.shape[1], 5)


def _ab2(nodes: np.ndarray) -> Rows:
    """Adams-Bashforth 2 with variable steps; the first step is Euler's."""
    dt = nodes[:-1] - nodes[1:]
    ratio = np.zeros_like(dt)
    np.divide(dt[1:], dt[:-1], out=ratio[1:], where=dt[:-1] > 0)
    return nodes[:-1], _rows(1.0, -dt * (1 + ratio / 2), dt * ratio / 2, 0.0, 1.0)


def _dpmpp_2m(nodes: np.ndarray) -> Rows:
    """DPM-Solver++ 2M (Lu et al. 2022, midpoint) for flow: sigma = t, alpha = 1 - t.

    D = x - sigma v;  x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D_bar, where
    D_bar = D + (D - D_prev) h / (2 h_prev) and h is the step in log(alpha/sigma); first order at
    the first step and into sigma = 0, where h is infinite.
    """
    sigma, sigma_next = nodes[:-1], nodes[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = np.log1p(-nodes) - np.log(nodes)
        h = log_snr[1:] - log_snr[:-1]
        extrapolate = np.zeros_like(h)
        extrapolate[1:] = h[1:] / (2 * h[:-1])
        scale = np.where(sigma > 0, sigma_next / np.where(sigma > 0, sigma, 1.0), 1.0)
    extrapolate[~np.isfinite(extrapolate) | (sigma_next <= 0)] = 0.0
    data = (1 - sigma_next) - (1 - sigma) * scale
    now, before = data * (1 + extrapolate), data * extrapolate
    return sigma, _rows(scale + now, -now * sigma, -before, 1.0, -sigma)


SOLVERS: dict[str, Callable[[np.ndarray], Rows]] = {
    "euler": _euler,
    "heun": _heun,
    "ab2": _ab2,
    "dpmpp_2m": _dpmpp_2m,
}
EVALUATIONS_PER_STEP = {"euler": 1, "heun": 2, "ab2": 1, "dpmpp_2m": 1}


def _rows(*columns) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def check_solver(name: str) -> None:
    """``ValueError`` with the known names if ``name`` is not a solver."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {name!r}")


def num_steps(t: Tensor, r: Tensor, *, step_size: float, grid: int | None = None) -> np.ndarray:
    """N = ceil((t - r) / step_size) per sample, ``[B]`` int64; 0 where t == r; at most one per grid
    cell.
    """
    span = t.double().numpy() - r.double().numpy()
    steps = np.ceil((span - TIME_ULP) / step_size).clip(min=1)
    if grid is not None:
        steps = np.minimum(steps, np.rint(span * grid))
    return np.where(span > 0, steps, 0).astype(np.int64)


def plan(
    t: Tensor, r: Tensor, *, step_size: float, solver: str = "euler", grid: int | None = None
) -> SolverTable:
    """The table that integrates each sample from t down to r in N = ceil((t - r)/step_size) steps.

    Args:
        t, r: interval ends, ``[B]`` float32 or float64 on the CPU, 0 <= r <= t <= 1; the table has
            their dtype.
        step_size: largest step h, > 0.
        grid: round t, r and the end of every step to multiples of 1/grid (the official SANA code:
            1000).

    A sample with t == r gets one evaluation that returns ``end = -velocity(x, t)``.  ``ValueError``
    if a time or the step is out of range.  Source: Eq. 15-17.
    """
    check_solver(solver)
    _check_interval(t, r, step_size)
    dtype = torch.promote_types(torch.promote_types(t.dtype, r.dtype), torch.float32)
    if grid is not None:
        t, r = (on_grid(time.double(), grid) for time in (t, r))
    steps = num_steps(t, r, step_size=step_size, grid=grid)

    order = np.argsort(-np.maximum(steps, 1), kind="stable")
    is_sorted = bool((order == np.arange(len(order))).all())
    steps, t64, r64 = steps[order], t.double().numpy()[order], r.double().numpy()[order]
    is_equal = steps == 0

    times, coef = SOLVERS[solver](_nodes(t64, r64, steps, grid))
    evaluations = np.where(is_equal, 1, steps * EVALUATIONS_PER_STEP[solver])
    times, coef = times.copy(), coef.copy()
    times[0, is_equal], coef[0, is_equal] = t64[is_equal], (0.0, -1.0, 0.0, 0.0, 1.0)
    arrived = np.arange(len(times))[:, None] >= evaluations[None, :]
    last = np.take_along_axis(times, evaluations[None, :] - 1, axis=0)
    times = np.where(arrived, last, times)  # never t = 0, where a velocity may be singular
    coef[arrived] = (1.0, 0.0, 0.0, 0.0, 0.0)

    return SolverTable(
        times=torch.from_numpy(times).to(dtype),
        coef=torch.from_numpy(coef).to(dtype),
        active=tuple(int(n) for n in (~arrived).sum(axis=1)),
        order=None if is_sorted else torch.from_numpy(order),
        span=torch.from_numpy(np.where(is_equal, 1.0, t64 - r64)).to(dtype),
        start_weight=torch.from_numpy(1.0 - is_equal).to(dtype),
        has_history=bool((coef[..., 2] != 0).any()),
    )


def _nodes(t: np.ndarray, r: np.ndarray, steps: np.ndarray, grid: int | None) -> np.ndarray:
    """``[N_max + 1, B]``: the times a sample visits, equal steps, r repeated once it has
    arrived.
    """
    k = np.arange(max(int(steps.max()), 1) + 1)[:, None]
    fraction = np.minimum(k / np.maximum(steps, 1), 1.0)
    nodes = t - fraction * (t - r)
    nodes = np.where(fraction >= 1.0, r, nodes)
    return nodes if grid is None else np.rint(nodes * grid) / grid


def _check_interval(t: Tensor, r: Tensor, step_size: float) -> None:
    if t.ndim != 1 or t.shape != r.shape or t.device.type != "cpu" or r.device.type != "cpu":
        raise ValueError(
            f"t and r must be CPU tensors of one shape [B]; got {list(t.shape)} on {t.device} and "
            f"{list(r.shape)} on {r.device}"
        )
    if not step_size > 0:
        raise ValueError(f"step_size must be > 0, got {step_size}")
    if len(t) == 0:
        raise ValueError("t and r are empty; a plan needs at least one sample")
    if not bool(((r >= 0) & (t <= 1)).all()):
        raise ValueError(f"times must lie in [0, 1]; got r >= {r.min():.4g} and t <= {t.max():.4g}")
    if not bool((r <= t).all()):
        i = int((r > t).nonzero()[0])
        raise ValueError(
            f"r must be <= t for every sample; sample {i} has t={t[i]:.4g}, r={r[i]:.4g}"
        )


def scheduled(
    schedule: Schedule, batch: int, *, solver: str = "euler", dtype: torch.dtype = torch.float32
) -> SolverTable:
    """The table of one fixed schedule for a whole batch (few-step samplers)."""
    check_solver(solver)
    nodes, network = (np.asarray(s, dtype=np.float64) for s in (schedule.nodes, schedule.times))
    if len(network) != len(nodes) - 1 or (np.diff(nodes) >= 0).any() or len(nodes) < 2:
        raise ValueError(
            f"a schedule of K steps has K + 1 descending nodes and K network times; got nodes "
            f"{[round(x, 4) for x in nodes]} and {len(network)} times"
        )
    times, coef = SOLVERS[solver](nodes[:, None])
    if EVALUATIONS_PER_STEP[solver] == 1:
        times = network[:, None]
    has_history = bool((coef[..., 2] != 0).any())
    times, coef = (torch.from_numpy(np.ascontiguousarray(a)).to(dtype) for a in (times, coef))
    ones = torch.ones(batch, dtype=dtype)
    return SolverTable(
        times=times.expand(-1, batch).contiguous(),
        coef=coef.expand(-1, batch, -1).contiguous(),
        active=(batch,) * len(times),
        order=None,
        span=ones * (schedule.nodes[0] - schedule.nodes[-1]),
        start_weight=ones,
        has_history=has_history,
    )
