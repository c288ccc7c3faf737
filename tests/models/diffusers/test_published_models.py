"""Published models without weights: their sizes, their cost, and estimates from few blocks."""

import re
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny_pipelines import PIPELINES, tiny_pipeline, tiny_size
from torch.utils.flop_counter import FlopCounterMode

from mfd_fast import cli
from mfd_fast.cost import plans
from mfd_fast.cost.cycle import trace_cycle
from mfd_fast.cost.plans import cycle_of, memory_of
from mfd_fast.cost.shapes import shapes_of
from mfd_fast.models import preset
from mfd_fast.models.diffusers import shapes
from mfd_fast.models.diffusers.family import family_of
from mfd_fast.models.diffusers.network import FamilyNetwork
from mfd_fast.models.diffusers.published import PUBLISHED
from mfd_fast.models.diffusers.shapes import outlined, published_pipeline

# Parameters in 10^9 and TFLOP of one evaluation of one row at the model's own size, counted apart
# from this project on networks of the public configurations (HiDream with balanced experts).
SIZES = {
    "sd3-medium": (2.028, 8.90),
    "sd3.5-medium": (2.243, 11.25),
    "sd3.5-large": (8.057, 31.12),
    "flux1-dev": (11.901, 74.38),
    "flux2-dev": (32.223, 282.6),
    "flux2-klein-4b": (3.876, 34.82),
    "flux2-klein-9b": (9.079, 75.51),
    "qwen-image": (20.430, 73.13),
    "z-image": (6.155, 56.58),
    "lumina2": (2.610, 23.83),
    "auraflow": (6.859, 43.97),
    "cogview4": (6.369, 57.28),
    "hidream": (17.106, 77.8),
    "chroma": (8.900, 74.57),
    "bria": (3.786, 25.30),
    "wan2.1-1.3b": (1.419, 283.0),
    "wan2.1-14b": (14.288, 1678),
    "wan2.2-5b": (5.000, 517.0),
    "wan2.2-a14b": (14.288, 1678),  # each of the two
    "hunyuan-video": (12.821, 12069),
    "ltx-2b": (1.923, 37.13),
    "kandinsky5-t2i": (6.022, 47.13),
    "kandinsky5-t2v": (2.008, 660.0),
    "sana-video-2b": (1.906, 111.2),
    "omnigen": (3.762, 37.64),
    "cosmos2-2b": (1.956, 17.84),
    "cosmos2-14b": (14.265, 122.0),
}
SHAPES = {  # height, width and frames of those counts
    **dict.fromkeys(("cosmos2-2b", "cosmos2-14b"), (768, 1360)),
    **dict.fromkeys(("wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b", "sana-video-2b"), (480, 832, 81)),
    "wan2.2-5b": (704, 1280, 121),
    "hunyuan-video": (720, 1280, 129),
    "ltx-2b": (512, 704, 161),
    "kandinsky5-t2v": (512, 768, 121),
}


def counted(family):
    """TFLOP of one evaluation of one row."""
    transformer = family.pipe.transformer.eval()
    family.set_modes(transformer)
    family.without_values(transformer)
    x = torch.empty(1, *family.sample_shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        FamilyNetwork(family)(x, torch.empty(1, device="meta"), family.blank(1))
    return counter.get_total_flops() / 1e12


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_operations_of_the_real_configurations(name):
    family = outlined(preset(name))
    transformer, (parameters, tera) = family.pipe.transformer, SIZES[name]
    assert counted(family) == pytest.approx(tera, rel=0.01)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(
        parameters, abs=6e-4
    )
    size = SHAPES.get(name, (1024, 1024))
    assert (family.height, family.width, getattr(family, "frames", None)) == (*size, None)[:3]
    assert type(family.pipe).__name__ == PUBLISHED[name].pipeline


def test_wan_14b_at_720p_is_the_count_made_apart():
    config = preset("wan2.1-14b")
    config = replace(config, pipeline=replace(config.pipeline, resolution="720x1280"))
    assert counted(outlined(config)) == pytest.approx(6523, rel=0.01)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_blank_condition_is_what_the_family_encodes(name):
    family = family_of(tiny_pipeline(name), **tiny_size(name))
    ours, theirs = family.blank(2), family.encode(["a red fox", "a cat"])
    assert ours.keys() == theirs.keys()
    for leaf, value in theirs.items():
        assert ours[leaf].dtype == value.dtype or leaf == "mask"
        axes = [0, -1] if value.ndim > 2 else [0]  # of text, all but its length (and layers)
        axes = [0, 1] if leaf == "pooled" else axes
        assert ours[leaf].ndim == value.ndim
        assert all(ours[leaf].shape[axis] == value.shape[axis] for axis in axes), leaf


FLUX = {
    **{"in_channels": 16, "num_layers": 1, "num_single_layers": 4, "attention_head_dim": 16},
    **{"num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32},
    **{"axes_dims_rope": [4, 4, 8], "guidance_embeds": True},
}
SD3 = {
    **{"sample_size": 8, "num_layers": 6, "attention_head_dim": 16, "num_attention_heads": 4},
    **{"caption_projection_dim": 64, "joint_attention_dim": 72, "pooled_projection_dim": 64},
    **{"in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8},
    **{"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
}


@pytest.mark.parametrize(
    ("name", "network", "activation"),
    [
        ("flux1-dev", FLUX, "none"),
        pytest.param("sd3.5-medium", SD3, "block", marks=pytest.mark.slow),
    ],
)
def test_few_blocks_of_a_kind_counted_are_the_whole_network(name, network, activation, monkeypatch):
    model = PUBLISHED[name]._replace(network=network)
    monkeypatch.setattr(shapes, "published", lambda _: model)
    config = preset(name)
    config = replace(
        config,
        train=replace(config.train, activation=activation),
        pipeline=replace(config.pipeline, rank=4, resolution="64x64"),
        distill=replace(config.distill, student_steps=1),
    ).resolved()
    assert [n for n, _ in config.terms()] == [-1, 2]
    ours, whole = cycle_of(config, 1), trace_cycle(shapes_of(config), config.distill, 1)
    assert ours.gradients == whole.gradients
    tables = [x.persistent.pop("tables") for x in (ours, whole)]  # and scalars still alive
    assert abs(tables[0] - tables[1]) < 1000
    assert ours.persistent == whole.persistent
    for phase, work in whole.phases.items():
        assert ours.phases[phase].flops == pytest.approx(work.flops)
        assert ours.phases[phase].bytes == pytest.approx(work.bytes)
        assert ours.phases[phase].num_ops == pytest.approx(work.num_ops)
    for is_captured in (False, True):
        sizes = [memory_of(x, is_captured=is_captured, has_context=False) for x in (ours, whole)]
        assert sizes[0] == pytest.approx(sizes[1])


def test_an_estimate_of_a_published_model_needs_no_file(monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("looked for the model")

    monkeypatch.setattr("mfd_fast.models.diffusers.checkpoint.fetch", refuse)
    model = PUBLISHED["sd3.5-medium"]
    assert preset("sd3.5-medium").teacher == model.model
    small = model._replace(network=SD3 | {"num_layers": 2})
    monkeypatch.setattr(shapes, "published", lambda _: small)
    line = "estimate sd3.5-medium --gpu rtx4090 --resolution 64x64 --distill.student-steps 1"
    assert cli.main(line.split()) == 0
    said = capsys.readouterr().out
    assert "sd3.5-medium on 1 x rtx4090" in said
    assert "only between updates: text encoders 11.161 GB" in said
    assert "only between updates: VAE 0.168 GB" in said


def test_an_estimate_of_a_large_video_teacher(capsys, monkeypatch):
    """On one and eight H100, of a run that keeps every activation, with that policy alone."""
    monkeypatch.setattr(plans, "POLICIES", ("none",))
    cycles = {}

    def cycle_once(config, batch):
        key = repr(config), batch
        cycles[key] = cycles[key] if key in cycles else cycle_of(config, batch)
        return cycles[key]

    for module in (plans, sys.modules["mfd_fast.cost.estimate"]):
        monkeypatch.setattr(module, "cycle_of", cycle_once)
    monkeypatch.setattr(shapes, "decoding_bytes", lambda _: 5e9)  # tested below
    for gpus in (1, 8):
        line = f"estimate wan2.1-14b --gpu h100 --gpus {gpus} --resolution 480x832"
        assert cli.main(line.split()) == 0
        check_estimate(capsys.readouterr().out, gpus)


def check_estimate(said, gpus):
    assert "e+" not in said
    forward = float(re.search(r"^aux/forward +([\d,.]+)", said, re.M)[1].replace(",", ""))
    # Ten auxiliary updates; the adapters' own products are the rest.
    assert forward / 10 == pytest.approx(1678, rel=0.01)
    memory = re.search(r"^memory .*", said, re.M)[0]
    assert all(part in memory for part in ("weights", "gradients", "optimizer", "graph pool,"))
    assert "only between updates: decoding a video by tiles 5.000 GB" in said
    assert re.search(r"^1,000 cycles: [\d,.-]+ hours, predicted\.$", said, re.M)
    assert f"on {gpus} x h100" in said and ("GPU hours" in said) == (gpus > 1)


def test_decoding_by_tiles_takes_less_than_the_whole(monkeypatch):
    config = preset("wan2.1-1.3b")
    config = replace(config, pipeline=replace(config.pipeline, frames=5))
    by_tiles = config.beside_the_updates()["decoding a video by tiles"]
    monkeypatch.setattr(shapes, "in_tiles", lambda _: nullcontext())
    whole = config.beside_the_updates()["decoding a video by tiles"]
    assert by_tiles < 0.5 * whole


def test_krea2_is_built_from_the_defaults_of_its_class():
    assert type(published_pipeline(PUBLISHED["krea2"])).__name__ == "Krea2Pipeline"
