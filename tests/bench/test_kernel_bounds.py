"""The bounds of bench/results/kernel_bounds.json: how they are counted; none gets worse."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        "step=Counter({'LDG.E.128': 1, 'FFMA': 1, 'BRA': 1}), "
        "registers=32, shared=0, load_bytes=8.0)"
    )


def test_operations_of_a_tensor_core_instruction():
    names = "HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32", "HGMMA.64x64x16.F32.BF16", "FFMA"
    script = f"from bench.predict.issue import *; print([tensor_flops(n) for n in {names}])"
    flops = [2 * 16 * 8 * 16, 2 * 16 * 8 * 8, 2 * 64 * 64 * 16 / 4, 0]
    assert json.loads(in_a_process_that_compiles("-c", script)) == flops


@pytest.mark.slow
@pytest.mark.parametrize("card", ["a100", "h200", "rtx5090"])
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
