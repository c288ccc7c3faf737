"""The memory of CUDA graphs, without a GPU: whatever they may overwrite is overwritten."""

import importlib.util
import sys
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recorded_graph import RecordedGraph
from test_distiller import DIM, CondNetwork
from test_graphs import CONFIGS, make

from mfd_fast import CopiedBackbone, DistillConfig, Distiller, OptimConfig, make_distiller
from mfd_fast.distill.captured import MAX_SHAPES, CapturedDistiller
from mfd_fast.distill.graphs import (
    WARMUP_CALLS,
    CudaGraph,
    on_side_stream,
    side_stream,
)

PADDED = ("mfd", "ab2", "four steps, random", "micro batches", "loss scale")


class Padded(CondNetwork):
    """Takes conditions of any length, as a text encoder's padded ones are."""

    def forward(self, x, t, cond):
        return super().forward(x, t, cond.mean(1))

    def prepare(self, cond):
        return torch.tanh(cond)


def padded(cls, overrides, **kwargs):
    torch.manual_seed(3)
    backbone = CopiedBackbone(Padded(), sample_shape=(DIM,), null_cond=torch.zeros_like)
    config = {"guidance": 4.5, "step_size": 0.2, "aux_updates": 2, "ema_decay": 0.9} | overrides
    return cls(backbone, DistillConfig(**config), **kwargs)


def conds_of_lengths(count, lengths, seed=0):
    """Lengths come in an order that lets every one be met late, rarely, and after any other."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(1.0 / torch.arange(1.0, len(lengths) + 1), count, True,
                              generator=generator)  # fmt: skip
    return [torch.randn(4, lengths[i], 1, generator=generator) for i in drawn.tolist()]


def assert_equal_runs(eager, captured, conds):
    """Every metric of every update, looked at when the run is over, and every weight."""
    rows = [(eager.step(cond), captured.step(cond)) for cond in conds]
    for index, (expected, got) in enumerate(rows):
        assert set(expected) == set(got)
        assert all(torch.equal(expected[k], got[k]) for k in expected), (index, expected, got)
    for role in ("aux", "student"):
        pairs = zip(*(d.backbone.parameters_of(role) for d in (eager, captured)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("seed", [0, 1])
def test_graphs_of_several_lengths_share_memory(name, seed):
    """Captures of one length among replays of the others: the numbers are those of eager runs."""
    eager = padded(Distiller, CONFIGS[name])
    captured = padded(CapturedDistiller, CONFIGS[name], graph=RecordedGraph)
    assert_equal_runs(eager, captured, conds_of_lengths(110, (3, 5, 2), seed))
    assert len(captured._static) == 3
    assert all(static.steps["prepare"].graph for static in captured._static.values())


def test_shapes_beyond_the_most_run_without_graphs():
    eager = padded(Distiller, {})
    captured = padded(CapturedDistiller, {}, graph=RecordedGraph)
    conds = [torch.randn(4, length, 1) for length in range(1, MAX_SHAPES + 4)]
    assert_equal_runs(eager, captured, [*conds, torch.randn(3, 1, 1), conds[0]])
    assert len(captured._static) == MAX_SHAPES


# The bugs that CUDA graphs would have, planted in the text of captured.py.
PREPARE = 'run("prepare", self._update_graph, partial(self._prepare, static))(part)'
BUGS = {
    "a dropped reference": {
        "        static.row += 1\n": """        static.row += 1
        if static.steps["prepare"].graph is not None:
            static.prepared = None
"""
    },
    "a wrong order of first capture": {
        PREPARE: PREPARE.replace("run(", "prepare = run(").replace("(part)", "\n            ")
        + "(prepare if self.num_updates['student'] else partial(self._prepare, static))(part)",
        'begin, after="prepare")(part)': "begin)(part)",
    },
    "a result kept across a replay": {"value.clone() for": "value for"},
    "read before it is captured": {'ode_step, after="prepare")()': "ode_step)()"},
    "one place for all lengths": {"static.prepared": "self._prepared"},
}
SEEN_IN_NUMBERS = {"a result kept across a replay", "read before it is captured",
                   "one place for all lengths"}  # fmt: skip


def loaded(folder, replacements):
    text = Path(sys.modules[CapturedDistiller.__module__].__file__).read_text()
    for old, new in replacements.items():
        assert old in text, f"the text to break is gone from captured.py: {old}"
        text = text.replace(old, new)
    path = folder / "faulty_captured.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module.CapturedDistiller


def run_single_samples(cls, name):
    """One ODE graph is all, and with a random step captures come late."""
    overrides = CONFIGS[name] | {"aux_updates": 1}
    eager, captured = padded(Distiller, overrides), padded(cls, overrides, graph=RecordedGraph)
    conds = [cond[:1] for cond in conds_of_lengths(100, (3, 5))]
    assert_equal_runs(eager, captured, conds)


def run_both(cls):
    for name in ("four steps", "four steps, random"):
        run_single_samples(cls, name)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, tmp_path, monkeypatch):
    faulty = loaded(tmp_path, BUGS[bug])
    with pytest.raises((AssertionError, RuntimeError)):
        run_both(faulty)
    if bug not in SEEN_IN_NUMBERS:  # it takes what others do to the memory to see it
        monkeypatch.setattr("recorded_graph.spoil", lambda blocks: None)
        run_both(faulty)


def test_without_a_bug_nothing_is_caught(tmp_path):
    run_both(loaded(tmp_path, {}))


def test_memory_that_nobody_holds_is_spoiled():
    """Floats become NaN, integers an index that no table has."""
    for dtype, is_spoiled in ((torch.bfloat16, torch.isnan), (torch.int64, lambda x: x > 1 << 60)):
        held, lost = torch.ones(4, dtype=dtype), [torch.ones(4, dtype=dtype)]
        graph = RecordedGraph()
        out = graph.capture(lambda held=held, lost=lost: (held + 0, lost[0] + 0))
        graph.replay()
        assert [x.tolist() for x in out] == [[1] * 4] * 2
        lost.clear()
        graph.replay()
        assert out[0].tolist() == [1] * 4 and is_spoiled(out[1]).all()


def test_a_graph_spoils_what_may_lie_in_its_memory_and_nothing_else():
    pool, x = RecordedGraph.new_pool(), torch.ones(4)
    graphs = [RecordedGraph((), pool) for _ in range(2)] + [RecordedGraph()]
    first, second = (graph.capture(lambda: x * 2 + 1) for graph in graphs[:2])
    elsewhere = graphs[2].capture(lambda: x * 2 + 1)
    for graph in (graphs[1], graphs[2]):  # captured later, with first held; and in another pool
        graph.replay()
    assert all((x == 3).all() for x in (first, second, elsewhere))
    graphs[0].replay()
    assert second.isnan().all() and (first == 3).all() and (elsewhere == 3).all()
    graphs[1].replay()
    reader, borrowed = RecordedGraph(), [first]
    read = reader.capture(lambda: borrowed[0] + 0)
    del first, borrowed[:]
    reader.replay()
    assert (read == 3).all()  # let go, but nobody captured since may have its memory
    third = RecordedGraph((), pool)
    third.capture(lambda: x + 1)
    reader.replay()
    assert read.isnan().all()


def test_one_generation_of_activations_is_alive():
    """In warm-ups and when all is captured."""
    distiller = padded(CapturedDistiller, CONFIGS["four steps"], graph=RecordedGraph)
    made, alive = [], []

    class Mark(torch.autograd.Function):
        """Lives as long as what is saved for the backward beside it."""

        @staticmethod
        def forward(ctx, x):
            ctx.mark = type("Saved", (), {})()
            made.append(weakref.ref(ctx.mark))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    def watch(module, inputs, output):
        return Mark.apply(output) if output.requires_grad else output

    distiller.backbone.student.inner.register_forward_hook(watch)
    begin = distiller._begin

    def counted(*args, **kwargs):
        alive.append(sum(ref() is not None for ref in made))
        begin(*args, **kwargs)
        assert made and made[-1]() is not None

    distiller._begin = counted
    for _ in range(WARMUP_CALLS + 2):
        distiller.student_step(torch.randn(4, 3, 1))
        assert not any(ref() is not None for ref in made)
    assert alive == [0] * (WARMUP_CALLS + 1)


def test_graphs_are_given_up_and_made_again():
    """After release_graphs, as before a result table, and after load_state_dict."""
    overrides = {"student_optim": OptimConfig(warmup_updates=12)}
    eager = padded(Distiller, overrides)
    captured = padded(CapturedDistiller, overrides, graph=RecordedGraph)
    for round_ in range(3):
        assert_equal_runs(eager, captured, conds_of_lengths(20, (3, 5), round_))
        assert captured.num_graphs > 0
        if round_ == 0:
            captured.release_graphs()
        else:
            captured.load_state_dict(eager.state_dict())
        assert captured.num_graphs == 0


def test_a_loaded_learning_rate_goes_into_the_old_tensor():
    one, two = (make(Distiller, {"student_optim": OptimConfig(warmup_updates=9)}) for _ in "ab")
    one.student_step(torch.randn(4, 1))
    rates = [group["lr"] for group in two.optimizers["student"].param_groups]
    two.load_state_dict(one.state_dict())
    for old, group in zip(rates, two.optimizers["student"].param_groups, strict=True):
        assert group["lr"] is old
        assert torch.equal(old, one.optimizers["student"].param_groups[0]["lr"])


class Reads(CondNetwork):
    """Looks at a value: no graph can do that."""

    def forward(self, x, t, cond):
        return super().forward(x, t, cond) * (2.0 if float(t.detach().sum()) > 1e9 else 1.0)


class ReadsInTheTeacherOnly(CondNetwork):
    def forward(self, x, t, cond):
        v = super().forward(x, t, cond)
        return v if self.training else v[(v == v).all(1)]


@pytest.mark.parametrize("network", [Reads, ReadsInTheTeacherOnly])
def test_a_network_that_cannot_be_captured_trains_without_graphs(network):
    def distiller(cls, **kwargs):
        torch.manual_seed(3)
        backbone = CopiedBackbone(network(), sample_shape=(DIM,), null_cond=torch.zeros_like)
        config = DistillConfig(step_size=0.2, aux_updates=2, student_steps=2)
        return cls(backbone, config, **kwargs)

    captured = distiller(CapturedDistiller, graph=RecordedGraph, may_fall_back=True)
    with pytest.warns(UserWarning, match="may not use .*: updates run without CUDA graphs") as told:
        assert_equal_runs(distiller(Distiller), captured, torch.randn(40, 4, 1).unbind())
    assert len(told) == 1 and captured.num_graphs == 0
    strict = distiller(CapturedDistiller, graph=RecordedGraph)
    with pytest.raises(ValueError, match=r"may not use .*; set train\.capture to auto or off"):
        assert_equal_runs(distiller(Distiller), strict, torch.randn(40, 4, 1).unbind())


def test_auto_on_and_off_on_a_machine_without_a_gpu():
    backbone = make(Distiller, {}).backbone
    for capture in ("auto", "off"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert type(make_distiller(backbone, DistillConfig(), capture=capture)) is Distiller
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU and this is cpu; set train\.cap"):
        make_distiller(backbone, DistillConfig(), capture="on")
    with pytest.raises(ValueError, match=r"capture must be one of .*'auto'.*, got True"):
        make_distiller(backbone, DistillConfig(), capture=True)


class FakeStream:
    made = 0

    def __init__(self, device=None):
        FakeStream.made += 1

    def wait_stream(self, other):
        pass


def test_one_side_stream_serves_warm_ups_and_captures(monkeypatch):
    """Every stream keeps a workspace of the libraries; threads that copy must not spoil a capture.

    ``torch.cuda`` is a double: what is asked of it is what is tested.
    """
    asked = []

    def graph(target, **kwargs):
        asked.append(kwargs)
        return nullcontext()

    monkeypatch.setattr(FakeStream, "made", 0)
    here = FakeStream()
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "current_stream": lambda: here,
        "Stream": FakeStream,
        "stream": nullcontext,
        "graph": graph,
        "CUDAGraph": SimpleNamespace,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    side_stream.cache_clear()
    try:
        for _ in range(40):
            with on_side_stream():
                pass
            CudaGraph(pool=(0, 1)).capture(lambda: None)
        assert FakeStream.made == 2  # and the one that everything else is on
        assert all(kwargs["stream"] is side_stream(0) for kwargs in asked)
        assert {kwargs["capture_error_mode"] for kwargs in asked} == {"thread_local"}
    finally:
        side_stream.cache_clear()
