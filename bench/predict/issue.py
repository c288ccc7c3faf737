"""A lower bound in microseconds of every Triton kernel, by its machine code; no GPU is needed.

    python -m bench.predict.issue [--only REGEX of kernels] [--cards h200 ...] [--write]

The launchers run on meta tensors as for the card's multiprocessors, every launch is recorded, and
each kernel is compiled for the card as it would be there.  A launch takes at least the longest of

    copy      the bytes of its arguments, each once, at the memory's rate
    issue     instructions of the busiest multiprocessor, one a clock on each of four schedulers
    pipe      the same for the busiest of its units (fma, alu, special functions, loads and stores)
    matmul    its tensor-core instructions
    latency   loads that wait for each other: LATENCY_US for every step of a loop and every wave,
              shared by the stages of a pipelined loop

``--write`` makes bench/results/kernel_bounds.json, its picture docs/kernel_bounds.png, and
docs/kernels.md.  Nothing here was measured.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before triton's first import

import triton

from bench.predict.bounds_picture import draw
from bench.predict.kernel_shapes import APART, PASSES, PRODUCTS, SHAPES, TOKENS, WIDTH
from bench.predict.launches import Launch, compile_launch, oldest_arch, record, specialise
from bench.results import write
from mfd_fast.cost.devices import DEVICES
from mfd_fast.kernels import card as multiprocessors

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench/results/kernel_bounds.json"
PAGE, PICTURE = ROOT / "docs/kernels.md", ROOT / "docs/kernel_bounds.png"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BOUNDS = ("copy", "issue", "pipe", "matmul", "latency")
LATENCY_US = 0.4  # of a load from memory; an assumption


class Card(NamedTuple):
    """What a multiprocessor holds and how many clocks a unit of its four needs for a warp."""

    arch: int
    multiprocessors: int
    gigahertz: float
    shared: int
    warps: int
    blocks: int
    clocks: dict[str, int]


CARDS = {
    "a100": Card(80, 108, 1.41, 164 << 10, 64, 32, {"fma": 2, "alu": 2, "mufu": 8, "lsu": 4}),
    "h200": Card(90, 132, 1.98, 228 << 10, 64, 32, {"fma": 1, "alu": 2, "mufu": 8, "lsu": 4}),
    "rtx4090": Card(89, 128, 2.52, 100 << 10, 48, 24, {"fma": 1, "alu": 2, "mufu": 8, "lsu": 4}),
    "rtx5090": Card(120, 170, 2.41, 100 << 10, 48, 24, {"fma": 1, "alu": 1, "mufu": 8, "lsu": 4}),
}
UNITS = {
    "mufu": r"MUFU|I2F|F2I|F2F\b",
    "lsu": r"LDG|STG|LDS|STS|LDSM|LDL|STL",
    "fma": r"FFMA|FMUL|FADD|HFMA2|IMAD",
    "none": r"U|BRA|EXIT|NOP|BAR|S2R|CS2R|LDC|DEPBAR|WARPSYNC|BSYNC|BSSY|HMMA|HGMMA",
}


class Code(NamedTuple):
    """Machine code: instructions outside loops, of one step of the loops, and resources.

    loops: that run one after the other, each as often.
    """

    straight: Counter
    step: Counter
    loops: int
    registers: int
    shared: int
    load_bytes: float  # of one thread and global load or store


def code_of(launch: Launch, arch: int) -> Code:
    """Compiled once for every specialisation."""
    key = launch.name, repr(specialise(launch)), launch.warps, launch.stages, arch
    if key not in _CODE:
        compiled = compile_launch(launch, arch)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            dump = [CUOBJDUMP, "-sass", "-res-usage", file.name]
            done = subprocess.run(dump, check=True, capture_output=True, text=True)
        registers = int(re.search(r"REG:(\d+)", done.stdout + done.stderr)[1])
        _CODE[key] = read_code(done.stdout, registers, compiled.metadata.shared)
    return _CODE[key]


_CODE: dict[tuple, Code] = {}


def read_code(sass: str, registers: int, shared: int) -> Code:
    """Instructions by name.  A loop that the assembler unrolled counts as its shortest form; loops
    that store and loops that do not are different loops.
    """
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(\w[\w.]*)([^;]*);", sass)
    code = [(int(at, 16), name, rest) for at, name, rest in found]
    spans = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    bodies = [Counter(name for at, name, _ in code if a <= at <= b) for a, b in inner]
    straight = Counter(name for at, name, _ in code if not any(a <= at <= b for a, b in inner))
    kinds: dict[bool, list[Counter]] = {}
    for body in bodies:
        kinds.setdefault(any(name.startswith("STG") for name in body), []).append(body)
    step = sum((min(bodies, key=Counter.total) for bodies in kinds.values()), Counter())
    widths = [_width(name) for _, name, _ in code if re.match("LDG|STG", name)]
    return Code(straight, step, len(kinds), registers, shared, sum(widths) / max(1, len(widths)))


def _width(name: str) -> int:
    found = re.search(r"\.(128|64|U16|S16|U8)\b", name)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}[found[1]] if found else 4


def steps(launch: Launch) -> int:
    """How often the loop of a kernel runs, 0 without one."""
    a = launch.args
    return {
        "_glu_depthwise_kernel": lambda: a["rows"] + 2,
        "_glu_depthwise_backward_kernel": lambda: a["rows"] + 4,
        "_segmented_matmul_kernel": lambda: ceil(
            a["INNER"] * ceil(a["C"] / a["BLOCK_C"]) / a["SPLITS"]
        ),
        "_segmented_outer_kernel": lambda: a["num_rows"] * ceil(a["tokens"] / a["BLOCK_T"]),
        "_linear_attention_kernel": lambda: ceil(a["tokens"] / a["BLOCK_T"]),
        "_linear_attention_grad_q_kernel": lambda: ceil(a["range_tokens"] / a["BLOCK_T"]),
        "_linear_attention_grad_kv_kernel": lambda: ceil(a["apply_tokens"] / a["BLOCK_T"]),
        "_gated_residual_backward_kernel": lambda: a["tiles"],
        "_norm_modulate_backward_kernel": lambda: a["tiles"],
        "_sum_parts_kernel": lambda: ceil(a["parts"] / a["BLOCK_P"]),
        "_finish_kernel": lambda: ceil(a["samples"] / a["BLOCK_S"]),
        "_short_attention_backward_kernel": lambda: a["each"],
    }.get(launch.name, lambda: 0)()


def tensor_flops(name: str) -> float:
    """Operations of a tensor-core instruction, for one warp."""
    if found := re.match(r"HMMA\.(\d{2})(\d+)\.?", name):
        m, rest = int(found[1]), found[2]
        return 2 * m * int(rest[0]) * int(rest[1:])
    found = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name)
    return 2 * prod(map(int, found.groups())) / 4 if found else 0


def bound(launch: Launch, card_name: str) -> dict:
    """One row of the result."""
    card, code = CARDS[card_name], code_of(launch, CARDS[card_name].arch)
    trips = steps(launch) if code.step else 0
    count = Counter(code.straight)
    for name, n in code.step.items():
        count[name] += trips * n
    allocated = ceil(code.registers / 8) * 8 * 32 * launch.warps
    resident = min(
        65536 // allocated,
        card.warps // launch.warps,
        card.blocks,
        card.shared // (code.shared + 1024),
    )
    busiest = ceil(ceil(launch.programs / card.multiprocessors) * launch.warps / 4)  # warps
    waves = launch.programs / (resident * card.multiprocessors)
    peak, _, bandwidth, *_ = DEVICES[card_name]
    flops = sum(tensor_flops(name) * n for name, n in count.items())
    clocks = dict.fromkeys(card.clocks, 0)
    for name, n in count.items():
        unit = next((u for u, pattern in UNITS.items() if re.match(pattern, name)), "alu")
        if unit != "none":
            clocks[unit] += n * card.clocks[unit]
    unit = max(clocks, key=clocks.get)
    per_clock = peak * 1e12 / (card.multiprocessors * card.gigahertz * 1e9 * 4)
    clock_us = busiest / (card.gigahertz * 1e3)
    overlap = max(1, launch.stages - 1) if any("LDGSTS" in name for name in code.step) else 1
    us = {
        "copy": launch.bytes / bandwidth * 1e6,
        "issue": count.total() * clock_us,
        "pipe": clocks[unit] * clock_us,
        "matmul": flops / per_clock * clock_us,
        "latency": ceil(waves) * (trips / overlap + 1) * max(1, code.loops) * LATENCY_US,
    }
    return {
        "kernel": launch.name.strip("_").removesuffix("_kernel"),
        "card": card_name,
        "programs": launch.programs,
        "warps": launch.warps,
        "registers": code.registers,
        "shared": code.shared,
        "resident": resident,
        "waves": round(waves, 2),
        "load_bytes": round(code.load_bytes, 1),
        "unit": unit,
        **{f"{name}_us": round(value, 2) for name, value in us.items()},
        "bound_us": round(max(us.values()), 2),
        "bound": max(us, key=us.get),
    }


def bounds(cards: list[str], only: str = "") -> Iterator[dict]:
    """Every launch of every shape on every card, its place in the shape's order first."""
    for shape, call in SHAPES.items():
        for card in cards:
            multiprocessors.FORCED = CARDS[card].multiprocessors
            for at, launch in enumerate(record(call)):
                if re.search(only, launch.name) and CARDS[card].arch >= oldest_arch(launch):
                    yield {"shape": shape, "at": at} | bound(launch, card)


PREFACE = """\
# Kernels, counted

Microseconds that every Triton kernel takes at least, from its machine code and its grid, in bf16 on
an H200. What a column means is said at the top of `bench/predict/issue.py`, which made this page:
`python -m bench.predict.issue --write`. Other cards are in `bench/results/kernel_bounds.json`.
**Nothing on it was measured on a GPU**: clocks, memory rates and the latency of a load are assumed.

![every bound](kernel_bounds.png)
"""
BLOCK = """
## One block of SANA 1.6B, forward, on an H200

Microseconds: the kernels below but `quantize_rows`, cuBLAS's six products at {share:.0%} of the
peak rate, and what PyTorch does besides (attention to the text) as passes over the tokens at the
memory's rate. `tests/bench/test_kernel_bounds.py` counts the launches of the block itself.

| lanes | fused kernels | products | PyTorch | sum | launches |
|---:|---:|---:|---:|---:|---:|
"""
PRODUCT_SHARE = 0.8  # of the peak: 790 TFLOP/s of an H200's 989; an assumption
FEW = {  # why a kernel has fewer programs than an H200 has multiprocessors
    "linear_attention": "a program a head; more would be a second launch and wait as long "
    "(docs/lab-notes.md)",
    "segmented_outer": "parts of the sum would need a further launch that adds them; a deeper "
    "pipeline halves the waiting without one",
    "ode_step": "it moves one small latent; its time is that of a launch",
}
HEADINGS = ("kernel", "programs", "waves", "registers", *BOUNDS, "by")


def block_row(rows: list[dict], lanes: int) -> dict:
    """One SANA block's forward on an H200 by parts, in us, and its launches."""
    peak, _, bandwidth, *_ = DEVICES["h200"]
    shape = f"SANA, {lanes} lanes", "h200"
    mine = [r for r in rows if (r["shape"], r["card"]) == shape and r["kernel"] not in APART]
    flops = sum(2 * lanes * TOKENS * n * k for n, k in PRODUCTS)
    passes = sum(PASSES.values()) * lanes * TOKENS * WIDTH * 2
    row = {
        "lanes": lanes,
        "kernels": sum(r["bound_us"] for r in mine),
        "products": flops / (PRODUCT_SHARE * peak * 1e6),
        "pytorch": passes / bandwidth * 1e6,
    }
    launches = len(mine) + len(PRODUCTS) + len(PASSES)
    return row | {"sum": row["kernels"] + row["products"] + row["pytorch"], "launches": launches}


def page(rows: list[dict]) -> str:
    """docs/kernels.md: one block, the H200's rows, and every card's sum."""
    text = PREFACE + BLOCK.format(share=PRODUCT_SHARE)
    for lanes in (1, 3, 12):
        text += f"| {' | '.join(f'{value:.0f}' for value in block_row(rows, lanes).values())} |\n"
    for shape in SHAPES:
        here = [row for row in rows if row["shape"] == shape]
        text += f"\n## {shape}\n\n| {' | '.join(HEADINGS)} |\n|---{'|---:' * 8}|---|\n"
        for row in here:
            if row["card"] == "h200":
                times = [row[f"{name}_us"] for name in BOUNDS]
                cells = [row["kernel"], row["programs"], row["waves"], row["registers"], *times]
                text += f"| {' | '.join(map(str, [*cells, row['bound']]))} |\n"
        sums = {card: sum(r["bound_us"] for r in here if r["card"] == card) for card in CARDS}
        few = {
            r["kernel"]
            for r in here
            if r["card"] == "h200" and r["programs"] < CARDS["h200"].multiprocessors
        }
        for kernel in sorted(few):
            text += f"\nFewer programs than multiprocessors, {kernel}: {FEW[kernel]}.\n"
        text += f"\nSum: {', '.join(f'{us:.0f} us on {card}' for card, us in sums.items())}.\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression of kernels")
    parser.add_argument("--cards", nargs="+", choices=list(CARDS), default=list(CARDS))
    parser.add_argument("--write", action="store_true", help="the result file and the page")
    options = parser.parse_args()
    rows = []
    for row in bounds(options.cards, options.only):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.write:
        head = {"op": "kernel_bounds", "triton": triton.__version__, "measured": False}
        write(RESULT, head, rows)
        PAGE.write_text(page(rows))
        draw(rows, list(CARDS), PICTURE)


if __name__ == "__main__":
    main()
