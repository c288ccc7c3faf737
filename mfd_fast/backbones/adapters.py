"""AdapterBank: one frozen network, several low-rank adapters, chosen per lane of a batch.

    y = W x + b + sum over the adapters of the lane  (alpha / rank) B A x     (LoRA, Hu et al. 2021)

All factors of an adapter lie in one flat vector: an optimizer step, a gradient norm, an average and
an all-reduce are each one operator on one tensor.  The float32 master is what is trained; calls
without gradient read a copy in the model's dtype, made by :meth:`AdapterBank.refresh`.

Letters in shapes: n samples, L lanes of a sample, P positions of a row, r rank.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from mfd_fast.backbones.lora import Adapter, Given, Target
from mfd_fast.backbones.networks import Patterns, find_modules
from mfd_fast.files.compare import differences, some

PEFT_PREFIX = "base_model.model."

LaneAdapters = tuple[tuple[str, ...], ...]


@dataclass
class _Call:
    """What the targets have to know while the network runs."""

    num_lanes: int
    rows: int | None
    runs: tuple[tuple[str, tuple[int, ...] | None], ...]  # adapter, its lanes (None: all)
    with_grad: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    without_grad: str = ""  # a target that ran without gradient all the same


class _During:
    """Inside the block the bank runs ``call``; reusable, and usable from another thread."""

    def __init__(self, bank: "AdapterBank", call: _Call | None):
        self.bank, self.call = bank, call

    def __enter__(self) -> "_During":
        self.outer, self.bank._call = self.bank._call, self.call
        return self

    def __exit__(self, *exc: Any) -> None:
        self.bank._call = self.outer

    def recompute_behind(self, made: Any) -> None:
        """What a network checkpoints by itself is run again under this call, in a backward from the
        tensors ``made``: a pytree, all that led out of the block.

        ``ValueError`` if the network itself turned gradients off for a target.
        """
        if self.call.without_grad:
            raise ValueError(
                f"{self.call.without_grad} runs without gradient inside a call that needs one: "
                "checkpoint with use_reentrant=False, or leave what runs under torch.no_grad out "
                "of targets"
            )
        call = replace(self.call, with_grad={})  # made again where needed: the graph stays small
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self.bank._recompute, call))


class AdapterBank(nn.Module):
    """Named LoRA adapters over the linear layers of one network, which it freezes.

    Args:
        network: cast and moved already; its targets must share dtype and device.
        rank: r of every trained adapter; a multiple of 8 keeps all factors aligned for the GPU.
        alpha: numerator of the scale alpha / r.
        targets: which ``nn.Linear`` and 1x1 ``nn.Conv2d`` get factors (:func:`find_modules`).
        names: the trained adapters.
        generator: draws A ~ N(0, 1/r^2), PEFT's "gaussian"; B is zero, so an adapter starts as
            nothing.

    Outside :meth:`lanes` the network is its frozen self.  ``ValueError`` says what does not fit and
    what there is.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        rank: int = 64,
        alpha: float = 64.0,
        targets: Patterns = ("to_q", "to_k", "to_v"),
        names: tuple[str, ...] = ("aux", "student"),
        generator: Generator | None = None,
    ):
        super().__init__()
        self.targets = _targets_of(network, targets)
        network.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self._call: _Call | None = None
        self._recomputed: tuple[weakref.ref[_Call], int] | None = None  # and its backward
        self._uncalled = {is_grad: set(range(len(self.targets))) for is_grad in (False, True)}
        self._plans: dict[LaneAdapters, tuple] = {}
        self._merged: tuple[str, list[Tensor]] | None = None
        for name in names:
            adapter = self._add(name, rank, alpha, is_trained=True)
            adapter.initialise(generator)
        self._index_of = {target.module: index for index, target in enumerate(self.targets)}
        # Without names and modules, which would make every layer a graph of its own when compiled.
        self._layouts = [replace(target, name="", module=None) for target in self.targets]
        self._repeats: dict[int, int] = {}  # rows of a target's input in place of one
        hook = self._after_target  # one object for all: compiled blocks are told apart by it
        for target in self.targets:
            target.module.register_forward_hook(hook, with_kwargs=True)
        self.register_load_state_dict_post_hook(_refresh_all)
        if hasattr(network, "use_adapters"):  # a network that adds packed adapters by itself
            network.use_adapters(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter, trained or frozen."""
        return tuple(self.adapters)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The one flat master of an adapter, ``[numel]``: float32, or the model's dtype if frozen.

        Not called ``parameters``: that is ``nn.Module``'s and yields those of all adapters.
        """
        return [self._adapter(name).master]

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A ``[r, in]`` and B ``[out, r]`` of every target in the model's dtype, as views.

        Inside :meth:`lanes` with gradient they lead to the master; else they are the copy.  For a
        network that computes its projections in its own way; scale is :meth:`scale`.
        """
        if self._call is not None:
            self.mark_called(0, len(self.targets))
        names = (target.name for target in self.targets)
        return dict(zip(names, self._factors(name), strict=True))

    def scale(self, name: str) -> float:
        """alpha / r of an adapter."""
        return self._adapter(name).scale

    def lanes(self, per_lane: LaneAdapters, *, rows: int | None = None) -> _During:
        """``with bank.lanes((("aux",), ())):`` the network adds the adapters each lane uses.

        Args:
            per_lane: the adapters of every lane of a sample, added in this order; ``()`` is the
                frozen network.  The batch is sample-major, ``[n * L, ...]``.
            rows: n * L, if a target may see several rows in place of one (windows); otherwise taken
                from the input of each target.

        The choice is static Python: nothing is read back and the block can be captured.  With
        gradients enabled on entry, every trained adapter in use leads to its master.
        """
        if per_lane not in self._plans:
            self._plans[per_lane] = self._plan(per_lane)
        call = _Call(len(per_lane), rows, self._plans[per_lane])
        return _During(self, self._with_grad(call) if torch.is_grad_enabled() else call)

    def _with_grad(self, call: _Call) -> _Call:
        for name, _ in call.runs:
            if self.adapters[name].master.requires_grad:
                call.with_grad[name] = self.adapters[name].factors_with_grad()
        return call

    def resumed(self) -> _During:
        """A context that runs what runs now: recomputation in backward enters it later."""
        return _During(self, self._call)

    def mark_called(self, first: int, count: int = 1) -> None:
        """A network that adds these targets' adapters by itself says so, as their hooks do."""
        if uncalled := self._uncalled[torch.is_grad_enabled()]:
            uncalled.difference_update(range(first, first + count))

    def has_uncalled(self) -> bool:
        """Whether a target was not called yet, with gradient or without, as it is now."""
        return bool(self._uncalled[torch.is_grad_enabled()])

    def check_called(self) -> None:
        """After a forward; ``ValueError`` names targets that it went around, at the first one
        with and the first one without gradient.
        """
        if uncalled := self._uncalled[torch.is_grad_enabled()]:
            names = [self.targets[index].name for index in sorted(uncalled)]
            raise ValueError(
                f"the network did not call {some(names, 8)}, so adapters there would be trained in "
                "vain: leave out of targets what it does not use or uses by its weight alone "
                "(out_proj of nn.MultiheadAttention, F.linear); make the bank of a compiled "
                "network before its first call"
            )

    def refresh(self, name: str) -> None:
        """Bring the model-dtype copy up to date after the master changed.

        In place: addresses stay, so it may be captured.
        """
        self._adapter(name).refresh()

    def adapter_state_dict(self, name: str, *, prefix: str = PEFT_PREFIX) -> dict[str, Tensor]:
        """The factors under PEFT's keys ``{prefix}{module}.lora_A.weight``, copies of the master.

        diffusers' pipelines take ``prefix="transformer."``.
        """
        return {key: view.detach().clone() for key, view in self._peft_views(name, prefix).items()}

    def load_adapter_state_dict(
        self, name: str, state: Mapping[str, Tensor], *, prefix: str = PEFT_PREFIX
    ) -> None:
        """Take the factors from PEFT's keys; ``ValueError`` names every key that does not fit."""
        views = self._peft_views(name, prefix)
        if listed := differences(state, views, limit=8):
            raise ValueError(
                f"the state does not fit adapter {name!r} of rank {self._adapter(name).rank}: "
                f"{listed}. Check rank, targets and prefix (here {prefix!r})"
            )
        with torch.no_grad():
            for key, view in views.items():
                view.copy_(state[key])
        self.refresh(name)

    def add_frozen(
        self,
        name: str,
        state: Mapping[str, Tensor],
        *,
        alpha: float,
        rank: int,
        prefix: str = PEFT_PREFIX,
    ) -> None:
        """One more adapter that is never trained, for a teacher that is network + LoRA."""
        self._add(name, rank, alpha, is_trained=False)
        try:
            self.load_adapter_state_dict(name, state, prefix=prefix)
        except ValueError:
            del self.adapters[name]
            raise

    @torch.no_grad()
    def merge(self, name: str, *, for_good: bool = False) -> None:
        """Add an adapter to the network's own weights; unless ``for_good``, keeps a copy of them
        for unmerge.
        """
        adapter = self._adapter(name)
        if self._merged is not None:
            raise ValueError(f"{self._merged[0]!r} is merged already; unmerge it first")
        weights = [target.own_weight() for target in self.targets]
        names = {id(w): target.name for w, target in zip(weights, self.targets, strict=True)}
        if len(names) < len(weights):
            tied = [target.name for target in self.targets if target.name not in names.values()]
            raise ValueError(
                f"{tied} share their weight with other targets, and {name!r} has an adapter for "
                "each, so they cannot be merged: leave all but one out of targets"
            )
        self._merged = (name, [weight.detach().clone() for weight in weights])
        self._plans.clear()
        for weight, (a, b) in zip(weights, adapter.split(adapter.master), strict=True):
            wide = torch.promote_types(weight.dtype, torch.float32)
            delta = adapter.scale * (b.to(wide) @ a.to(wide))
            weight.copy_(weight.to(wide) + delta.view_as(weight))
        if for_good:
            self._merged = None

    @torch.no_grad()
    def unmerge(self, name: str) -> None:
        """Restore the network's own weights bit for bit."""
        if self._merged is None or self._merged[0] != name:
            merged = "nothing" if self._merged is None else repr(self._merged[0])
            raise ValueError(f"cannot unmerge {name!r}: {merged} is merged")
        for target, weight in zip(self.targets, self._merged[1], strict=True):
            target.module.weight.copy_(weight)
        self._merged = None
        self._plans.clear()

    def _add(self, name: str, rank: int, alpha: float, *, is_trained: bool) -> Adapter:
        if name in self.adapters or not name.isidentifier():
            raise ValueError(
                f"an adapter's name must be a new identifier; got {name!r}, and there is "
                f"{list(self.names)}"
            )
        if rank < 1:
            raise ValueError(f"the rank of adapter {name!r} must be >= 1, got {rank}")
        adapter = Adapter(self.targets, rank=rank, alpha=alpha, is_trained=is_trained)
        self.adapters[name] = adapter
        return adapter

    def _adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise ValueError(f"there is no adapter {name!r}; there is {list(self.names)}")
        return self.adapters[name]

    def _factors(self, name: str) -> list[tuple[Tensor, Tensor]]:
        call = self.call_in_force()
        with_grad = {} if call is None else call.with_grad
        return with_grad.get(name, self._adapter(name).factors)

    def _plan(self, per_lane: LaneAdapters) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
        """Every adapter in use, in order of appearance, with its lanes; None for all lanes."""
        used: dict[str, list[int]] = {}
        for lane, names in enumerate(per_lane):
            if isinstance(names, str) or len(set(names)) != len(names):
                raise ValueError(
                    f"each lane must be a tuple of different adapters; lane {lane} is {names!r}"
                )
            for name in names:
                self._adapter(name)
                used.setdefault(name, []).append(lane)
        if self._merged is not None and self._merged[0] in used:
            raise ValueError(
                f"adapter {self._merged[0]!r} is merged into the network: leave it out of the "
                "lanes or unmerge it"
            )
        everywhere = list(range(len(per_lane)))
        return tuple((k, None if v == everywhere else tuple(v)) for k, v in used.items())

    def _recompute(self, call: _Call, _: Tensor) -> None:
        """Hook of a gradient: from here on this backward computes parts of ``call`` again."""
        self._recomputed = weakref.ref(call), torch._C._current_graph_task_id()

    def call_in_force(self) -> _Call | None:
        """What the targets see now: the block's call, or the one a backward computes again."""
        if self._call is not None or self._recomputed is None:
            return self._call
        call, backward = self._recomputed[0](), self._recomputed[1]
        if call is None or backward != torch._C._current_graph_task_id():
            return None
        return call if call.with_grad else self._with_grad(call)

    def given(self, index: int) -> Given | None:
        """What target ``index`` adds in the call in force; None outside :meth:`lanes`."""
        call = self.call_in_force()
        if call is None:
            return None
        runs = tuple(
            (*self._factors(name)[index], self.adapters[name].scale, lanes)
            for name, lanes in call.runs
        )
        return Given(self._layouts[index], runs, call.num_lanes, self._repeats.get(index, 1))

    def _after_target(self, module: nn.Module, args: tuple, kwargs: dict, y: Tensor):
        """Forward hook of a target: y plus the adapters of every lane."""
        x = args[0] if args else kwargs["input"]
        given = getattr(module, "given_adapters", None)
        if given is None:  # else its block was told before, and runs compiled (compiled.py)
            given = self._seen(self._index_of[module], len(x))
        return y if given is None else given.add(x, y)

    def _seen(self, index: int, length: int) -> Given | None:
        """The same of a target that is called with ``length`` rows."""
        call = self.call_in_force()
        if call is not None:
            self.mark_called(index)
            target = self.targets[index]
            if call.with_grad and not torch.is_grad_enabled():
                call.without_grad = call.without_grad or target.name
            self._repeats[index] = target.repeat(length, call.rows, call.num_lanes)
        return self.given(index)

    def _peft_views(self, name: str, prefix: str) -> dict[str, Tensor]:
        adapter = self._adapter(name)
        views = {}
        for target, pair in zip(self.targets, adapter.split(adapter.master.detach()), strict=True):
            for factor, matrix in zip(("lora_A", "lora_B"), pair, strict=True):
                view = matrix[:, :, None, None] if target.is_conv else matrix
                views[f"{prefix}{target.name}.{factor}.weight"] = view
        return views


def _targets_of(network: nn.Module, patterns: Patterns) -> list[Target]:
    found, unmatched = find_modules(network, patterns)
    if unmatched or not found:
        there = find_modules(network, ".*")[0].items()
        layers = [name for name, module in there if isinstance(module, nn.Linear | nn.Conv2d)]
        raise ValueError(f"targets {unmatched} match nothing; the network has {some(layers, 8)}")
    targets = [Target.of(name, module) for name, module in found.items()]
    kinds = {(target.dtype, target.device) for target in targets}
    if len(kinds) != 1 or not next(iter(kinds))[0].is_floating_point:
        raise ValueError(
            "all targets must share one floating dtype and one device; got "
            f"{sorted(f'{dtype} on {device}' for dtype, device in kinds)}"
        )
    return targets


def _refresh_all(bank: AdapterBank, _: Any) -> None:
    for adapter in bank.adapters.values():
        adapter.refresh()
