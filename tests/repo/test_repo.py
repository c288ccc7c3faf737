"""Rules of the repository: sizes, import direction, forbidden calls, operators complete."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("mfd_fast", "kernels", "csrc", "bench", "tests", "scripts", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and not path.is_symlink()
    if "kernels" not in path.relative_to(ROOT).parts[1:]  # mfd_fast/kernels links to kernels/
)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]


def name(path):
    return str(path.relative_to(ROOT))


def test_no_file_is_over_400_lines():
    long = {name(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_no_function_is_over_60_lines():
    long = {}
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 60:
                    long[f"{name(path)}:{node.name}"] = lines
    assert not long


# Architecture: imports point one way.  A room may import its own line and those above it.
ROOMS = [
    {"ops", "kernels", "settings", "files", "hub", "testing"},
    {"flow", "metrics", "pictures"},
    {"backbones"},
    {"distill"},
    {"baselines"},
    {"run"},
    {"cost", "models"},
    {"cli", "diffusers"},
]
RANK = {room: rank for rank, line in enumerate(ROOMS) for room in line}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "mfd_fast" and len(parts) > 1:
                yield parts[1]


def test_imports_point_one_way():
    wrong = set()
    for path in PYTHON:
        parts = path.relative_to(ROOT).parts
        if parts[0] != "mfd_fast" or len(parts) == 2:
            continue
        for other in imported_modules(path):
            if RANK.get(other, -1) > RANK[parts[1]]:
                wrong.add(f"{name(path)} imports {other}")
    assert not wrong


def test_every_room_has_a_place():
    rooms = {path.parent.name for path in (ROOT / "mfd_fast").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "mfd_fast").glob("*.py")} - {"__init__", "__main__"}
    assert rooms | files == RANK.keys()


def test_the_house_in_numbers():
    command = [sys.executable, "scripts/house_numbers.py"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"rooms at the top +(\d+)", out)[1]) <= 20
    assert re.search(r"files in circles +0 ", out)
    settings = len((ROOT / "tests/data/settings.txt").read_text().split())
    assert f"settings, commands   {settings}, " in out


FORBIDDEN = re.compile(r"\.item\(\)|\.cpu\(\)|\.tolist\(\)|\bprint\(|torch\.cuda\.synchronize")
HOT = ("mfd_fast/ops", "kernels", "mfd_fast/flow", "mfd_fast/backbones", "mfd_fast/distill")
READS = ("distill/phases.py", "distill/ranks.py")  # outside the updates


def test_hot_path_never_reads_the_device():
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in PYTHON
        if name(path).startswith(HOT) and not name(path).endswith(READS)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not found


def test_kernels_do_not_know_torch():
    for path in SOURCES:
        if path.parent.name in ("cpu", "cuda") and path.parent.parent.name == "csrc":
            assert "torch/" not in path.read_text(), name(path)


OPERATORS = sorted(
    path.stem for path in (ROOT / "mfd_fast/ops").glob("*.py")
    if "= define(" in path.read_text()
)  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_complete(operator):
    """Reference, test and benchmark of the same name."""
    reference = (ROOT / "mfd_fast/ops/reference.py").read_text()
    assert re.search(rf"^def {operator}\(", reference, re.MULTILINE)
    assert (ROOT / f"tests/ops/test_{operator}.py").is_file()
    assert (ROOT / f"bench/ops/{operator}.py").is_file()
    assert "opcheck" in (ROOT / f"tests/ops/test_{operator}.py").read_text()


def test_import_needs_only_the_core_dependencies():
    """``import mfd_fast`` loads no optional package (and no YAML, no CLI)."""
    banned = "yaml tyro rich diffusers transformers peft sklearn scipy matplotlib torchmetrics"
    code = (
        "import torch, sys; before = set(sys.modules); import mfd_fast; "
        f"print([m for m in {banned.split()} if m in set(sys.modules) - before])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_readme_tree_names_what_exists():
    block = re.search(r"```text\n(mfd_fast/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.group(1).splitlines():
        path = line.split()[0]
        assert (ROOT / path).exists(), f"README names {path}, which is not there"


PUBLIC = {
    "mean_velocity": "(velocity, x, t, r, *, step_size, solver, grid, cond)",
    "guided": "(velocity_cond, velocity_uncond, scale)",
    "sample_times": "(batch, distribution, *, mean, std, generator)",
    "sample_time_pairs": "(batch, distribution, *, mean, std, equal_fraction, min_interval, "
    "max_interval, generator)",
    "interpolate": "(x0, noise, t)",
    "mfd_loss": "(x_t, u_teacher, u_aux)",
    "generate": "(student_velocity, noise, *, steps, solver, schedule)",
}


@pytest.mark.parametrize("function", PUBLIC)
def test_public_signatures(function):
    import inspect

    import mfd_fast

    parameters = inspect.signature(getattr(mfd_fast, function)).parameters.values()
    names, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            names.append("*")
            starred = True
        names.append(parameter.name)
    assert f"({', '.join(names)})" == PUBLIC[function]
    assert "[b" in getattr(mfd_fast, function).__doc__.lower() or function == "guided"


def test_readme_tables_are_what_the_results_say():
    from bench.pages import families
    from bench.pages.readme import OF_QUICKSTART, QUICKSTART, README, TABLES, render

    for page, made in (
        (README, TABLES),
        (QUICKSTART, OF_QUICKSTART),
        (families.PAGE, families.TABLES),
    ):
        text = page.read_text()
        assert render(text, made) == text, "run: python -m bench.pages"


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
