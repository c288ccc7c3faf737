"""One or several runs as one HTML file that needs nothing else: no server, script or network."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mfd_fast.files.whole import write_text
from mfd_fast.pictures.grids import GRID, INK, new_figure, smoothed
from mfd_fast.run.config import read_settings
from mfd_fast.run.folder import CONFIG, RESULTS, RunFolder

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#975a16", "#2c7a7b", "#718096")
TITLES = {  # keys of metrics.jsonl that get a curve, in this order; others follow by name
    "aux_loss": "auxiliary loss (flow matching)",
    "student_loss": "student loss (surrogate)",
    "distance": "mean-flow distance |u_T - u_A|",
    "aux_grad_norm": "gradient norm, auxiliary",
    "student_grad_norm": "gradient norm, student",
    "skipped": "updates skipped so far",
    "updates_per_s": "updates per second",
}
POSITION = "update"
PREVIEWS = "preview-*.png"  # the sample grids drawn during the run
MAX_PREVIEWS = 6
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;max-width:1180px;margin:2rem auto;
padding:0 1rem}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid
#e4e7eb;padding-bottom:.2rem}table{border-collapse:collapse;font-size:.9rem;margin:.6rem 0}
td,th{padding:.22rem .7rem;border-bottom:1px solid #e4e7eb;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.differs td{background:#fffbea}
img{max-width:100%;margin:.4rem 0;image-rendering:auto}figure{margin:.8rem 0}figcaption,.note{
color:#616e7c;font-size:.88rem}.curves{display:grid;grid-template-columns:repeat(auto-fill,
minmax(340px,1fr));gap:1rem}.curves svg{width:100%;height:auto}.key{display:inline-block;width:.9em;
height:.9em;border-radius:2px;margin-right:.4em;vertical-align:-.1em}code{background:#f5f7fa;
padding:.1em .3em;border-radius:3px}
"""


def write_report(runs: Sequence[RunFolder], path: str | Path) -> Path:
    """The report of one run, or several beside each other, as an HTML file.

    A run that has not finished is shown as far as it has come.

    Raises:
        ValueError: no runs, or a run without a logged row, by its folder.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder")
    histories = {run.path.name: _history(run) for run in runs}
    if len(histories) != len(runs):
        raise ValueError(
            f"run folders in one report need different names; got {[str(r.path) for r in runs]}"
        )
    title = f"mfd-fast: {', '.join(histories)}"
    parts = [f"<h1>{escape(title)}</h1>", _legend(histories) if len(runs) > 1 else ""]
    parts += ["<h2>Results</h2>", *(_results(run) for run in runs)]
    parts += ["<h2>Curves</h2>", _curves(histories)]
    parts += ["<h2>Pictures</h2>", *(_pictures(run) for run in runs)]
    parts += [
        "<h2>Configuration</h2>",
        _comparison({r.path.name: flat(read_settings(r / CONFIG)) for r in runs}),
    ]
    environments = {r.path.name: flat(_result_file(r).get("environment", {})) for r in runs}
    parts += ["<h2>Environment</h2>", _comparison(environments)]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    write_text(path, page)
    return Path(path)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def _history(run: RunFolder) -> list[dict[str, Any]]:
    try:
        rows = run.history()
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"{run.path} has no readable metrics.jsonl ({error})") from None
    if not rows:
        raise ValueError(f"{run.path} has logged nothing yet; wait for its first row")
    return rows


def _result_file(run: RunFolder) -> dict[str, Any]:
    path = run / RESULTS
    return json.loads(path.read_text()) if path.is_file() else {}


def _legend(names: Mapping[str, Any]) -> str:
    keys = [
        f'<span class="key" style="background:{COLOURS[i % len(COLOURS)]}"></span>{escape(name)}'
        for i, name in enumerate(names)
    ]
    return f"<p>{' &nbsp; '.join(keys)}</p>"


def _results(run: RunFolder) -> str:
    results = _result_file(run)
    if not results:
        return f"<h3>{escape(run.path.name)}</h3><p class='note'>The run has not finished.</p>"
    facts = {
        "wall time": f"{results['seconds']:.0f} s",
        "updates": ", ".join(f"{n} {role}" for role, n in results["updates"].items()),
        "skipped": results["skipped_updates"],
    }
    if "peak_memory_gb" in results:
        counts = results.get("peak_memory_counts", "")  # older results do not say
        facts["peak memory"] = f"{results['peak_memory_gb']:.3g} GB" + (counts and f", {counts}")
    columns = list(results["table"][0]) if results["table"] else []
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(_cell(row[column]) for column in columns)}</tr>" for row in results["table"]
    )
    summary = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return (
        f"<h3>{escape(run.path.name)}</h3><p class='note'>{escape(summary)}</p>"
        f"<table><tr>{head}</tr>{body}</table>{_phases(results.get('phases', {}))}"
    )


def _phases(phases: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds of every phase between two logged rows, with its share as a bar."""
    totals = {
        name: phase["seconds"] * phase["count"] for name, phase in phases.items() if ">" not in name
    }
    whole = sum(totals.values())
    if not whole:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{_cell(1e3 * phases[name]['seconds'])}"
        f"{_cell(100 * total / whole)}<td><span class='key' style='background:{COLOURS[0]};"
        f"width:{12 * total / whole:.2f}em'></span></td></tr>"
        for name, total in totals.items()
    )
    return f"<table><tr><th>phase</th><th>ms each</th><th>share, %</th><th></th></tr>{rows}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="n">{value}</td>'
    return f"<td>{escape('-' if value is None else str(value))}</td>"


def _curves(histories: Mapping[str, list[dict[str, Any]]]) -> str:
    found = {key for rows in histories.values() for row in rows for key in row}
    keys = [key for key in TITLES if key in found]
    keys += sorted(found - {POSITION, *TITLES})
    return f'<div class="curves">{"".join(_curve(key, histories) for key in keys)}</div>'


def _curve(key: str, histories: Mapping[str, list[dict[str, Any]]]) -> str:
    """One panel as inline SVG: every run's values, faint, and their moving average."""
    import matplotlib

    figure = new_figure(4.2, 2.7)
    axis = figure.subplots()
    for i, rows in enumerate(histories.values()):
        points = [(row[POSITION], row[key]) for row in rows if key in row]
        if not points:
            continue
        updates, values = zip(*points, strict=True)
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(updates, values, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(updates, smoothed(values), color=colour, linewidth=1.6)
    axis.set_title(TITLES.get(key, key), fontsize=10, color=INK, loc="left")
    axis.set_xlabel("student updates", fontsize=8, color=INK)
    axis.grid(color=GRID, linewidth=0.8)
    axis.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _pictures(run: RunFolder) -> str:
    previews = sorted(run.path.glob(PREVIEWS))
    if len(previews) > MAX_PREVIEWS:  # evenly over the run, the first and the last among them
        last = len(previews) - 1
        previews = [previews[i * last // (MAX_PREVIEWS - 1)] for i in range(MAX_PREVIEWS)]
    pictures = [
        path
        for path in sorted(run.path.glob("*.png"))
        if path.name != "training_curves.png" and not path.match(PREVIEWS)
    ]
    figures = "".join(_figure(path) for path in [*pictures, *previews])
    name = escape(run.path.name)
    return f"<h3>{name}</h3>{figures or '<p class=note>No pictures yet.</p>'}"


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = escape(path.name)
    return (
        f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _comparison(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of keys; rows in which the runs differ are marked and come first."""
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    if not keys:
        return "<p class='note'>Nothing was recorded.</p>"
    rows = {key: [column.get(key, "-") for column in columns.values()] for key in keys}
    differing = [key for key in keys if any(value != rows[key][0] for value in rows[key])]
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr{' class=differs' if key in differing else ''}><td><code>{escape(key)}</code></td>"
        + "".join(_cell(value) for value in rows[key])
        + "</tr>"
        for key in [*differing, *(key for key in keys if key not in differing)]
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"
