"""Renders docs/performance.md and its pictures from the committed results, and nothing else."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from bench.pages import waterfall
from bench.predict import roofline
from bench.results import RESULTS, markdown, read, short
from mfd_fast.run.environment import ROOT

DOCS = ROOT / "docs"
PAGE = DOCS / "performance.md"

HEAD = """# Performance

Made by `python -m bench.pages` from `bench/results/*.json`; do not edit. **Nothing here was
measured on a GPU**: predictions for one say so.
"""


def facts(result: dict) -> str:
    """Where a result was taken."""
    return (
        f"{result['device']}, {result['threads']} thread(s), torch {result['torch']}, "
        f"commit {result['commit']}"
    )


def made(path: Path, result: dict) -> str:
    """The command that makes a result, and where it was taken."""
    name = re.sub(f"(_{short(result['device'])}|_estimate)?.json$", "", path.name)
    return f"`python -m bench {name} --out bench/results` on {facts(result)}"


def waterfalls() -> list[Path]:
    """The results of ``bench.updates.step``, one a model and device."""
    return sorted(RESULTS.glob("step_*.json"))


def waterfall_section() -> str:
    """Every model's tables and picture."""
    text = [
        "## One switch at a time",
        "From the literal diffusers + PEFT loop to the whole engine (`bench/updates/step.py`). "
        "Down to `fused` or `captured` every row keeps what the rows above it changed, "
        "except those that only change the literal loop; the others each start from there. "
        "Milliseconds are the clock's, per sample; ratios are to `literal`, where there is none to "
        "`sequential`. `ab2` takes twice the step, so half the evaluations.",
    ]
    for path in waterfalls():
        result = json.loads(path.read_text())
        config = result["config"]
        text += [f"### {config['model']}", waterfall.times_table(result)]
        text += [waterfall.details_table(result), f"![waterfall]({picture_of(path).name})"]
        aux, student = config["cycle"]
        text.append(
            f"{made(path, result)}; interval {config['interval']}, h = "
            f"{config['step']}, {config['repeats']} timed update(s) a row; a cycle is {aux} "
            f"auxiliary and {student} student updates; a large matmul reaches "
            f"{config['rates']['tflops']} TFLOP/s here."
        )
    return "\n\n".join(text)


def picture_of(path: Path) -> Path:
    """Where the picture of a waterfall goes."""
    return DOCS / path.name.replace("step_", "waterfall_").replace(".json", ".png")


def time_section() -> str:
    """Predicted against measured seconds."""
    text = ["## Predicted time"]
    for path in sorted(RESULTS.glob("predicted_time_*.json")):
        result = json.loads(path.read_text())
        rows = [
            [row["case"], row["update"], f"{row['predicted_s']:.4g}", f"{row['measured_s']:.4g}",
             f"{row['ratio']:.2f}"]
            for row in result["rows"]
        ]  # fmt: skip
        sources = "; ".join(sorted({row["source"] for row in result["rows"]}))
        text += [
            "Seconds of an update at shapes that were not measured for the prediction.",
            markdown(["case", "update", "predicted s", "measured s", "ratio"], rows),
            f"{made(path, result)}; predicted from {sources}.",
        ]
    return "\n\n".join(text)


def literal_section() -> str:
    """SANA against the literal loop."""
    path = RESULTS / "sana_literal_cpu.json"
    result = read(path.name)
    columns = ("update", "impl", "seconds", "seconds_p10", "seconds_p90", "ratio")
    rows = [
        [f"{row[c]:.2f}" if c[0] in "sr" else row[c] for c in columns] for row in result["rows"]
    ]
    return (
        "## SANA against diffusers + PEFT\n\nThe literal loop (`bench/updates/literal.py`, "
        "official settings) and ours with the same weights, prompts and interval.\n\n"
        f"{markdown(['update', 'loop', 's', 'p10', 'p90', 'ratio'], rows)}\n\n"
        f"{made(path, result)}."
    )


def occfm_section() -> str:
    """OccFM's fast paths against its reference."""
    parts = ["## OccFM, fast path against reference"]
    for name in ("network", "decoder"):
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
            f"{made(path, result)}.",
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
        parts += [f"{roofs}.", f"![roofline]({picture})", f"{made(path, result)}."]
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
        f"{made(RESULTS / 'predicted_memory_cpu.json', result)}. Predicted from a trace without "
        "storage; measured as the highest RSS of "
        "a process of its own, above what it had before."
    )
    return f"## Predicted memory\n\n{markdown(head, rows)}\n\n{caption}"


def table4_section() -> str:
    """The paper's cost table beside the estimate."""
    result = read("table4_estimate.json")
    rows = [
        [row["objective"].upper(), str(row["paper_hours"]), f"{row['hours']:.2f}",
         _ends(row["eager_hours"]), f"{row['hours_at_the_data_sheet']:.2f}",
         str(row["paper_gb"]), f"{row['gb']:.1f}", f"{row['paper_seconds_a_cycle']:.1f}",
         f"{row['seconds_a_cycle']:.2f}", _ends(row["eager_seconds_a_cycle"])]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["objective", "paper h", "captured h", "eager h", "at the data sheet h", "paper GB",
            "predicted GB", "paper s a cycle", "captured s a cycle", "eager s a cycle"]  # fmt: skip
    mfd = result["rows"][0]
    config = result["config"]
    text = (
        f"SANA 1.6B at 1024px on one RTX PRO 6000, preset `{config['preset']}`, {mfd['cycles']} "
        "cycles of 10 auxiliary and 1 student updates, batch 1. Predicted for this engine, as CUDA "
        "graphs and launched from Python at "
        f"{_ends(config['host_us'], '.0f')} us an operator; the shares of the data sheet are "
        f"{config['efficiency']}. Nothing is fitted to the paper.\n\n"
        f"The work of a cycle is {mfd['tflop_a_cycle']:.0f} TFLOP (E[N] = "
        f"{mfd['evaluations']:.1f}), so the paper's {mfd['paper_seconds_a_cycle']:.0f} s are "
        f"{mfd['hours_at_the_data_sheet'] / mfd['paper_hours']:.1%} of the data sheet's rate, if "
        "its 3,000 training steps are 3,000 such cycles.\n\n"
        f"Memory: the paper's {mfd['paper_gb']} GB hold the text encoder and the image decoder "
        f"too; the predicted {mfd['gb']:.1f} GB are the network, two adapters with optimizer "
        "state in float32, and the activations of four student steps."
    )
    caption = f"{made(RESULTS / 'table4_estimate.json', result)}."
    parts = ["## Table 4 of the paper", markdown(head, rows), text, caption]
    return "\n\n".join([*parts, published_section(result["rows"])])


def _ends(ends: list[float], form: str = ".2f") -> str:
    low, high = (format(end, form) for end in ends)
    return low if low == high else f"{low}-{high}"


def published_section(estimates: list[dict]) -> str:
    """The paper's seconds against the parts of the loop that took them."""
    result = read("published_cost.json")
    keys = ("tflop", "operators", "device_seconds", "seconds", "seconds_high")
    total = {key: sum(row[key] for row in result["rows"]) for key in keys}
    listed = [*result["rows"], {"part": "cycle", "times": "", **total}]
    rows = [
        [row["part"], str(row["times"]).removesuffix(".0"), f"{row['tflop']:.1f}",
         str(row["operators"]), f"{row['device_seconds']:.2f}",
         _ends([row["seconds"], row["seconds_high"]])]
        for row in listed
    ]  # fmt: skip
    once = {row["part"]: row for row in result["rows"]}
    step = [once["teacher, guided"], once["auxiliary, no gradient"]]
    expected, ours = (
        result["config"][key] for key in ("evaluations", "operators_of_an_ode_step_of_ours")
    )
    mfd, vsd = (row["paper_seconds_a_cycle"] for row in estimates)
    beyond = (expected - 1) / expected
    integration = [beyond * sum(part[key] for part in step) for key in ("seconds", "seconds_high")]
    text = (
        "Where the paper's seconds could go: the published loop part by part, eager, with the "
        "same assumed shares and the published settings (uniform pairs, E[N] = "
        f"{expected}). An ODE step is {sum(part['operators_once'] for part in step)} operators "
        f"there and {ours} here.\n\n"
        "Host and device together explain "
        f"{_ends([total['seconds'], total['seconds_high']], '.1f')} of the {mfd:.0f} s; the device "
        f"alone {total['device_seconds']:.1f}. MFD and VSD share "
        f"all but the integration beyond its first step: {mfd - vsd:.1f} s of the paper's, "
        f"{_ends(integration, '.1f')} s predicted. The other "
        f"{mfd - total['seconds_high']:.0f} to {mfd - total['seconds']:.0f} s are in no part that "
        "is known here and stay unexplained, the same for both methods, if the paper's 3,000 "
        "training steps are 3,000 such cycles. Nothing was measured on a GPU."
    )
    head = ["part of the published cycle", "times", "TFLOP", "operators", "device s", "s"]
    caption = f"{made(RESULTS / 'published_cost.json', result)}."
    return "\n\n".join([markdown(head, rows), text, caption])


def operators_section() -> str:
    """Every compiled CPU operator against eager PyTorch at its first large fp32 shapes."""
    rows, first = [], None
    for path in sorted(RESULTS.glob("*_cpu.json")):
        result = json.loads(path.read_text())
        if not (ROOT / f"csrc/cpu/{result.get('op')}.h").is_file():
            continue  # a study, or an operator whose CPU implementation is the reference
        first = first or result
        eager = {
            (row["shape"], row["dtype"]): row["us"]
            for row in result["rows"]
            if row["impl"] == "eager"
        }
        for row in result["rows"]:
            if row["impl"] == "ours" and row["dtype"] == "float32":
                spread = f"{row['us']:.0f} ({row['us_p10']:.0f}-{row['us_p90']:.0f})"
                rows.append(
                    [f"`{result['op']}`, {row['shape']}",
                     f"{eager[row['shape'], row['dtype']]:.0f}", spread,
                     f"{row['speedup']:.2f}x", f"{row['copy_fraction']:.0%}"]
                )  # fmt: skip
    head = ["operator, shape, fp32", "eager us", "ours us (p10-p90)", "speed-up", "of copy"]
    return "\n\n".join(
        [
            "## Operators on a CPU",
            "The C++ kernels against eager PyTorch; the other operators run the PyTorch reference "
            "there. Over 100 % of the copy bandwidth means that the data were in cache.",
            markdown(head, rows),
            f"`python -m bench NAME --out bench/results` on {first['device']}, "
            f"{first['threads']} thread(s), torch {first['torch']}.",
        ]
    )


SECTIONS: list[Callable[[], str]] = [
    literal_section,
    operators_section,
    waterfall_section,
    occfm_section,
    roofline_section,
    memory_section,
    time_section,
    table4_section,
]


def render() -> str:
    """The whole page."""
    return "\n\n".join([HEAD.rstrip(), *(section() for section in SECTIONS)]) + "\n"


def draw() -> None:
    """The page's pictures."""
    for path in waterfalls():
        waterfall.draw(path, picture_of(path))
    for path in RESULTS.glob("roofline_*.json"):
        result = json.loads(path.read_text())
        points = list(roofline.operators(result["device"], result["threads"]))
        picture = DOCS / path.name.replace(".json", ".png")
        roofline.draw(result["rows"], points, result["device"], picture)
