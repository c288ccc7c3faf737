"""Updates on CUDA tensors without storage, on a PyTorch without CUDA: what they run, as JSON.

    LD_PRELOAD=device.so python tests/support/fake_cuda/trace.py WHAT[,WHAT...] [compiled]

``device.so`` is ``device.cpp`` compiled.  WHAT is MODEL:VARIANT of ``bench.updates.variants`` (of
"captured" the graphs are calls), "conditions" for what the tasks feed an update, or "planted" for
faults that must be seen.  With "compiled" every private CUDA operator has a
kernel, as the extension brings them.

``FakeTensorMode`` knows shapes, dtypes and devices.  Tensors of the host keep their values.  The
operators of ``mfd_fast`` run what is registered for CUDA, and a launch of Triton only says that it
was one.  Not seen: which softmax attention PyTorch itself chooses, which takes a device.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import triton
from torch import Tensor, nn
from torch._library.simple_registry import singleton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

COPIES = ("_to_copy", "copy_")
READS = ("_local_scalar_dense", "equal")  # answered with 1, so that the update goes on
SANA_LAYERS = 2  # of 20 that run the same code
INTERVAL = (0.6, 0.56)  # two ODE steps: the first makes what the others find


class OnFakeCuda(TorchDispatchMode):
    """Runs every operator where its tensors are.

    faults: what an update must not do, collected until they are cleared.
    chosen: operator of mfd_fast -> what ran for it: "compiled", "triton" or "reference".
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.pinned: list[Tensor] = []
        self.faults: set[str] = set()
        self.chosen: dict[str, set[str]] = defaultdict(set)
        self.ran: list[set[str]] = []  # by the operators under way, the innermost last

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, given = func.overloadpacket.__name__, tensors((args, kwargs))
        if name == "_pin_memory":
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        target = kwargs.get("device")
        on_device = any(map(is_cuda, given))
        if not on_device and not (target and torch.device(target).type == "cuda"):
            return func(*args, **kwargs)
        if func.namespace == "mfd_fast":
            return self._run_operator(name, func, args, kwargs)
        if name in READS:
            self.faults.add(f"{name}: the host reads a value")
            return 1
        self._check_inputs(name, given, args, kwargs)
        if name == "_fused_adamw_":  # in place; it has no fake
            return None
        with self.fake:
            out = func(*args, **kwargs)
        self._check_outputs(name, tensors(out), on_device)
        return out

    def _run_operator(self, name, func, args, kwargs):
        """What is registered for CUDA, and else for every device: operators made of others."""
        key = torch.DispatchKey.CUDA
        is_made_of_others = not func.has_kernel_for_dispatch_key(key)
        if is_made_of_others:
            key = torch.DispatchKey.CompositeExplicitAutograd
        self.ran.append(set())
        with self:
            out = func._op_dk(key, *args, **kwargs)
        ran = self.ran.pop()
        if name.endswith("_cuda"):
            self.ran[-1].add("compiled")
        elif not is_made_of_others:
            self.chosen[name] |= ran or {"reference"}
        return out

    def _check_inputs(self, name, given, args, kwargs):
        hosts = [x for x in given if not is_cuda(x)]
        if not hosts:
            return
        if name not in COPIES:
            self.faults.add(f"{name}: reads a tensor of the host")
            return
        pinned = {x.untyped_storage()._cdata for x in self.pinned}
        if any(x.untyped_storage()._cdata not in pinned for x in hosts):
            self.faults.add(f"{name}: copies pageable memory")
        if not kwargs.get("non_blocking", args[2] if len(args) > 2 else False):
            self.faults.add(f"{name}: waits for its copy")

    def _check_outputs(self, name, made, on_device):
        if on_device and not all(map(is_cuda, made)):
            self.faults.add(f"{name}: falls to the host")
        if any(x.dtype == torch.float64 for x in made):
            self.faults.add(f"{name}: float64")

    def launch(self, kernel, *args, grid, **kwargs):
        """In the place of ``JITFunction.run``."""
        given = tensors((args, kwargs))
        if not all(map(is_cuda, given)):
            self.faults.add(f"{kernel.__name__}: reads a tensor of the host")
        if any(x.dtype == torch.float64 for x in given):
            self.faults.add(f"{kernel.__name__}: float64")
        self.ran[-1].add("triton")


def is_cuda(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_iter(tree) if isinstance(x, Tensor)]


def stand_in(mode: OnFakeCuda) -> None:
    """What Python asks a device, and Triton's launches."""
    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    torch.cuda._lazy_init = lambda: None
    torch.cuda.current_stream = torch.cuda.Stream = lambda *_: stream
    torch.cuda.stream = torch.cuda.device = lambda _: nullcontext()
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    Tensor.record_stream = lambda self, stream: None
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(3.0, device="cuda") is a copy, too
    nn.Module._apply = move
    triton.runtime.JITFunction.run = lambda kernel, *args, **kwargs: mode.launch(
        kernel, *args, **{k: v for k, v in kwargs.items() if k != "warmup"}
    )
    import mfd_fast.distill.trained
    import mfd_fast.run.task
    from bench.updates import networks, variants

    host_generator = torch.Generator
    mfd_fast.distill.trained.Generator = lambda *_: host_generator()
    mfd_fast.run.task.pick_device = torch.device
    networks.SANAS["1.6b"] = {"num_layers": SANA_LAYERS}
    variants.INTERVAL = INTERVAL
    variants.CapturedDistiller = partial(variants.CapturedDistiller, graph=Call)


class Call:
    """A graph that runs its function, every time."""

    runs_while_capturing = True

    def __init__(self, generators=(), pool=None):
        pass

    @staticmethod
    def new_pool():
        return None

    def capture(self, function):
        self.replay = function
        return function()


def move(module: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    """``Module._apply`` with new parameters: those without storage cannot change their type."""
    for child in module.children():
        child._apply(fn)
    with torch.no_grad():
        for key, x in module._parameters.items():
            module._parameters[key] = x if x is None else nn.Parameter(fn(x), x.requires_grad)
        for key, x in module._buffers.items():
            module._buffers[key] = x if x is None else fn(x)
    return module


def with_compiled_operators() -> None:
    """Give every private operator ``_<name>_cuda`` a kernel when it is defined."""
    define = torch.library.define

    def define_with_kernel(name: str, schema: str) -> None:
        define(name, schema)
        sys.modules["mfd_fast.ops.dispatch"].build_info = lambda: {"cuda": True}
        public = name.removesuffix("_cuda").removeprefix("mfd_fast::")
        if not name.endswith("_cuda"):
            return

        def kernel(*args):  # the fake of the public operator gives the results
            known = public if hasattr(torch.ops.mfd_fast, public) else public.removeprefix("_")
            return singleton.find(f"mfd_fast::{known}").fake_impl.kernel(*args)

        torch.library.impl(name, "CUDA")(kernel)

    torch.library.define = define_with_kernel


def updates(model: str, variant: str) -> dict[str, Callable]:
    """role -> one update."""
    from bench.updates.variants import make_loop

    return make_loop(model, variant, "cuda").updates


def conditions() -> dict[str, Callable]:
    """Task -> the conditions of an update."""
    from mfd_fast.models import preset
    from mfd_fast.models.cifar10.task import Cifar10Task
    from mfd_fast.models.digits.task import DigitsTask
    from mfd_fast.models.occfm.data.windows import OccupancyBatch
    from mfd_fast.models.occfm.evaluate import condition
    from mfd_fast.models.sana.text.conditions import TextConditions

    config = preset("digits")
    config.train.__dict__["device"] = "cuda"
    images = torch.zeros(9, 3, 32, 32, dtype=torch.uint8)
    cifar10 = Cifar10Task.__new__(Cifar10Task)
    cifar10.config, cifar10.device = config, torch.device("cuda")
    cifar10.conditions = partial(cifar10.drawn_with_data, config.train.batch_size)
    cifar10._images = lambda: images
    text = {"text": torch.zeros(2, 5, 8), "mask": torch.ones(2, 5, dtype=torch.bool)}
    source = SimpleNamespace(null=torch.zeros(2, 8), longest=5, batch=lambda *_: text)
    windows = OccupancyBatch(torch.zeros(1, 12, 8, 4, 4), torch.zeros(1, 6, 2))
    return {
        "digits": partial(DigitsTask(config).conditions(), 0),
        "cifar10": partial(cifar10.conditions(), torch.Generator()),
        "sana": partial(TextConditions(source, batch_size=2, seed=0, device="cuda").next_cond, 0),
        "occfm": partial(condition, windows, torch.device("cuda")),
    }


def planted() -> dict[str, Callable]:
    """What is wrong -> a function that does it."""
    from mfd_fast.ops import interpolate

    on_host, on_device = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
    wide = on_device.double()

    return {
        "pageable": lambda: on_host.to("cuda", non_blocking=True),
        "pageable value": lambda: torch.tensor(3.0, device="cuda"),
        "waiting": lambda: on_device.copy_(on_host.pin_memory()),
        "read": lambda: float(on_device.sum()),
        "decision": lambda: bool((on_device > 0).all()),
        "to the host": lambda: on_device.cpu(),
        "host operand": lambda: on_device * torch.tensor(2.0),
        "float64": lambda: on_device.double(),
        "float64 in an operator": lambda: interpolate(wide, wide, on_device[:, 0]),
    }


def traced(mode: OnFakeCuda, make: Callable[[], dict[str, Callable]]) -> dict:
    """The faults of each function, and what ran for the operators in all of them."""
    faults = {}
    mode.chosen.clear()
    for name, run in make().items():
        run()  # what is made once is made now
        mode.faults.clear()
        run()
        faults[name] = sorted(mode.faults)
    return {
        "faults": faults,
        "chosen": {name: sorted(found) for name, found in sorted(mode.chosen.items())},
    }


def main() -> None:
    whats, *options = sys.argv[1:]
    mode = OnFakeCuda()
    if "compiled" in options:
        with_compiled_operators()
    stand_in(mode)
    makers = {"conditions": conditions, "planted": planted}
    with mode:
        found = {
            what: traced(mode, makers.get(what, partial(updates, *what.split(":"))))
            for what in whats.split(",")
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
