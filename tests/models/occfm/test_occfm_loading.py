"""OccFM's checkpoints: published layout, averaged buffers, run folders; broken files by name."""

import pickle
import re
import warnings

import pytest
import torch
from occfm_fill import fill
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from mfd_fast.models.occfm.config import CONFIGS, OccfmConfig
from mfd_fast.models.occfm.loading import (
    load_transition,
    load_vae,
    load_vae3d,
    read_checkpoint,
    run_configs_of,
    save_occfm_transition,
    save_occfm_vae,
)
from mfd_fast.models.occfm.network import OccfmNetwork
from mfd_fast.models.occfm.run_config import read_run_configs
from mfd_fast.models.occfm.vae.config import VAE_CONFIGS, VaeConfig
from mfd_fast.models.occfm.vae.swin import relative_index
from mfd_fast.models.occfm.vae.vae import OccupancyVae
from mfd_fast.models.occfm.vae.vae3d import OccupancyVae3d

TINY, TINY_VAE = CONFIGS["tiny"], VAE_CONFIGS["tiny"]
TINY_CLIPS = VaeConfig(**{**vars(TINY_VAE), "clip": 6})
# What averaging leaves one too small, in every table of offsets, from the second average on.
DAMAGED = (11, 22, 29, 31, 39, 44, 53, 58, 62, 69, 78, 79)
UPDATES = 3


class WorldModel(nn.Module):
    def __init__(self):
        super().__init__()
        vae = fill(OccupancyVae(TINY_VAE))
        self.embedding, self.encoder = vae.embedding, vae.encoder
        self.transition_model = fill(OccfmNetwork(TINY))
        self.decoder = vae.decoder


def published(model, ema=None):
    """What a run saves: live weights of the wrapped model, the average, bookkeeping."""
    return {
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "ema_model": None if ema is None else ema.state_dict(),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
        "epoch": 199,
        "scaler_state_dict": None,
        "lr_scheduler": {"last_epoch": 7, "base_lrs": [8e-5]},
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world model, and the checkpoint of its run, averaged as the published ones were."""
    model = WorldModel()
    ema = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9999), use_buffers=True)
    for _ in range(UPDATES):
        ema.update_parameters(model)
        with torch.no_grad():
            model.transition_model.final_conv[1].bias.add_(1)
    path = tmp_path_factory.mktemp("run") / "ckpt" / "epoch=000199.ckpt"
    path.parent.mkdir()
    torch.save(published(model, ema), path)
    return model, ema.module, path


def tables(vae):
    return [b for name, b in vae.named_buffers() if name.endswith("relative_position_index")]


def assert_same(network, model):
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items())
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("ema", [None, True, False])
def test_transition_of_a_world_model(world, ema):
    model, average, path = world
    network = load_transition(path, config=TINY, ema=ema)
    assert_same(network, (model if ema is False else average).transition_model)


def test_averaged_tables_are_kept_and_counted(world):
    _, average, path = world
    wrong = sum(int((relative_index() == value).sum()) for value in DAMAGED)
    assert wrong == 111
    count = len(tables(average))
    with pytest.warns(UserWarning, match=rf"{count * wrong} of {count * 625} offsets .* kept"):
        vae = load_vae(path, config=TINY_VAE)
    assert_same(vae, average)
    index = relative_index()
    damaged = torch.where(torch.isin(index, torch.tensor(DAMAGED)), index - 1, index)
    assert all(torch.equal(table, damaged) for table in tables(vae))


def test_damaged_tables_are_repaired_on_demand(world):
    path = world[2]
    with pytest.warns(UserWarning, match="repaired"):
        vae = load_vae(path, config=TINY_VAE, repair=True)
    assert all(torch.equal(table, relative_index()) for table in tables(vae))
    latents = torch.randn(1, *TINY_VAE.latent_shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="kept"):
        kept = load_vae(path, config=TINY_VAE)
    assert not torch.allclose(kept.decode(latents), vae.decode(latents))


def test_live_weights_have_whole_tables(world):
    model, _, path = world
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vae = load_vae(path, config=TINY_VAE, ema=False)
    assert_same(vae, model)


def test_vae_checkpoints_have_no_average(tmp_path):
    vae, clips = fill(OccupancyVae(TINY_VAE)), fill(OccupancyVae3d(TINY_CLIPS))
    torch.save(published(vae), tmp_path / "vae.ckpt")
    torch.save(published(clips), tmp_path / "clips.ckpt")
    assert_same(load_vae(tmp_path / "vae.ckpt", config=TINY_VAE), vae)
    assert_same(load_vae3d(tmp_path / "clips.ckpt", config=TINY_CLIPS), clips)
    with pytest.raises(ValueError, match="has no average"):
        load_vae(tmp_path / "vae.ckpt", config=TINY_VAE, ema=True)
    with pytest.raises(ValueError, match=r"clips.ckpt .* unexpected: .*temporal_block"):
        load_vae(tmp_path / "clips.ckpt", config=TINY_VAE)
    with pytest.raises(ValueError, match=r"vae.ckpt .* missing: .*temporal_block.* and 44 more"):
        load_vae3d(tmp_path / "vae.ckpt", config=TINY_CLIPS)
    with pytest.raises(ValueError, match="read by load_vae"):
        load_transition(tmp_path / "vae.ckpt", config=TINY)


def test_latent_channels_are_the_files(tmp_path):
    vae = OccupancyVae(VaeConfig(**{**vars(TINY_VAE), "latent_channels": 2}))
    torch.save(published(vae), tmp_path / "vae.ckpt")
    assert load_vae(tmp_path / "vae.ckpt", config=TINY_VAE).config.latent_channels == 2


def test_dtype_is_cast(world):
    network = load_transition(world[2], config=TINY, dtype=torch.bfloat16)
    assert network.dtype == torch.bfloat16
    vae = load_vae(world[2], config=TINY_VAE, ema=False, dtype=torch.bfloat16)
    assert tables(vae)[0].dtype == torch.int64 and vae.decoder.conv_in.weight.dtype == network.dtype


BROKEN = {
    "a missing tensor": (lambda s: s.pop("module.decoder.conv_in.bias"), "missing: .*conv_in.bias"),
    "an unknown tensor": (
        lambda s: s.__setitem__("module.decoder.extra", torch.zeros(1)),
        "unexpected: .*decoder.extra",
    ),
    "an unknown part": (
        lambda s: s.__setitem__("module.critic.weight", torch.zeros(1)),
        "expected only .*got .*critic.weight",
    ),
    "another shape": (
        lambda s: s.__setitem__("module.decoder.conv_in.bias", torch.zeros(7)),
        r"conv_in.bias \[7\] in place of \[32\]",
    ),
    "another kind": (
        lambda s: s.__setitem__("module.decoder.conv_in.bias", torch.zeros(32, dtype=torch.int64)),
        "conv_in.bias torch.int64 in place of torch.float32",
    ),
    "a mixed prefix": (
        lambda s: s.__setitem__("decoder.conv_in.bias", s.pop("module.decoder.conv_in.bias")),
        "module. is before some names and not others",
    ),
    "no tensor": (lambda s: s.__setitem__("module.decoder.name", "x"), "expected only tensors"),
    "a wild table": (
        lambda s: s["module.decoder.net_blocks.0.blocks.0.attn.relative_position_index"].fill_(81),
        "entries outside 0 to 80",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_tensors_that_do_not_fit_are_named(fault, tmp_path):
    damage, message = BROKEN[fault]
    content = published(fill(OccupancyVae(TINY_VAE)))
    damage(content["state_dict"])
    torch.save(content, tmp_path / "broken.ckpt")
    with pytest.raises(ValueError, match=message) as error:
        load_vae(tmp_path / "broken.ckpt", config=TINY_VAE)
    assert "broken.ckpt" in str(error.value)


class Code:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_no_checkpoint_are_refused(world, tmp_path, capsys):
    path = tmp_path / "bad.ckpt"
    with pytest.raises(FileNotFoundError, match=r"bad\.ckpt, found none"):
        read_checkpoint(path)
    whole = world[2].read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"no checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_checkpoint(path)
    torch.save({"state_dict": {}, "hook": Code()}, path)
    with pytest.raises(ValueError, match=r"bad\.ckpt is refused: .*tensors and plain containers"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps({"state_dict": Code()}, protocol=2))
    with pytest.raises(ValueError, match=r"bad\.ckpt.* is not a zip file"):
        read_checkpoint(path)
    assert "executed" not in capsys.readouterr().out
    for content, message in (
        ({"model": {}}, r"expected 'state_dict' .* got keys \['model'\]"),
        ([1], "got a list"),
        ({"state_dict": {}, "ema_model": None}, "expected the tensors of a network"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)


def test_students_are_written_and_read(tmp_path):
    network, path = fill(OccfmNetwork(TINY)), tmp_path / "student.safetensors"
    save_occfm_transition(network, path, metadata={"steps": 1})
    again = load_transition(path)
    assert again.config == TINY
    assert_same(again, network)
    with pytest.raises(ValueError, match=r"expected occfm_vae weights in .*student.safetensors"):
        load_vae(path)


@pytest.mark.parametrize("cls", [OccupancyVae, OccupancyVae3d])
def test_vaes_are_written_and_read(cls, tmp_path):
    vae, path = (
        fill(cls(TINY_CLIPS if cls is OccupancyVae3d else TINY_VAE)),
        tmp_path / "v.safetensors",
    )
    save_occfm_vae(vae, path)
    load, other = (load_vae3d, load_vae) if cls is OccupancyVae3d else (load_vae, load_vae3d)
    assert load(path).config == vae.config
    assert_same(load(path), vae)
    with pytest.raises(ValueError, match=r"v\.safetensors"):
        other(path)


NETWORK_YAML = """
IN_CHANNELS: 16
OUT_CHANNELS: 16
MODEL_CHANNELS: 128
CHANNEL_MULTI: [2, 4]
INPUT_SIZE: [50, 50]
INIT_KERNEL_SIZE: 7
INIT_3D_CONV_CHANNELS: 64
ATTN_DIM: 32
TEMPORAL_ATTN_HEAD: 8
SPATIAL_ATTN_HEAD: 8
TRAJECTORY_LENGTH: 6
"""
RUN_YAML = """
DATA:
  _BASE_CONFIG_: cfgs/data.yaml
  HIST_LAST: 4
MODEL:
  TRANSITION:
    _BASE_CONFIG_: cfgs/network.yaml
    TRAJECTORY_LENGTH: 12
  LOSS: {UNCOND_P: 0.2, RESCALE_FACTOR: 10, SAMPLE_STEP: 10, ALPHA_STEP: 3, UNCOND_SCALE: 2}
"""


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "cfgs").mkdir()
    (tmp_path / "cfgs/network.yaml").write_text(NETWORK_YAML)
    (tmp_path / "cfgs/data.yaml").write_text("SEQUENCE_LENGTH: 6\nHIST_LAST: 6\n")
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    return tmp_path


def test_run_yaml_builds_on_its_bases(run_folder):
    configs = read_run_configs(run_folder / "run.yaml", base_folder=run_folder)
    assert configs.transition == CONFIGS["occfm_fut"]
    assert configs.vae == VAE_CONFIGS["occfm_vae"]
    checkpoint = run_folder / "ckpt" / "epoch=000196.ckpt"
    checkpoint.parent.mkdir()
    assert run_configs_of(checkpoint, base_folder=run_folder) == configs


def test_run_yaml_of_a_vae_has_no_network(tmp_path):
    (tmp_path / "vae.yaml").write_text("MODEL: {COMPRESSOR: {LATENT_DIM: 4}}")
    configs = read_run_configs(tmp_path / "vae.yaml")
    assert configs.transition is None and configs.vae == VAE_CONFIGS["occfm_vae_4c"]


def test_history_is_whole_without_a_key(run_folder):
    (run_folder / "run.yaml").write_text(RUN_YAML.replace("  HIST_LAST: 4\n", ""))
    configs = read_run_configs(run_folder / "run.yaml", base_folder=run_folder)
    assert configs.transition == OccfmConfig(trajectory_length=12, history_last=6)


WRONG_YAML = {
    "a missing key": (
        lambda t: t.replace("UNCOND_SCALE: 2", "X: 2"),
        "RESCALE_FACTOR. is missing",
    ),
    "no network": (lambda t: "A: 1", "'LATENT_DIM' is missing"),
    "two values": (lambda t: t + "\nB: {TRAJECTORY_LENGTH: 6}", "several values: .12, 6"),
    "another list": (lambda t: "[1]", "must hold a YAML mapping, got a list"),
    "an object": (lambda t: "A: !!python/object/apply:os.getcwd []", "is not plain YAML"),
    "a loop": (lambda t: "_BASE_CONFIG_: run.yaml", "files name one another"),
    "two sizes": (
        lambda t: t.replace("TRAJECTORY_LENGTH: 12", "OUT_CHANNELS: 8"),
        r"IN_CHANNELS and OUT_CHANNELS to be equal, got \[16, 8\]",
    ),
}


@pytest.mark.parametrize("fault", WRONG_YAML)
def test_wrong_yaml_is_refused_by_name(fault, run_folder):
    change, message = WRONG_YAML[fault]
    path = run_folder / "run.yaml"
    path.write_text(change(RUN_YAML))
    with pytest.raises(ValueError, match=message) as error:
        read_run_configs(path, base_folder=run_folder)
    assert "run.yaml" in str(error.value)


def test_missing_yaml_is_named(run_folder, world):
    with pytest.raises(FileNotFoundError, match=r"cfgs/data.yaml, which is not in .*base_folder="):
        read_run_configs(run_folder / "run.yaml", base_folder=run_folder / "cfgs")
    with pytest.raises(FileNotFoundError, match=r"neither .* has the YAML file of the run"):
        load_transition(world[2])
    (run_folder / "other.yaml").write_text("A: 1")
    with pytest.raises(ValueError, match="has 2 YAML files"):
        run_configs_of(run_folder / "x.ckpt")
