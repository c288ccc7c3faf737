"""The Backbone protocol: three roles behind one batched evaluation; and full copies of a network.

A *lane* is one role seen by one sample: teacher with its condition, teacher without, auxiliary or
student.  ``forward`` evaluates a batch of lanes ``[n, L, *S]``, sample-major, so that the samples
still moving along their trajectories are a prefix.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from mfd_fast.backbones.networks import (
    Masters,
    check_apart,
    copy_of,
    first_floating,
    kept_buffers,
    train_floating,
    velocity_of,
)
from mfd_fast.ops.checks import KERNEL_DTYPES
from mfd_fast.ops.reference import renormalised, wide
from mfd_fast.ops.renormalised_guidance import renormalised_guidance

ROLES = ("teacher", "aux", "student")


class Lane(NamedTuple):
    """One role; the teacher with or without its condition."""

    role: str
    is_conditional: bool = True


TEACHER = Lane("teacher")
TEACHER_UNCOND = Lane("teacher", is_conditional=False)
AUX = Lane("aux")
STUDENT = Lane("student")


def trajectory_lanes(guidance: float) -> tuple[Lane, ...]:
    """The lanes that integrate teacher and auxiliary together; w = 1 needs no unconditional one."""
    return (TEACHER, AUX) if guidance == 1.0 else (TEACHER, TEACHER_UNCOND, AUX)


def batch_size(cond: Any) -> int:
    """The leading dimension that every leaf of ``cond`` shares; ``ValueError`` if they disagree."""
    leaves = tree_leaves(cond)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim >= 1 for leaf in leaves):
        raise ValueError(
            "cond must be a pytree of tensors with a leading batch dimension; got "
            f"{type(cond).__name__} with leaves {[type(leaf).__name__ for leaf in leaves]}. "
            "Put what is no tensor (None, numbers) into a function around the network; for an "
            "unconditional network pass torch.empty(batch, 0)."
        )
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) != 1:
        raise ValueError(
            f"the leaves of cond must share their batch size; got shapes "
            f"{[list(leaf.shape) for leaf in leaves]}"
        )
    return sizes.pop()


def in_parts(cond: Any, parts: int) -> list[Any]:
    """``cond`` in equal parts, the micro-batches; ``ValueError`` if its batch does not divide."""
    batch = batch_size(cond)
    if batch % parts:
        raise ValueError(
            f"the batch must divide into distill.micro_batches={parts} equal parts; got {batch}"
        )
    rows = batch // parts
    return [tree_map(lambda leaf, i=i: leaf[i * rows : (i + 1) * rows], cond) for i in range(parts)]


@dataclass
class Prepared:
    """What is constant along a trajectory: the condition of every lane, made once.

    ``cond`` and ``null`` are pytrees with B rows; ``null`` is None without a null condition.
    """

    cond: Any
    null: Any
    batch: int
    _rows: dict[tuple[Lane, ...], Any] = field(default_factory=dict)

    def rows(self, lanes: tuple[Lane, ...], n: int) -> Any:
        """Conditions of the first n samples, a row per lane, sample-major: ``[n * L, ...]``."""
        if lanes not in self._rows:
            per_lane = [self.cond if lane.is_conditional else self._null() for lane in lanes]
            flat, spec = zip(*(tree_flatten(tree) for tree in per_lane), strict=True)
            leaves = [torch.stack(group, dim=1).flatten(0, 1) for group in zip(*flat, strict=True)]
            self._rows[lanes] = spec[0].unflatten(leaves)
        return tree_map(lambda leaf: leaf[: n * len(lanes)], self._rows[lanes])

    def _null(self) -> Any:
        if self.null is None:
            raise ValueError(
                "guidance other than 1 needs the teacher without its condition: give the backbone "
                "null_cond, a function from cond to the null condition of the same shape"
            )
        return self.null


@dataclass(kw_only=True)
class NetworkPrepared(Prepared):
    """Rows that a network's own ``prepare`` made from the conditions of each set of lanes.

    ``make_rows(cond rows [B * L, ...], lanes)`` runs once per set of lanes and grad mode.  The rows
    belong to the weights and adapters as they are then: prepare again after an update.  Rows made
    with gradient stay in the autograd graph and serve all evaluations of one backward.
    """

    make_rows: Callable[[Any, tuple[Lane, ...]], Any]
    _made: dict[tuple, Any] = field(default_factory=dict)

    def rows(self, lanes: tuple[Lane, ...], n: int) -> Any:
        """What the network gets in place of cond, for the first n samples: ``[n * L, ...]``."""
        key = (lanes, torch.is_grad_enabled())
        if key not in self._made:
            made = self.make_rows(super().rows(lanes, self.batch), lanes)
            count = self.batch * len(lanes)
            shapes = [list(getattr(leaf, "shape", ())) for leaf in tree_leaves(made)]
            if any(shape[:1] != [count] for shape in shapes):
                raise ValueError(
                    f"the network's prepare must return tensors of {count} rows, as many as it "
                    f"got; got shapes {shapes}"
                )
            self._made[key] = made
        made = self._made[key]
        return made if n == self.batch else tree_map(lambda leaf: leaf[: n * len(lanes)], made)


class FixedRows:
    """The rows of some groups of lanes, made now and never again: CUDA graphs read them."""

    def __init__(self, prepared: Prepared, groups: tuple[tuple[Lane, ...], ...]):
        self.batch = prepared.batch
        self._rows = {lanes: prepared.rows(lanes, prepared.batch) for lanes in groups}

    def rows(self, lanes: tuple[Lane, ...], n: int) -> Any:
        """As ``Prepared.rows``; a ``KeyError`` for lanes that were not fixed."""
        return tree_map(lambda leaf: leaf[: n * len(lanes)], self._rows[lanes])


class Backbone(Protocol):
    """Teacher, auxiliary and student behind one batched evaluation."""

    sample_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def prepare(self, cond: Any) -> Prepared:
        """Compute once what is constant along a trajectory; leaves of cond are ``[B, ...]``."""
        ...

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared, lanes: tuple[Lane, ...]) -> Tensor:
        """Velocities ``[n, L, *S]`` of x ``[n, L, *S]`` at t ``[n]`` or ``[n, L]``.

        n <= B: the lanes of the first n prepared samples.
        """
        ...

    def lane_groups(self, lanes: tuple[Lane, ...]) -> tuple[tuple[Lane, ...], ...]:
        """The sets of lanes that ``forward`` evaluates together, in one call of a network each."""
        ...

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The parameters that training this role changes; empty for the teacher."""
        ...

    def refresh(self, role: str) -> None:
        """Called after the role's parameters changed: update what is derived from them in place."""
        ...

    def student_network(self) -> nn.Module:
        """A copy of the student as a network of its own, ``network(x, t, cond)``, in eval mode."""
        ...


class CopiedBackbone(nn.Module):
    """Three full copies of a network ``network(x, t, cond) -> v``.

    Args:
        teacher: the pretrained network; frozen and put in eval mode.  If the networks have a
            method ``prepare(cond rows) -> prepared rows``, a pytree with leading dimension rows,
            each calls its own once per trajectory and gets the result in place of cond.  A method
            ``combine(v_cond, v_uncond, w)`` of the teacher replaces linear guidance.
        auxiliary, student: networks that start as the teacher; deep copies of it if None.  They
            train in the mode they come in (eval mode where the auxiliary is integrated), and only
            what requires a gradient, or everything if nothing does.  Of parameters in 16 bits
            float32 masters are trained.
        sample_shape: shape of one sample, without the batch dimension.
        null_cond: cond -> the null condition of the same shapes; needed for guidance other than 1.
        dtype: what x is cast to before it enters a network; that of the teacher's parameters if
            None.

    ``ValueError`` if the network cannot be copied, has no floating-point parameters, or a trained
    parameter belongs to two of the three.
    """

    def __init__(
        self,
        teacher: nn.Module,
        auxiliary: nn.Module | None = None,
        student: nn.Module | None = None,
        *,
        sample_shape: tuple[int, ...],
        null_cond: Callable[[Any], Any] | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        first = first_floating(teacher)
        self.aux = copy_of(teacher) if auxiliary is None else auxiliary
        self.student = copy_of(teacher) if student is None else student
        for network in (self.aux, self.student):
            train_floating(network)
        check_apart({"aux": self.aux, "student": self.student}, {"teacher": teacher})
        self.teacher = teacher.eval().requires_grad_(False)
        self.combine = getattr(teacher, "combine", None)
        self._masters: dict[str, Masters] = {}
        self.sample_shape = tuple(sample_shape)
        self.null_cond = null_cond
        self._side_stream: torch.cuda.Stream | None = None
        self.dtype = first.dtype if dtype is None else dtype

    @property
    def device(self) -> torch.device:
        """Where the networks are: trainers move them after the backbone was made."""
        return next(self.teacher.parameters()).device

    def prepare(self, cond: Any) -> Prepared:
        batch = batch_size(cond)
        null = None if self.null_cond is None else self.null_cond(cond)
        if getattr(self.teacher, "prepare", None) is None:
            return Prepared(cond, null, batch)
        return NetworkPrepared(cond, null, batch, make_rows=self._prepare_rows)

    def _prepare_rows(self, cond: Any, lanes: tuple[Lane, ...]) -> Any:
        return getattr(self, lanes[0].role).prepare(cond)

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared, lanes: tuple[Lane, ...]) -> Tensor:
        """One call per role: neighbouring lanes of a role are one batch, two roles two streams."""
        n = check_lanes(x, prepared, lanes)
        times = t if t.ndim == 2 else t[:, None].expand(n, len(lanes))
        jobs, start = [], 0
        for members in self.lane_groups(lanes):
            width = len(members)
            rows = x[:, start : start + width].flatten(0, 1).to(self.dtype)
            time = times[:, start : start + width].flatten()
            jobs.append(partial(self._velocity, members, rows, time, prepared.rows(members, n)))
            start += width
        parts = self._in_parallel(jobs) if x.is_cuda and len(jobs) == 2 else [job() for job in jobs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _velocity(self, lanes: tuple[Lane, ...], rows: Tensor, t: Tensor, cond: Any) -> Tensor:
        """One network on the rows ``[n * L, *S]`` of its lanes; ``[n, L, *S]``."""
        v = self.velocity(lanes[0].role, rows, t, cond)
        return v.unflatten(0, (-1, len(lanes)))

    def velocity(self, role: str, x: Tensor, t: Tensor, cond: Any, *end: Tensor) -> Tensor:
        """One network at x ``[R, *S]``, t ``[R]`` (and at a second time, if it takes one)."""
        return velocity_of(getattr(self, role), x, t, cond, *end, name=f"{role} network")

    def _in_parallel(self, jobs: list[Callable[[], Tensor]]) -> list[Tensor]:
        """Two networks as two branches that join: neither reads what the other writes."""
        here = torch.cuda.current_stream()
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream()
        self._side_stream.wait_stream(here)
        with torch.cuda.stream(self._side_stream):
            second = jobs[1]()
        first = jobs[0]()
        here.wait_stream(self._side_stream)
        second.record_stream(here)
        return [first, second]

    def lane_groups(self, lanes: tuple[Lane, ...]) -> tuple[tuple[Lane, ...], ...]:
        """Neighbouring lanes of one role."""
        return tuple(tuple(group) for _, group in groupby(lanes, key=lambda lane: lane.role))

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        if role not in ROLES:
            raise ValueError(f"role must be one of {list(ROLES)}, got {role!r}")
        if role == "teacher":
            return []
        network = getattr(self, role)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if all(parameter.element_size() >= 4 for parameter in trained):
            return trained
        if role not in self._masters:  # made as late as that: until now the network may be moved
            self._masters[role] = Masters(network, trained)
        return self._masters[role].parameters

    def buffers_of(self, role: str) -> list[Tensor]:
        """What besides parameters belongs to the state of a network that is trained."""
        return kept_buffers(getattr(self, role))

    def student_network(self) -> nn.Module:
        """A copy of the student, in eval mode; ``ValueError`` if it is spread over ranks."""
        if any(hasattr(parameter, "to_local") for parameter in self.student.parameters()):
            raise ValueError(
                "the student's weights are spread over ranks: inside averaged_student(), gather "
                "them with torch.distributed.checkpoint.state_dict.get_model_state_dict"
            )
        masters = self._masters.get("student")
        student = copy.deepcopy(self.student, {id(masters): masters}).eval()
        if masters is not None:
            masters.let_go(student)
        return student

    def refresh(self, role: str) -> None:
        """Round the float32 masters of a network in 16 bits into it, in place."""
        if role in self._masters:
            self._masters[role].write()


def guided_lanes(
    backbone: Backbone, x: Tensor, t: Tensor, prepared: Prepared, lanes: tuple[Lane, ...], w: float
) -> Tensor:
    """Velocities ``[n, L, *S]`` of one evaluation, for a solver step that guides lanes 0 and 1.

    If the backbone has ``combine(v_cond, v_uncond, w)``, guidance that is not linear, both lanes of
    the teacher hold what it makes of them: linear guidance leaves equal velocities as they are.
    """
    v = backbone.forward(x, t, prepared, lanes)
    combine = getattr(backbone, "combine", None)
    if combine is None or TEACHER_UNCOND not in lanes:
        return v
    if combine is renormalised and v.dtype in KERNEL_DTYPES:
        return renormalised_guidance(v, w)
    both = combine(*(wide(v[:, lane]) for lane in (0, 1)), w).to(v.dtype)[:, None]
    return torch.cat([both, both, v[:, 2:]], dim=1)


def check_lanes(x: Tensor, prepared: Prepared, lanes: tuple[Lane, ...]) -> int:
    """n of x ``[n, L, *S]``; ``ValueError`` if it has other lanes, or more samples than cond."""
    n, width = x.shape[:2]
    if width != len(lanes) or n > prepared.batch:
        raise ValueError(
            f"x must be [n, {len(lanes)}, ...] with n <= {prepared.batch} for these lanes and "
            f"this prepared condition; got {list(x.shape)}"
        )
    return n


def check_noise(noise: Tensor, prepared: Prepared, backbone: Backbone) -> None:
    """``ValueError`` unless there is one sample of noise for each row of cond."""
    shape = [prepared.batch, *backbone.sample_shape]
    if list(noise.shape) != shape:
        raise ValueError(
            f"noise must be {shape}, a sample for each row of cond; got {list(noise.shape)}"
        )


def buffers_of(backbone: Backbone, roles: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """``"{role}_buffers"``: what besides parameters is the state of networks that are trained."""
    of = getattr(backbone, "buffers_of", lambda role: [])  # adapters have none
    return {f"{role}_buffers": of(role) for role in roles}


@contextmanager
def swapped(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Inside the block ``parameters`` hold ``values`` (the EMA weights); restored after it."""
    saved = [parameter.detach().clone() for parameter in parameters]
    targets = [parameter.data for parameter in parameters]
    torch._foreach_copy_(targets, values)
    try:
        yield
    finally:
        torch._foreach_copy_(targets, saved)
