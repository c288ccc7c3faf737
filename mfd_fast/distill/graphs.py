"""Running a phase of the step as a graph: captured once, replayed without Python.

    CapturedStep    static inputs, warm-up on a side stream, capture, replay
    CudaGraph       torch.cuda.CUDAGraph behind the few calls that CapturedStep needs
    check_capture_safe    fails on operators that cannot be captured and on steps that differ

What may be captured: no host reads, no data-dependent Python, times and learning rates in device
tensors, random numbers from a registered generator, non-finite steps skipped by ``found_inf``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only, tree_unflatten

WARMUP_CALLS = 3  # lazily made state (optimizer moments, library workspaces) exists after these

# Operators that read a device value on the host or whose result has a data-dependent shape.
FORBIDDEN = {
    "_local_scalar_dense": "a host read (item, tolist, float(tensor), if tensor)",
    "nonzero": "nonzero or boolean-mask indexing",
    "masked_select": "masked_select",
    "unique_dim": "unique",
    "_unique2": "unique",
    "equal": "torch.equal",
    "lift_fresh": "torch.tensor(python value)",
    "repeat_interleave": "repeat_interleave with a tensor of repeats",
}


class CudaGraph:
    """A sequence of device work that can run again on the same memory: ``torch.cuda.CUDAGraph``.

    Args:
        generators: CUDA generators used inside, whose state advances on every replay.
        pool: of :meth:`new_pool`; a private one if None.  Graphs of one pool share memory: what one
            allocates and nobody holds any more, those captured later may use.
    """

    runs_while_capturing = False

    def __init__(self, generators: Sequence[Generator] = (), pool: Any = None):
        if not torch.cuda.is_available():
            raise ValueError("capturing a step needs an NVIDIA GPU; on the CPU use Distiller")
        self.graph = torch.cuda.CUDAGraph()
        self.pool = pool
        for generator in generators:
            self.graph.register_generator_state(generator)

    @staticmethod
    def new_pool() -> Any:
        """Memory for graphs that never run at the same time."""
        return torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record what ``function`` does and return what it returned."""
        # Only this thread's calls can spoil the capture: another one may be writing a checkpoint.
        with torch.cuda.graph(
            self.graph,
            pool=self.pool,
            stream=side_stream(torch.cuda.current_device()),
            capture_error_mode="thread_local",
        ):
            return function()

    def replay(self) -> None:
        """Do it again; results appear in the tensors that ``capture`` returned."""
        self.graph.replay()


class CapturedStep:
    """A function of tensors that runs as a graph after a few warm-up calls.

    Args:
        function: takes and returns pytrees of tensors; everything it does must be capturable.
        graph: makes the graph, a ``CudaGraph``.
        after: the step whose tensors this one reads; its graph must exist first, because before
            that its tensors are new ones on every call.

    Inputs are copied into static buffers; the returned tensors are static too: the next call
    overwrites them.  The warm-up calls run ``function`` itself (on a side stream on a GPU): they
    are ordinary steps, not thrown away.  The last of them is watched: ``refusal`` names an operator
    that cannot be captured, and then every call stays an ordinary one.  ``ValueError`` if an
    input's shape, dtype or device changes.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        graph: Callable[[], CudaGraph],
        after: "CapturedStep | None" = None,
    ):
        self.after = after
        self.function = function
        self.make_graph = graph
        self.graph: CudaGraph | None = None
        self.refusal = ""
        self.calls = 0
        self._inputs: list[Tensor] | None = None
        self._spec: Any = None
        self._outputs: Any = None

    def __call__(self, *args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        if self._inputs is None:
            self._inputs, self._spec = [leaf.clone() for leaf in leaves], spec
        self._check(leaves, spec)
        for static, leaf in zip(self._inputs, leaves, strict=True):
            static.copy_(leaf, non_blocking=True)
        self.calls += 1
        if self.graph is not None:
            self.graph.replay()
        elif self._is_warm():
            self.graph = self.make_graph()
            self._outputs = self.graph.capture(self._run)
            if not self.graph.runs_while_capturing:
                self.graph.replay()
        else:
            self._outputs = self._warm_up()
        return self._outputs

    def _is_warm(self) -> bool:
        waits = self.after is not None and self.after.graph is None
        return self.calls > WARMUP_CALLS and not waits and not self.refusal

    def _run(self) -> Any:
        return self.function(*tree_unflatten(self._inputs, self._spec))

    def _warm_up(self) -> Any:
        with on_side_stream():
            if self.calls != WARMUP_CALLS:
                return self._run()
            with Watch() as watch:
                outputs = self._run()
        self.refusal = watch.found
        return outputs

    def _check(self, leaves: list[Tensor], spec: Any) -> None:
        def facts(tensors):
            return [(list(x.shape), x.dtype, x.device) for x in tensors]

        if spec != self._spec or facts(leaves) != facts(self._inputs):
            raise ValueError(
                f"a captured step takes the shapes it was made with, {facts(self._inputs)}; got "
                f"{facts(leaves)}. Keep the batch size fixed (drop the last partial batch) or make "
                "a new step"
            )


@lru_cache
def side_stream(device: int) -> torch.cuda.Stream:
    """The one stream of a GPU for warm-ups and captures: libraries keep a workspace for each."""
    return torch.cuda.Stream(device)


@contextmanager
def on_side_stream() -> Iterator[None]:
    """Run the block on :func:`side_stream` and join it; nothing to do without a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    here, side = torch.cuda.current_stream(), side_stream(torch.cuda.current_device())
    side.wait_stream(here)
    with torch.cuda.stream(side):
        yield
    here.wait_stream(side)


def forbidden(func: Any, args: tuple) -> str:
    """Why an operator cannot be captured, or nothing."""
    name, what = func.overloadpacket.__name__, ""
    if name in FORBIDDEN and not (name == "repeat_interleave" and len(args) == 1):
        what = FORBIDDEN[name]
    if name in ("index", "index_put", "index_put_") and any(
        isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_iter(args[1])
    ):
        what = "boolean-mask indexing"
    return what and f"a captured step may not use {what} (operator {func})"


class Watch(TorchDispatchMode):
    """Runs the block as it is; ``found`` is the first reason why it cannot be captured.

    If the block works on a GPU, what it does among CPU tensors alone is Python's own.
    """

    def __init__(self):
        super().__init__()
        self._found = {"cpu": "", "cuda": ""}
        self._is_on_gpu = False

    @property
    def found(self) -> str:
        return self._found["cuda" if self._is_on_gpu else "cpu"]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_iter((args, out)) if isinstance(x, Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        why = forbidden(func, args)
        if on_gpu and func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            pageable = any(x.device.type == "cpu" and not x.is_pinned() for x in tensors)
            why = f"a captured step may not copy pageable memory (operator {func})" * pageable
        self._is_on_gpu |= on_gpu
        key = "cuda" if on_gpu else "cpu"
        self._found[key] = self._found[key] or why
        return out


def refuse_forbidden(func: Any, args: tuple) -> None:
    """``ValueError`` for an operator that cannot be captured."""
    if why := forbidden(func, args):
        raise ValueError(why)


class _Trace(TorchDispatchMode):
    """The operators of a step with the shapes and dtypes of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse_forbidden(func, args)
        facts = tree_map_only(Tensor, lambda x: (tuple(x.shape), x.dtype), (args, kwargs or {}))
        self.calls.append((str(func), str(facts)))
        return func(*args, **(kwargs or {}))


def check_capture_safe(step: Callable[[int], Any]) -> int:
    """Run ``step(0)`` and ``step(1)``, which must differ in their inputs only, and compare them.

    Returns the number of operators.  ``ValueError`` names an operator that cannot be captured, or
    the first place where the two runs differ (data-dependent Python).  The caller warms up first.
    """
    traces = []
    for i in range(2):
        with _Trace() as trace:
            step(i)
        traces.append(trace.calls)
    first, second = traces
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a[0] != b[0]:
            raise ValueError(f"operator {position} is {a[0]} in one run and {b[0]} in the other")
        if _shapes_only(a[1]) != _shapes_only(b[1]):
            raise ValueError(f"operator {position}, {a[0]}: arguments {a[1]} and then {b[1]}")
    if len(first) != len(second):
        raise ValueError(f"one run has {len(first)} operators, the other {len(second)}")
    return len(first)


def _shapes_only(facts: str) -> str:
    """Generators and other objects print their address; everything else must agree."""
    return " ".join(word for word in facts.split() if "0x" not in word)
