"""Loading what diffusers' save_pretrained writes, from a folder or the hub's cache, offline."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from sana_models import VARIANTS, call_theirs, inputs, make_theirs

from mfd_fast.models.sana import load_sana_transformer
from mfd_fast.testing.numerics import assert_as_accurate

STEM = "diffusion_pytorch_model"
SAVES = {
    "one file": {},
    "shards": {"max_shard_size": "40KB"},
    "variant": {"variant": "fp16"},
    "shards of a variant": {"variant": "fp16", "max_shard_size": "40KB"},
}


@pytest.fixture(params=SAVES)
def saved(request, tmp_path):
    """A model, the pipeline folder with its transformer, and the variant it was saved as."""
    options = SAVES[request.param]
    theirs = make_theirs(**VARIANTS["qk_norm"]).bfloat16()
    theirs.save_pretrained(tmp_path / "transformer", **options)
    return theirs, tmp_path, options.get("variant")


@pytest.fixture
def folder(tmp_path):
    make_theirs().save_pretrained(tmp_path / "transformer", max_shard_size="40KB")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(saved, dtype):
    theirs, folder, variant = saved
    for path in (folder, str(folder / "transformer")):
        ours = load_sana_transformer(path, variant=variant, dtype=dtype)
        state = ours.state_dict()
        assert state.keys() == theirs.state_dict().keys()
        assert all(
            torch.equal(state[key], value.to(dtype)) for key, value in theirs.state_dict().items()
        )
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    x, t, cond = inputs(2, dtype)
    eager = call_theirs(theirs.to(dtype), x, t, cond)
    exact = load_sana_transformer(folder, variant=variant, dtype=torch.float64)(x.double(), t, cond)
    assert_as_accurate(ours(x, t, cond), eager.detach(), exact)


def test_a_time_table_is_made_from_the_loaded_weights(folder):
    x, t, cond = inputs(2)
    t = t.mul(1000).round() / 1000
    tabled, direct = (load_sana_transformer(folder, time_table=on, dtype=torch.float32)(x, t, cond)
                      for on in (True, False))  # fmt: skip
    assert_as_accurate(
        tabled, direct, load_sana_transformer(folder, dtype=torch.float64)(x.double(), t, cond)
    )


def put_in_cache(cache, folder, commit="c0ffee" + 34 * "0", revision="main"):
    """The layout of the hub's cache, as a download leaves it."""
    repo = cache / "models--owner--sana"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / revision).write_text(commit)


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_a_model_id_loads_offline_from_the_cache(saved, offline_cache):
    theirs, folder, variant = saved
    put_in_cache(offline_cache, folder / "transformer" / "..", revision="v2")
    ours = load_sana_transformer("owner/sana", revision="v2", variant=variant)
    assert torch.equal(ours.proj_out.weight, theirs.proj_out.weight)


def test_a_model_that_is_not_in_the_cache(offline_cache):
    message = r"'owner/sana' is no local folder, and the model at revision 'v2' is neither in the"
    with pytest.raises(FileNotFoundError, match=message):
        load_sana_transformer("owner/sana", revision="v2")


def test_only_the_transformer_is_fetched(monkeypatch, folder):
    asked = {}

    def download(model_id, *, revision, allow_patterns):
        asked.update(id=model_id, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_sana_transformer("owner/sana", revision="abc")
    assert asked["id"] == "owner/sana" and asked["revision"] == "abc"
    assert asked["patterns"] == [
        "transformer/config.json",
        f"transformer/{STEM}.safetensors",
        f"transformer/{STEM}-*.safetensors",
        f"transformer/{STEM}.safetensors.index.json",
    ]


def shards(folder):
    return sorted((folder / "transformer").glob("*-of-*.safetensors"))


def edit_config(folder, **entries):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_shard(folder, change):
    tensors = load_file(shards(folder)[0])
    change(tensors)
    save_file(tensors, shards(folder)[0])


def edit_index(folder, text):
    (folder / "transformer" / f"{STEM}.safetensors.index.json").write_text(text)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def pickled_only(folder):
    for path in (folder / "transformer").glob(f"{STEM}*"):
        path.unlink()
    (folder / "transformer" / f"{STEM}.bin").touch()


def first_name(folder):
    return sorted(load_file(shards(folder)[0]))[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "transformer" / "config.json").unlink(),
            "transformer has no config.json; expected the folder of a diffusers pipeline",
        ),
        (lambda f: shards(f)[1].unlink(), rf"lacks \['{STEM}-00002-of-.*'\] of the \d+ files that"),
        (
            pickled_only,
            rf"has neither {STEM}.safetensors nor .*index.json; .*\['{STEM}.bin'\]: only safetens",
        ),
        (
            lambda f: edit_config(f, num_layers=3),
            r"missing: \['transformer_blocks.2.* \d+ more",
        ),
        (
            lambda f: edit_config(f, num_layers=1),
            r"do not fit its config.json: not of this network: \['transformer_blocks.1.",
        ),
        (
            lambda f: edit_config(f, caption_channels=23),
            r"another shape: \['caption_projection.linear_1.weight \[64, 24\] in place of \[64, 23",
        ),
        (
            lambda f: edit_config(f, qk_norm="l2"),
            "json: .*qk_norm must be one of .*got 'l2'",
        ),
        (
            lambda f: edit_config(f, _class_name="Flux"),
            "json: expected .* got one of a Flux",
        ),
        (
            lambda f: edit_config(f, num_layers="2"),
            "num_layers must be a whole number, got '2'",
        ),
        (lambda f: edit_config(f, mlp_ratio="2"), "mlp_ratio must be a number, got '2'"),
        (lambda f: cut_short(shards(f)[0]), "00001-of-.* is not a complete safetensors file"),
        (lambda f: cut_short(f / "transformer" / "config.json"), "config.json is not JSON"),
        (
            lambda f: edit_shard(f, lambda tensors: tensors.popitem()),
            r"missing: \['[a-z_.0-9]+'\]\. Copy both again",
        ),
        (
            lambda f: edit_shard(f, lambda tensors: tensors.update(extra=torch.zeros(1))),
            r"not of this network: \['extra'\]",
        ),
        (lambda f: edit_index(f, "{}"), "must hold a weight_map from tensors to files"),
        (lambda f: edit_index(f, "[]"), "must hold a JSON object, got a list"),
        (lambda f: edit_index(f, '{"weight_map": {"a": "../b"}}'), "files of its own folder"),
    ],
)
def test_a_broken_folder_says_what_is_wrong(folder, spoil, message):
    spoil(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_sana_transformer(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"variant": "fp16"},
            rf"neither {STEM}.fp16.safetensors nor {STEM}.*.index.fp16",
        ),
        ({"revision": "v2"}, "revision 'v2' belongs to a model id"),
        ({"dtype": torch.float16}, "dtype must be one of .* got torch.float16; SANA's activations"),
    ],
)
def test_arguments_that_do_not_fit(folder, arguments, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_sana_transformer(folder, **arguments)


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "./a/b", "a/b/c"])
def test_neither_a_folder_nor_an_id(path):
    with pytest.raises(FileNotFoundError, match="is neither a folder nor a model id of the form"):
        load_sana_transformer(path)
