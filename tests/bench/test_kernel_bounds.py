"""The bounds of bench/results/kernel_bounds.json: how they are counted; none gets worse."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mfd_fast  # noqa: F401  (registers the operators)

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = json.loads((ROOT / "bench/results/kernel_bounds.json").read_text())
# A loop of four, one of which is unrolled twice, and the trap after EXIT that jumps to itself.
SASS = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FFMA R5, R4, R4, R5 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E R6, desc[UR4][R2.64+0x4] ;
        /*0060*/                   FFMA R5, R4, R6, R5 ;
        /*0070*/               @P1 BRA 0x40 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90 ;
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the triton package"
)


def in_a_process_that_compiles(*command: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests/support"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_loops_and_widths_are_read_from_machine_code():
    script = f"from bench.predict.issue import *; c = read_code({SASS!r}, 32, 0); print(c)"
    assert in_a_process_that_compiles("-c", script).strip() == (
        "Code(straight=Counter({'IMAD.MOV.U32': 1, 'EXIT': 1, 'BRA': 1}), "
        "step=Counter({'LDG.E.128': 1, 'FFMA': 1, 'BRA': 1}), loops=1, "
        "registers=32, shared=0, load_bytes=8.0)"
    )


def test_operations_of_a_tensor_core_instruction():
    names = "HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32", "HGMMA.64x64x16.F32.BF16", "FFMA"
    script = f"from bench.predict.issue import *; print([tensor_flops(n) for n in {names}])"
    flops = [2 * 16 * 8 * 16, 2 * 16 * 8 * 8, 2 * 64 * 64 * 16 / 4, 0]
    assert json.loads(in_a_process_that_compiles("-c", script)) == flops


COUNTING = """
import json, torch
from importlib import import_module
from bench.predict.launches import counted
from kernel_launches import FP32, meta

x, row, mean = meta(3, 1024, 2240), meta(3, 2240), meta(3, 1024, dtype=FP32)
heads, state = meta(3, 1024, 3, 70, 32).unbind(2), meta(3, 70, 33, 32, dtype=FP32)
y, a, b = meta(1, 1024, 6720), meta(1, 3, 64, 2240), meta(1, 3, 2240, 64)
lora = (a, b, meta(1, dtype=torch.int32), 1.0)
wide, taps, bias = meta(3, 1024, 11200), meta(11200, 1, 3, 3), meta(11200)
glu, grad = (wide, taps, bias, bias, 32, 32), meta(3, 1024, 5600)
short = (*meta(2500, 12, 3, 8, 16).unbind(2), None, True, 0.25)
z, t, flat = meta(4, 2, 32768, dtype=FP32), meta(4, dtype=FP32), meta(4, 32768)
norm, norm_grad = (x, row, row, None, 1e-6, "layer"), (x, x, row, None, mean, mean, "layer", False)
angles = meta(1, 1024, 64, dtype=FP32)
rotary = (meta(3, 1024, 24, 128), meta(128), angles, angles, 1e-6, "interleaved", False)
calls = {
    "gated_residual": (x, x, row, row[0]),
    "gated_residual_backward": (x, x, row, row[0], False),
    "layer_norm_modulate": norm,
    "layer_norm_modulate_backward": norm_grad,
    "residual_norm_modulate": (*norm, x, row, None),
    "residual_norm_modulate_backward": (*norm_grad, x, row),
    "rms_norm_modulate_silu": (x, row[0], row, row, 1e-6),
    "rms_norm_modulate_silu_backward": (x, x, row[0], row, row, mean, 1e-6, False),
    "renormalised_guidance": (meta(4, 3, 4096, 64), 4.0),
    "rms_norm_rotary": rotary,
    "rms_norm_rotary_backward": (rotary[0], *rotary),
    "linear_attention": (*heads, 1e-15),
    "linear_attention_backward": (x, *heads, state, 1e-15),
    "segmented_lora_": (y, x[:1], *lora),
    "segmented_lora": (y, x[:1], *lora),
    "segmented_lora_backward": (y, x[:1], meta(1, 1024, 192), *lora, True),
    "glu_depthwise": glu,
    "glu_depthwise_backward": (grad, *glu, False),
    "quantize_rows": (x[0],),
    "short_attention": short,
    "short_attention_backward": (meta(2500, 12, 128), *short, False),
    "ode_step_": (z, meta(4, 3, 32768), None, meta(4, 5, dtype=FP32), 4.5, flat),
    "interpolate": (flat, flat, t, True),
    "mfd_loss": (flat, flat, flat, t, None),
}
for name, args in calls.items():
    name_there = name.replace("residual_norm", "layer_norm")
    own = name in ("linear_attention_backward",)
    module = name_there if own else name_there.removesuffix("_").removesuffix("_backward")
    launcher = getattr(import_module(f"mfd_fast.kernels.{module}"), name_there)
    counted(lambda: launcher(*args))  # counters of arrivals are made once
    numbers = counted(lambda: launcher(*args))
    print(json.dumps([name, numbers, "More than one" in launcher.__doc__]))
"""


def test_one_launch_and_one_allocation_or_the_reason():
    lines = in_a_process_that_compiles("-c", COUNTING).splitlines()
    counts = {name: (numbers, is_said) for name, numbers, is_said in map(json.loads, lines)}
    more = {name: tuple(numbers) for name, (numbers, _) in counts.items() if max(numbers) > 1}
    assert more == {
        "layer_norm_modulate": (1, 3),
        "rms_norm_modulate_silu": (1, 2),
        "residual_norm_modulate": (1, 4),
        "residual_norm_modulate_backward": (1, 2),
        "linear_attention": (1, 2),
        "linear_attention_backward": (2, 2),
        "segmented_lora_": (2, 2),
        "segmented_lora": (2, 3),
        "segmented_lora_backward": (4, 5),
        "quantize_rows": (1, 2),
        "interpolate": (1, 2),
        "mfd_loss": (2, 4),
    }
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    ours = {n.removeprefix("mfd_fast::").lstrip("_") for n in registered if "mfd_fast::" in n}
    residual = {"residual_norm_modulate", "residual_norm_modulate_backward"}  # of one operator
    assert counts.keys() - residual == {name for name in ours if not name.endswith("_cuda")}
    said = {name for name, (_, is_said) in counts.items() if is_said}
    assert said == more.keys() | {"layer_norm_modulate_backward"}  # with a gate it is


BLOCK = """
import json
from bench.predict.launches import block_launches
print(json.dumps(block_launches(3)))
"""


def test_a_block_of_three_lanes_launches_sixteen_kernels():
    """Of SANA 1.6B as the network calls it, the third lane with an adapter."""
    names = json.loads(in_a_process_that_compiles("-c", BLOCK))
    assert len(names) == 16, names


def test_a_block_of_three_lanes_meets_its_time_with_the_depthwise_unit_bound_by_copy():
    script = "from bench.predict.issue import *; rows = json.loads(RESULT.read_text())['rows']\n"
    script += "print(json.dumps([block_row(rows, lanes) for lanes in (1, 3, 12)]))"
    blocks = json.loads(in_a_process_that_compiles("-c", script))
    assert [block["launches"] for block in blocks] == [16, 16, 16]
    assert blocks[1]["sum"] <= 700
    glu = [r for r in COMMITTED["rows"] if (r["kernel"], r["card"]) == ("glu_depthwise", "h200")]
    assert {row["shape"]: row["bound"] for row in glu}["SANA, 3 lanes"] == "copy"


@pytest.mark.slow
@pytest.mark.parametrize("card", ["a100", "h200", "rtx4090", "rtx5090"])
def test_no_bound_is_worse_than_the_committed_one(card):
    import triton

    if triton.__version__ != COMMITTED["triton"]:
        pytest.skip(f"the committed bounds are of code made by Triton {COMMITTED['triton']}")
    text = in_a_process_that_compiles("-m", "bench.predict.issue", "--cards", card)
    keys = ("shape", "at", "kernel")
    ours = {tuple(r[k] for k in keys): r["bound_us"] for r in map(json.loads, text.splitlines())}
    then = {
        tuple(r[k] for k in keys): r["bound_us"] for r in COMMITTED["rows"] if r["card"] == card
    }
    assert ours.keys() == then.keys(), "python -m bench.predict.issue --write"
    worse = {key: (us, then[key]) for key, us in ours.items() if us > then[key]}
    assert not worse, "now and committed; if it is meant: python -m bench.predict.issue --write"
