"""mfd-fast distill MODEL: from a pipeline's folder to files that diffusers reads."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from tiny_runs import SHORT, saved

from mfd_fast import cli
from mfd_fast.cli.cost import built
from mfd_fast.models import open_run, preset
from mfd_fast.models.diffusers.family import family_of
from mfd_fast.models.diffusers.record import record_call

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
# Linear guidance and call arguments; renormalised and a scheduler; texts of their own lengths.
NAMES = ("sd3", "qwen-image", "cogview4")
ON_LORA = "sd3-lora"  # a run whose teacher has a LoRA
PROMPTS = ["a red fox", "a much longer prompt: a cat on the snow", "two boats"]
BOUND = 1e-3  # of latents that reach 3 to 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"), NAMES, PROMPTS)


@pytest.fixture(scope="module")
def prompts(models):
    return models / "prompts.txt"


@pytest.fixture(scope="module")
def runs(models, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    lora = ["--teacher-lora", f"{folder / 'sd3' / 'student.safetensors'}:0.5"]
    for name, more in {**dict.fromkeys(NAMES, ()), ON_LORA: lora}.items():
        command = ["distill", str(models / name.removesuffix("-lora")), "--prompts", str(prompts),
                   "--out", str(folder / name), *SHORT, "2", *more]  # fmt: skip
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
    has_scheduler = (run / "scheduler_config.json").is_file()
    assert ("scheduler" in card) == has_scheduler == (name == "qwen-image")


def test_the_start_says_which_updates_run_eagerly_and_why(models, prompts, capsys):
    whys = {"sd3": "", "qwen-image": "diffusers makes a tensor", "cogview4": "texts of each"}
    for name, why in whys.items():
        found = settings(models / name, prompts).task().check()
        assert found.get("step", "").startswith(f"eager ({why}" if why else "")


@pytest.mark.parametrize("name", [*NAMES, ON_LORA])
def test_the_card_in_the_stock_pipeline_gives_the_students_images(name, runs, models):
    """Its LoRA, its scheduler and the arguments that it types, against our own network."""
    import diffusers

    run, task = open_run(runs / name)
    task._load_student(run)
    cond, noise = task.text.encode(PROMPTS[:2]), task.noise(2, seed=3)
    ours = task._latents("student", cond, noise, task.schedule())

    card = (run / "README.md").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(models / name.removesuffix("-lora"))
    weights = re.search(r'weight_name="(.*?)"', card).group(1)
    assert (weights == "student_with_teacher_lora.safetensors") == (name == ON_LORA)
    typed = re.search(r'pipe\("a prompt", (.*)\)\.images', card).group(1)
    call = eval(f"dict({typed})")
    size = call.pop("height"), call.pop("width")
    family = family_of(pipe, height=size[0], width=size[1])
    steps = call.pop("num_inference_steps")

    def end():  # of each prompt alone, as the card types it
        rows = zip(noise.split(1), PROMPTS, strict=False)
        return torch.cat([record_call(family, x, steps, prompt=p, **call).end for x, p in rows])

    without = end()
    pipe.load_lora_weights(run.path, weight_name=weights)
    if "pipe.scheduler" in card:
        pipe.scheduler = type(pipe.scheduler).from_pretrained(run.path)
    theirs = end()
    assert float((ours - theirs).abs().max()) < BOUND
    assert float((without - theirs).abs().max()) > 10 * BOUND  # the LoRA does something


@pytest.mark.parametrize("name", NAMES)
def test_a_run_continued_from_its_checkpoint_is_the_uninterrupted_one(
    name, runs, models, prompts, tmp_path
):
    """Stopped after one update, resumed with the line it was started with, text in two visits."""
    command = ["distill", str(models / name), "--prompts", str(prompts), "--out",
               str(tmp_path / name), *SHORT]  # fmt: skip
    assert cli.main([*command, "1"]) == 0
    assert cli.main([*command, "2", "--resume", "--pipeline.text-memory", "1e-9"]) == 0
    one, two = (load_file(folder / name / "student.safetensors") for folder in (runs, tmp_path))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_sampling_evaluating_and_exporting_a_finished_run(runs, tmp_path, capsys):
    import diffusers

    run = runs / "sd3"
    picture, merged = tmp_path / "fox.png", tmp_path / "merged"
    command = ["sample", str(run), "--prompt", "a fox", "--prompt", "a dog", "--num", "3"]
    assert cli.main([*command, "--out", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    assert cli.main(["evaluate", str(run)]) == 0
    row = json.loads((run / "results.json").read_text())["table"][2]
    assert f"{row['distance']:.3f}" in capsys.readouterr().out
    assert cli.main(["export", str(run), "--out", str(merged)]) == 0

    _, task = open_run(run)
    task._load_student(open_run(run)[0])
    cond, noise = task.text.encode(PROMPTS[:1]), task.noise(1, seed=3)
    ours = task._latents("student", cond, noise, task.schedule())
    pipe = diffusers.DiffusionPipeline.from_pretrained(merged)
    family = family_of(pipe, height=64, width=64)
    call = {name: value for name, value in task.sampler.call.items() if "steps" not in name}
    theirs = record_call(family, noise, 2, prompt=PROMPTS[:1], **call).end
    assert float((ours - theirs).abs().max()) < BOUND


def test_what_measures_a_run_takes_the_pipelines_own_guidance(models, prompts):
    config = settings(models / "sd3", prompts)
    assert config.distill.guidance == 1.0
    assert config.resolved().distill.guidance == built(config)[0].config.guidance == 7.0
    told = replace(config, pipeline=replace(config.pipeline, guidance=2.0))
    assert told.resolved().distill.guidance == 2.0


def test_text_is_encoded_once_and_a_row_is_what_the_pipeline_encodes(models, prompts):
    config = settings(models / "qwen-image", prompts)
    text = replace(config, train=replace(config.train, updates=3, batch_size=2)).task().text
    conds = [text.next_cond(n) for n in range(5)]
    assert text.visits == 1
    for n in (0, 4):
        batch = text.family.encode([text.prompts[i] for i in text.indices(n)])
        assert torch.equal(conds[n]["mask"], batch["mask"])
        difference = (conds[n]["text"] - batch["text"])[batch["mask"]]
        assert float(difference.abs().max()) < BOUND


def test_a_teacher_lora_is_in_the_weights_of_all_roles(models, prompts, runs):
    """Two files with a weight each; the student's own file for the plain pipeline: the card."""
    first, second = (runs / name / "student.safetensors" for name in ("sd3", ON_LORA))
    task = settings(models / "sd3", prompts, teacher_lora=f"{first}:0.5, {second}").task()
    plain = settings(models / "sd3", prompts).task().family.pipe.transformer
    states = load_file(first), load_file(second)
    for name, weight in task.family.pipe.transformer.named_parameters():
        key = f"transformer.{name.removesuffix('.weight')}.lora_"
        delta = weight - plain.get_parameter(name)
        if f"{key}A.weight" not in states[0]:
            assert not delta.any()
            continue
        products = [state[f"{key}B.weight"] @ state[f"{key}A.weight"] for state in states]
        assert float((delta - 0.5 * products[0] - products[1]).abs().max()) < BOUND


def copied(model, folder, **changes):
    """The model's folder with other entries in model_index.json."""
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def refused(capsys, *argv):
    assert cli.main(["distill", *map(str, argv)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    said = said.splitlines()[-1]
    assert said.startswith("mfd-fast distill: ")
    return said


def test_what_is_refused_before_anything_is_loaded(models, prompts, tmp_path, capsys):
    sd3, text = models / "sd3", ("--prompts", prompts, "--out", tmp_path / "out")
    for number, name in enumerate(
        ("PixArtSigmaPipeline", "StableDiffusionXLPipeline", "CogVideoXPipeline")
    ):
        model = copied(sd3, tmp_path / str(number), _class_name=name)
        assert f"{name} is no flow model" in refused(capsys, model, *text)
    flux = tmp_path / "schnell"
    tiny_pipeline("flux1-schnell").save_pretrained(flux)
    assert "is distilled already" in refused(capsys, flux, *text)
    lacks = copied(sd3, tmp_path / "lacks")
    shutil.rmtree(lacks / "text_encoder_2")
    assert "has no text_encoder_2" in refused(capsys, lacks, *text)
    assert "has no model_index.json" in refused(capsys, tmp_path, *text)
    assert "did you mean 'sana-tiny'" in refused(capsys, "sana-tinny", *text)
    assert "needs prompts: --prompts FILE" in refused(capsys, sd3)
    assert "needs a model: mfd-fast distill MODEL" in refused(capsys, "pipeline", *text)
    assert "64 x 60" in refused(capsys, sd3, *text, "--resolution", "64x60")
    assert "HxW in pixels" in refused(capsys, sd3, *text, "--resolution", "big")
    assert "give the scale with --guidance" in refused(
        capsys, sd3, *text, "--resolution", "64x64", "--distill.guidance", "2"
    )
    assert not (tmp_path / "out").exists()
    config = settings(models / "cogview4", prompts)
    sharded = replace(config, train=replace(config.train, shard="fsdp", preview_every=0))
    with pytest.raises(ValueError, match="must be none for this CogView4Pipeline: its ranks would"):
        sharded.resolved()


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    """A cache of the hub that holds ``owner/NAME``, and no network."""
    from huggingface_hub import constants

    for name in NAMES:
        place = tmp_path / f"models--owner--{name}"
        shutil.copytree(models / name, place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_hub_id_is_the_folder_of_its_cache(hub, models, prompts, tmp_path, capsys):
    config = settings("owner/sd3", prompts)
    assert (config.preset, config.teacher) == ("pipeline", "owner/sd3")
    there, here = config.task(), settings(models / "sd3", prompts).task()
    assert there.shape == here.shape
    ours, theirs = (task.family.pipe.transformer.state_dict() for task in (there, here))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    said = refused(capsys, "owner/nothing", "--prompts", prompts, "--out", tmp_path / "out")
    assert "neither in the Hugging Face cache nor could it be fetched" in said


def test_a_sana_pipeline_goes_to_its_own_network(tmp_path):
    from mfd_fast.models.sana.presets import SanaRun
    from mfd_fast.models.sana.tiny import make_tiny_checkpoint

    folder = make_tiny_checkpoint(tmp_path)
    config = preset(str(folder))
    assert isinstance(config, SanaRun)
    assert (config.preset, config.teacher) == ("sana-1.6b", str(folder))


def test_a_published_hub_id_is_its_preset():
    assert preset("Qwen/Qwen-Image") == preset("qwen-image")


def test_a_lora_of_another_model_is_refused(models, prompts, runs, tmp_path, capsys):
    text = ("--prompts", prompts, "--out", tmp_path / "out")
    other = runs / "qwen-image" / "student.safetensors"
    said = refused(capsys, models / "sd3", *text, *SHORT, "1", "--teacher-lora", other)
    assert f"{other} is no LoRA of this StableDiffusion3Pipeline" in said
    said = refused(capsys, models / "sd3", *text, *SHORT, "1", "--teacher-lora", "none.safetensors")
    assert "there is no LoRA file none.safetensors" in said


def settings(model, prompts, **pipeline):
    config = preset(str(model))
    pipeline = {"prompts": str(prompts), "dtype": "float32", "resolution": "64x64"} | pipeline
    train = replace(config.train, device="cpu")
    return replace(config, train=train, pipeline=replace(config.pipeline, **pipeline))
