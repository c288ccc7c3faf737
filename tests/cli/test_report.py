"""The HTML report: complete, self-contained, and shown by a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from mfd_fast import cli
from mfd_fast.models import preset
from mfd_fast.run.folder import RESULTS, RunFolder

pytest.importorskip("matplotlib")
from mfd_fast.run.page import write_report  # needs matplotlib

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def make_run(path, *, seed, is_finished=True):
    from PIL import Image

    config = preset("digits")
    run = RunFolder.create(path, replace(config, distill=replace(config.distill, seed=seed)))
    for update in range(1, 21):
        run.log({"update": update, "aux_loss": 1 / update, "distance": seed + update % 5,
                 "updates_per_s": 3.0})  # fmt: skip
    if is_finished:
        table = [{"name": "student, <1> step", "nfe": 1, "frechet": 1.23456, "recall": None}]
        run.write_json(RESULTS, {
            "environment": {"device": "a CPU & more"}, "seconds": 12.3, "skipped_updates": 0,
            "updates": {"aux": 100, "student": 20}, "table": table, "peak_memory_gb": 1.5,
            "peak_memory_counts": "what was counted",
            "phases": {"aux/forward": {"seconds": 0.003, "count": 100},
                       "student/integrate": {"seconds": 0.05, "count": 20}},
        })  # fmt: skip
        Image.new("RGB", (40, 20), (200, 30, 30)).save(run / "samples_grid.png")
        for update in range(10):
            Image.new("RGB", (8, 8)).save(run / f"preview-{update:06d}.png")
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder / "one", seed=0),
        make_run(folder / "two", seed=1),
        make_run(folder / "going-on", seed=1, is_finished=False),
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return write_report(runs, tmp_path_factory.mktemp("report") / "report.html")


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "<script" not in text
    assert "@import" not in text


def test_every_metric_has_a_curve_and_every_run_its_rows(page):
    text = page.read_text()
    assert text.count("<svg") == 3  # aux_loss, distance, updates_per_s
    assert text.count("<h3>one</h3>") == 2  # results, pictures
    assert "student, &lt;1&gt; step" in text and "1.235" in text and "a CPU &amp; more" in text
    assert "The run has not finished." in text
    # The grid and six of ten previews, of both finished runs.
    assert text.count("data:image/png;base64") == 14
    assert "preview-000000.png" in text and "preview-000009.png" in text


def test_phases_and_memory_are_shown(page):
    text = page.read_text()
    assert text.count("peak memory: 1.5 GB, what was counted") == 2
    assert re.search(r"student/integrate</td><td class=\"n\">50</td><td class=\"n\">76.92", text)


def test_settings_that_differ_come_first_and_are_marked(page):
    rows = re.findall(r"<tr( class=differs)?><td>([\w.]+)</td>", page.read_text())
    marked = [name for mark, name in rows if mark]
    assert marked[0] == "distill.seed" and rows[0][0]
    assert "distill.objective" not in marked


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_a_browser_shows_it(page, tmp_path):
    shot = tmp_path / "page.png"
    profile = f"--user-data-dir={tmp_path}"
    command = [BROWSER, "--headless", "--no-sandbox", profile, "--window-size=1200,1600"]
    url = page.as_uri()
    dom = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, check=True)
    assert dom.stdout.count("<svg") == 3 and dom.stdout.count("<img") == 14
    subprocess.run([*command, f"--screenshot={shot}", url], capture_output=True, check=True)
    from PIL import Image

    colours = Image.open(shot).convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colours) > 50  # a page, not a blank sheet


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_runs_off_the_page(page, tmp_path, width):
    measure = "<script>document.title = [innerWidth, document.documentElement.scrollWidth]</script>"
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", f"{measure}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    inside, needed = map(int, re.search(r"<title>(\d+),(\d+)</title>", dom).groups())
    assert needed <= inside <= max(width, 500)  # 500: as narrow as some browsers' windows get


def test_a_bar_fits_a_terminal_of_80_columns():
    from tqdm import tqdm

    from mfd_fast.run.console import BAR

    text = "distance 123.456, 12.3 updates/s"
    bar = tqdm.format_meter(9589, 9589, 86399, ncols=None, bar_format=BAR, postfix=text)
    assert len(bar) <= 80 and bar.count("/s") == 1


def test_runs_that_differ_much_have_panels_of_their_own(tmp_path):
    small, large = (make_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 500)))
    text = write_report([small, large], tmp_path / "r.html").read_text()
    assert text.count("<svg") == 4  # aux_loss, updates_per_s, and distance twice


def test_the_table_is_the_terminals(tmp_path):
    run = make_run(tmp_path / "run", seed=0)
    results = json.loads((run / RESULTS).read_text())
    results["table_text"] = "| sampler | NFE |\n|---|---:|\n| student | 1 |\n\nA note."
    results["table"][0]["class_iou"] = [0.1] * 17
    run.write_json(RESULTS, results)
    text = write_report([run], tmp_path / "r.html").read_text()
    assert "<th>NFE</th>" in text and '<td class="n">1</td>' in text and "A note." in text
    assert "frechet" not in text and "class_iou" not in text


def test_the_command(runs, tmp_path, capsys):
    target = tmp_path / "r.html"
    assert cli.main(["report", str(runs[0].path), "--out", str(target)]) == 0
    assert target.read_text().startswith("<!doctype html>")
    assert cli.main(["report"]) == 2
    assert "expected mfd-fast report RUN" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    (runs[2] / "metrics.jsonl").write_text("")
    assert cli.main(["report", str(runs[2].path)]) == 2
    assert "has logged nothing yet" in capsys.readouterr().err


def test_a_broken_line_of_metrics_is_named(tmp_path):
    run = make_run(tmp_path / "run", seed=0)
    (run / "metrics.jsonl").write_text(json.dumps({"update": 1})[:-1] + "\n")
    with pytest.raises(ValueError, match=r"no readable metrics\.jsonl"):
        write_report([run], tmp_path / "r.html")
