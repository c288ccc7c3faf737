"""The command line as a user meets it: a short run end to end, and every way to type it wrong."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from fake_hub import fake_hub
from PIL import Image

from mfd_fast import cli

TINY = ["--train.updates", "3", "--train.batch-size", "4", "--train.log-every", "1",
        "--distill.aux-updates", "1", "--num-eval-samples", "200"]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert cli.main(["distill", "digits", "--out", str(folder), *TINY]) == 0
    return folder


def test_distill_leaves_a_complete_run_folder(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "student.safetensors", "results.json",
        "samples_grid.png", "training_curves.png", "checkpoints",
    }  # fmt: skip
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["train"]["updates"] == 3 and config["distill"]["step_size"] == 0.05
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert {"aux_loss", "student_loss", "distance", "updates_per_s", "skipped"} <= set(rows[0])
    results = json.loads((run_folder / "results.json").read_text())
    assert [row["nfe"] for row in results["table"]] == [100, 20, 10, 4, 2, 1]


def test_evaluate_repeats_the_table(run_folder, capsys):
    assert cli.main(["evaluate", str(run_folder)]) == 0
    printed = capsys.readouterr().out
    expected = json.loads((run_folder / "results.json").read_text())["table"]
    for row in expected:
        line = next(line for line in printed.splitlines() if f" {row['name']} " in line)
        assert f"{row['frechet_to_teacher50']:.2f}" in line  # the same samples, the same numbers


def test_a_hub_folder_is_complete_and_pushed(run_folder, tmp_path, monkeypatch, capsys):
    command = ["export", str(run_folder), "--to", "hub-folder", "--push", "me/student", "--out"]
    monkeypatch.setenv("HF_TOKEN", "of a test")
    with fake_hub() as (address, files):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert cli.main([*command, str(tmp_path / "shared")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("me/student")
    shared = {
        str(path.relative_to(tmp_path / "shared")): path.read_bytes()
        for path in (tmp_path / "shared").rglob("*") if path.is_file()
    }  # fmt: skip
    assert files == shared
    assert {"README.md", "config.yaml", "student.safetensors", "images/samples_grid.png"} == {
        *files
    }
    assert files["student.safetensors"] == (run_folder / "student.safetensors").read_bytes()
    card = files["README.md"].decode()
    found = {}
    monkeypatch.chdir(tmp_path / "shared")
    exec(card.split("```python\n")[1].split("```")[0], found)
    assert sum(p.numel() for p in found["student"].parameters()) > 0
    table = json.loads((run_folder / "results.json").read_text())["table_text"]
    assert table in card and "- `train.updates`: 3" in card
    assert str(run_folder) not in card + files["config.yaml"].decode()


def test_a_hub_that_refuses_is_said_and_the_folder_stays(run_folder, tmp_path, monkeypatch, capsys):
    command = ["export", str(run_folder), "--out", str(tmp_path / "out"), "--push"]
    assert cli.main([*command, "me/student"]) == 2 and "type --to hub-folder" in said(capsys)
    command[-1:] = ["--to", "hub-folder", "--push"]
    assert cli.main([*command, "student"]) == 2 and "OWNER/NAME, got 'student'" in said(capsys)
    assert cli.main([*command, "me/stu dent"]) == 2 and "got 'me/stu dent'" in said(capsys)
    monkeypatch.setenv("HF_TOKEN", "of a test")
    with fake_hub(status=403) as (address, files):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert cli.main([*command, "me/student"]) == 2
    assert "me/student could not be pushed (" in (text := said(capsys)) and "hf upload" in text
    assert not files and (tmp_path / "out/README.md").is_file()


def said(capsys):
    return capsys.readouterr().err


def test_sample_writes_a_picture_and_never_overwrites(run_folder, tmp_path, capsys):
    target = tmp_path / "samples.png"
    command = ["sample", str(run_folder), "--out", str(target), "--num", "20"]
    assert cli.main(command) == 0
    before = target.read_bytes()
    assert before[:8] == b"\x89PNG\r\n\x1a\n"
    plain = sorted((tmp_path / "samples").iterdir())
    assert len(plain) == 20 and Image.open(plain[0]).size == (8, 8)
    one = ["sample", str(run_folder), "--out", str(tmp_path / "one.png"), "--num", "1"]
    assert cli.main(one) == 0 and Image.open(tmp_path / "one.png").size == (8, 8)
    assert cli.main(command) == 2
    assert "exists; choose another file with --out" in capsys.readouterr().err
    assert target.read_bytes() == before


def test_an_existing_run_is_not_overwritten(run_folder, capsys):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert cli.main(["distill", "digits", "--out", str(run_folder), *TINY]) == 2
    assert "already holds files (a run?); nothing was changed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


def packaged_teacher() -> Path:
    import mfd_fast.models

    return Path(mfd_fast.models.__file__).parent / "digits/weights" / "digits_teacher.safetensors"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["distil", "digits"], "unknown command 'distil'; .*did you mean 'distill'"),
        (["distill"], "expected mfd-fast distill PRESET"),
        (["distill", "--out", "x"], "PRESET first; got '--out'"),
        (["distill", "digit"], "unknown preset 'digit'; .*did you mean 'digits'"),
        (
            ["distill", "digits", "--objective", "gan"],
            "--objective.* must be one of mfd, vsd, .*, got 'gan'",
        ),
        (
            ["distill", "digits", "--distill.step-sise", "0.1"],
            "unknown option '--distill.step-sise'; .*did you mean '--distill.step-size'",
        ),
        (
            ["distill", "digits", "--train.batch-size", "many"],
            "--train.batch-size: expected a whole number, got 'many'; mfd-fast distill digits --h",
        ),
        (["distill", "digits", "--teacher", "nowhere.safetensors"], "nowhere.safetensors"),
        (["distill", "digits", "--config", "."], "--config: .: is a directory; name another place"),
        (["sample", "nowhere"], "nowhere is not a run folder: it has no config.yaml"),
        (["export", "nowhere"], "expected mfd-fast export --out PATH; .*shows an example"),
        (["report", "r", "--uot", "3"], "unknown option '--uot'; .*did you mean '--out'"),
        (
            ["evaluate", "nowhere", "--num-samples", "many"],
            "--num-samples: expected a whole number, got 'many'",
        ),
        (["pretrain", "sana"], "unknown network 'sana'; there is digits, "),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(
    argv, message, tmp_path, capsys, monkeypatch
):
    import re

    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_setting_out_of_range_exits_with_2(value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", "digits", "--distill.step-size", value]) == 2
    error = capsys.readouterr().err
    assert f"distill.step_size must be > 0, got {float(value)}" in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_teacher_is_refused(tmp_path, capsys):
    broken = tmp_path / "teacher.safetensors"
    broken.write_bytes(packaged_teacher().read_bytes()[:1000])
    out = tmp_path / "run"
    assert cli.main(["distill", "digits", "--teacher", str(broken), "--out", str(out)]) == 2
    assert str(broken) in capsys.readouterr().err
    assert not out.exists()


def test_an_unwritable_folder_is_refused(tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert cli.main(["distill", "digits", "--out", str(blocker / "run"), *TINY]) == 2
    assert "choose a writable folder with --out" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert cli.main(["distill", "digits", "--out", str(tmp_path / "run"), *TINY]) == 2
    assert "choose a writable folder" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert "compiled operators" in capsys.readouterr().out


@pytest.mark.parametrize(("package", "extra"), sorted(cli.EXTRAS.items()))
def test_a_package_of_an_extra_is_asked_for(package, extra, monkeypatch, capsys):
    names = {"sklearn": "scikit-learn", "PIL": "pillow"}
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (listed,) = re.findall(rf"^{extra} = \[(.*)\]", text, re.MULTILINE)
    assert re.search(rf'"{names.get(package, package)}\b', listed)

    def without(*_):
        raise ModuleNotFoundError(f"No module named {package!r}", name=f"{package}.utils")

    monkeypatch.setattr(cli, "_run", without)
    assert cli.main(["info"]) == 2
    assert f"pip install 'mfd-fast[{extra}]'" in capsys.readouterr().err
