"""Renders docs/performance.md and its pictures from the committed result files, and nothing else.

python -m bench.performance            # rewrite docs/performance.md and docs/waterfall_*.png
python -m bench.performance --check    # exit 1 if the page and the results differ
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from bench.report import RESULTS, markdown, read

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "performance.md"
ROLES = ("aux", "student")
COLOURS = {"aux": "#2b6cb0", "student": "#c05621"}

HEAD = """# Performance

Made by `python -m bench.performance` from `bench/results/*.json`; do not edit. **Nothing here was
measured on a GPU**: predictions for one say so.
"""


def facts(result: dict) -> str:
    """Where a result was taken."""
    return (
        f"{result['device']}, {result['threads']} thread(s), torch {result['torch']}, "
        f"commit {result['commit']}"
    )


def waterfalls() -> list[Path]:
    """The results of ``bench.bench_step``, one a model and device."""
    return sorted(RESULTS.glob("step_*.json"))


def waterfall_section() -> str:
    """Every model's table and picture."""
    parts = [
        "## One switch at a time",
        "From the literal diffusers + PEFT loop to the whole engine; every row changes what its "
        "name says and keeps what the rows above it changed (`bench/bench_step.py` explains the "
        "names; `block`, `batch N` and `ab2` each start from the last row that is none of these). "
        "Milliseconds are the processor's, per sample: the machine was shared, and the clock's say "
        "nothing. `ab2` takes twice the step, so about half the evaluations.",
    ]
    for path in waterfalls():
        result = json.loads(path.read_text())
        parts += [f"### {result['config']['model']}", waterfall_table(result)]
        parts.append(f"![waterfall]({picture_of(path).name})")
        parts.append(
            f"`python -m bench.bench_step --model {result['config']['model']} --out "
            f"bench/results/{path.name}` on {facts(result)}; interval "
            f"{result['config']['interval']}, h = {result['config']['step']}, "
            f"{result['config']['repeats']} timed update(s) a row. GFLOP charge adapters on every "
            "row of a call."
        )
    return "\n\n".join(parts)


def waterfall_table(result: dict) -> str:
    """Both roles of every variant."""
    by_variant = variants(result)
    first = next(iter(by_variant.values()))
    rows = []
    for name, roles in by_variant.items():
        cells = [name, str(roles["student"]["batch"])]
        for role in ROLES:
            seconds = roles[role]["seconds_per_sample"]
            ratio = first[role]["seconds_per_sample"] / seconds
            cells += [f"{1e3 * seconds:.4g}", f"{ratio:.2f}x", str(roles[role]["operators"])]
        student = roles["student"]
        rows.append([*cells, f"{student['gflop']:.1f}", f"{student['peak_mb']:.0f}"])
    head = ["variant", "batch", "aux ms", "ratio", "operators", "student ms", "ratio", "operators"]
    return markdown([*head, "student GFLOP", "peak RSS MB"], rows)


def variants(result: dict) -> dict[str, dict[str, dict]]:
    """variant -> role -> row, in the order of the file."""
    by_variant: dict[str, dict[str, dict]] = {}
    for row in result["rows"]:
        by_variant.setdefault(row["variant"], {})[row["update"]] = row
    return by_variant


def picture_of(path: Path) -> Path:
    """Where the picture of a waterfall goes."""
    return DOCS / path.name.replace("step_", "waterfall_").replace(".json", ".png")


def draw(path: Path) -> None:
    """The seconds of a waterfall as bars."""
    from mfd_fast.report.pictures import GRID, INK, new_figure, write_png

    result = json.loads(path.read_text())
    by_variant = variants(result)
    figure = new_figure(9.0, 0.34 * len(by_variant) + 1.4)
    for axis, role in zip(figure.subplots(1, 2), ROLES, strict=True):
        values = [1e3 * roles[role]["seconds_per_sample"] for roles in by_variant.values()]
        bars = axis.barh(list(by_variant), values, color=COLOURS[role])
        axis.bar_label(bars, fmt="%.4g", fontsize=8, color=INK, padding=2)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.18 * max(values))
        axis.set_title(f"{role} update, ms a sample", fontsize=10, color=INK, loc="left")
        axis.grid(axis="x", color=GRID)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, colors=INK)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    title = f"{result['config']['model']}, {result['device']}, {result['threads']} thread(s)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=INK)
    figure.tight_layout()
    write_png(figure, picture_of(path))


def literal_section() -> str:
    """SANA against the literal loop."""
    result = json.loads((RESULTS / "sana_literal_cpu.json").read_text())
    columns = ("update", "impl", "seconds", "seconds_p10", "seconds_p90", "ratio")
    rows = [
        [f"{row[c]:.2f}" if c[0] in "sr" else row[c] for c in columns] for row in result["rows"]
    ]
    return (
        "## SANA against diffusers + PEFT\n\nThe literal loop (`bench/baseline_eager.py`, official "
        "settings) and ours with the same weights, prompts and interval.\n\n"
        f"{markdown(['update', 'loop', 's', 'p10', 'p90', 'ratio'], rows)}\n\n"
        "`python -m bench.bench_sana --out bench/results/sana_literal_cpu.json` on "
        f"{facts(result)}."
    )


def occfm_section() -> str:
    """OccFM's fast paths against its reference."""
    parts = ["## OccFM, fast path against reference"]
    for name, module in (("network", "bench_occfm"), ("decoder", "bench_occfm_decoder")):
        path = RESULTS / f"occfm_{name}_cpu.json"
        result = json.loads(path.read_text())
        rows = [
            [
                row.get("shape", f"{row.get('frames')} frame(s)"),
                f"{row['dtype']} {row['impl']}",
                f"{row['ms']:.0f} ({row['ms_p10']:.0f}-{row['ms_p90']:.0f})",
                f"{row.get('speedup', 1.0):.2f}x",
                str(row["operators"]),
                f"{row.get('gb_moved', row.get('bytes_moved', 0) / 1e9):.2f}",
            ]
            for row in result["rows"]
        ]
        parts += [
            markdown([name, "", "ms (p10-p90)", "ratio", "operators", "GB moved"], rows),
            f"`python -m bench.{module} --out bench/results/{path.name}` on {facts(result)}.",
        ]
    return "\n\n".join(parts)


def roofline_section() -> str:
    """The device's own ceilings, and every operator under them."""
    parts = ["## Ceilings"]
    for path in sorted(RESULTS.glob("roofline_*.json")):
        result = json.loads(path.read_text())
        roofs = ", ".join(
            f"{row['kind']} {row['dtype']} {row['gb_s']} GB/s"
            if "gb_s" in row
            else f"{row['kind']} {row['dtype']} {row['tflop_s']} TFLOP/s"
            for row in result["rows"]
        )
        picture = path.name.replace(".json", ".png")
        command = (
            f"python -m bench.roofline --out bench/results/{path.name} --picture docs/{picture}"
        )
        parts += [f"{roofs}.", f"![roofline]({picture})", f"`{command}` on {facts(result)}."]
    return "\n\n".join(parts)


def memory_section() -> str:
    """Predicted against measured bytes."""
    result = read("predicted_memory_cpu.json")
    rows = [
        [row["case"], str(row["batch"]), f"{row['predicted_mb']:.1f}", f"{row['measured_mb']:.1f}",
         f"{row['ratio']:.3f}"]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["case", "batch", "predicted MB", "RSS growth MB", "ratio"]
    caption = (
        "`python -m bench.predicted_memory --out bench/results/predicted_memory_cpu.json` on "
        f"{facts(result)}. Predicted from a trace without storage; measured as the highest RSS of "
        "a process of its own, above what it had before."
    )
    return f"## Predicted memory\n\n{markdown(head, rows)}\n\n{caption}"


def table4_section() -> str:
    """The paper's cost table beside the estimate."""
    result = read("table4_estimate.json")
    rows = [
        [row["objective"].upper(), str(row["paper_hours"]), f"{row['hours']:.2f}",
         f"{row['hours_at_the_data_sheet']:.2f}", str(row["paper_gb"]), f"{row['gb']:.1f}",
         f"{row['paper_seconds_a_cycle']:.1f}", f"{row['seconds_a_cycle']:.2f}"]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["objective", "paper h", "estimate h", "at the data sheet h", "paper GB",
            "estimate GB", "paper s a cycle", "estimate s a cycle"]  # fmt: skip
    mfd, vsd = result["rows"]
    config = result["config"]
    paper_ratio = mfd["paper_hours"] / vsd["paper_hours"]
    our_ratio = mfd["hours"] / vsd["hours"]
    text = (
        f"SANA 1.6B at 1024px on one RTX PRO 6000, preset `{config['preset']}`, {mfd['cycles']} "
        "cycles of 10 auxiliary and 1 student updates, batch 1. The estimate is for this engine "
        f"without graphs; its shares of the data sheet are {config['efficiency']}. It is not "
        "fitted to the paper.\n\n"
        f"The work of a cycle is {mfd['tflop_a_cycle']:.0f} TFLOP (E[N] = "
        f"{mfd['evaluations']:.1f}), so the paper's {mfd['paper_seconds_a_cycle']:.0f} s are "
        f"{mfd['hours_at_the_data_sheet'] / mfd['paper_hours']:.1%} of the data sheet's rate, if "
        "its 3,000 training steps are 3,000 such cycles. Its time is therefore not the network's "
        "arithmetic. What its published script does besides, and the estimate leaves out: it "
        "encodes the prompt with a 2.6B-parameter text encoder at every update, decodes a 1024px "
        "image in float32 and writes a PNG at every student update, launches about 3,056 kernels "
        "from Python for an ODE step where this engine has 332, and reads times and losses back. "
        "How the hours divide among these is not in the paper and was not measured here. The "
        "difference between MFD and VSD points the same way: both have the same overhead, and the "
        f"paper's hours differ by a factor of {paper_ratio:.2f} where the work alone predicts "
        f"{our_ratio:.2f}.\n\n"
        f"Memory: the paper's {mfd['paper_gb']} GB hold the text encoder and the image decoder "
        f"too; the estimate's {mfd['gb']:.1f} GB are the network, two adapters with optimizer "
        "state in float32, and the activations of four student steps."
    )
    caption = f"`python -m bench.table4 --out bench/results/table4_estimate.json`, {facts(result)}."
    return f"## Table 4 of the paper\n\n{markdown(head, rows)}\n\n{text}\n\n{caption}"


SECTIONS: list[Callable[[], str]] = [
    literal_section,
    waterfall_section,
    occfm_section,
    roofline_section,
    memory_section,
    table4_section,
]


def render() -> str:
    """The whole page."""
    return "\n\n".join([HEAD.rstrip(), *(section() for section in SECTIONS)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    if args.check:
        return int(PAGE.read_text() != render())
    for path in waterfalls():
        draw(path)
    PAGE.write_text(render())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
