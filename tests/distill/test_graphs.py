"""Capture logic without a GPU: recorded graphs replay on CPU memory; the checker catches what
cannot.
"""

import pytest
import torch
from recorded_graph import RecordedGraph
from test_distiller import DIM, CondNetwork

from mfd_fast import (
    AdapterBank,
    CopiedBackbone,
    DistillConfig,
    Distiller,
    OptimConfig,
    SharedBackbone,
)
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.graphs import WARMUP_CALLS, CapturedStep, check_capture_safe

CONFIGS = {
    "mfd": {},
    "vsd": {"objective": "vsd"},
    "unguided": {"guidance": 1.0},
    "ab2": {"solver": "ab2", "max_interval": 0.5},
    "heun on a grid": {"solver": "heun", "grid": 1000},
    "four steps": {"student_steps": 4},
    "four steps, last": {"student_steps": 4, "student_backprop": "last"},
    "four steps, random": {"student_steps": 4, "student_backprop": "random"},
    "micro batches": {"micro_batches": 2},
    "loss scale": {"loss_scale": 1024.0},
    "samples of a cycle": {"aux_samples": "cycle", "aux_updates": 3, "micro_batches": 2},
    "the student's samples": {
        "aux_samples": "student",
        "aux_updates": 3,
        "aux_draws_per_sample": 2,
    },
    "samples of two updates": {"aux_samples": "student", "aux_kept": 2, "micro_batches": 2},
    "warm-up": {"student_optim": OptimConfig(warmup_updates=6)},
}


def make(cls, overrides, **kwargs):
    torch.manual_seed(3)
    networks = [CondNetwork() for _ in range(3)]
    backbone = CopiedBackbone(*networks, sample_shape=(DIM,), null_cond=torch.zeros_like)
    config = {"guidance": 4.5, "step_size": 0.2, "aux_updates": 2, "ema_decay": 0.9} | overrides
    return cls(backbone, DistillConfig(**config), **kwargs)


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_replay_equals_eager_bit_for_bit(name):
    """Same seeds, 30 updates: replaying recorded operators gives the eager run's numbers
    exactly.
    """
    eager = make(Distiller, CONFIGS[name])
    captured = make(CapturedDistiller, CONFIGS[name], graph=RecordedGraph)
    conds = torch.randn(30, 4, 1)
    for index, cond in enumerate(conds):
        expected, got = eager.step(cond), captured.step(cond)
        assert set(expected) == set(got)
        assert all(torch.equal(expected[k], got[k]) for k in expected), (index, expected, got)
    for role in ("aux", "student"):
        pairs = zip(*(d.backbone.parameters_of(role) for d in (eager, captured)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(eager.ema, captured.ema, strict=True))
    assert captured.num_graphs > 0  # it did capture


def test_ode_graphs_are_one_per_number_of_moving_samples():
    distiller = make(CapturedDistiller, {}, graph=RecordedGraph)
    for _ in range(20):
        distiller.student_step(torch.randn(4, 1))
    (static,) = distiller._static.values()
    counts = {key[1] for key in static.steps if key[0] == "ode"}
    assert counts <= {1, 2, 3, 4}


def test_an_optimizer_that_cannot_be_captured_steps_outside():
    overrides = {"ema_decay": 0.9}
    optimizers = []
    runs = []
    for cls, extra in ((Distiller, {}), (CapturedDistiller, {"graph": RecordedGraph})):
        distiller = make(cls, overrides, **extra)
        distiller.optimizers = {
            role: torch.optim.SGD(distiller.backbone.parameters_of(role), lr=0.1, momentum=0.9)
            for role in ("aux", "student")
        }
        if cls is CapturedDistiller:
            distiller.outside = ["aux", "student"]
        optimizers.append(distiller.optimizers)
        runs.append(distiller)
    for cond in torch.randn(20, 4, 1):
        expected, got = (distiller.step(cond) for distiller in runs)
        assert all(torch.equal(expected[k], got[k]) for k in expected)
    parameters = zip(*(d.backbone.parameters_of("student") for d in runs), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


def test_optimizers_say_whether_they_can_be_captured():
    from mfd_fast.distill.optim import is_capturable, make_optimizer

    weights = [torch.nn.Parameter(torch.zeros(3))]
    assert is_capturable(make_optimizer(weights, OptimConfig()))
    assert not is_capturable(torch.optim.SGD(weights, lr=0.1))


def test_static_inputs_are_read_at_replay():
    step = CapturedStep(lambda x, y: {"sum": x + 2 * y}, graph=RecordedGraph)
    for i in range(WARMUP_CALLS + 3):
        x, y = torch.full((3,), float(i)), torch.ones(3)
        assert torch.equal(step(x, y)["sum"], x + 2 * y)


def test_a_changed_shape_is_refused_by_a_captured_step():
    step = CapturedStep(lambda x: x + 1, graph=RecordedGraph)
    step(torch.zeros(3))
    with pytest.raises(ValueError, match="Keep the batch size fixed"):
        step(torch.zeros(4))
    with pytest.raises(ValueError, match="takes the shapes it was made with"):
        step(torch.zeros(3, dtype=torch.float64))


def test_capture_on_the_cpu_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and this is cpu: use Distiller"):
        make(CapturedDistiller, {})


@pytest.mark.parametrize("name", ["mfd", "vsd", "four steps", "loss scale"])
@pytest.mark.parametrize("phase", ["aux", "student"])
def test_every_phase_is_capture_safe(name, phase, monkeypatch):
    """Two runs on other inputs: no forbidden operator, the same operators on the same shapes."""
    distiller = make(Distiller, CONFIGS[name])
    table = distiller._draw_table(torch.zeros(4, 1))  # one plan: its length is known on the host
    monkeypatch.setattr(distiller, "_draw_table", lambda cond: table)
    times = torch.rand(4)
    monkeypatch.setattr(distiller, "_draw_aux_times", lambda cond: times)
    conds = torch.randn(2, 4, 1).unbind()
    step = distiller.aux_step if phase == "aux" else distiller.student_step
    for cond in conds:
        step(cond)  # state exists
    assert check_capture_safe(lambda i: step(conds[i])) > 20


def unsafe_item(x):
    return x * float(x.sum())


def unsafe_mask(x):
    return x[x > 0]


def unsafe_branch(x):
    return x + 1 if x.shape[0] and STATE.pop() else x.exp()


def unsafe_constant(x):
    return x * torch.tensor(2.0)


def unsafe_host_number(x):
    return x * STATE.pop()


STATE = []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (unsafe_item, "may not use a host read"),
        (unsafe_mask, "boolean-mask indexing"),
        (unsafe_constant, r"torch.tensor\(python value\)"),
        (unsafe_branch, "in one run and"),
        (unsafe_host_number, "arguments .* and then"),
    ],
)
def test_the_checker_catches_an_unsafe_step(function, message):
    STATE[:] = [False, True] if function is unsafe_branch else [2.5, 1.5]
    inputs = torch.randn(2, 5).unbind()
    with pytest.raises(ValueError, match=message):
        check_capture_safe(lambda i: function(inputs[i]))


def test_steady_state_keeps_no_tensor():
    """100 updates leave as many live tensors as there were before."""
    import gc

    distiller = make(Distiller, {})
    cond = torch.randn(4, 1)

    def live():
        gc.collect()
        return sum(torch.is_tensor(o) for o in gc.get_objects())

    for _ in range(9):
        distiller.step(cond)
    before = live()
    for _ in range(99):
        distiller.step(cond)
    assert live() <= before


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_equals_eager_bit_for_bit_on_a_gpu(name):
    eager, captured = (make_on_gpu(cls, CONFIGS[name]) for cls in (Distiller, CapturedDistiller))
    for cond in torch.randn(30, 4, 1, device="cuda"):
        expected, got = eager.step(cond), captured.step(cond)
        assert all(torch.equal(expected[k], got[k]) for k in expected)


@pytest.mark.gpu
def test_no_sync_in_steady_state_on_a_gpu():
    distiller = make_on_gpu(CapturedDistiller, {})
    cond = torch.randn(4, 1, device="cuda")
    for _ in range(60):
        distiller.step(cond)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            distiller.step(cond)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_on_gpu(cls, overrides):
    torch.manual_seed(3)
    networks = [CondNetwork().cuda() for _ in range(3)]
    backbone = CopiedBackbone(*networks, sample_shape=(DIM,), null_cond=torch.zeros_like)
    config = {"guidance": 4.5, "step_size": 0.2, "aux_updates": 2, "ema_decay": 0.9} | overrides
    return cls(backbone, DistillConfig(**config))


def make_shared(cls, **kwargs):
    """Adapters on one network that prepares its condition, as SANA does."""
    torch.manual_seed(3)

    class Prepares(CondNetwork):
        def prepare(self, cond):
            return torch.tanh(self.project(cond))

        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(1, 1)

    network = Prepares()
    bank = AdapterBank(
        network, rank=2, alpha=2, targets=("inner", "outer", "project"),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    backbone = SharedBackbone(
        network, adapters=bank, sample_shape=(DIM,), null_cond=torch.zeros_like
    )
    config = DistillConfig(guidance=4.5, step_size=0.2, aux_updates=2, ema_decay=0.9)
    return cls(backbone, config, **kwargs)


def test_recorded_replay_of_adapters_equals_eager_bit_for_bit():
    eager = make_shared(Distiller)
    captured = make_shared(CapturedDistiller, graph=RecordedGraph)
    for cond in torch.randn(30, 4, 1):
        expected, got = eager.step(cond), captured.step(cond)
        assert all(torch.equal(expected[k], got[k]) for k in expected)
