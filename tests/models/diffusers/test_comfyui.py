"""A student's LoRA under ComfyUI's names, read back by diffusers' own converters of that layout."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_networks import draw_adapter
from tiny_pipelines import PIPELINES, tiny_pipeline, tiny_size

from mfd_fast import DistillConfig
from mfd_fast.diffusers import distillation
from mfd_fast.models.diffusers.family import family_of
from mfd_fast.models.diffusers.lumina2 import Lumina2
from mfd_fast.models.diffusers.student import COMFYUI, WORKFLOW, comfyui_layers
from mfd_fast.models.sana.lora_files import Lora, save_comfyui_lora

CONFIG = DistillConfig(aux_updates=1, step_size=0.3)
OTHER_NAMES = ("flux2-dev", "flux2-klein", "lumina2")
OTHER_NAMES += ("wan", "wan2.2-5b", "wan2.2-a14b", "ltx", "ltx-static")
UNKNOWN = ("bria", "cogview4", "krea2", "sana")  # SANA's own preset writes such a file
UNKNOWN += ("kandinsky5-t2i", "kandinsky5-t2v", "hunyuan-video", "sana-video", "mochi")
UNKNOWN += ("cosmos2", "omnigen")


def products(state, prefix="transformer."):
    """Module -> B A."""
    names = {key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key}
    factors = {n: (state[f"{n}.lora_A.weight"], state[f"{n}.lora_B.weight"]) for n in names}
    return {n.removeprefix(prefix): b.float() @ a.float() for n, (a, b) in factors.items()}


def as_ab(state):
    """The factors as converters name them; alphas are checked by themselves."""
    names = {"lora_down": "lora_A", "lora_up": "lora_B"}
    return {
        key.replace(old, new): x
        for key, x in state.items()
        for old, new in names.items()
        if old in key
    }


def saved(name, folder, **options):
    pipe = tiny_pipeline(name)
    made = distillation(pipe, **tiny_size(name), rank=2, config=CONFIG, **options)
    draw_adapter(made.backbone.adapters, "student", 3)
    return pipe, {path.name for path in made.save(folder)}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("flux2-klein", ".img_attn.qkv."),
        ("wan", ".cross_attn.o."),
        ("ltx", "transformer_blocks.1.attn2.to_q."),
    ],
)
def test_native_names_are_what_diffusers_reads(name, layer, tmp_path):
    pipe, files = saved(name, tmp_path)
    assert COMFYUI in files
    state = load_file(tmp_path / COMFYUI)
    assert all(key.startswith("diffusion_model.") for key in state)
    assert any(layer in key for key in state)
    theirs = products(type(pipe).lora_state_dict(as_ab(state)))
    ours = products(load_file(tmp_path / "student.safetensors"))
    assert theirs.keys() == ours.keys()
    for module, delta in ours.items():
        assert torch.allclose(theirs[module], delta, rtol=1e-5, atol=1e-7), module
    for key in [key for key in state if key.endswith(".alpha")]:
        assert state[key] == len(state[key.replace(".alpha", ".lora_down.weight")])


def test_lumina2_under_native_names_is_what_diffusers_reads(tmp_path):
    """At the widths of the published model, which the converter knows by heart."""
    from diffusers import Lumina2Pipeline

    draw = torch.Generator().manual_seed(0)
    widths = {"attn.to_q": 2304, "attn.to_k": 768, "attn.to_v": 768, "attn.to_out.0": 2304}
    widths |= {f"feed_forward.linear_{n}": 8 for n in (1, 2, 3)} | {"norm1.linear": 8}
    lora = Lora(
        {
            f"{stack}.0.{name}": (
                torch.randn(2, 4, generator=draw), torch.randn(rows, 2, generator=draw)
            )
            for stack in ("layers", "noise_refiner", "context_refiner")
            for name, rows in widths.items()
            if (stack, name) != ("context_refiner", "norm1.linear")
        }
    )  # fmt: skip
    wholes = comfyui_layers(Lumina2, lora)
    save_comfyui_lora(lora, tmp_path / COMFYUI, description="a student", wholes=wholes)
    state = load_file(tmp_path / COMFYUI)
    theirs = products(Lumina2Pipeline.lora_state_dict(as_ab(state)))
    assert theirs.keys() == lora.factors.keys()
    for module, (a, b) in lora.factors.items():
        assert torch.allclose(theirs[module], b @ a, rtol=1e-5, atol=1e-6), module


@pytest.mark.parametrize("name", ["sd3", "qwen-image", "z-image", "lumina2", "bria"])
def test_one_file_where_it_serves_both_programs(name, tmp_path):
    _, files = saved(name, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert (COMFYUI in files) == (name in OTHER_NAMES)
    assert ("ComfyUI" in card) == (name not in UNKNOWN)
    assert (WORKFLOW in files) == (name not in UNKNOWN)
    if WORKFLOW in files:
        graph = json.loads((tmp_path / WORKFLOW).read_text())
        assert graph["student"]["inputs"]["lora_name"] in files
        assert graph["sigmas"]["inputs"]["sigmas"].replace(",", "") in card
        linked = [v[0] for node in graph.values() for v in node["inputs"].values()
                  if isinstance(v, list)]  # fmt: skip
        assert {*linked} == {*graph} - {"file"}  # every node is used, and is there
    if name not in (*OTHER_NAMES, *UNKNOWN):
        assert "not run there): load `student.safetensors`" in card


def test_a_layer_without_a_name_there_means_no_file(tmp_path):
    _, files = saved("flux2-klein", tmp_path, targets=("attn.to_q", "x_embedder"))
    assert COMFYUI not in files
    assert "ComfyUI" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_says_what_comfyui_reads(name):
    family = family_of(tiny_pipeline(name), **tiny_size(name))
    assert bool(family.comfyui) == (name in OTHER_NAMES)
    assert (family.comfyui is None) == (name in UNKNOWN)
