"""The frozen base of a run: loaded tensor by tensor, chosen, swapped, continued, refused."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from frozen_bases import as_plain, family_with, quantised
from safetensors.torch import load_file
from test_task import SHORT, settings
from tiny_pipelines import PIPELINES, tiny_pipeline

from mfd_fast import cli
from mfd_fast.backbones.quantized import COMPARED, FrozenLinear
from mfd_fast.cost.plans import cycle_of, memory_of, on_base
from mfd_fast.models.diffusers import base as bases
from mfd_fast.models.diffusers.checkpoint import of_diffusers
from mfd_fast.models.diffusers.family import Family
from mfd_fast.models.diffusers.network import FamilyNetwork

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "hidream-euler"])
def test_a_network_loaded_tensor_by_tensor_is_diffusers_own(name, tmp_path):
    network = tiny_pipeline(name).transformer
    network.save_pretrained(tmp_path, max_shard_size="40KB")
    cls = type(network)
    options = {"blocks": Family.blocks, "dtype": torch.bfloat16, "device": "cpu"}
    theirs = cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = bases.load_network(tmp_path, cls, base="bf16", **options)
    mine = as_plain(ours).state_dict()
    assert mine.keys() == theirs.state_dict().keys()
    for key, x in theirs.state_dict().items():
        assert mine[key].dtype == x.dtype and torch.equal(mine[key], x), key
    assert any(isinstance(x, FrozenLinear) for x in ours.modules())
    (tmp_path / "config.json").rename(tmp_path / "kept")
    for path in [*tmp_path.glob("*.safetensors")][1:]:
        path.unlink()
    (tmp_path / "kept").rename(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"lack .*copy them again"):
        bases.load_network(tmp_path, cls, base="bf16", **options)


# HiDream twice is one too many; OmniGen refuses a base.
ON_A_BASE = [name for name in PIPELINES if name not in ("hidream-euler", "omnigen")]


@pytest.mark.parametrize("name", ON_A_BASE)
def test_every_family_runs_on_a_quantised_base(name):
    network = quantised(name, "int8", torch.float32)
    velocities = []
    for one in (network, as_plain(network)):
        family, cond = family_with(name, one)
        torch.manual_seed(3)
        x = torch.randn(2, *family.sample_shape)
        with torch.no_grad():
            velocities.append(FamilyNetwork(family)(x, torch.tensor([0.3, 0.8]), cond))
    assert torch.equal(*velocities)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd3"
    tiny_pipeline("sd3").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prompts.txt"
    path.write_text("a red fox\ntwo boats\n")
    return path


def test_a_package_that_diffusers_cannot_import_is_a_sentence(monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("Failed to import diffusers.x because of:\nno libcuda")

    monkeypatch.setitem(sys.modules, "diffusers", Broken())
    with pytest.raises(ImportError, match=r"its Sd: no libcuda. Install that package"):
        of_diffusers("Sd")


def least(model, prompts, base):
    """GB of the smallest base memory there can be."""
    stored = settings(model, prompts, base=base).stored()
    return (stored.rest + 2 * max(stored.blocks.values())) / 1e9


def test_a_run_on_nf4_is_the_same_swapped_and_continued(model, prompts, tmp_path):
    command = ["distill", str(model), "--prompts", str(prompts), "--base", "nf4"]
    swapped = ["--base-memory", str(least(model, prompts, "nf4"))]
    out = {name: str(tmp_path / name) for name in ("resident", "swapped", "continued")}
    assert cli.main([*command, "--out", out["resident"], *SHORT, "2"]) == 0
    assert cli.main([*command, "--out", out["swapped"], *SHORT, "2", *swapped]) == 0
    assert cli.main([*command, "--out", out["continued"], *SHORT, "1"]) == 0
    assert cli.main([*command, "--out", out["continued"], *SHORT, "2", "--resume", *swapped]) == 0
    first, *others = (load_file(f"{path}/student.safetensors") for path in out.values())
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert cli.main(["export", out["swapped"], "--out", str(tmp_path / "merged")]) == 0
    merged = load_file(tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors")
    plain = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    for key, weight in plain.items():
        name = f"transformer.{key.removesuffix('.weight')}.lora_"
        if f"{name}A.weight" in first:
            weight = weight + first[f"{name}B.weight"] @ first[f"{name}A.weight"]
        assert torch.allclose(merged[key], weight, atol=1e-6)


def test_a_teacher_lora_is_kept_beside_the_codes(model, prompts, tmp_path):
    out = tmp_path / "first"
    command = ["distill", str(model), "--prompts", str(prompts), "--out", str(out), *SHORT, "1"]
    assert cli.main(command) == 0
    file = out / "student.safetensors"
    state = load_file(file)
    plain = settings(model, prompts, base="int8").task().family.pipe.transformer
    config = settings(model, prompts, base="int8", teacher_lora=f"{file}:0.5")
    with_lora = config.task().family.pipe.transformer
    changed = 0
    for name, layer in with_lora.named_modules():
        if not isinstance(layer, FrozenLinear):
            continue
        before, key = plain.get_submodule(name), f"transformer.{name}.lora_"
        assert torch.equal(layer.stored, before.stored)
        delta = layer.weight - before.weight
        if f"{key}A.weight" in state:
            product = 0.5 * state[f"{key}B.weight"] @ state[f"{key}A.weight"]
            assert torch.allclose(delta, product, atol=1e-6)
            changed += bool(product.any())
        else:
            assert not delta.any()
    assert changed


def test_auto_takes_the_largest_format_that_fits(model, prompts, monkeypatch):
    config = settings(model, prompts, base="auto").resolved()
    plain = cycle_of(config, 1)

    def needed(base):
        one = replace(config, pipeline=replace(config.pipeline, base=base))
        cycle = on_base(plain, one.stored(), config, config.train.activation)
        return sum(memory_of(cycle, is_captured=False, has_context=False).values())

    sizes = {base: needed(base) for base in COMPARED}
    assert [*sizes] == sorted(sizes, key=sizes.get, reverse=True)
    for base, size in sizes.items():
        monkeypatch.setattr(bases, "free_memory", lambda device, size=size: size)
        task = config.task()
        assert task.config.pipeline.base == base
        assert task.check()["base"].startswith(f"{base}, ") and "(auto, " in task.check()["base"]
    monkeypatch.setattr(bases, "free_memory", lambda device: sizes["nf4"] - 1000)
    with pytest.raises(ValueError, match=r"even with nf4 .*--train.activation block takes less"):
        config.task()


def test_what_a_base_refuses(model, prompts, monkeypatch):
    def said(**options):
        config = settings(model, prompts, **options)
        with pytest.raises((ValueError, ImportError)) as error:
            config.task()
        return str(error.value)

    assert "--base-memory must be at least" in said(base="int8", base_memory=1e-6)
    monkeypatch.setattr(bases, "free_memory", lambda device: 1000.0)
    text = said(base="int8", base_memory=least(model, prompts, "int8"))
    assert "would live in the host's memory" in text and "raise --base-memory by" in text
    config = settings(model, prompts, base="int8")
    with pytest.raises(ValueError, match=r"drop --train\.float8, or take --base bf16"):
        replace(config, train=replace(config.train, float8=True)).task()
    config = settings(model, prompts, base_memory=1.0)
    with pytest.raises(ValueError, match="come from the host"):
        replace(config, train=replace(config.train, capture="on")).task()


def test_the_error_of_a_base_on_the_users_prompts(model, prompts, capsys):
    """nf4 errs more than int8, and is told what is better where that is above the solver's own."""
    command = ["estimate", str(model), "--check-base", "--prompts", str(prompts), *SHORT[:6]]
    errors = {}
    for base in ("int8", "nf4"):
        capsys.readouterr()
        assert cli.main([*command, "--distill.step-size", ".3", "--base", base]) == 0
        said = capsys.readouterr().out
        errors[base], bound = (float(x) / 100 for x in re.findall(r"([\d.]+)%", said))
        assert ("below that" in said) == (errors[base] <= bound)
        assert (f"take --base {'int8' if base == 'nf4' else 'bf16'}" in said) == (
            errors[base] > bound
        )
    assert 0 < errors["int8"] < errors["nf4"]
    assert cli.main(command) == 2
    assert "add --base int8 or nf4" in capsys.readouterr().err
    assert cli.main(["estimate", "digits", "--check-base"]) == 2
