"""``mfd-fast estimate`` and ``profile`` as they are typed: names, numbers, mistakes, the guide."""

import contextlib
import importlib
import io
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from mfd_fast import cli
from mfd_fast.cli.cost import OWN_GPU, _device, _make_folder, gpu_named
from mfd_fast.cost import estimate as predict
from mfd_fast.cost.devices import DEVICES, GB, THIS_MACHINE, assumed, device_named
from mfd_fast.cost.estimate import GPUS_PER_MACHINE, NETWORK_BYTES_S
from mfd_fast.cost.plans import CONTEXT_BYTES
from mfd_fast.cost.table import text
from mfd_fast.models import preset

GUIDE = Path(__file__).parents[2] / "docs/cost.md"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *((name, name) for name in [*DEVICES, THIS_MACHINE]),
        *((name.upper().replace("-", " "), name) for name in [*DEVICES, THIS_MACHINE]),
        *((typed, "rtx4090") for typed in ("RTX 4090", "RTX-4090", "rtx_4090", "4090")),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
    ],
)
def test_a_gpu_is_known_by_its_usual_spellings(typed, meant):
    assert gpu_named(typed, DEVICES) == meant


@pytest.mark.parametrize(
    "typed", ["RTX 6000", "6000", "L40", "H100 NVL", "A100-PCIE-40GB", "nvidia"]
)
def test_another_board_is_not_taken_for_a_known_one(typed):
    assert gpu_named(typed, DEVICES) == typed
    with pytest.raises(ValueError, match=f"unknown GPU '{typed}'"):
        device_named(typed)


def test_a_name_of_several_words_needs_no_quotes():
    argv = ["--gpu", "RTX", "4090", "--batch", "8"]
    typed = cli.command_of("estimate").parse("digits", argv, "mfd-fast").keywords
    assert (typed["gpu"], typed["batch"]) == ("RTX 4090", 8)


def test_numbers_alone_describe_a_gpu_of_ones_own():
    """Not the default's: its power limit and link would be in the result."""
    numbers = {"bf16_tflops": 100.0, "bandwidth": 5e11, "memory": 16e9}
    own, _ = _device(None, numbers, preset("digits"))
    assert (own.name, own.watts, own.link) == (OWN_GPU, 0, 0)
    assert own.source.startswith("given by you") and "data sheet" not in own.source
    changed, _ = _device(
        None, {"bf16_tflops": 0.0, "bandwidth": 0.0, "memory": 16e9}, preset("digits")
    )
    assert (changed.name, changed.memory, changed.watts) == (
        "h100",
        16e9,
        device_named("h100").watts,
    )


def test_measured_rates_do_not_replace_what_was_typed(monkeypatch):
    measured = object(), object()
    monkeypatch.setattr("mfd_fast.cost.measured.calibrated", lambda *_, **__: measured)
    none = dict.fromkeys(("bf16_tflops", "bandwidth", "memory"), 0.0)
    assert _device("H100", none, preset("digits")) is measured
    device, _ = _device("H100", none | {"memory": 40e9}, preset("digits"))
    assert device.memory == 40e9


MISTAKES = [
    ("estimate digits --gpu banana", "unknown GPU 'banana'; there is b200, .*; for another one add "
     r"--peak-tflops \(16-bit\), --bandwidth \(GB/s\), --memory \(GB\)$"),
    ("estimate digits --gpu h10", r"unknown GPU 'h10' \(did you mean 'h100'\?\)"),
    ("estimate digits --gpu mine --peak-tflops 9 --memory 8", r"add --bandwidth \(GB/s\)$"),
    ("estimate digits --gpu", "--gpu expects a name; there is b200, .*, this-machine$"),
    ("estimate digits --gpu this machine --memory 8", "drop --peak-tflops, --bandwidth and --mem"),
    *((f"estimate digits {option} {typed}", f"{option} must be >= 1, got {typed}$")
      for option in ("--gpus", "--batch") for typed in ("0", "-2")),
    *((f"estimate digits {option} {typed}", f"{option}: expected a whole number, got '{typed}'; ")
      for option in ("--gpus", "--batch") for typed in ("two", "1.5")),
    *((f"estimate digits --bandwidth {typed}", f"--bandwidth must be .*> 0, got {float(typed)}$")
      for typed in ("-5", "0", "nan", "inf")),
    ("estimate digits --memory 24GB", "--memory: expected a number, got '24GB'; "),
    ("estimate digits --peak-tflops 0", "--peak-tflops must be > 0, got 0.0$"),
    ("estimate", "expected mfd-fast estimate PRESET"),
    ("estimate digit", "did you mean 'digits'"),
    ("profile digit", "did you mean 'digits'"),
    ("profile digits --cycles 0", "--cycles must be >= 1, got 0$"),
    ("profile digits --batch 0", "--batch must be >= 1, got 0$"),
    ("profile digits --out file", "file is no folder that can be written; choose another with"),
    ("profile digits --out file/in/it", "choose another with --out$"),
    ("profile sana-1.6b --teacher nowhere", "'nowhere' is neither a folder nor a model id"),
    ("profile occfm", "expected --teacher FILE and --occfm.store STORE"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_with_what_to_type(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch(mode=0o777)
    assert cli.main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1 and not captured.out
    assert re.search(message, captured.err.strip()), captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(ValueError, match=r"/proc/nowhere cannot be made \(.*\); choose another"):
        _make_folder(Path("/proc/nowhere"))


def test_samples_of_every_student_update_of_a_cycle_count():
    config = preset("digits")
    config = replace(config, distill=replace(config.distill, student_updates=3))
    run = predict(config, device_named("h100"), assumed(is_captured=False))
    slow, fast = (3 * config.train.batch_size / end for end in reversed(run.cycle_seconds))
    row = next(line for line in text(run, scaling=True).splitlines() if line.startswith("1 "))
    assert row.split()[-1] == f"{slow:.4g}-{fast:.4g}"


@pytest.fixture
def traced_once(monkeypatch):
    """The same shapes are traced once for several devices."""
    modules = [importlib.import_module(f"mfd_fast.cost.{name}") for name in ("estimate", "plans")]
    trace, known = modules[0].cycle_of, {}

    def remembered(config, batch):
        key = (config, batch)
        if key not in known:
            known[key] = trace(config, batch)
        return known[key]

    for module in modules:
        monkeypatch.setattr(module, "cycle_of", remembered)


def test_the_guide_shows_what_the_commands_print(traced_once):
    """Every line below a ``$`` of a console block is a line of the output, in its order."""
    shown = re.findall(r"^```console\n\$ (.*?)\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.M)
    assert len(shown) >= 5
    for command, lines in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert cli.main(shlex.split(command)[1:]) == 0
        rest = iter(printed.getvalue().splitlines())
        for line in lines.splitlines():
            assert line in rest, f"{command}: no {line!r}; run: python -m scripts.fill_console"


def test_the_guide_names_what_is_assumed():
    text = " ".join(GUIDE.read_text().split())
    assert f"{CONTEXT_BYTES / GB:g} GB for the CUDA context" in text
    assert f"{GPUS_PER_MACHINE} GPUs a machine" in text
    assert f"{NETWORK_BYTES_S / GB:g} GB/s a GPU between machines" in text
