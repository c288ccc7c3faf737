"""Adapters on networks as people bring them: handled exactly, or refused in one sentence."""

import copy
from functools import partial

import own_networks
import pytest
import torch
from own_networks import COND, DIM, WIDTH, ByWeight, Checkpointed, Plain, Tied, assert_same, conds
from recorded_graph import RecordedGraph
from small_networks import draw_adapter
from torch import nn
from torch.utils.checkpoint import checkpoint

from mfd_fast import (
    AUX,
    STUDENT,
    TEACHER,
    TEACHER_UNCOND,
    AdapterBank,
    DistillConfig,
    Distiller,
    OptimConfig,
    SharedBackbone,
)
from mfd_fast.backbones.networks import names_of
from mfd_fast.distill.captured import CapturedDistiller

TARGETS = ("first", "last")


def make_backbone(network, targets=TARGETS):
    """Adapters that all do something."""
    bank = AdapterBank(network, rank=4, targets=targets)
    for seed, name in enumerate(bank.names):
        draw_adapter(bank, name, seed)
    return SharedBackbone(network, adapters=bank, sample_shape=(DIM,), null_cond=torch.zeros_like)


def make(network, targets=TARGETS, cls=Distiller, **kwargs):
    optim = OptimConfig(lr=1e-2)
    options = {"guidance": 2.0, "step_size": 0.25, "aux_updates": 1} | kwargs
    config = DistillConfig(student_optim=optim, aux_optim=optim, **options)
    return cls(make_backbone(network, targets), config)


def run_of(distiller, updates=4):
    """The metrics of some updates, the masters, and samples."""
    torch.manual_seed(2)
    rows = [distiller.step(cond) for cond in conds(updates)]
    masters = {r: distiller.parameters_of(r)[0].detach() for r in ("aux", "student")}
    samples = distiller.generate(torch.ones(3, DIM), torch.ones(3, COND))
    return [*rows, masters, {"samples": samples}]


def assert_same_run(one, two):
    for mine, theirs in zip(one, two, strict=True):
        assert_same(mine, theirs)


INSIDE = [
    ("first", "blocks.0.0", "blocks.1.2"),
    ("blocks.0.0", "blocks.1.2"),
    ("blocks.0.2", "blocks.1.0", "last"),
]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("targets", INSIDE)
def test_what_a_network_checkpoints_is_computed_again_under_its_adapters(targets, captured):
    """Two calls of the student in one graph, two parts: bit for bit as without checkpoints."""
    torch.manual_seed(1)
    network = Checkpointed()
    options = {"student_steps": 2, "micro_batches": 2, "aux_draws_per_sample": 2}
    cls = partial(CapturedDistiller, graph=RecordedGraph) if captured else Distiller
    expected = run_of(make(copy.deepcopy(network), targets, **options))
    network.reentrant = False
    # Replay needs the same operators: what a recomputation runs is captured like anything else.
    assert_same_run(run_of(make(network, targets, cls, **options)), expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_call_in_a_graph_is_computed_again_under_its_own_adapters(order):
    """One backward from calls of different lanes, and from the frozen network outside of them."""
    torch.manual_seed(1)
    network = Checkpointed()
    grads = {}
    for reentrant in (None, False):
        network.reentrant = reentrant
        twin = copy.deepcopy(network)
        backbone = make_backbone(twin, ("blocks.0.0", "blocks.1.2"))
        torch.manual_seed(3)
        x, t = torch.randn(6, 3, DIM, requires_grad=True), torch.rand(6)
        prepared = backbone.prepare(torch.randn(6, COND))
        calls = [(AUX, TEACHER, STUDENT), (STUDENT, TEACHER_UNCOND, TEACHER)]
        v = [backbone.forward(x, t, prepared, calls[index]) for index in order]
        plain = twin(x[:, 0], t, prepared.cond)
        (v[0] * v[1]).sum().add(plain.square().sum()).backward()
        grads[reentrant] = {r: backbone.parameters_of(r)[0].grad for r in ("aux", "student")}
        grads[reentrant]["x"] = x.grad
    assert_same(grads[None], grads[False])
    assert all(grad.any() for grad in grads[None].values())


class Prepares(Plain):
    """Keys of the condition, checkpointed where they are made."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Sequential(nn.Linear(COND, WIDTH), nn.SiLU(), nn.Linear(WIDTH, COND))
        self.is_checkpointed = False

    def prepare(self, cond):
        if not self.is_checkpointed:
            return self.keys(cond)
        return checkpoint(self.keys, cond, use_reentrant=False)


def test_what_prepare_checkpoints_is_computed_again_too():
    torch.manual_seed(1)
    network = Prepares()
    targets = ("keys.0", "keys.2", "last")
    expected = run_of(make(copy.deepcopy(network), targets, student_steps=2))
    network.is_checkpointed = True
    assert_same_run(run_of(make(network, targets, student_steps=2)), expected)


@pytest.mark.parametrize("name", ["Dropout", "BatchNorm", "SpectralNorm", "Fixed", "WeightNorm"])
def test_the_shared_network_is_a_function_and_stays_as_it_was(name):
    torch.manual_seed(1)
    network = getattr(own_networks, name)()
    distiller = make(network)
    before = copy.deepcopy(network.state_dict())
    run_of(distiller)
    assert_same(before, network.state_dict())
    noise, cond = torch.randn(4, DIM), torch.randn(4, COND)
    assert torch.equal(distiller.generate(noise, cond), distiller.generate(noise, cond))


COMPILE = partial(torch.compile, backend="eager")


@pytest.mark.parametrize("wraps_blocks", [False, True])
def test_a_compiled_network_gives_the_same_and_keeps_its_names(wraps_blocks):
    torch._dynamo.reset()
    torch.manual_seed(1)
    network, targets = Checkpointed(), ("blocks.0.0", "2", "last")
    eager = make(copy.deepcopy(network), targets)
    if wraps_blocks:
        network.blocks[0] = COMPILE(network.blocks[0])
    compiled = make(network if wraps_blocks else COMPILE(network), targets)
    assert_same_run(run_of(compiled), run_of(eager))
    keys = [list(d.backbone.adapters.adapter_state_dict("student")) for d in (eager, compiled)]
    assert keys[0] == keys[1]
    again = copy.deepcopy(eager.backbone.adapters)
    again.load_adapter_state_dict("aux", compiled.backbone.adapters.adapter_state_dict("student"))


def parametrized():
    network = own_networks.WeightNorm()
    return AdapterBank(network, rank=4, targets=TARGETS)


def attention(targets):
    """torch's own block: its attention uses out_proj by weight; its fast path, all of it."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.out = nn.Linear(DIM + 1 + COND, WIDTH), nn.Linear(WIDTH, DIM)
            self.block = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)

        def forward(self, x, t, cond):
            h = self.inp(torch.cat([x, t[:, None], cond], dim=1))
            return self.out(self.block(h[:, None])[:, 0])

    return make(Attends(), targets)


def one_cycle(distiller):
    for cond in conds(2):
        distiller.step(cond)


def called_before():
    torch._dynamo.reset()
    network = COMPILE(Plain().eval().requires_grad_(False))
    for _ in range(2):
        with torch.no_grad():
            network(torch.zeros(8, DIM), torch.zeros(8), torch.zeros(8, COND))
    return make(network)


class ReturnsOutput(Plain):
    def forward(self, x, t, cond):
        return (super().forward(x, t, cond),)


class Unused(Plain):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)


class PartlyWithout(Plain):
    """A part that never gets a gradient."""

    def inner(self, h):
        with torch.no_grad():
            return super().inner(h)


def test_layers_that_are_called_in_other_forwards_only_are_not_missed():
    """Once every target was seen, with and without gradient, nothing is checked any more."""
    distiller = attention(("linear1", "linear2", "inp", "out"))
    one_cycle(distiller)
    bank = distiller.backbone.adapters
    with torch.no_grad():
        bank.check_called()
    bank.check_called()
    before = bank.adapter_state_dict("student", prefix="")
    one_cycle(distiller)
    after = bank.adapter_state_dict("student", prefix="")
    assert all(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: one_cycle(attention(("out_proj", "linear1"))),
            r"call \['block.self_attn.out_pr",
        ),
        (lambda: one_cycle(make(ByWeight())), r"did not call \['last'\], so .* F.linear"),
        (lambda: one_cycle(make(ByWeight(only_without_grad=True))), r"did not call \['last'\]"),
        (lambda: one_cycle(make(Unused(), ("first", "head"))), r"call \['head'\], .* leave out of"),
        (lambda: one_cycle(called_before()), "make the bank of a compiled network before its fir"),
        (
            lambda: one_cycle(make(Checkpointed(reentrant=True), ("first", "blocks.0.0"))),
            "blocks.0.0 runs without gradient .*: checkpoint with use_reentrant=False",
        ),
        (
            lambda: one_cycle(make(Checkpointed(reentrant=True), ("blocks.0.0", "blocks.1.2"))),
            "blocks.0.0 runs without gradient .*: checkpoint with use_reentrant=False",
        ),
        (
            lambda: one_cycle(make(ReturnsOutput())),
            "must return one tensor, .* got tuple",
        ),
        (lambda: one_cycle(make(PartlyWithout())), "leave what runs under torch.no_grad out of t"),
        (
            lambda: parametrized().merge("aux"),
            "weight of first is computed .*remove_parametrizat",
        ),
        (
            lambda: AdapterBank(Tied(), targets=("second", "third")).merge("aux"),
            r"\['second'\] share their weight .* leave all but one out of targets",
        ),
        (
            lambda: make(Plain(), ("first", "to_qq")),
            r"targets \('to_qq',\) match nothing; .*'firs",
        ),
        (lambda: make(Checkpointed(), ("0",)), "blocks.0 is Sequential. Narrow the targets"),
        (lambda: make(Plain(), ("first", " last")), r"targets \(' last',\) match nothing"),
        (lambda: make(Plain(), ()), r"targets \(\) match nothing"),
        (lambda: make(Plain(), "first, last"), r"targets \('first, last',\) match nothing"),
        (
            lambda: SharedBackbone(
                Checkpointed(), adapters=None, sample_shape=(DIM,), activation="block"
            ),
            r"\('to_q', 'to_k', 'to_v'\) match nothing",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(run, message):
    with pytest.raises(ValueError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_blocks_of_an_activation_policy_must_all_exist():
    from mfd_fast.backbones.activation import apply_activation_policy

    with pytest.raises(ValueError, match=r"blocks \('7',\) match nothing"):
        apply_activation_policy(Checkpointed(), "block", ("0", "7"))


def test_a_refused_merge_changes_nothing():
    bank = parametrized()
    before = copy.deepcopy([target.module.state_dict() for target in bank.targets])
    with pytest.raises(ValueError, match="is computed"):
        bank.merge("aux")
    for target, state in zip(bank.targets, before, strict=True):
        assert_same(state, target.module.state_dict())
    with bank.lanes((("aux",),)):  # it is not said to be merged
        pass


@pytest.mark.parametrize("setting", ["to_q,to_k,to_v", "to_q, to_k , to_v", " to_q,to_k,to_v,"])
def test_names_of_a_setting_may_have_blanks(setting):
    assert names_of(setting) == ("to_q", "to_k", "to_v")


def test_targets_may_come_from_an_iterator():
    bank = AdapterBank(Plain(), targets=(name for name in TARGETS))
    assert [target.name for target in bank.targets] == list(TARGETS)
