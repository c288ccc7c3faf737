"""The guides: every command in a bash block and every Python block runs as it stands.

Blocks without a language need a network, a GPU or several machines and are not run; a bash block in
them would be.
"""

import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mfd_fast import cli
from mfd_fast.cli import COMMANDS

ROOT = Path(__file__).parents[2]
GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md"))
NEEDS = {"sana.md": ("diffusers", "matplotlib"), "quickstart.md": ("sklearn", "matplotlib"),
         "troubleshooting.md": ("sklearn", "matplotlib"), "occfm.md": ("matplotlib",),
         "cost.md": ("sklearn", "matplotlib")}  # fmt: skip


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(path):
    lines = "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


# A run of a guide is as long as its page says, on fewer samples.
SMALL = {
    "mfd-fast distill digits": "--train.batch-size 16 --distill.aux-updates 1 --num-eval-samples 20"
}


def run(line):
    """An mfd-fast command in this process (no second import of torch), anything else in bash."""
    if not line.startswith("mfd-fast "):
        subprocess.run(["bash", "-c", line], check=True)
        return
    line += "".join(f" {more}" for start, more in SMALL.items() if line.startswith(start))
    command, _, target = line.partition(" > ")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(shlex.split(command)[1:])
    assert code == 0, line
    if target:
        Path(target.strip()).write_text(printed.getvalue())


@pytest.mark.parametrize("guide", [p.name for p in GUIDES if commands(p)])
def test_every_command_of_a_guide_runs(guide, tmp_path, monkeypatch):
    for package in NEEDS.get(guide, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    for line in commands(ROOT / "docs" / guide):
        run(line)


@pytest.mark.parametrize("guide", [p.name for p in GUIDES if blocks(p, "python")])
def test_every_python_block_of_a_guide_runs(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / "docs" / guide, "python"):
        exec(compile(block, guide, "exec"), {})


@pytest.mark.parametrize("path", [*GUIDES, ROOT / "README.md"], ids=lambda path: path.name)
def test_links_and_command_names_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    typed = set(re.findall(r"^(?:[A-Z_]+=\S+ )*mfd-fast ([a-z][a-z-]+)", text, re.MULTILINE))
    assert typed <= set(COMMANDS)


def test_the_occfm_table_is_the_committed_result():
    pytest.importorskip("matplotlib")
    from mfd_fast.models.occfm.evaluate import format_table

    result = json.loads((ROOT / "bench/results/occfm_demo_cpu.json").read_text())
    assert format_table(result["table"]) in (ROOT / "docs/occfm.md").read_text()
    rows = {row["name"]: row for row in result["table"]}
    ten, one, student = (
        rows[name] for name in ("teacher, 10 steps", "teacher, 1 step", "student, 1 step")
    )
    for score in ("iou_mean_of_frames", "miou_mean_of_frames"):
        assert student[score] > one[score] and student[score] > 0.9 * ten[score]
