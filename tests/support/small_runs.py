"""A run of a small conditional network, built the same way every time, for tests of resuming."""

import resource
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.distill.config import DistillConfig, OptimConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.run.checkpoint import latest_good, read
from mfd_fast.run.checkpoint_writer import Checkpointer
from mfd_fast.run.config import TrainConfig
from mfd_fast.run.loop import Progress, train
from mfd_fast.run.resume import restore
from mfd_fast.run.stop import Stopped

DIM, BATCH = 3, 8


class CondNetwork(torch.nn.Module):
    """``(x [B, 3], t [B], cond [B, 1]) -> [B, 3]``, not linear, with blocks that fsdp can split."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(DIM + 2, 16)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
        self.outer = torch.nn.Linear(16, DIM)

    def forward(self, x, t, cond):
        x = torch.tanh(self.inner(torch.cat([x, t.to(x.dtype)[:, None], cond.to(x.dtype)], dim=1)))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.outer(x)


def make_backbone(dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    networks = [CondNetwork().to(dtype) for _ in range(3)]
    return CopiedBackbone(*networks, sample_shape=(DIM,), null_cond=torch.zeros_like)


def make_shared(dtype=torch.float32):
    """Adapters that do something on one frozen network, one more of them the teacher's."""
    torch.manual_seed(1)
    network = CondNetwork().to(dtype)
    bank = AdapterBank(network, rank=2, alpha=2.0, targets=("inner", "0", "1", "outer"))
    bank.add_frozen("base", bank.adapter_state_dict("aux"), alpha=2.0, rank=2)
    with torch.no_grad():
        for adapter in bank.adapters.values():
            adapter.master.copy_(0.3 * torch.randn(adapter.master.shape))
            adapter.refresh()
    return SharedBackbone(
        network,
        adapters=bank,
        sample_shape=(DIM,),
        null_cond=torch.zeros_like,
        teacher_adapter="base",
    )


def make_distiller(ranks=None, dtype=torch.float32, backbone=None, make=Distiller, **overrides):
    optim = OptimConfig(lr=1e-2)
    settings = {"guidance": 2.0, "step_size": 0.2, "aux_updates": 2, "ema_decay": 0.9}
    settings |= {"student_optim": optim, "aux_optim": optim}
    config = DistillConfig(**{**settings, **overrides})
    distiller = make(backbone or make_backbone(dtype), config, ranks=ranks)
    if distiller.backbone.dtype == torch.float64:  # the exact run: the same noise, wider
        noise = distiller._noise
        distiller._noise = lambda *shape: noise(*shape).double()
    return distiller


def next_cond(n):
    """The condition of update n, rows of all ranks."""
    return torch.randn(BATCH, 1, generator=torch.Generator().manual_seed(n))


def make_checkpointer(folder, config, **options):
    options = {"header": {"made_by": "a test"}, "warn": lambda sentence: None} | options
    return Checkpointer(folder, config, **options)


def run(folder, *, updates, checkpoint_every=0, resumed=False, stop=None, ranks=None, **overrides):
    """Train, from the newest checkpoint if ``resumed``; the distiller and the rows of this part."""
    config = TrainConfig(updates=updates, log_every=2, checkpoint_every=checkpoint_every)
    distiller = make_distiller(ranks, **overrides)
    progress = Progress(distiller)
    if resumed:
        ranks = distiller.ranks
        path = ranks.broadcast_text(str(latest_good(folder)[0]) if ranks.is_main else "")
        restore(read(Path(path)), distiller, progress, ranks)
    rows = []
    with suppress(Stopped):
        train(
            distiller,
            next_cond,
            config,
            [rows.append],
            progress=progress,
            checkpointer=make_checkpointer(folder, config, ranks=ranks),
            stop=stop,
        )
    return distiller, rows


class StopAfter:
    """Stands for a StopSignal: a signal arrives during update number n."""

    def __init__(self, n):
        self.left = n

    @property
    def signum(self):
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else 0


def without_clock(rows):
    return [{k: v for k, v in row.items() if k != "updates_per_s"} for row in rows]


def assert_same(a, b):
    """Two trees of tensors and plain values, bit for bit."""
    leaves_a, spec_a = tree_flatten(a)
    leaves_b, spec_b = tree_flatten(b)
    assert spec_a == spec_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert type(x) is type(y)
        assert torch.equal(x, y) and x.dtype == y.dtype if torch.is_tensor(x) else x == y


@contextmanager
def largest_file(size):
    """Writing beyond ``size`` bytes into any file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
