"""Renders the table of published models in docs/families.md."""

from bench.predict.families import GPUS
from bench.results import markdown, read
from mfd_fast.run.environment import ROOT

PAGE = ROOT / "docs/families.md"
SHORT = {"rtx4090": "RTX 4090, 24 GB", "h100": "H100, 80 GB", "h200": "H200, 141 GB"}


def table() -> str:
    """Sizes, and predicted memory and hours of 1,000 cycles on every card."""
    result = read("families_estimate.json")
    rows = [
        [f"`{row['preset']}`", f"{row['parameters_b']:.2f} B", f"{row['tflop']:.4g}",
         f"{row['encoders_gb']:.1f} GB", *(cell(row[gpu]) for gpu in GPUS)]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["preset", "network", "TFLOP", "text encoders", *(SHORT[gpu] for gpu in GPUS)]
    caption = (
        "**Predicted**, nothing of it measured on a GPU: memory while it trains and hours for "
        f"{result['config']['cycles']:,} cycles of 10 auxiliary updates and 1 student update, one "
        "image of 1024 x 1024 an update (Cosmos-Predict2: 768 x 1360), or one video of the size "
        "that its pipeline makes by itself, rank 64; the fastest profile that fits: n keeps all "
        "activations, b recomputes blocks, 8 has 8-bit moments. TFLOP: one evaluation of one "
        "image or video. The text encoders are on the card before the training, alone. "
        "`python -m bench families --out bench/results`."
    )
    return f"{markdown(head, rows)}\n\n{caption}"


def cell(found: dict) -> str:
    """Memory, hours and profile on a card, or what is missing."""
    if not found["fits"]:
        return f"no, {found['gb']:.0f} GB"
    if not found.get("text_fits", True):
        return "no, text encoders"
    profile = found["activation"][0] + "8" * (found["optimizer"] != "adamw")
    least, most = (f"{hours:.3g}" if hours < 100 else f"{hours:,.0f}" for hours in found["hours"])
    hours = least if least == most else f"{least}-{most}"
    return f"{found['gb']:.0f} GB, {hours} h, {profile}"


def constants() -> str:
    """What an evaluation no longer does, and what is kept for it."""
    rows = [
        [f"`{row['preset']}`", f"{row['tflop']:.4g}",
         f"{1 - row['tflop_left'] / row['tflop']:.2%}", f"{row['operators']:,}",
         f"{row['operators_left']:,}", f"{row['mb_a_row']:.1f}"]
        for row in read("constants.json")["rows"]
    ]  # fmt: skip
    head = ["preset", "TFLOP", "less", "operators", "left", "MB kept"]
    caption = (
        "Counted without weights: one evaluation of one row in bf16, without adapters, at the "
        "preset's size; what is kept, for each row. "
        "`python -m bench constants --out bench/results`."
    )
    return f"{markdown(head, rows)}\n\n{caption}"


TABLES = {"families": table, "constants": constants}
