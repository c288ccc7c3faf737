"""Every reader, on files that claim or stand for far more than they hold, with little memory.

A case writes its file and gives the call that reads it; the limit is on the address space, so what
is asked for counts whether or not it is touched.
"""

import io
import json
import pickle
import re
import resource
import struct
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mfd_fast.files.pickles import load_plain_pickle
from mfd_fast.files.tensors import read_tensors
from mfd_fast.models import preset
from mfd_fast.models.cifar10.data import load_cifar10
from mfd_fast.models.cifar10.unet import load_unet
from mfd_fast.models.digits.dit import load_dit
from mfd_fast.models.occfm.data.files import (
    read_key_frames,
    read_labels,
    read_latents,
    write_labels,
)
from mfd_fast.models.occfm.data.store import OccupancyStore
from mfd_fast.models.occfm.loading import load_transition, load_vae, load_vae3d, read_checkpoint
from mfd_fast.models.occfm.run_config import read_run_configs
from mfd_fast.models.sana.loading import load_sana_transformer
from mfd_fast.models.sana.lora_files import read_lora
from mfd_fast.models.sana.text.store import TextStore
from mfd_fast.run.config import with_file

SPARE = 256 << 20  # bytes that any reader may take
HUGE = 1 << 34  # bytes that none may


@contextmanager
def little_memory():
    """At most ``SPARE`` bytes of address space more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def refused(pattern):
    """A ``ValueError`` about the file, and not about the memory that there was not."""
    with little_memory(), pytest.raises(ValueError, match=pattern) as caught:
        yield
    assert not re.search("memory|alloc", str(caught.value), re.IGNORECASE)


def test_the_limit_holds():
    with little_memory(), pytest.raises(MemoryError):
        bytearray(HUGE)


class Call:
    """Pickled as a call of a name."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def quadratic(kind: bytes, value: bytes, call: bytes = b"\x85R") -> bytes:
    """A list of 20,000 calls of ``kind`` on one value of 200,000 bytes."""
    calls = (b"h\x02h\x01" + call) * 20_000
    return b"".join([b"\x80\x02](", value, b"q\x01c", kind, b"\nq\x02", calls, b"e."])


TEXT = b"X" + struct.pack("<I", 200_000) + b"x" * 200_000
LIST = b"](" + b"K\x01" * 200_000 + b"e"
LATIN1 = b"X\x06\0\0\0latin1\x86R"
PICKLES = {
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"N.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b"x.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"x.",
    "copies of a text": quadratic(b"__builtin__\nbytearray", TEXT),
    "copies of bytes": quadratic(b"__builtin__\nbytes", TEXT),
    "copies of a set": quadratic(b"__builtin__\nset", LIST),
    "copies of a frozenset": quadratic(b"__builtin__\nfrozenset", LIST),
    "encoded copies": quadratic(b"_codecs\nencode", TEXT, LATIN1),
}
for number in (0, 2, 4):
    PICKLES[f"bytearray({HUGE}), {number}"] = pickle.dumps([Call(bytearray, HUGE)], number)
    PICKLES[f"bytes({HUGE}), {number}"] = pickle.dumps([Call(bytes, HUGE)], number)


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("read", [load_plain_pickle, read_key_frames, read_latents])
def test_pickles(read, name, tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(PICKLES[name])
    with refused(r"hostile\.pkl"):
        read(path)


def test_the_memo_of_a_pickle_has_no_room_for_its_index(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    with little_memory():
        assert load_plain_pickle(tmp_path / "a.pkl") == []


def test_arrays_of_a_pickle_share_its_bytes(tmp_path):
    """An entry names the array of another one: 40 bytes, not another copy in float32."""
    whole = np.zeros((1, 4, 512, 512), np.float16)
    path = Path("data/nuscenes/gts/s")
    entries = [{"x_sampled": whole, "gt_path": f"{path}/t{i}/labels.npz"} for i in range(500)]
    (tmp_path / "l.pkl").write_bytes(pickle.dumps(entries))
    with little_memory():
        assert len(read_latents(tmp_path / "l.pkl")) == 500


def test_batches_of_cifar10(tmp_path):
    (tmp_path / "test_batch").write_bytes(PICKLES[f"bytearray({HUGE}), 2"])
    with refused("test_batch"):
        load_cifar10(tmp_path, train=False)


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def with_records(data, change, method=zipfile.ZIP_STORED):
    """A torch file with other records: ``change(name, bytes)``."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out.getvalue()


OLD = {"_use_new_zipfile_serialization": False}
MANY = pickle.dumps(1 << 31, protocol=2)[2:-1]  # as an int of a pickle
TENSOR = {"state_dict": {"w": torch.arange(200.0)}}


def larger(data):
    """The tensor's numbers, 200, are two thousand million: of its storage or its shape."""
    return data.replace(b"K\xc8", MANY)


TORCH = {
    "bytearray": saved({"state_dict": Call(bytearray, HUGE)}),
    "bytearray, old format": saved({"state_dict": Call(bytearray, HUGE)}, **OLD),
    "a storage, old format": larger(saved(TENSOR, **OLD)),
    "a storage": with_records(saved(TENSOR), lambda name, data: larger(data)),
    "a tensor": with_records(
        saved(TENSOR),
        lambda name, data: data.replace(b"K\x00K\xc8\x85", b"K\x00" + MANY + b"\x85"),
    ),
    "a deflated record": with_records(
        saved(TENSOR),
        lambda name, data: bytes(1 << 29) if name.endswith("/0") else data,
        zipfile.ZIP_DEFLATED,
    ),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("read", [read_checkpoint, read_tensors])
def test_torch_files(read, name, tmp_path):
    path = tmp_path / "hostile.ckpt"
    path.write_bytes(TORCH[name])
    with refused(r"hostile\.ckpt"):
        read(path)


def test_a_refused_checkpoint_names_the_culprit(tmp_path):
    for number, (value, name) in enumerate(
        [(Call(print, 1), r"print"), (Path("x"), r"pathlib\.PosixPath"), (np.ones(3), "numpy")]
    ):
        path = tmp_path / f"{number}.ckpt"
        torch.save({"state_dict": {}, "hyper": {"key": [value]}}, path)
        told = rf"{number}\.ckpt is refused: .* names \S*{name}\S* \(under .*'hyper' 'key'\)"
        with pytest.raises(ValueError, match=told):
            read_checkpoint(path)


def test_honest_torch_files_are_read(tmp_path):
    linear = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    content = {
        "state_dict": {**linear.state_dict(), "parameter": linear.weight, "view": linear.weight.T,
                       "expanded": torch.ones(1).expand(5), "empty": torch.empty(0, 3),
                       "half": torch.ones(2).half(), "scalar": torch.tensor(3)},
        "optimizer_states": [optimizer.state_dict()], "lr_scheduler": scheduler.state_dict(),
        "size": torch.Size([2]), "ordered": OrderedDict(a=1), "bytes": bytearray(b"x"),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert found.keys() == content["state_dict"].keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, content["state_dict"][name])


def npz_with_header(shape, dtype, *, data=b"", name="semantics.npy"):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, header.getvalue() + data)
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        npz_with_header((1 << 12, 1 << 12, 1 << 10), "|u1"),
        npz_with_header((1 << 10, 1 << 10, 1 << 9), "|u1", data=bytes(1 << 29)),
        npz_with_header((2, 2, 2), "<U1000000000"),
        npz_with_header((1, 1, 1), "|u1", data=bytes(1 << 29), name="semantics"),
    ],
    ids=["header", "deflated", "wide type", "no array"],
)
def test_labels(content, tmp_path):
    path = tmp_path / "labels.npz"
    path.write_bytes(content)
    with refused(r"labels\.npz"):
        read_labels(path)


def own_file(path, kind, config):
    header = {"kind": kind, "config": config, "metadata": {}}
    save_file({"w": torch.zeros(1)}, path, metadata={"mfd_fast": json.dumps(header)})


@pytest.mark.parametrize(
    ("load", "kind", "config"),
    [
        (load_dit, "dit", {"width": 1 << 20}),
        (load_dit, "dit", {"depth": 1 << 30}),
        (load_dit, "dit", {"depth": 10**400}),
        (load_unet, "unet", {"width": 1 << 16}),
        (load_unet, "unet", {"blocks": 1 << 30}),
        (load_transition, "occfm_transition", {"base_width": 1 << 16}),
        (load_vae, "occfm_vae", {"width": 1 << 18}),
        (load_vae, "occfm_vae", {"encoder_depths": [1 << 30, 2]}),
        (load_vae3d, "occfm_vae3d", {"clip": 6, "width": 1 << 18}),
    ],
)
def test_configs_in_weight_files(load, kind, config, tmp_path):
    path = tmp_path / "own.safetensors"
    own_file(path, kind, config)
    with refused(r"own\.safetensors"):
        load(path)


HEADERS = {
    "length": struct.pack("<Q", HUGE) + b"{}",
    "offsets": b'{"w":{"dtype":"F32","shape":[4294967296],"data_offsets":[0,17179869184]}}',
    "shape": b'{"w":{"dtype":"F32","shape":[4294967296],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("read", [read_tensors, read_lora, load_dit])
def test_headers_of_safetensors(read, name, tmp_path):
    path, header = tmp_path / "h.safetensors", HEADERS[name]
    is_whole = name == "length"
    path.write_bytes(header if is_whole else struct.pack("<Q", len(header)) + header + bytes(4))
    with refused(r"h\.safetensors"):
        read(path)


@pytest.mark.parametrize("config", [{"num_layers": 1 << 30}, {"caption_channels": 1 << 30}])
def test_the_config_of_a_sana_checkpoint(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with refused(re.escape(str(tmp_path))):
        load_sana_transformer(tmp_path)


def test_the_scenes_of_a_store(tmp_path):
    np.save(tmp_path / "trajectories.npy", np.zeros((3, 2), np.float32))
    array = {"dtype": "float32", "shape": [3, 2], "sha256": ""}
    for scenes in ([["s", HUGE]], [["s", -HUGE], ["t", HUGE + 3]], [["s", 3.0]], [["s", True]]):
        index = {"format": 1, "scenes": scenes, "arrays": {"trajectories": array}}
        (tmp_path / "index.json").write_text(json.dumps(index))
        with refused(r"index\.json"):
            OccupancyStore(tmp_path).starts(2)


def test_the_header_of_a_text_store(tmp_path):
    from mfd_fast.models.sana.text.store import _sealed

    for count, size in ((HUGE, 1), (HUGE, HUGE), (-1, 1), (1, 0), (2.5, 1), (True, 1)):
        header = {"format": 1, "prompts": {"count": count}, "shard_size": size}
        (tmp_path / "header.json").write_text(json.dumps(_sealed(header | {"encoder": {"dim": 4}})))
        (tmp_path / "null.bin").write_bytes(b"")
        with refused(re.escape(str(tmp_path))):
            TextStore(tmp_path)


ALIASES = "".join(f"a{i}: &a{i} {{{', '.join(f'{k}: *a{i - 1}' for k in 'bcdefghi')}}}\n"
                  for i in range(1, 12))  # fmt: skip
YAML = {
    "aliases": "a0: &a0 {b: 1}\n" + ALIASES,
    "itself": "preset: digits\ndistill: &d {imm: *d}\n",
    "depth": "a: " + "[" * 100_000,
    "size": "a: 1\n" * 1_000_000,
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(YAML[name])
    for read in (lambda: with_file(preset("digits"), path), lambda: read_run_configs(path)):
        with refused(r"c\.yaml"):
            read()


def test_honest_files_need_no_more_than_that(tmp_path):
    grid = np.full((200, 200, 16), 17, np.uint8)  # a thousand voxels in a byte
    write_labels(tmp_path / "labels.npz", grid)
    with little_memory():
        assert np.array_equal(read_labels(tmp_path / "labels.npz"), grid)
