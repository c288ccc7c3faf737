"""Compiled blocks: as many graphs as kinds of blocks and sets of lanes, and the same results."""

import shutil

import pytest
import torch
from small_networks import draw_adapter
from tiny_pipelines import SIDES, tiny_pipeline
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from mfd_fast import AUX, TEACHER, TEACHER_UNCOND, DistillConfig, Distiller
from mfd_fast.backbones.compiled import check_compiler
from mfd_fast.backbones.float8 import use_float8
from mfd_fast.distill.graphs import check_capture_safe
from mfd_fast.models.diffusers.backbone import backbone_of
from mfd_fast.models.diffusers.family import family_of
from mfd_fast.testing.counting import Count
from mfd_fast.testing.numerics import assert_as_accurate


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def made(name, **options):
    pipe = tiny_pipeline(name)
    if name == "sd3":  # a block like the others, and the last one, without a text to hand on
        pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[1:]
    side = SIDES.get(name, 64)
    family = family_of(pipe, height=side, width=side)
    backbone = backbone_of(family, rank=2, **options)
    for seed, adapter in enumerate(("aux", "student")):
        draw_adapter(backbone.adapters, adapter, seed)
    return family, backbone, family.encode(["a red fox"])


def masters(family, backbone, cond, *, after_cycle=lambda: None):
    """What two cycles make of the adapters."""
    config = DistillConfig(
        student_steps=2, guidance=family.guidance, step_size=0.2, aux_updates=2, seed=3
    )
    distiller = Distiller(backbone, config)
    if backbone.dtype == torch.float64:  # the exact run: the same noise, wider
        noise = distiller._noise
        distiller._noise = lambda *shape: noise(*shape).double()
    for _ in range(2):
        for _ in range(config.aux_updates + 1):
            distiller.step(cond)
        after_cycle()
    found = (backbone.parameters_of(role)[0].detach().clone() for role in ("aux", "student"))
    return torch.cat(list(found))


def exact(name):
    """The same in float64."""
    family, backbone, cond = made(name)
    backbone.double().dtype = torch.float64
    null = family.encode_null()
    wide = [
        {key: x.double() if x.is_floating_point() else x for key, x in leaves.items()}
        for leaves in (cond, null)
    ]
    family.null_row = wide[1]
    return masters(family, backbone, wide[0])


def kinds_of(backbone):
    return {
        (type(block), tuple((name, x.shape) for name, x in block.named_parameters()))
        for block in backbone.activation.blocks.values()
    }


def watched(backbone):
    """The sets of lanes that the backbone will be asked for, with gradient or without."""
    forward, seen = backbone.forward, set()

    def forward_of(x, t, prepared, lanes):
        seen.add((lanes, torch.is_grad_enabled()))
        return forward(x, t, prepared, lanes)

    backbone.forward = forward_of
    return seen


CASES = [
    ("sd3", "none", "eager"),
    ("flux1-dev", "block", "eager"),
    ("qwen-image", "cheap", "aot_eager"),
    ("sana", "none", "eager"),  # its keys and values were computed before
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "activation", "backend"), CASES)
def test_a_cycle_has_a_graph_for_each_kind_of_block_and_set_of_lanes(name, activation, backend):
    counter, counts = CompileCounterWithBackend(backend), []
    family, backbone, cond = made(name, activation=activation, compiler=counter)
    seen = watched(backbone)
    ours = masters(family, backbone, cond, after_cycle=lambda: counts.append(counter.frame_count))
    assert len(seen) == 4
    assert 0 < counts[0] <= len(kinds_of(backbone)) * len(seen)
    assert counts[1] == counts[0]
    assert not counters["graph_break"]
    assert_as_accurate(ours, masters(*made(name, activation=activation)), exact(name))


def test_compiled_blocks_can_be_captured_and_lose_no_state():
    family, backbone, cond = made("flux1-dev", compiler="aot_eager")
    plain = made("flux1-dev")[1]
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(1, 1, *family.sample_shape).expand(-1, 2, -1, -1)
    prepared, t = backbone.prepare(cond), torch.tensor([0.7])

    @torch.no_grad()
    def step(_):
        return backbone.forward(x, t, prepared, (TEACHER, AUX))

    for i in range(2):
        step(i)
    assert check_capture_safe(step) > 0  # what the compiler started from
    with torch.no_grad():
        theirs = plain.forward(x, t, plain.prepare(cond), (TEACHER, AUX))
    assert torch.equal(step(0), theirs)  # aot_eager runs the same operators
    student = backbone.student_network()
    assert not any("forward" in vars(module) for module in student.modules())


LANES = (TEACHER, TEACHER_UNCOND, AUX)


def a_block(compiler=None, dtype=torch.float32):
    """A block of SD 3 for the lanes of a trajectory: run it."""
    backbone = made("sd3", compiler=compiler)[1].to(dtype)
    block = backbone.network.transformer.transformer_blocks[0]
    draws = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (3, 16, 32), "encoder_hidden_states": (3, 9, 32), "temb": (3, 32)}
    given = {name: torch.randn(shape, generator=draws).to(dtype) for name, shape in shapes.items()}

    @torch.no_grad()
    def run():
        with backbone.adapters.lanes(backbone._per_lane(LANES), rows=3):
            return block(**given)[1]

    backbone.adapters.mark_called(0, len(backbone.adapters.targets))
    with torch.no_grad():
        backbone.adapters.mark_called(0, len(backbone.adapters.targets))
    return run


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_fewer_operators_are_launched():
    from torch._inductor import metrics

    check_compiler(torch.device("cpu"))
    metrics.reset()
    eager, compiled = a_block(), a_block("inductor")
    assert_as_accurate(compiled(), eager(), a_block(dtype=torch.float64)())
    with Count() as count:
        eager()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        compiled()
    names = [event.name.removeprefix("aten::") for event in run.events()]
    products = [name for name in names if name in ("mm", "addmm", "bmm", "baddbmm")]
    products += [name for name in names if name.startswith("_scaled_dot_product")]
    launched = metrics.generated_kernel_count + len(products)
    print(f"an SD 3 block: {count.total} operators, compiled {launched}")
    assert products and launched < count.total


def test_what_does_not_go_together_is_refused():
    _, backbone, _ = made("flux1-dev", compiler="eager")
    with pytest.raises(ValueError, match="float8 does not go together with compiled blocks"):
        use_float8(backbone)
    with pytest.raises(ValueError, match=r"pipeline.compile must be off for HiDream"):
        made("hidream", compiler="eager")
