"""One or several runs as one HTML file."""

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mfd_fast.pictures.grids import draw_curve, new_figure
from mfd_fast.pictures.page import figure, table, table_of, write_page
from mfd_fast.run.config import read_settings
from mfd_fast.run.folder import CONFIG, RESULTS, RunFolder

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#975a16", "#2c7a7b", "#718096")
TITLES = {  # keys of metrics.jsonl that get a curve, in this order; others follow by name
    "distance": "mean-flow distance |u_T - u_A|",
    "aux_loss": "auxiliary loss (flow matching)",
    "student_loss": "student loss (surrogate)",
    "aux_loss_mean": "auxiliary loss, mean of all updates",
    "student_loss_mean": "student loss, mean of all updates",
    "aux_loss_std": "auxiliary loss, standard deviation",
    "student_loss_std": "student loss, standard deviation",
    "aux_lag": "auxiliary behind the student",
    "aux_grad_norm": "gradient norm, auxiliary",
    "student_grad_norm": "gradient norm, student",
    "aux_lr": "learning rate, auxiliary",
    "student_lr": "learning rate, student",
    "saturation": "share of values beyond the bound",
    "skipped": "updates skipped so far",
    "skipped_in_a_row": "updates skipped in a row",
    "updates_per_s": "updates per second, both roles",
}
JUDGE = (
    "Judge by the distance and the table: the auxiliary follows a student that moves, and the "
    "student's loss is a surrogate for a gradient; both may rise while the student gets better. "
    "Points and faint lines are logged rows, strong lines their moving average."
)
APART = 10  # panels of one key are split where ranges of runs differ by this factor
POSITION = "update"
PREVIEWS = "preview-*.png"  # the sample grids drawn during the run
MAX_PREVIEWS = 6


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
    results = {run.path.name: _result_file(run) for run in runs}
    colours = dict(zip(histories, COLOURS * len(runs), strict=False))
    keys = "&nbsp; ".join(f"<b style='color:{c}'>{escape(name)}</b>" for name, c in colours.items())
    write_page(
        path,
        f"mfd-fast: {', '.join(histories)}",
        [
            *("<h2>Results</h2>", *(_results(*pair) for pair in results.items())),
            *("<h2>Curves</h2>", f"<p>{keys}</p>", f"<p class='note'>{JUDGE}</p>"),
            _curves(histories, colours),
            *("<h2>Pictures</h2>", *map(_pictures, runs)),
            "<h2>Configuration</h2>",
            _comparison({run.path.name: flat(read_settings(run / CONFIG)) for run in runs}),
            "<h2>Environment</h2>",
            _comparison({name: flat(r.get("environment", {})) for name, r in results.items()}),
        ],
    )
    return Path(path)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {prefix + name: value}
        )
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


def _results(name: str, results: Mapping[str, Any]) -> str:
    if not results:
        return f"<h3>{escape(name)}</h3><p class='note'>The run has not finished.</p>"
    updates = ", ".join(f"{n} {role}" for role, n in results["updates"].items())
    facts = f"wall time: {results['seconds']:.0f} s; updates: {updates}; skipped: "
    facts += str(results["skipped_updates"])
    if "peak_memory_gb" in results:
        counts = results.get("peak_memory_counts", "")  # older results do not say
        facts += f"; peak memory: {results['peak_memory_gb']:.3g} GB" + (counts and f", {counts}")
    rows = results["table"]
    parts = [f"<h3>{escape(name)}</h3><p class='note'>{escape(facts)}</p>"]
    if text := results.get("table_text"):
        parts.append(table_of(text))
    elif rows:  # of an older run
        keys = [key for key, value in rows[0].items() if not isinstance(value, Mapping | list)]
        shown = [[row.get(key) for key in keys] for row in rows]
        parts.append(table([key.replace("_", " ") for key in keys], shown))
    phases = {k: v for k, v in results.get("phases", {}).items() if ">" not in k}
    if whole := sum(phase["seconds"] * phase["count"] for phase in phases.values()):
        share = {name: p["seconds"] * p["count"] / whole for name, p in phases.items()}
        timed = [[name, 1e3 * p["seconds"], 100 * share[name]] for name, p in phases.items()]
        parts.append(table(["phase", "ms each", "share, %"], timed))
    return "".join(parts)


def _curves(histories: Mapping[str, list[dict]], colours: Mapping[str, str]) -> str:
    """Panels as inline SVG: every run's values, faint, and their moving average."""
    import matplotlib

    found = {key for rows in histories.values() for row in rows for key in row}
    panels = []
    for key in [*(k for k in TITLES if k in found), *sorted(found - {POSITION, *TITLES})]:
        points = {
            name: [(row[POSITION], row[key]) for row in rows if key in row]
            for name, rows in histories.items()
        }
        title = TITLES.get(key, key.replace("_", " "))
        for names in _together(points):
            picture, buffer = new_figure(4.2, 2.7), io.StringIO()
            axis = picture.subplots()
            for name in names:
                draw_curve(axis, points[name], title, colours[name])
            picture.tight_layout()
            with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
                picture.savefig(buffer, format="svg", metadata={"Date": None})
            panels.append(buffer.getvalue()[buffer.getvalue().index("<svg") :])
    return f'<div class="curves">{"".join(panels)}</div>'


def _together(points: Mapping[str, list[tuple]]) -> list[list[str]]:
    """Runs that share a panel: all, or each its own where one would flatten another."""
    drawn = {name: [v for _, v in rows if v - v == 0.0] for name, rows in points.items()}
    spans = {name: max(map(abs, values)) for name, values in drawn.items() if any(values)}
    if spans and max(spans.values()) > APART * min(spans.values()):
        return [[name] for name, rows in points.items() if rows]
    return [[name for name, rows in points.items() if rows]]


def _pictures(run: RunFolder) -> str:
    previews = sorted(run.path.glob(PREVIEWS))
    if len(previews) > MAX_PREVIEWS:  # evenly over the run, the first and the last among them
        last = len(previews) - 1
        previews = [previews[i * last // (MAX_PREVIEWS - 1)] for i in range(MAX_PREVIEWS)]
    others = [path for path in sorted(run.path.glob("*.png")) if not path.match(PREVIEWS)]
    pictures = [path for path in others if path.name != "training_curves.png"] + previews
    shown = "".join(map(figure, pictures)) or "<p class='note'>No pictures yet.</p>"
    return f"<h3>{escape(run.path.name)}</h3>{shown}"


def _comparison(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of keys; rows in which the runs differ are marked and come first."""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    if not keys:
        return "<p class='note'>Nothing was recorded.</p>"
    rows = [[key, *(column.get(key, "-") for column in columns.values())] for key in keys]
    differing = [row for row in rows if any(value != row[1] for value in row[1:])]
    same = [row for row in rows if row not in differing]
    return table(["", *columns], [*differing, *same], marked=len(differing))
