"""``mfd-fast export``: a whole checkpoint, be the teacher a folder, a model id, a variant."""

import json
import shutil

import huggingface_hub
import pytest
import torch

from mfd_fast.models import preset
from mfd_fast.models.sana import load_sana_transformer
from mfd_fast.models.sana.lora_files import Lora, merge_lora, read_lora, save_diffusers_lora
from mfd_fast.models.sana.presets import SanaRun
from mfd_fast.models.sana.tiny import make_tiny_checkpoint
from mfd_fast.run.config import from_dict, to_dict

diffusers = pytest.importorskip("diffusers")

REPO, COMMIT = "owner/sana", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    factors = (torch.ones(2, 64), torch.ones(64, 2))
    lora = Lora({"transformer_blocks.0.attn1.to_q": factors})
    save_diffusers_lora(lora, folder / "student.safetensors", description="a student")
    return folder


def with_variant(plain, target, *, mixed):
    """The checkpoint under a variant, sharded; if mixed, with other weights under plain names."""
    pipeline = diffusers.SanaPipeline.from_pretrained(plain)
    pipeline.save_pretrained(target, variant="fp16", max_shard_size="20KB")
    if mixed:  # the VAE has the variant only, the text encoder has both, and a pickle
        other = make_tiny_checkpoint(target.with_name("other"), seed=1)
        shutil.copy2(other / "text_encoder" / "model.safetensors", target / "text_encoder")
        (target / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    return target


def exported(checkpoint, run, out, **sana):
    tree = to_dict(preset("sana-tiny")) | {"teacher": str(checkpoint)}
    tree["sana"] |= {"dtype": "float32"} | sana
    tree["train"] |= {"device": "cpu"}
    return from_dict(SanaRun, tree).task().export(run, out)


def assert_whole(out, plain, run):
    """The teacher's pipeline with the LoRA merged, opened without a word of variants."""
    found = diffusers.SanaPipeline.from_pretrained(out)
    teacher = diffusers.SanaPipeline.from_pretrained(plain)
    student = load_sana_transformer(plain, dtype=torch.float32)
    merge_lora(student, read_lora(run / "student.safetensors"))
    for part, wanted in (
        (found.transformer, student),
        (found.vae, teacher.vae),
        (found.text_encoder, teacher.text_encoder),
    ):
        state = part.state_dict()
        assert state.keys() == wanted.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in wanted.state_dict().items())
    assert found.scheduler.config == teacher.scheduler.config
    assert found.tokenizer("a fox").input_ids == teacher.tokenizer("a fox").input_ids
    names = [path.name for path in out.rglob("*")]
    assert not [name for name in names if "fp16" in name or name.endswith(".bin")]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_variant_becomes_a_whole_checkpoint_without_one(plain, run, mixed, tmp_path):
    base = with_variant(plain, tmp_path / "base", mixed=mixed)
    exported(base, run, tmp_path / "out", variant="fp16")
    assert_whole(tmp_path / "out", plain, run)


def cached(folder, cache, monkeypatch):
    """The folder as a model of the hub's cache, offline."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_a_model_id_becomes_a_whole_checkpoint(plain, run, variant, tmp_path, monkeypatch):
    base = with_variant(plain, tmp_path / "base", mixed=False) if variant else plain
    cached(base, tmp_path / "cache", monkeypatch)
    exported(REPO, run, tmp_path / "out", variant=variant)
    assert_whole(tmp_path / "out", plain, run)


def test_what_is_fetched_of_a_model_id_is_one_set_of_weights(plain, run, tmp_path, monkeypatch):
    """A hub of two variants, of which the VAE has one only: no file is fetched in vain."""
    import fnmatch

    hub = with_variant(plain, tmp_path / "hub", mixed=True)
    shutil.rmtree(hub / "vae")
    shutil.copytree(plain / "vae", hub / "vae")
    local, there = tmp_path / "local", [path for path in hub.rglob("*") if path.is_file()]

    def download(repo, *, revision, allow_patterns):
        for path in there:
            name = str(path.relative_to(hub))
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, local / name)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    exported(REPO, run, tmp_path / "out", variant="fp16")
    assert_whole(tmp_path / "out", plain, run)
    assert not (local / "text_encoder" / "model.safetensors").exists()
    assert not (local / "text_encoder" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
@pytest.mark.parametrize("what", ["folder", "weights"])
def test_a_part_that_the_teacher_lacks_is_named_and_nothing_is_written(
    plain, run, part, what, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(plain, base)
    if what == "folder":
        shutil.rmtree(base / part)
    else:
        next((base / part).glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {part}, which its model_index\.json"):
        exported(base, run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_an_export_into_the_checkpoint_is_refused(plain, run):
    with pytest.raises(ValueError, match="lies in the checkpoint that it copies"):
        exported(plain, run, plain / "merged")
    assert json.loads((plain / "model_index.json").read_text())["_class_name"] == "SanaPipeline"
