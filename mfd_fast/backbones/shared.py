"""SharedBackbone: teacher, auxiliary and student as adapters of one frozen network.

All lanes of all samples go through the network in one call; the adapters are added to the rows of
the lanes that use them.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.backbones.activation import Together, apply_activation_policy
from mfd_fast.backbones.adapters import AdapterBank, LaneAdapters
from mfd_fast.backbones.compiled import compile_blocks
from mfd_fast.backbones.lanes import ROLES, Lane, NetworkPrepared, Prepared, batch_size, check_lanes
from mfd_fast.backbones.networks import Patterns, first_floating, plain_name, velocity_of


class SharedBackbone(nn.Module):
    """One frozen ``network(x, t, cond) -> v`` for all three roles.

    Args:
        network: the pretrained network; frozen and put in eval mode.  If it has a method
            ``prepare(cond rows) -> prepared rows``, a pytree with leading dimension rows (keys and
            values of the cross-attentions, say), that is called once per trajectory under the same
            adapters, and the network gets its result in place of cond.  A method ``resumed()``
            gives a context that brings back what its blocks read besides their arguments, for
            recomputation.  A method ``combine(v_cond, v_uncond, w)`` replaces linear guidance
            (``lanes.guided_lanes``).
        adapters: the bank of this network, with adapters ``"aux"`` and ``"student"``; one of rank
            64 on to_q, to_k, to_v if None.
        sample_shape: shape of one sample, without the batch dimension.
        null_cond: cond -> the null condition of the same shapes; needed for guidance other than 1.
        dtype: what x is cast to before it enters the network; that of its parameters if None.
        teacher_adapter: a frozen adapter of the bank (``AdapterBank.add_frozen``) that belongs to
            every role: the teacher is network + adapter.
        activation: what the forward with gradient keeps (``activation.apply_activation_policy``);
            all but ``"none"`` need ``blocks``.
        blocks: the repeated blocks of the network, by name.
        compiler: a backend of torch.compile, ``"inductor"``: each kind of ``blocks`` is compiled
            once for all of its kind (``compiled.compile_blocks``).

    ``ValueError`` if the bank belongs to another network or lacks an adapter.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        adapters: AdapterBank | None = None,
        sample_shape: tuple[int, ...],
        null_cond: Callable[[Any], Any] | None = None,
        dtype: torch.dtype | None = None,
        teacher_adapter: str | None = None,
        activation: str = "none",
        blocks: Patterns = (),
        compiler: str | Callable | None = None,
    ):
        super().__init__()
        adapters = AdapterBank(network) if adapters is None else adapters
        base = () if teacher_adapter is None else (teacher_adapter,)
        _check_bank(network, adapters, base)
        self.network = network.eval().requires_grad_(False)
        self.combine = getattr(network, "combine", None)
        self.adapters = adapters
        self.adapters_of = {"teacher": base, "aux": (*base, "aux"), "student": (*base, "student")}
        self.sample_shape = tuple(sample_shape)
        self.null_cond = null_cond
        first = first_floating(network)
        self.dtype = first.dtype if dtype is None else dtype
        self.float8: AbstractContextManager | None = None  # float8.use_float8
        self.compiler = compiler
        self.activation = apply_activation_policy(
            network,
            activation,
            blocks,
            recompute_context=self._resumed,
            compiled=None if compiler is None else partial(compile_blocks, adapters, compiler),
        )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def prepare(self, cond: Any) -> Prepared:
        """Compute once what is constant along a trajectory; leaves of cond are ``[B, ...]``."""
        batch = batch_size(cond)
        null = None if self.null_cond is None else self.null_cond(cond)
        if getattr(self.network, "prepare", None) is None:
            return Prepared(cond, null, batch)
        return NetworkPrepared(cond, null, batch, make_rows=self._prepare_rows)

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared, lanes: tuple[Lane, ...]) -> Tensor:
        """Velocities ``[n, L, *S]`` of x ``[n, L, *S]`` at t ``[n]`` or ``[n, L]``, in one call.

        ``ValueError`` if x does not have L lanes, the network changes the shape of its input, or it
        does not call one of the adapters' targets.
        """
        n, width = check_lanes(x, prepared, lanes), len(lanes)
        rows = x.flatten(0, 1).to(self.dtype)
        times = (t if t.ndim == 2 else t[:, None].expand(n, width)).flatten()
        conditions = prepared.rows(lanes, n)
        with self.adapters.lanes(self._per_lane(lanes), rows=n * width) as call, self._products():
            v = velocity_of(self.network, rows, times, conditions, name="network")
        call.recompute_behind(v)
        self.adapters.check_called()
        return v.unflatten(0, (n, width))

    def lane_groups(self, lanes: tuple[Lane, ...]) -> tuple[tuple[Lane, ...], ...]:
        """All lanes share one call."""
        return (lanes,)

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The flat master of the role's adapter; empty for the teacher."""
        if role not in ROLES:
            raise ValueError(f"role must be one of {list(ROLES)}, got {role!r}")
        return [] if role == "teacher" else self.adapters.parameters_of(role)

    def refresh(self, role: str) -> None:
        """To be called when the parameters of a role have changed; in place, capturable."""
        if self.parameters_of(role):
            self.adapters.refresh(role)

    def student_network(self) -> nn.Module:
        """A copy of the network, in eval mode, with the student's adapters merged into its weights
        and no trace of the bank.
        """
        network, bank, activation = copy.deepcopy((self.network, self.adapters, self.activation))
        activation.remove()
        for name in self.adapters_of["student"]:
            bank.merge(name, for_good=True)
        _remove_hooks(bank)
        return network.eval()

    def _resumed(self) -> AbstractContextManager:
        """A context that runs what runs now: recomputation in backward enters it later."""
        own = getattr(self.network, "resumed", None)
        adapters = self.adapters.resumed()
        return adapters if own is None else Together(adapters, own())

    def _products(self) -> AbstractContextManager:
        """Entered around the network: its matmuls in e4m3 where no gradient is wanted."""
        is_off = self.float8 is None or torch.is_grad_enabled()
        return nullcontext() if is_off else self.float8

    def _per_lane(self, lanes: tuple[Lane, ...]) -> LaneAdapters:
        return tuple(self.adapters_of[lane.role] for lane in lanes)

    def _prepare_rows(self, cond: Any, lanes: tuple[Lane, ...]) -> Any:
        count = batch_size(cond)
        with self.adapters.lanes(self._per_lane(lanes), rows=count) as call:
            made = self.network.prepare(cond)
        call.recompute_behind(made)
        return made


def _remove_hooks(bank: AdapterBank) -> None:
    """Let the bank's network forget it."""
    for module in (target.module for target in bank.targets):
        hooks = module._forward_hooks
        for key in [k for k, hook in hooks.items() if hook == bank._after_target]:
            del hooks[key], module._forward_hooks_with_kwargs[key]


def _check_bank(network: nn.Module, bank: AdapterBank, base: tuple[str, ...]) -> None:
    missing = [name for name in (*base, "aux", "student") if name not in bank.names]
    if missing:
        raise ValueError(f"the adapters lack {missing}; there is {list(bank.names)}")
    if base and bank.parameters_of(base[0])[0].requires_grad:
        raise ValueError(
            f"teacher_adapter must be frozen, made by add_frozen; {base[0]!r} is trained"
        )
    modules = {plain_name(name): module for name, module in network.named_modules()}
    for target in bank.targets:
        if modules.get(target.name) is not target.module:
            raise ValueError(
                f"the adapters belong to another network: their {target.name} is not this "
                "network's. Make the bank with the network you pass here"
            )
