"""Regional compile: each kind of repeated block is compiled once, for all blocks of its kind.

torch.compile keeps a graph for every set of guards.  What differs between two blocks of a kind are
tensors alone: parameters, which are inputs of the graph, and the factors of their adapters, which
:class:`CompiledBlock` hands to the targets before it calls the graph (``AdapterBank.given``).  So
there is a graph for each kind of block and set of lanes, with gradient and without, and the number
of samples is left open where a batch shrinks.  The graphs hold no state and read nothing back, so
an update can still be captured as CUDA graphs (mode "reduce-overhead", which makes its own, is not
used).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.files.whole import first_line

BACKEND = "inductor"
MAX_GRAPHS = 64  # of one class of blocks; torch's own limit is 8


class Inputs:
    """What the arguments of a class of blocks are like, learned in its first calls: a block whose
    arguments are otherwise would be another graph.

    led: the arguments, by place or name, that had a gradient in a block.
    strides: (argument, its shape without rows) -> strides, of those with gaps (slices).
    """

    def __init__(self):
        self.led: set[int | str] = set()
        self.strides: dict[tuple, tuple[int, ...]] = {}

    def learn(self, key: int | str, x: Any) -> None:
        """See one argument of one block."""
        if not isinstance(x, Tensor):
            return
        if x.requires_grad:
            self.led.add(key)
        if (
            x.ndim
            and 0 not in x.stride()
            and x.stride() != torch.empty(x.shape, device="meta").stride()
        ):
            self.strides[key, x.shape[1:]] = x.stride()

    def alike(self, key: int | str, x: Any) -> Any:
        """The argument as it is in other blocks: the first block's inputs are whole tensors and
        have no gradient.
        """
        if not isinstance(x, Tensor):
            return x
        strides = self.strides.get((key, x.shape[1:]), x.stride()) if x.ndim else ()
        if strides != x.stride():
            x = x.new_empty_strided(x.shape, strides).copy_(x)
        has_none = key in self.led and torch.is_grad_enabled() and not x.requires_grad
        return x.detach().requires_grad_() if has_none else x


class CompiledBlock:
    """A block's forward: the graph of its kind, with the adapters of its targets.

    Args:
        name: of the block, for errors.
        block: whose class has the forward that is compiled.
        bank: its adapters; a bank tests at its first calls, with gradient and without, that every
            target is called, so these run uncompiled; and so do calls whose operators are watched
            (``graphs.Watch``), which a graph would hide.
        compiled: the compiled forward of the class.
        inputs: what the arguments of the class are like.
    """

    def __init__(
        self, name: str, block: nn.Module, bank: AdapterBank, compiled: Callable, inputs: Inputs
    ):
        self.name, self.block, self.bank, self.compiled = name, block, bank, compiled
        self.inputs = inputs
        self.is_plain = True  # the last call with gradient, which is computed again as it was
        self.stand_ins: list[nn.Module] | None = None  # whose results were computed before
        inside = set(block.modules())
        self.targets = [
            (index, target.module)
            for index, target in enumerate(bank.targets)
            if target.module in inside
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.bank.call_in_force()
        if call is None or self._runs_plain():
            for key, x in (*enumerate(args), *kwargs.items()):
                self.inputs.learn(key, x)
            return type(self.block).forward(self.block, *args, **kwargs)
        args = tuple(self.inputs.alike(key, x) for key, x in enumerate(args))
        kwargs = {key: self.inputs.alike(key, x) for key, x in kwargs.items()}
        if call.rows is not None and call.rows > call.num_lanes > 1:
            if self.stand_ins is None:
                self.stand_ins = [x for x in self.block.modules() if "given_result" in vars(x)]
            results = (x.given_result for x in self.stand_ins)
            for x in (*args, *kwargs.values(), *results):
                if isinstance(x, Tensor) and x.ndim and len(x) == call.rows:
                    torch._dynamo.maybe_mark_dynamic(x, 0)
        for index, module in self.targets:
            vars(module)["given_adapters"] = self.bank.given(index)
        try:
            return self.compiled(self.block, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(
                f"{self.name} ({type(self.block).__name__}) cannot be compiled: "
                f"{first_line(error)}. Leave compile off"
            ) from error
        finally:
            for _, module in self.targets:
                del vars(module)["given_adapters"]

    def _runs_plain(self) -> bool:
        """Uncompiled, as said above; a block that is computed again runs as it did."""
        if torch._C._current_graph_task_id() != -1:
            return self.is_plain
        is_plain = self.bank.has_uncalled() or is_in_torch_dispatch_mode()
        if torch.is_grad_enabled():
            self.is_plain = is_plain
        return is_plain


def compile_blocks(
    bank: AdapterBank, backend: str | Callable, blocks: dict[str, nn.Module]
) -> dict[str, Callable]:
    """The compiled forwards of blocks, by name; none of them may lie inside another."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
    compiled = {
        cls: torch.compile(cls.forward, backend=backend, fullgraph=True)
        for cls in {type(block) for block in blocks.values()}
    }
    inputs = {cls: Inputs() for cls in compiled}
    return {
        name: CompiledBlock(name, block, bank, compiled[type(block)], inputs[type(block)])
        for name, block in blocks.items()
    }


def check_compiler(device: torch.device) -> None:
    """``ValueError`` if nothing can be compiled for the device: on a CPU without a C++ compiler."""
    try:
        torch.compile(_any_work, backend=BACKEND)(torch.ones(2, device=device))
    except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
        raise ValueError(
            f"nothing can be compiled for {device.type} here: {first_line(error)}. Install a C++ "
            "compiler (g++), or leave compile off"
        ) from error


def _any_work(x: Tensor) -> Tensor:
    return x.sin() + 1
