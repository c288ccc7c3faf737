"""SharedBackbone: three roles of one network in one call, prepared rows, the whole step."""

import pytest
import torch
from small_networks import (
    NETWORKS,
    SAMPLE_SHAPE,
    TARGETS,
    ImageNetwork,
    PreparingNetwork,
    image_inputs,
    make_bank,
    null_text,
)
from torch import nn

from mfd_fast import (
    AUX,
    STUDENT,
    TEACHER,
    TEACHER_UNCOND,
    AdapterBank,
    CopiedBackbone,
    DistillConfig,
    SharedBackbone,
)
from mfd_fast.distill.objectives import make_objective
from mfd_fast.testing.counting import Count
from mfd_fast.testing.numerics import assert_as_accurate

TRIPLE = (TEACHER, TEACHER_UNCOND, AUX)


def make_backbone(network, *, with_teacher_adapter=False, **kwargs):
    """A backbone whose adapters all do something."""
    _, bank = make_bank(network)
    teacher = None
    if with_teacher_adapter:
        state = {key: value.flip(0) for key, value in bank.adapter_state_dict("aux").items()}
        bank.add_frozen("mine", state, alpha=2.0, rank=4)
        teacher = "mine"
    options = {"sample_shape": SAMPLE_SHAPE, "null_cond": null_text} | kwargs
    return SharedBackbone(network, adapters=bank, teacher_adapter=teacher, **options)


def merged_copy(backbone, role, dtype):
    """A network without adapters whose weights are the role's."""
    plain = ImageNetwork().to(dtype)
    plain.load_state_dict(backbone.network.state_dict())
    modules = dict(plain.named_modules())
    for name in backbone.adapters_of[role]:
        scale = backbone.adapters.scale(name)
        state = backbone.adapters.adapter_state_dict(name, prefix="")
        with torch.no_grad():
            for target in backbone.adapters.targets:
                a, b = (state[f"{target.name}.lora_{f}.weight"].flatten(1).to(dtype) for f in "AB")
                weight = modules[target.name].weight
                weight += (scale * (b @ a)).view_as(weight)
    return plain


def copied(backbone, dtype=torch.float32):
    networks = [merged_copy(backbone, role, dtype) for role in ("teacher", "aux", "student")]
    return CopiedBackbone(*networks, sample_shape=SAMPLE_SHAPE, null_cond=null_text)


def wide(tree):
    return {key: value.double() for key, value in tree.items()}


def make_twins(kind, **kwargs):
    """The same backbone in float32 and float64."""
    network = NETWORKS[kind]()
    narrow = make_backbone(network, **kwargs)
    plain = NETWORKS[kind]().double()
    plain.load_state_dict(network.state_dict())
    return narrow, make_backbone(plain, **kwargs)


@pytest.mark.parametrize("with_teacher_adapter", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("lanes", [TRIPLE, (TEACHER, AUX), (STUDENT,), (AUX,)])
@pytest.mark.parametrize("kind", NETWORKS)
def test_one_call_for_all_lanes_equals_copies_with_merged_weights(
    kind, lanes, n, with_teacher_adapter
):
    backbone, _ = make_twins(kind, with_teacher_adapter=with_teacher_adapter)
    _, t, cond = image_inputs(5)
    x, t = torch.randn(n, len(lanes), *SAMPLE_SHAPE), t[:n]
    with torch.no_grad():
        v = backbone.forward(x, t, backbone.prepare(cond), lanes)
        eager = copied(backbone)
        exact = copied(backbone, torch.float64)
        theirs = eager.forward(x, t, eager.prepare(cond), lanes)
        truth = exact.forward(x.double(), t, exact.prepare(wide(cond)), lanes)
    assert_as_accurate(v, theirs, truth)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", NETWORKS)
def test_packed_lanes_equal_calls_of_each_role(kind, n):
    backbone, exact = make_twins(kind)
    _, t, cond = image_inputs(5)
    x, t = torch.randn(n, 3, *SAMPLE_SHAPE), t[:n]

    def separate(backbone, x, cond):
        prepared = backbone.prepare(cond)
        parts = [backbone.forward(x[:, i : i + 1], t, prepared, (lane,))
                 for i, lane in enumerate(TRIPLE)]  # fmt: skip
        return torch.cat(parts, dim=1)

    with torch.no_grad():
        v = backbone.forward(x, t, backbone.prepare(cond), TRIPLE)
        assert_as_accurate(v, separate(backbone, x, cond), separate(exact, x.double(), wide(cond)))


def masters_gradient(backbone, role, weight_grads):
    """The chain rule from a gradient of merged weights to A and B: flat, in the bank's order.

    W = W_0 + s B A  gives  dA = s B^T dW  and  dB = s dW A^T.
    """
    bank, parts = backbone.adapters, []
    pairs = bank.adapters[role].split(bank.parameters_of(role)[0].detach())
    for target, (a, b) in zip(bank.targets, pairs, strict=True):
        grad = weight_grads[f"{target.name}.weight"].flatten(1)
        a, b = a.to(grad.dtype), b.to(grad.dtype)
        parts += [bank.scale(role) * (b.t() @ grad), bank.scale(role) * (grad @ a.t())]
    return torch.cat([part.flatten() for part in parts])


def role_loss(backbone, role, config, cond, noises):
    """The losses of the two updates, written out with fixed random numbers."""
    prepared = backbone.prepare(cond)
    z, eps = noises

    def velocity(x, t, lane):
        return backbone.forward(x[:, None], t, prepared, (lane,))[:, 0]

    if role == "aux":
        t = torch.linspace(0.2, 0.9, len(z))
        return (velocity(z, t, AUX) - eps).square().mean()
    objective = make_objective(config)
    table = objective.draw(len(z), torch.Generator().manual_seed(1))
    x0 = z
    for k in range(config.student_steps):  # every step is part of the graph
        time = torch.full((len(z),), 1 - k / config.student_steps)
        x0 = x0 - velocity(x0, time, STUDENT) / config.student_steps
    return objective.student_loss(backbone, prepared, x0, eps, table)[0]


# Role, steps of the student's sampler, guidance; the auxiliary's loss has neither.
UPDATES = [("aux", 1, 1.0), *(("student", steps, w) for steps in (1, 4) for w in (1.0, 4.5))]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(("role", "steps", "guidance"), UPDATES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_equal_copies_with_merged_weights(kind, role, steps, batch, guidance):
    config = DistillConfig(guidance=guidance, step_size=0.2, student_steps=steps)
    backbone = make_backbone(NETWORKS[kind]())
    z, _, cond = image_inputs(batch)
    noises = (z, torch.randn_like(z))
    role_loss(backbone, role, config, cond, noises).backward()
    (master,) = backbone.parameters_of(role)
    (other,) = backbone.parameters_of("aux" if role == "student" else "student")
    assert other.grad is None and all(p.grad is None for p in backbone.network.parameters())

    def through_copies(dtype):
        backbone_copies = copied(backbone, dtype)
        inputs = [noise.to(dtype) for noise in noises]
        text = {"text": cond["text"].to(dtype)}
        role_loss(backbone_copies, role, config, text, inputs).backward()
        grads = {k: p.grad for k, p in getattr(backbone_copies, role).named_parameters()}
        return masters_gradient(backbone, role, grads)

    assert_as_accurate(master.grad, through_copies(torch.float32), through_copies(torch.float64))


def test_prepare_runs_once_per_lanes_and_grad_mode():
    network = PreparingNetwork()
    backbone = make_backbone(network)
    _, t, cond = image_inputs(4)
    prepared = backbone.prepare(cond)

    def evaluate(lanes, n):
        x = torch.randn(n, len(lanes), *SAMPLE_SHAPE)
        return backbone.forward(x, t[:n], prepared, lanes)

    with torch.no_grad():
        for n in (4, 4, 2, 1):
            evaluate(TRIPLE, n)
        assert network.num_prepared == 1
        evaluate((STUDENT,), 4)
        assert network.num_prepared == 2
    (evaluate((STUDENT,), 4) + evaluate((STUDENT,), 4)).sum().backward()  # one graph for both
    assert network.num_prepared == 3
    with torch.no_grad():
        evaluate((STUDENT,), 4)
    assert network.num_prepared == 3


def test_lanes_may_have_their_own_times():
    backbone = make_backbone(ImageNetwork())
    _, _, cond = image_inputs(2)
    x, t = torch.randn(2, 3, *SAMPLE_SHAPE), torch.rand(2, 3)
    with torch.no_grad():
        prepared = backbone.prepare(cond)
        v = backbone.forward(x, t, prepared, (AUX, AUX, AUX))
        for lane in range(3):
            times = t[:, lane : lane + 1].expand(2, 3)
            same = backbone.forward(x, times, prepared, (AUX, AUX, AUX))
            assert torch.equal(v[:, lane], same[:, lane])


def test_gradient_reaches_the_factors_used_in_prepare():
    backbone = make_backbone(PreparingNetwork())
    x, t, cond = image_inputs(2)
    v = backbone.forward(x[:, None], t, backbone.prepare(cond), (AUX,))
    v.square().mean().backward()
    (master,) = backbone.parameters_of("aux")
    pairs = backbone.adapters.adapters["aux"].split(master.grad)
    for target, (a, b) in zip(backbone.adapters.targets, pairs, strict=True):
        assert a.any() and b.any(), target.name


def test_three_lanes_cost_no_more_operators_than_one_role_and_its_adapter():
    backbone = make_backbone(PreparingNetwork())
    _, t, cond = image_inputs(4)
    prepared, counts = backbone.prepare(cond), {}
    for lanes in [(TEACHER,), (AUX,), TRIPLE]:
        x = torch.randn(4, len(lanes), *SAMPLE_SHAPE)
        with torch.no_grad():
            backbone.forward(x, t, prepared, lanes)  # prepares
            with Count() as count:
                backbone.forward(x, t, prepared, lanes)
        counts[lanes] = count.total
    assert counts[TRIPLE] <= counts[(AUX,)] + 1  # the times of the lanes
    in_loop = sum("to_q" in t.name or "mix" in t.name for t in backbone.adapters.targets)
    assert counts[(AUX,)] == counts[(TEACHER,)] + 2 * in_loop


def meta_sana():
    """diffusers' SANA 1.6B at 1024px without memory behind it, as ``network(x, t, cond)``."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.SanaTransformer2DModel(
            in_channels=32, out_channels=32, num_layers=20, num_attention_heads=70,
            attention_head_dim=32, num_cross_attention_heads=20, cross_attention_head_dim=112,
            cross_attention_dim=2240, caption_channels=2304, mlp_ratio=2.5, sample_size=32,
            patch_size=1,
        )  # fmt: skip
    return MetaSana(model.bfloat16().requires_grad_(False))


class MetaSana(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, cond):
        return self.model(
            hidden_states=x,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            timestep=t,
            return_dict=False,
        )[0]


@pytest.mark.slow
def test_an_ode_step_of_sana_needs_half_the_operators_of_peft():
    """All lanes together, any network: 1,457 compute operators against 3,055."""
    peft = pytest.importorskip("peft")
    text, mask = (torch.empty(1, 300, *c, device="meta").bfloat16() for c in ((2304,), ()))
    cond, t = {"text": text, "mask": mask}, torch.empty(1, device="meta")
    network = meta_sana()
    backbone = SharedBackbone(network, sample_shape=(32, 32, 32), null_cond=lambda cond: cond)
    prepared = backbone.prepare(cond)
    x = torch.empty(1, 3, 32, 32, 32, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        prepared.rows(TRIPLE, 1)
        with Count() as ours:
            backbone.forward(x, t, prepared, TRIPLE)

    theirs = 0
    config = peft.LoraConfig(r=64, lora_alpha=64, target_modules=["to_q", "to_k", "to_v"])
    for lanes in (2, 1):  # guided teacher, then the auxiliary
        if lanes == 1:
            for name in ("student", "aux"):
                network.model.add_adapter(config, adapter_name=name)
            network.to("meta")
        rows = {key: value.expand(lanes, *value.shape[1:]) for key, value in cond.items()}
        with torch.no_grad(), Count() as count:
            network(x[0, :lanes], t.expand(lanes), rows)
        theirs += count.total
    assert ours.total <= theirs / 2


class WrongShape(ImageNetwork):
    def forward(self, x, t, cond):
        return super().forward(x, t, cond)[:, :1]


class WrongPrepare(PreparingNetwork):
    def prepare(self, cond):
        return [pair[0][:1] for pair in super().prepare(cond)]


def run_lanes(network=None, width=1, n=2, lanes=(AUX,), cond=None, null_cond=null_text):
    backbone = make_backbone(ImageNetwork() if network is None else network, null_cond=null_cond)
    cond = image_inputs(2)[2] if cond is None else cond
    x = torch.zeros(n, width, *SAMPLE_SHAPE)
    return backbone.forward(x, torch.zeros(n), backbone.prepare(cond), lanes)


def foreign_bank():
    bank = AdapterBank(ImageNetwork(), targets=TARGETS)
    return SharedBackbone(ImageNetwork(), adapters=bank, sample_shape=SAMPLE_SHAPE)


def bank_with(names, **kwargs):
    network = ImageNetwork()
    bank = AdapterBank(network, targets=TARGETS, names=names)
    return SharedBackbone(network, adapters=bank, sample_shape=SAMPLE_SHAPE, **kwargs)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: run_lanes(WrongShape()), r"shape of its input, \[2, 8, 4, 4\]; got \[2, 1, 4, 4"),
        (lambda: run_lanes(width=2), r"x must be \[n, 1, ...\] with n <= 2 .*; got \[2, 2, 8"),
        (lambda: run_lanes(n=3), r"with n <= 2 for these lanes .*; got \[3, 1, 8, 4, 4\]"),
        (lambda: run_lanes(lanes=TRIPLE, width=3, null_cond=None), "give the backbone null_cond"),
        (lambda: run_lanes(WrongPrepare()), r"must return tensors of 2 rows, .* got shapes \[\[1"),
        (lambda: run_lanes(cond={"text": torch.zeros(2, 1), "n": torch.zeros(3)}), "share their b"),
        (foreign_bank, "belong to another network: their blocks.0.mix.to_v is not this network's"),
        (lambda: bank_with(("aux",)), r"the adapters lack \['student'\]; there is \['aux'\]"),
        (
            lambda: bank_with(("aux", "student"), teacher_adapter="student"),
            "must be frozen, made by add_frozen; 'student' is trained",
        ),
        (lambda: bank_with(("aux", "student"), activation="all"), "policy must be one of"),
        (lambda: bank_with(("aux", "student")).parameters_of("judge"), "role must be one of"),
        (lambda: bank_with(("aux", "student")).refresh("judge"), "role must be one of"),
        (lambda: SharedBackbone(nn.Linear(2, 2), sample_shape=(2,)), "match nothing"),
    ],
)
def test_errors_say_how_to_mend_them(run, message):
    with pytest.raises(ValueError, match=message):
        run()
