"""mfd-fast distill MODEL: a pipeline's folder from the command line to files that diffusers reads."""

import json

import pytest
from tiny_pipelines import tiny_pipeline

from mfd_fast import cli

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
NAMES = ("sd3", "qwen-image")  # linear guidance and call arguments; renormalised and a scheduler
PROMPTS = ["a red fox", "a much longer prompt: a cat on the snow", "two boats"]
SHORT = [
    *("--resolution", "64x64", "--pipeline.dtype", "float32", "--train.device", "cpu"),
    *("--pipeline.rank", "4", "--pipeline.alpha", "4", "--distill.step-size", ".3"),
    *("--distill.aux-updates", "1", "--distill.student-steps", "2", "--num-eval-samples", "2"),
    *("--train.log-every", "1", "--train.updates"),
]
BOUND = 1e-3  # of latents that reach 3 to 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        tiny_pipeline(name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def runs(models, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        command = ["distill", str(models / name), "--prompts", str(prompts), "--out",
                   str(folder / name), *SHORT, "2"]  # fmt: skip
        assert cli.main(command) == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_a_lora_pictures_and_a_card(name, runs):
    run = runs / name
    assert {
        "student.safetensors", "samples_grid.png", "training_curves.png", "results.json",
        "README.md",
    } <= {path.name for path in run.iterdir()}  # fmt: skip
    rows = json.loads((run / "results.json").read_text())["table"]
    assert [row["distance"] > 0 for row in rows] == [False, True, True]
    card = (run / "README.md").read_text()
    assert f"base_model: {name}\n" in card
    assert ("scheduler" in card) == (run / "scheduler_config.json").is_file() == (name != "sd3")
