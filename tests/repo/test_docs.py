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


def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples/one_step_digits.ipynb").read_text())["cells"]
    install, *code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert all(line.startswith("!") for line in install.splitlines())
    small = {"UPDATES, SAMPLES = 400, 2000": "UPDATES, SAMPLES = 1, 20",
             '"digits", *run': '"digits", *run, "--train.batch-size", "4"'}  # fmt: skip
    source = "\n".join(code)
    for full, less in small.items():
        assert full in source
        source = source.replace(full, less)
    exec(compile(source, "notebook", "exec"), {})
    assert (tmp_path / "shared/README.md").is_file()


def test_the_image_is_installed_as_the_guide_says():
    """No image is built here: its steps are those of docs/install.md."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    kinds = [line.split()[0] for line in lines if line and line[0] not in "# "]
    assert kinds[0] == "FROM" and kinds[-1] == "ENTRYPOINT"
    assert {*kinds} <= {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "ENTRYPOINT"}
    ran = " && ".join(line for line in lines if line.startswith("RUN"))
    guide = (ROOT / "docs/install.md").read_text()
    steps = [line.partition("  #")[0].strip() for line in re.findall(r"^pip .*", guide, re.M)]
    assert len(steps) == 3
    for step in steps:
        torch = step.replace("torch==2.13.0", "torch==${TORCH}")
        assert torch.removesuffix(" .") in ran, step
    assert "ARG TORCH=2.13.0" in lines


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
