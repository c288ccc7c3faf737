"""The CIFAR-10 network and files, and the two-dimensional toys."""

import pickle
import pickletools

import numpy as np
import pytest
import torch
from torch import Generator

from mfd_fast.baselines.second_time import with_second_time
from mfd_fast.models.cifar10.data import load_cifar10, to_unit_range
from mfd_fast.models.cifar10.unet import UNet, UNetConfig, load_unet, save_unet
from studies.toys import (
    BOARD_SIDE,
    MODE_RADIUS,
    MODE_STD,
    TOYS,
    mixture_velocity,
    mode_centres,
    sample_toy,
)

SMALL = UNetConfig(image_size=8, width=32, multipliers=(1, 2), blocks=1, attention_levels=(1,))


def random_unet():
    torch.manual_seed(0)
    model = UNet(SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch=3):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 8, 8), torch.rand(batch)


def test_the_cifar10_network_has_about_42_million_parameters():
    with torch.device("meta"):
        model = UNet(UNetConfig())
        v = model(torch.empty(2, 3, 32, 32), torch.empty(2))
    assert v.shape == (2, 3, 32, 32)
    assert abs(sum(p.numel() for p in model.parameters()) / 42e6 - 1) < 0.05


def test_a_fresh_unet_is_the_zero_field_and_every_parameter_gets_a_gradient():
    x, t = inputs()
    torch.manual_seed(0)
    assert not UNet(SMALL)(x, t).any()
    model = random_unet()
    model(x, t).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_images_do_not_mix_and_time_matters():
    model, (x, t) = random_unet(), inputs()
    v = model(x, t)
    torch.testing.assert_close(model(x[:1], t[:1]), v[:1])
    assert not torch.allclose(model(x, 1 - t), v)


def test_unet_second_time_starts_as_the_teacher_and_survives_saving(tmp_path):
    teacher, (x, t) = random_unet(), inputs()
    student = with_second_time(teacher)
    assert torch.equal(student(x, t, None, t / 2), teacher(x, t))
    torch.nn.init.normal_(student.span_mlp[-1].weight)
    save_unet(student, tmp_path / "student.safetensors")
    loaded = load_unet(tmp_path / "student.safetensors")
    assert torch.equal(loaded(x, t, None, t / 2), student(x, t, None, t / 2))
    assert loaded.config == student.config


def test_unet_derivatives_go_forward():
    """The flow-map objectives differentiate it in the direction of the flow."""
    from mfd_fast.baselines.batch import along_flow

    model, (x, t) = random_unet().double(), inputs()
    x, v = x.double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    _, rate = along_flow(model, x, t, v, torch.zeros_like(t), over=0)
    directions = (v, torch.ones_like(t))
    _, twice_backward = torch.autograd.functional.jvp(model, (x, t), directions)
    # Times are float32 inside: a hundred roundings of them at most.
    bound = 100 * torch.finfo(torch.float32).eps * rate.abs().max()
    assert (rate - twice_backward).abs().max() <= bound


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 48}, "width must be a multiple of 32, got 48"),
        ({"image_size": 30}, "image_size must be a multiple of 8 for 4 levels, got 30"),
        ({"blocks": 0}, "blocks must be >= 1, got 0"),
    ],
)
def test_bad_sizes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**settings)


def test_wrong_shapes_are_named():
    model, (x, t) = random_unet(), inputs()
    with pytest.raises(ValueError, match=r"shape \[B, 3, 8, 8\]; got \[3, 3, 4, 8\]"):
        model(x[:, :, :4], t)
    with pytest.raises(ValueError, match=r"t must have one value per image, shape \[3\]"):
        model(x, t[:2])
    with pytest.raises(ValueError, match=r"end needs a network with UNetConfig\.second_time"):
        model(x, t, None, t)


def batch_content(seed, size=4):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (size, 3072), dtype=np.uint8), draw.integers(0, 10, size)


def write_batches(folder, write):
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        write(folder, name, *batch_content(i))


def write_binary(folder, name, pixels, labels):
    records = np.concatenate((labels.astype(np.uint8)[:, None], pixels), axis=1)
    (folder / f"{name}.bin").write_bytes(records.tobytes())


def write_pickle(folder, name, pixels, labels):
    content = {"data": pixels, "labels": labels.tolist(), "batch_label": name}
    (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_python2_pickle(folder, name, pixels, labels):
    """As Python 2 wrote it: strings and bytes are the same opcodes, numpy's old module names."""
    raw = pixels.tobytes()
    parts = [b"\x80\x02}(", _string(b"data")]
    parts += [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"K\x00\x85"]
    parts += [_string(b"b"), b"\x87R(K\x01", b"K" + bytes([len(pixels)]) + b"M\x00\x0c\x86"]
    parts += [b"cnumpy\ndtype\n", _string(b"u1"), b"K\x00K\x01\x87R(K\x03", _string(b"|")]
    parts += [b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89", _string(raw), b"tb"]
    parts += [_string(b"labels"), b"]("]
    parts += [b"K" + bytes([int(label)]) for label in labels]
    parts += [b"eu."]
    stream = b"".join(parts)
    pickletools.dis(stream, out=open("/dev/null", "w"))  # noqa: SIM115
    (folder / name).write_bytes(stream)


def _string(value):
    return b"T" + len(value).to_bytes(4, "little") + value


@pytest.mark.parametrize("write", [write_binary, write_pickle, write_python2_pickle])
@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py"])
def test_cifar10_reads_what_its_makers_publish(write, subfolder, tmp_path):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    write_batches(folder, write)
    images, labels = load_cifar10(tmp_path)
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.uint8
    for i in range(5):
        pixels, expected = batch_content(i)
        part = slice(4 * i, 4 * i + 4)
        assert np.array_equal(images[part].flatten(1).numpy(), pixels)
        assert labels[part].tolist() == expected.tolist()
    test_images, _ = load_cifar10(tmp_path, train=False)
    assert np.array_equal(test_images.flatten(1).numpy(), batch_content(5)[0])
    unit = to_unit_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert unit.tolist() == [-1.0, 1.0]


class Danger:
    def __reduce__(self):
        return print, ("run",)


def test_broken_cifar10_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected data_batch_1 or data_batch_1\.bin in"):
        load_cifar10(tmp_path)
    write_batches(tmp_path, write_binary)
    first = tmp_path / "data_batch_1.bin"
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected records of 3073 bytes"):
        load_cifar10(tmp_path)
    write_pickle(tmp_path, "data_batch_1", *batch_content(0))
    for content, message in (
        ({"data": Danger()}, "expected only numpy arrays and plain containers"),
        ({"fine": 1}, r"expected a mapping with data and labels .* got \['fine'\]"),
        ({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}, r"got uint8 of shape \[2, 5\]"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [11]}, "labels 0 to 9"),
    ):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=message):
            load_cifar10(tmp_path)


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_seeded_and_centred(name):
    a, b = (sample_toy(name, 20_000, Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (20_000, 2) and a.dtype == torch.float32
    # The mean of 20,000 draws is within five standard errors of 0: each toy is symmetric.
    assert (a.mean(0).abs() < 5 * a.std(0) / 20_000**0.5).all()


def test_toys_lie_where_they_should():
    mixture = sample_toy("gaussian_mixture", 5000, Generator().manual_seed(0))
    nearest = torch.cdist(mixture, mode_centres()).min(1).values
    assert (nearest < 6 * MODE_STD).all() and mode_centres().norm(dim=1).allclose(
        torch.tensor(MODE_RADIUS)
    )
    board = sample_toy("checkerboard", 5000, Generator().manual_seed(0)) + BOARD_SIDE / 2
    assert ((board >= 0) & (board <= BOARD_SIDE)).all()
    square = board.floor().clamp(max=BOARD_SIDE - 1).long()
    assert (square.sum(1) % 2 == 0).all()
    with pytest.raises(ValueError, match="toy must be one of"):
        sample_toy("moon", 5, Generator())


def test_mixture_velocity_is_the_conditional_mean():
    """E[eps - x_0 | x_t = x] by importance sampling over the mixture's own samples."""
    generator = Generator().manual_seed(0)
    x0 = sample_toy("gaussian_mixture", 400_000, generator).double()
    x = torch.tensor([[0.5, 0.3], [1.2, -0.8], [0.0, 0.0]], dtype=torch.float64)
    for time in (0.3, 0.7):
        t = torch.full((3,), time, dtype=torch.float64)
        v = mixture_velocity(x, t)
        for i in range(3):
            eps = (x[i] - (1 - time) * x0) / time
            weight = torch.softmax(-eps.square().sum(1) / 2, dim=0)
            mean = (weight[:, None] * (eps - x0)).sum(0)
            spread = (weight[:, None] * (eps - x0 - mean).square()).sum(0).sqrt()
            error = 5 * spread * weight.square().sum().sqrt()  # five standard errors
            assert ((v[i] - mean).abs() < error).all()


@pytest.mark.parametrize("objective", ["mfd", "meanflow"])
def test_cifar10_pretrains_distils_and_samples(objective, tmp_path, capsys):
    """The commands a user types, on generated files and a small network."""
    from mfd_fast import cli

    pytest.importorskip("matplotlib")
    write_batches(tmp_path, write_binary)
    data, teacher, run = (str(tmp_path / name) for name in (".", "teacher", "run"))
    small = ["--width", "32", "--blocks", "1", "--updates", "2", "--batch-size", "2"]
    small += ["--warmup-updates", "1"]
    assert cli.main(["pretrain", "cifar10", "--data", data, "--out", teacher, *small]) == 0
    settings = ["--teacher", f"{teacher}/teacher.safetensors", "--cifar10.data", data]
    settings += ["--cifar10.teacher-steps", "1", "--train.updates", "1", "--train.batch-size", "2"]
    settings += ["--distill.aux-updates", "1", "--distill.step-size", "0.5"]
    settings += ["--num-eval-samples", "2", "--objective", objective]
    assert cli.main(["distill", "cifar10", "--out", run, *settings]) == 0
    out = capsys.readouterr().out
    assert "| student, 1 step |   1 |   - |" in out
    picture = tmp_path / "samples.png"
    assert cli.main(["sample", run, "--num", "2", "--out", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_cifar10_without_a_teacher_says_how_to_get_one(capsys, tmp_path):
    from mfd_fast import cli

    assert cli.main(["distill", "cifar10", "--out", str(tmp_path / "run")]) == 2
    assert "train one with mfd-fast pretrain cifar10" in capsys.readouterr().err
