"""Full copies of networks as people bring them: handled exactly, or refused in one sentence."""

import copy
from functools import partial

import own_networks
import pytest
import torch
from own_networks import (
    COND,
    DIM,
    Checkpointed,
    Dropout,
    Fixed,
    Plain,
    Tied,
    assert_same,
    conds,
    make,
)
from recorded_graph import RecordedGraph
from torch import nn

from mfd_fast import AUX, STUDENT, CopiedBackbone, DistillConfig, Distiller, OptimConfig
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.ranks import Ranks
from mfd_fast.run.checkpoint import pack

BUFFERED = ["SpectralNorm", "BatchNorm", "ComplexBuffer"]


def make_named(name, **kwargs):
    torch.manual_seed(1)
    return make(getattr(own_networks, name)(), **kwargs)


@pytest.mark.parametrize("cls", [Distiller, partial(CapturedDistiller, graph=RecordedGraph)])
@pytest.mark.parametrize("name", BUFFERED)
def test_buffers_that_training_changes_are_state(name, cls):
    """Continued and uninterrupted runs agree bit for bit; a state without buffers still loads."""
    one, two = make_named(name, cls=cls, ema_decay=0.5), make_named(name, cls=cls, ema_decay=0.5)
    start = [buffer.clone() for buffer in two.backbone.student.buffers()]
    updates = conds(10)
    for cond in updates[:5]:
        one.step(cond)
    state = one.state_dict()
    pack(state)  # a checkpoint can hold it
    two.load_state_dict(state)
    theirs = list(two.backbone.student.buffers())
    kept = [b for name, b in one.backbone.student.named_buffers() if name != "cache"]
    assert all(torch.equal(*pair) for pair in zip(kept, theirs, strict=False))
    assert not all(torch.equal(*pair) for pair in zip(start, theirs, strict=True))
    for cond in updates[5:]:
        assert_same(one.step(cond), two.step(cond))
    before = [buffer.clone() for buffer in two.backbone.student.buffers()]
    two.load_state_dict({k: v for k, v in state.items() if not k.endswith("_buffers")})
    assert all(torch.equal(*p) for p in zip(before, two.backbone.student.buffers(), strict=True))


@pytest.mark.parametrize("name", ["Dropout", "BatchNorm", "SpectralNorm"])
def test_samples_are_those_of_the_student_in_eval_mode(name):
    """And the mode, and the buffers, are as before afterwards."""
    distiller = make_named(name)
    for cond in conds(4):
        distiller.step(cond)
    noise, cond = torch.randn(4, DIM), torch.randn(4, COND)
    before = copy.deepcopy(distiller.backbone.student.state_dict())
    samples = distiller.generate(noise, cond)
    assert torch.equal(samples, distiller.generate(noise, cond))
    assert_same(before, distiller.backbone.student.state_dict())
    assert distiller.backbone.student.training and not distiller.backbone.teacher.training
    student = copy.deepcopy(distiller.backbone.student).eval()
    with torch.no_grad():
        assert torch.equal(samples, noise - student(noise, torch.ones(4), cond))


class Modes(Plain):
    """Notes the mode and grad mode of every call."""

    def forward(self, x, t, cond):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return super().forward(x, t, cond)


@pytest.mark.parametrize("cls", [Distiller, partial(CapturedDistiller, graph=RecordedGraph)])
def test_what_is_integrated_is_in_eval_mode_and_what_learns_in_its_own(cls):
    distiller = make(Modes(), cls)
    networks = [distiller.backbone.teacher, distiller.backbone.aux, distiller.backbone.student]
    for network in networks:
        network.seen = []
    distiller.aux_step(*conds(1))
    distiller.student_step(*conds(1))
    teacher, aux, student = (set(network.seen) for network in networks)
    assert teacher == {(False, False)}
    assert aux == {(True, True), (False, False)}
    assert student == {(True, True), (True, False)}  # the auxiliary learns from what is trained


def test_copies_train_in_the_mode_they_come_in():
    networks = [Dropout() for _ in range(3)]
    networks[2].eval()
    backbone = CopiedBackbone(*networks, sample_shape=(DIM,), null_cond=torch.zeros_like)
    assert [m.training for m in networks] == [False, True, False]
    Distiller(backbone, DistillConfig()).generate(torch.randn(4, DIM), torch.randn(4, COND))
    assert [m.training for m in networks] == [False, True, False]


def test_what_the_network_keeps_fixed_stays_fixed():
    network = Fixed()
    fixed = {"table": network.table.detach().clone(), "codes": network.codes.detach().clone()}
    distiller = make(network)
    for cond in conds(4):
        distiller.step(cond)
    for role in ("aux", "student"):
        trained = getattr(distiller.backbone, role)
        assert_same(fixed, dict(trained.named_parameters()))
        assert len(distiller.backbone.parameters_of(role)) == 4
        for name, parameter in trained.named_parameters():
            is_fixed = name in fixed
            assert is_fixed != parameter.requires_grad
            assert is_fixed == torch.equal(parameter, network.get_parameter(name))


def test_a_network_frozen_as_a_whole_is_trained_as_a_whole():
    backbone = make(Fixed().requires_grad_(False)).backbone
    names = {name for name, p in backbone.student.named_parameters() if p.requires_grad}
    assert names == {"first.weight", "first.bias", "last.weight", "last.bias", "table"}
    assert not any(p.requires_grad for p in backbone.teacher.parameters())


def test_dtype_and_device_are_those_of_floating_parameters():
    network = nn.Module()
    network.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    network.layer = nn.Linear(2, 2).bfloat16()
    assert CopiedBackbone(network, sample_shape=(DIM,)).dtype == torch.bfloat16


def test_tied_weights_stay_tied_and_are_trained_once():
    distiller = make(Tied())
    for cond in conds(4):
        distiller.step(cond)
    student = distiller.backbone.student
    assert student.second.weight is student.third.weight
    assert student.second.weight is not distiller.backbone.aux.second.weight
    assert len(distiller.backbone.parameters_of("student")) == 7  # 8 names
    assert not torch.equal(student.second.weight, distiller.backbone.teacher.second.weight)


def run_of(network, updates=4):
    """The metrics of some updates, and samples."""
    distiller = make(network)
    torch.manual_seed(2)
    rows = [distiller.step(cond) for cond in conds(updates)]
    return rows, distiller.generate(torch.ones(3, DIM), torch.ones(3, COND))


@pytest.mark.parametrize("reentrant", [False, True])
def test_own_checkpointing_changes_nothing(reentrant):
    torch.manual_seed(1)
    network = Checkpointed()
    expected, samples = run_of(copy.deepcopy(network))
    network.reentrant = reentrant
    rows, same = run_of(network)
    for row, theirs in zip(rows, expected, strict=True):
        assert_same(row, theirs)
    assert torch.equal(samples, same)


def compiled_in_place(network):
    network.compile(backend="eager")
    return network


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), compiled_in_place])
@pytest.mark.parametrize("name", ["Plain", "BatchNorm"])
def test_a_compiled_network_has_three_copies_of_its_own(name, wrap):
    torch.manual_seed(1)
    network = getattr(own_networks, name)()
    expected, samples = run_of(copy.deepcopy(network))
    before = copy.deepcopy(network.state_dict())
    rows, same = run_of(wrap(network))
    for row, theirs in zip(rows, expected, strict=True):
        assert_same(row, theirs)
    assert torch.equal(samples, same)
    assert_same(before, network.state_dict())  # the teacher's


def test_parametrized_weights_are_trained_by_what_they_are_made_of():
    torch.manual_seed(1)
    backbone = make_named("WeightNorm").backbone
    twin = copy.deepcopy(backbone.student)
    x, t, cond = torch.randn(5, 1, DIM), torch.rand(5), torch.randn(5, COND)
    backbone.forward(x, t, backbone.prepare(cond), (STUDENT,)).square().mean().backward()
    twin(x[:, 0], t, cond).square().mean().backward()
    pairs = zip(backbone.parameters_of("student"), twin.parameters(), strict=True)
    assert all(torch.equal(mine.grad, theirs.grad) for mine, theirs in pairs)


class Returns(Plain):
    """What people's networks return in place of a tensor."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x, t, cond):
        return self.wrap(super().forward(x, t, cond))


class Uncast(Plain):
    """Concatenates x, t and cond as they come."""

    def forward(self, x, t, cond):
        return self.last(self.inner(torch.cat([x, t[:, None], cond], dim=1)))


class UncastCondition(Uncast):
    def forward(self, x, t, cond):
        return super().forward(x, t.to(x.dtype), cond)


class PreparesNone(Plain):
    def prepare(self, cond):
        return cond, None


class Constant(Plain):
    def forward(self, x, t, cond):
        return super().forward(x, t, cond).detach()


class Bilinear(nn.Module):
    """A convolution fails with another message than a matmul."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 1)

    def forward(self, x, t, cond):
        return self.layer((x * t[:, None])[:, None])[:, 0]


def old_weight_norm():
    network = Plain()
    nn.utils.weight_norm(network.first)
    network.first(torch.zeros(1, DIM + 1 + COND))  # now its weight is no leaf
    return network


def first_update(network, cond=None):
    return make(network).aux_step(torch.zeros(4, COND) if cond is None else cond)


def generate(noises, conditions):
    return make(Plain()).generate(torch.zeros(noises, DIM), torch.zeros(conditions, COND))


def shared_layer():
    teacher, student = Plain(), Plain()
    student.first = teacher.first
    return CopiedBackbone(teacher, student=student, sample_shape=(DIM,))


def foreign_optimizers(dtype=torch.float32):
    backbone = CopiedBackbone(Plain().to(dtype), sample_shape=(DIM,))
    return Distiller(
        backbone,
        DistillConfig(),
        {
            "aux": torch.optim.SGD(backbone.parameters_of("aux"), lr=0.1),
            "student": torch.optim.SGD(backbone.student.parameters(), lr=0.1),
        },
    )


def forward_rows(rows, conditions):
    backbone = make(Plain()).backbone
    prepared = backbone.prepare(torch.zeros(conditions, COND))
    return backbone.forward(torch.zeros(rows, 1, DIM), torch.zeros(rows), prepared, (AUX,))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: first_update(Returns(lambda v: (v,))), r"student network .* got tuple: .*out\[0"),
        (lambda: first_update(Returns(lambda v: {"sample": v})), "one tensor.*; got dict"),
        (
            lambda: first_update(Uncast().bfloat16()),
            r"x in torch.bfloat16 and t or cond in torch.float32.*: cast them .* t.to\(x.dtype\)",
        ),
        (lambda: first_update(UncastCondition().half()), "x in torch.float16 and t or cond in tor"),
        (lambda: first_update(Bilinear().bfloat16()), "failed with .*cast them where they meet x"),
        (
            lambda: first_update(Plain(), {"text": torch.zeros(4, COND), "mask": None}),
            r"leaves \['Tensor', 'NoneType'\]. Put what is no tensor \(None, numbers\) into a func",
        ),
        (lambda: first_update(Plain(), [torch.zeros(4, COND), 7.5]), r"leaves \['Tensor', 'float"),
        (
            lambda: first_update(PreparesNone()),
            r"must return tensors of 4 rows.*\[\[4, 4\], ",
        ),
        (lambda: first_update(Constant()), "loss of the aux leads to none of its parameters"),
        (lambda: generate(3, 4), r"noise must be \[4, 2\], .* row of cond; got \[3, 2\]"),
        (lambda: generate(5, 4), r"noise must be \[4, 2\], .* row of cond; got \[5, 2\]"),
        (lambda: forward_rows(5, 4), r"x must be \[n, 1, ...\] with n <= 4 .* got \[5, 1, 2\]"),
        (lambda: make(old_weight_norm()), "Plain cannot be copied .*: pass networks of their own"),
        (shared_layer, "the student network trains first.weight, which is the teacher's too"),
        (
            lambda: CopiedBackbone(*[Plain()] * 3, sample_shape=(DIM,)),
            "the aux network trains first.weight, which is the student's too: pass copies",
        ),
        (lambda: CopiedBackbone(nn.Identity(), sample_shape=(DIM,)), "Identity has none: register"),
        (
            lambda: foreign_optimizers(torch.bfloat16),
            r"optimizers\['student'\] has parameters .*: make it with backbone.parameters_of\('st",
        ),
        (
            lambda: DistillConfig(guidance="3"),
            r"guidance must be a number, got '3' \(str\)",
        ),
        (
            lambda: DistillConfig(aux_updates=2.0),
            "aux_updates must be a whole number, got 2.0",
        ),
        (lambda: DistillConfig(student_optim=3e-4), "distill.student_optim must be a OptimConfig"),
        (lambda: OptimConfig(lr="1e-4"), r"lr must be a number, got '1e-4' \(str\)"),
        (lambda: OptimConfig(kind="lion"), "kind must be one of"),
    ],
)
def test_what_does_not_fit_is_one_sentence(run, message):
    with pytest.raises(ValueError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_batch_statistics_of_one_of_several_processes_are_refused():
    backbone = make_named("BatchNorm").backbone
    with pytest.raises(ValueError, match=r"^aux.norm takes the statistics of one process's samp"):
        Distiller(backbone, DistillConfig(), ranks=Ranks(0, 2))


def test_other_errors_of_a_network_come_through():
    """A sentence about dtypes must not hide what it does not explain."""

    class Broken(Plain):
        def forward(self, x, t, cond):
            raise RuntimeError("no such table")

    with pytest.raises(RuntimeError, match="no such table"):
        first_update(Broken().bfloat16())


def test_settings_take_whole_numbers_for_fractions():
    assert DistillConfig(guidance=3).guidance == 3.0
    assert DistillConfig(max_interval=1).max_interval == 1.0


def test_optimizers_of_the_plain_parameters_are_the_trained_ones_in_float32():
    assert foreign_optimizers().optimizers["student"].param_groups[0]["lr"] == 0.1
