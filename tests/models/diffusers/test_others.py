"""mfd-fast distill on the pipelines without a LoRA loader: files, card, resuming, refusals."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from tiny_runs import SHORT, distil, saved

from mfd_fast import cli
from mfd_fast.models import open_run, preset
from mfd_fast.models.diffusers.family import family_of
from mfd_fast.models.diffusers.record import record_call

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
NAMES = ("cosmos2", "omnigen")
PROMPTS = ["a red fox", "a cat nap", "a much longer prompt: a cat on the snow"]
BOUND = 1e-3  # of latents that reach 3 to 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"), NAMES, PROMPTS)


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        assert distil(models, name, folder / name, *SHORT, "2") == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_card_in_the_stock_pipeline_gives_the_students_images(
    name, runs, models, tmp_path, monkeypatch
):
    """The lines that it types, against our own network."""
    import diffusers

    run, task = open_run(runs / name)
    task._load_student(run)
    cond, noise = task.text.encode(PROMPTS[:2]), task.noise(2, seed=3)
    ours = task._latents("student", cond, noise, task.schedule())

    card = (run / "README.md").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(models / name)
    typed = re.search(r'pipe\("a prompt", (.*)\)\.images', card).group(1)
    call = eval(f"dict({typed})")
    family = family_of(pipe, height=call.pop("height"), width=call.pop("width"))
    steps = call.pop("num_inference_steps")
    without = record_call(family, noise, steps, prompt=PROMPTS[:2], **call).end
    monkeypatch.chdir(run.path)
    lines = re.findall(r"^pipe\.(?:transformer|scheduler).*", card, re.MULTILINE)
    for line in lines:
        exec(line, {"pipe": pipe, type(pipe.scheduler).__name__: type(pipe.scheduler)})
    theirs = record_call(family, noise, steps, prompt=PROMPTS[:2], **call).end
    assert float((ours - theirs).abs().max()) < BOUND
    assert float((without - theirs).abs().max()) > 10 * BOUND  # the lines do something
    assert (
        cli.main(["export", str(run.path), "--to", "hub-folder", "--out", str(tmp_path / "hub")])
        == 0
    )
    merged = tmp_path / "hub" / "student_transformer" / "config.json"
    assert merged.is_file() == (name == "omnigen")
    assert (run / "samples_grid.png").stat().st_size > 1000
    rows = json.loads((run / "results.json").read_text())["table"]
    assert [row["distance"] > 0 for row in rows] == [False, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_continued_from_its_checkpoint_is_the_uninterrupted_one(name, runs, models, tmp_path):
    assert distil(models, name, tmp_path / name, *SHORT, "1") == 0
    assert distil(models, name, tmp_path / name, *SHORT, "2", "--resume") == 0
    one, two = (load_file(folder / name / "student.safetensors") for folder in (runs, tmp_path))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_pipeline_has_the_student_in_its_weights(name, runs, tmp_path):
    """Cosmos-Predict2 puts its own settings into every scheduler it is made with."""
    import diffusers

    run, task = open_run(runs / name)
    task._load_student(run)
    cond, noise = task.text.encode(PROMPTS[:1]), task.noise(1, seed=3)
    ours = task._latents("student", cond, noise, task.schedule())
    merged = tmp_path / "merged"
    assert cli.main(["export", str(run.path), "--out", str(merged)]) == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(merged)
    pipe.scheduler = type(pipe.scheduler).from_pretrained(merged, subfolder="scheduler")
    family = family_of(pipe, height=64, width=64)
    call = {name: value for name, value in task.sampler.call.items() if "steps" not in name}
    theirs = record_call(family, noise, 2, prompt=PROMPTS[:1], **call).end
    assert float((ours - theirs).abs().max()) < BOUND


def test_cosmos_refuses_what_its_checker_and_its_adapter_refuse(models, tmp_path, capsys):
    index = models / "cosmos2" / "model_index.json"
    before = index.read_text()
    video = json.loads(before) | {"_class_name": "Cosmos2VideoToWorldPipeline"}
    index.write_text(json.dumps(video))
    assert distil(models, "cosmos2", tmp_path, *SHORT, "1") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "Cosmos2VideoToWorldPipeline starts from an image, a video or a control input" in said
    index.write_text(before)
    family = family_of(tiny_pipeline("cosmos2"), height=64, width=64)
    with pytest.raises(ValueError, match=r"safety checker .* refuses the prompt 'an unsafe fox'"):
        family.encode(["a fox", "an unsafe fox"])
    family.pipe.safety_checker.check_video_safety = lambda frames: 0 * frames
    assert not family.decode(torch.randn(1, *family.sample_shape)).any()


def test_presets_without_weights():
    assert preset("nvidia/Cosmos-Predict2-2B-Text2Image") == preset("cosmos2-2b")
