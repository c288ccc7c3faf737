"""``mfd-fast calibrate``: what is measured is kept, and every later estimate takes and names it."""

from dataclasses import replace

import pytest

from mfd_fast import cli
from mfd_fast.cli.cost import _small
from mfd_fast.cost import device_named, own
from mfd_fast.cost.devices import COMPILED, EAGER, REPLAYED
from mfd_fast.cost.measured import best_known, efficiency_here

BOARD = "NVIDIA GeForce RTX 4090"


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Measure what there is not: a device, and seconds an operator by how it launches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def measure(device, launches):
        monkeypatch.setattr(own, "this_machine", lambda: device)
        monkeypatch.setattr(own, "launch_seconds", lambda make, capture: launches[capture])
        return own.measure(lambda capture: None)

    return measure


def test_a_measured_card_takes_the_place_of_its_data_sheet(measured):
    card = replace(device_named("rtx4090"), name=BOARD, bf16_tflops=150.0, watts=0.0, link=0.0)
    path = measured(card, {"off": 20e-6, "on": 2e-6})
    sheet = device_named("rtx4090")
    for is_captured, seconds in ((False, 20e-6), (True, 2e-6)):
        device, used = best_known(sheet, "sana-1.6b", is_captured=is_captured)
        assert (device.bf16_tflops, device.watts) == (150.0, sheet.watts)
        assert (used.host.low, used.host.high) == (seconds, seconds)
        assert str(path) in used.source and str(path) in device.source
        hosts = {host.how: host.low for host in used.hosts}
        assert hosts == {EAGER.how: 20e-6, COMPILED.how: COMPILED.low, REPLAYED.how: 2e-6}
    assert best_known(device_named("rtx3090"), "sana-1.6b", is_captured=False) is None
    here = replace(card, bf16_tflops=1.0)  # this-machine, measured anew
    assert efficiency_here(here, "sana-1.6b")[0].bf16_tflops == 150.0


def test_a_measured_cpu_is_of_itself_alone(measured):
    cpu = replace(device_named("rtx4090"), name="AMD EPYC, 64 threads", is_gpu=False)
    path = measured(cpu, {"off": 5e-6})
    assert path.name == "amd-epyc-64-threads.json"
    assert best_known(cpu, "sana-1.6b", is_captured=False)[1].host.low == 5e-6
    assert best_known(cpu, "sana-1.6b", is_captured=True) is None
    other = replace(cpu, name="AMD EPYC, 32 threads")
    assert best_known(other, "sana-1.6b", is_captured=False) is None


def test_the_command_measures_launches_and_the_estimate_names_the_file(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(own, "CYCLES", 1)
    monkeypatch.setattr(own, "WARMUPS", 1)
    card = replace(device_named("rtx4090"), name="a CPU, 1 threads", is_gpu=False)
    monkeypatch.setattr(own, "this_machine", lambda: card)
    assert cli.main(["calibrate"]) == 0
    said = capsys.readouterr().out.splitlines()
    path = next(tmp_path.rglob("*.json"))
    assert said[-1] == str(path) and "us an operator, launched from Python" in said[1]
    device, launches = own.read(path)
    assert device.bf16_tflops == card.bf16_tflops and 1e-7 < launches[EAGER.how] < 1e-2
    monkeypatch.setattr("mfd_fast.cost.devices.this_machine", lambda kind="": card)
    monkeypatch.setattr("mfd_fast.cli.cost._measured", lambda config, run: "")
    assert cli.main(["estimate", "sana-tiny", "--gpu", "this-machine"]) == 0
    assert str(path) in capsys.readouterr().out


def test_the_small_network_is_mostly_launches():
    distiller, cond = _small("cpu", "off")
    assert sum(p.numel() for p in distiller.backbone.parameters()) < 1e6
    distiller.step(cond)
