"""mfd-fast distill on pipelines of videos: LoRAs, MP4 files, contact sheets, resuming."""

import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from tiny_runs import distil, saved

from mfd_fast import cli
from mfd_fast.models import open_run, preset
from mfd_fast.models.diffusers.family import family_of
from mfd_fast.models.diffusers.record import record_call
from mfd_fast.models.diffusers.task import PipelineTask
from mfd_fast.models.diffusers.video import in_tiles
from mfd_fast.pictures import videos
from mfd_fast.pictures.videos import no_mp4, video_rows

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
NAMES = ("wan", "wan2.2-a14b", "kandinsky5-t2v")
PROMPTS = ["a red fox", "a much longer prompt: a cat on the snow", "two boats"]
UPDATES = 3
SHORT = [
    *("--resolution", "32x32", "--frames", "5", "--fps", "8", "--num-eval-samples", "1"),
    *("--pipeline.dtype", "float32", "--train.device", "cpu", "--train.batch-size", "2"),
    *("--pipeline.rank", "4", "--pipeline.alpha", "8", "--distill.step-size", ".3"),
    *("--distill.aux-updates", "1", "--distill.student-steps", "2", "--train.log-every", "1"),
    *("--distill.student-optim.lr", ".02", "--train.preview-every", "2"),
    *("--train.checkpoint-every", "1", "--train.updates", str(UPDATES)),
]
BOUND = 1e-3  # of latents that reach 3 to 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"), NAMES, PROMPTS)


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        assert distil(models, name, folder / name, *SHORT) == 0
    return folder


def frames_of(path):
    imageio = pytest.importorskip("imageio")
    reader = imageio.get_reader(path)
    return [*reader.iter_data()], reader.get_meta_data()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_loras_videos_and_a_card(name, runs):
    run = runs / name
    numbers = ("", "_2") if name == "wan2.2-a14b" else ("",)
    files = {f"student{n}.safetensors" for n in numbers}
    if name.startswith("wan"):
        files |= {f"student_comfyui{n}.safetensors" for n in numbers}
    there = {path.name for path in run.glob("student*")}
    assert there == files
    for file in files:
        start = "diffusion_model.blocks." if "comfyui" in file else "transformer."
        keys = [key for key in load_file(run / file) if not key.endswith(".alpha")]
        assert all(key.startswith(start) and ".lora_" in key for key in keys)
    for stem in ("samples_grid", "preview-000002"):
        assert (run / f"{stem}.png").stat().st_size > 1000
        for number in (1, 2) if not no_mp4() else ():
            frames, facts = frames_of(run / f"{stem}-{number}.mp4")
            assert (len(frames), frames[0].shape, facts["fps"]) == (5, (32, 32, 3), 8)
    rows = json.loads((run / "results.json").read_text())["table"]
    assert [row["distance"] > 0 for row in rows] == [False, True, True]
    card = (run / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card
    assert 'export_to_video(video, "video.mp4", fps=8)' in card
    assert card.count("load_lora_weights") == len(numbers)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_in_the_stock_pipeline_gives_the_students_videos(name, runs, models):
    """Its LoRAs, its scheduler and the arguments that it types, against our own networks."""
    import diffusers

    run, task = open_run(runs / name)
    task._load_student(run)
    cond, noise = task.text.encode(PROMPTS[:2]), task.noise(2, seed=3)
    ours = task._latents("student", cond, noise, task.schedule())

    card = (run / "README.md").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(models / name)
    typed = re.search(r'pipe\("a prompt", (.*)\)\.frames', card).group(1)
    call = eval(f"dict({typed})")
    options = {key: call.pop(key) for key in ("height", "width")}
    family = family_of(pipe, **options, frames=call["num_frames"])
    steps = call.pop("num_inference_steps")

    def end():  # of each prompt alone, as the card types it
        rows = zip(noise.split(1), PROMPTS, strict=False)
        return torch.cat([record_call(family, x, steps, prompt=[p], **call).end for x, p in rows])

    without = end()
    for line in re.findall(r"pipe\.load_lora_weights\(.*?\)", card):
        eval(line.replace('"."', "run.path"))
    assert f"import {type(pipe).__name__}, UniPCMultistepScheduler\n" in card
    assert 'pipe.scheduler = UniPCMultistepScheduler.from_pretrained(".")' in card
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(run.path)
    theirs = end()
    assert float((ours - theirs).abs().max()) < BOUND
    assert float((without - theirs).abs().max()) > 10 * BOUND  # the LoRAs do something


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_killed_continues_bit_for_bit(name, runs, models, tmp_path):
    """kill -9 at the preview of update 2, resumed with the line it was started with."""
    if not (child := os.fork()):
        PipelineTask.preview = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        distil(models, name, tmp_path / name, *SHORT)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / name / "student.safetensors").exists()
    assert distil(models, name, tmp_path / name, *SHORT, "--resume") == 0
    for path in (runs / name).glob("student*.safetensors"):
        one, two = load_file(path), load_file(tmp_path / name / path.name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_sampling_and_exporting_a_run_of_two_networks(runs, tmp_path, monkeypatch, capsys):
    import diffusers

    run = runs / "wan2.2-a14b"
    picture, merged = tmp_path / "fox.png", tmp_path / "merged"
    command = ["sample", str(run), "--prompt", "a fox", "--out", str(picture)]
    if not no_mp4():
        assert cli.main(command) == 0
        assert len(frames_of(tmp_path / "fox.mp4")[0]) == 5
        picture.unlink()
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    assert cli.main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "MP4 files need imageio and imageio_ffmpeg" in said and "mfd-fast[video]" in said
    assert cli.main(["export", str(run), "--out", str(merged)]) == 0

    _, task = open_run(run)
    task._load_student(open_run(run)[0])
    cond, noise = task.text.encode(PROMPTS[:1]), task.noise(1, seed=3)
    ours = task._latents("student", cond, noise, task.schedule())
    pipe = diffusers.DiffusionPipeline.from_pretrained(merged)
    family = family_of(pipe, height=32, width=32, frames=5)
    call = {name: value for name, value in task.sampler.call.items() if "steps" not in name}
    theirs = record_call(family, noise, 2, prompt=PROMPTS[:1], **call).end
    assert float((ours - theirs).abs().max()) < BOUND


def test_a_contact_sheet_without_mp4(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    draw = torch.Generator().manual_seed(0)
    made = torch.randint(0, 256, (2, 9, 3, 32, 640), generator=draw, dtype=torch.uint8)
    sheet = tmp_path / "sheet.png"
    assert video_rows({"a": made}, sheet, captions=["x", "y"], fps=4) == [sheet]
    assert videos.smaller(made[0]).shape == (9, 3, 16, 320)


def test_what_is_refused_in_a_sentence(models, tmp_path, capsys):
    def refused(*more):
        assert distil(models, "wan", tmp_path / "out", *SHORT, *more) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said.splitlines()[-1]

    assert "frames must be 1 more than a multiple of 4" in refused("--frames", "6")
    assert "multiples of 16 for WanPipeline" in refused("--resolution", "64x72")
    index = models / "wan" / "model_index.json"
    before = index.read_text()
    for name in ("WanImageToVideoPipeline", "WanVACEPipeline", "LTXConditionPipeline"):
        index.write_text(json.dumps(json.loads(before) | {"_class_name": name}))
        said = refused()
        assert f"{name} starts from an image, a video or a control input" in said
    index.write_text(before)
    with pytest.raises(ValueError, match="makes images: leave out frames and fps"):
        family_of(tiny_pipeline("sd3"), height=64, width=64, frames=5)


def test_large_videos_are_decoded_by_tiles():
    family = family_of(tiny_pipeline("wan"), height=320, width=64, frames=1)
    x = torch.randn(1, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    whole, calls = family.decode(x), []
    decoder = family.pipe.vae.decoder
    hook = decoder.register_forward_hook(lambda *_: calls.append(1))
    with in_tiles(family.pipe.vae):
        assert family.decode(x).shape == whole.shape
    assert len(calls) > 1
    hook.remove()
    assert torch.equal(family.decode(x), whole)


def test_presets_of_published_videos():
    assert preset("Wan-AI/Wan2.1-T2V-14B-Diffusers") == preset("wan2.1-14b")
    assert preset("wan2.2-5b").pipeline.frames == 121
    assert preset("wan2.1-1.3b").num_eval_samples < preset("sd3.5-medium").num_eval_samples
