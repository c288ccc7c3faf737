"""Renders the tables of docs/cost.md from the committed predictions, and nothing else."""

from math import inf

from bench.results import markdown, read
from mfd_fast.run.environment import ROOT

PAGE = ROOT / "docs/cost.md"
CARDS = ("h100", "l40s", "b200")
MODES = {"none": "kept", "layer": "twice"}


def published_times() -> str:
    """Published seconds a step beside the predicted ones, both cards in a row."""
    result = read("published.json")
    rows: dict[tuple, dict[str, dict]] = {}
    for row in result["rows"]:
        if row["half"] != "memory":
            rows.setdefault((row["network"], row["mode"], row["half"]), {})[row["gpu"]] = row
    table = [
        [network, MODES[mode], half, *_cards(found)]
        for (network, mode, half), found in rows.items()
    ]
    columns = [(f"{card} published s", "predicted s", "ratio") for card in CARDS]
    head = ["network", "blocks", "half", *(name for three in columns for name in three)]
    config = result["config"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in config["shares"].items())
    wrong = ", ".join(config["sides"]["wrong"]) or "none"
    caption = (
        f"Fitted: {config['host_us']:.1f} us of the host an operator; {shares} of the data sheets' "
        f"rates; compiled regions {config['compiled_host_us']:.1f} us. Held out: median factor "
        f"{config['test_median']:.2f}, within 1.6 of the published seconds "
        f"{config['test_within_1_6']}. Host or device (both cards' ratio) wrong: {wrong}, right: "
        f"{len(config['sides']['right'])}."
    )
    return f"{markdown(head, table)}\n\n{caption}\n\n{_caveats(result['rows'])}"


def _cards(found: dict[str, dict]) -> list[str]:
    cells = []
    for card in CARDS:
        row = found.get(card)
        cells += (
            [f"{row['published_s']:.3f}", f"{row['predicted_s']:.3f}", f"{row['ratio']:.2f}"]
            if row
            else [""] * 3
        )
    return cells


def _caveats(rows: list[dict]) -> str:
    seen = {(row["network"], row["caveat"], row["source"]) for row in rows if row["caveat"]}
    sources = sorted({row["source"] for row in rows})
    lines = [f"- {network}: {caveat} [{sources.index(source) + 1}]" for network, caveat, source in
             sorted(seen)]  # fmt: skip
    cited = ", ".join(f"[{i + 1}] <{source}>" for i, source in enumerate(sources))
    return "\n".join(lines) + f"\n\nSources: {cited}."


def published_memory() -> str:
    """Published peaks beside the predicted ones."""
    rows = [row for row in read("published.json")["rows"] if row["half"] == "memory"]
    table = [
        [row["network"], MODES[row["mode"]], f"{row['published_gb']:.2f}",
         f"{row['predicted_gb']:.2f}", f"{row['ratio']:.2f}"]
        for row in rows
    ]  # fmt: skip
    near = sum(abs(row["ratio"] - 1) <= 0.1 for row in rows)
    head = ["network", "blocks", "published GB", "predicted GB", "ratio"]
    return f"{markdown(head, table)}\n\nWithin 10%: {near} of {len(rows)}. GB are 10^9 bytes."


SECONDS = {
    (gpu, way): f"{card} {way} s" for gpu, card in (("h100", "H100"), ("rtx4090", "RTX 4090"))
    for way in ("eager", "captured")
}  # fmt: skip


def objectives() -> str:
    """A cycle of every objective on every network, and what the integration costs over VSD."""
    result = read("objectives_cost.json")
    rows, limits = result["rows"], result["config"]["memory_gb"]
    table = [
        [row["network"], _objective(row), *_work(row), f"{row['gb_eager']:.1f}",
         *(_seconds(row, *key, limits[key[0]]) for key in SECONDS)]
        for row in rows
    ]  # fmt: skip
    head = ["network", "objective", "forwards", "TFLOP", "launches", "GB", *SECONDS.values()]
    found = {(row["network"], _objective(row)): row for row in rows}
    more = ", ".join(
        f"{network} {found[network, 'mfd']['tflop'] / row['tflop'] - 1:.0%} of the operations and "
        f"{found[network, 'mfd']['h100_eager_s'][1] / row['h100_eager_s'][1] - 1:.0%} of an H100's "
        "seconds, launched from Python"
        for (network, name), row in found.items()
        if name == "vsd"
    )
    return f"{markdown(head, table)}\n\nThe integration adds to vsd: {more}."


def objective_phases() -> str:
    """The phases of SANA."""
    table = [
        [_objective(row), name, *_work(phase), f"{phase['gb']:.1f}",
         *(_seconds(phase, *key) for key in SECONDS)]
        for row in read("objectives_cost.json")["rows"]
        if row["network"] == "sana-1.6b"
        for name, phase in row["phases"].items()
    ]  # fmt: skip
    head = ["objective", "phase", "forwards", "TFLOP", "launches", "GB", *SECONDS.values()]
    return markdown(head, table)


def _objective(row: dict) -> str:
    return row["objective"] + ", here" * (row["where"] == "here")


def _work(row: dict) -> list[str]:
    return [f"{row['forwards']:.1f}", f"{row['tflop']:.1f}", str(row["launches"])]


def _seconds(row: dict, gpu: str, way: str, limit: float = inf) -> str:
    """At least and at most; empty where it cannot be captured."""
    if row.get(f"gb_{way}", 0.0) > limit:
        return "does not fit"
    ends = [f"{end:.3g}" for end in row.get(f"{gpu}_{way}_s", ())]
    return "-".join(dict.fromkeys(ends))


TABLES = {
    "published times": published_times,
    "published memory": published_memory,
    "objectives": objectives,
    "objective phases": objective_phases,
}
