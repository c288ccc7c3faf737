"""A SANA run from the command line: distil, sample, evaluate, its files, and what it refuses."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from mfd_fast import cli
from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.models import preset
from mfd_fast.models.sana import load_sana_transformer
from mfd_fast.models.sana.lora_files import Lora, merge_lora, read_lora, save_diffusers_lora
from mfd_fast.models.sana.presets import SanaRun
from mfd_fast.models.sana.tiny import make_tiny_checkpoint
from mfd_fast.run.config import MEMORY_PROFILES, from_dict, to_dict, with_memory
from mfd_fast.testing.numerics import assert_as_accurate

SanaPipeline = pytest.importorskip("diffusers").SanaPipeline
pytest.importorskip("matplotlib")
SHORT = [
    *("--train.updates", "2", "--train.log-every", "1", "--train.batch-size", "1"),
    *("--distill.aux-updates", "1", "--num-eval-samples", "2", "--train.device", "cpu"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("sana-tiny"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prompts.txt"
    path.write_text("a red cube\ntwo cats\na boat\n")
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, checkpoint, prompts):
    folder = tmp_path_factory.mktemp("runs") / "sana"
    command = ["distill", "sana-tiny", "--out", str(folder), "--teacher", str(checkpoint),
               "--sana.prompts", str(prompts), "--train.preview-every", "1", *SHORT]  # fmt: skip
    assert cli.main(command) == 0
    return folder


def settings(checkpoint, **sana):
    tree = to_dict(preset("sana-tiny")) | {"teacher": str(checkpoint)}
    tree["sana"] |= sana
    tree["train"] |= {"device": "cpu", "batch_size": 2}
    return from_dict(SanaRun, tree)


def test_a_run_leaves_the_lora_in_both_layouts_and_pictures(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert {
        "student.safetensors", "student_comfyui.safetensors", "samples_grid.png",
        "training_curves.png", "results.json", "config.yaml", "metrics.jsonl",
    } <= names  # fmt: skip
    state = load_file(run_folder / "student.safetensors")
    assert len(state) == 2 * 2 * 6  # A and B, two blocks, six layers
    assert all(key.startswith("transformer.transformer_blocks.") for key in state)
    assert any(value.any() for key, value in state.items() if "lora_B" in key)  # it has learnt
    rows = json.loads((run_folder / "results.json").read_text())["table"]
    assert [(row["nfe"], row["distance"] > 0) for row in rows] == [(40, False), (4, True)]


def test_sample_grids_are_drawn_while_it_trains(run_folder):
    names = sorted(path.name for path in run_folder.glob("preview-*.png"))
    assert names == ["preview-000001.png", "preview-000002.png"]


def test_sampling_a_prompt_of_ones_own(run_folder, tmp_path):
    from PIL import Image

    target = tmp_path / "cat.png"
    command = ["sample", str(run_folder), "--prompt", "a cat", "--prompt", "a dog",
               "--num", "3", "--out", str(target)]  # fmt: skip
    assert cli.main(command) == 0
    assert Image.open(target).width > Image.open(target).height  # three images side by side
    plain = [Image.open(path).size for path in (tmp_path / "cat").iterdir()]
    assert len(plain) == 3 and len(set(plain)) == 1


def test_the_exported_checkpoint_is_a_pipeline_with_the_students_function(
    run_folder, checkpoint, tmp_path, capsys
):
    out = tmp_path / "merged"
    assert cli.main(["export", str(run_folder), "--out", str(out)]) == 0
    merged = SanaPipeline.from_pretrained(out).transformer.state_dict()
    network = load_sana_transformer(checkpoint, dtype=torch.float32)
    merge_lora(network, read_lora(run_folder / "student.safetensors"))
    assert merged.keys() == network.state_dict().keys()
    assert all(torch.equal(merged[name], value) for name, value in network.state_dict().items())
    assert cli.main(["export", str(run_folder), "--out", str(out)]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


def test_evaluate_repeats_the_distance(run_folder, capsys):
    assert cli.main(["evaluate", str(run_folder)]) == 0
    row = json.loads((run_folder / "results.json").read_text())["table"][1]
    assert f"{row['distance']:.3f}" in capsys.readouterr().out


def test_a_store_gives_the_run_the_same_text_as_its_prompts(checkpoint, prompts, tmp_path):
    store = tmp_path / "store"
    command = ["encode-prompts", str(checkpoint), "--prompts", str(prompts), "--out", str(store)]
    assert cli.main(command) == 0
    from_file = settings(checkpoint, prompts=str(prompts)).task().conditions()
    from_store = settings(checkpoint, prompts=str(store)).task().conditions()
    for n in (0, 1, 7):
        one, two = from_file(n), from_store(n)
        assert torch.equal(one["mask"], two["mask"])
        assert torch.equal(one["text"][one["mask"]], two["text"][two["mask"]])


def test_a_teacher_lora_belongs_to_every_role_and_to_the_file_for_the_plain_checkpoint(
    checkpoint, prompts, tmp_path
):
    network = load_sana_transformer(checkpoint, dtype=torch.float32)
    bank = AdapterBank(network, rank=2, alpha=3.0, targets=("to_q", "to_out.0"))
    with torch.no_grad():
        bank.parameters_of("student")[0].normal_(std=0.1)
    teacher_lora = tmp_path / "style.safetensors"
    save_diffusers_lora(Lora.of(bank, "student"), teacher_lora, description="a style")
    folder = tmp_path / "run"
    command = ["distill", "sana-tiny", "--out", str(folder), "--teacher", str(checkpoint),
               "--sana.prompts", str(prompts), "--sana.teacher-lora", str(teacher_lora),
               *SHORT]  # fmt: skip
    assert cli.main(command) == 0
    task = settings(checkpoint, prompts=str(prompts), teacher_lora=str(teacher_lora)).task()
    plain = settings(checkpoint, prompts=str(prompts)).task()
    student = task._network(read_lora(folder / "student.safetensors"))
    both = plain._network(read_lora(folder / "student_with_teacher_lora.safetensors"))
    name = "transformer_blocks.0.attn1.to_q"
    exact = plain._network().get_submodule(name).weight.double()
    for lora in (read_lora(teacher_lora), read_lora(folder / "student.safetensors")):
        a, b = lora.factors[name]
        exact = exact + b.double() @ a.double()
    sequential, at_once = (n.get_submodule(name).weight for n in (student, both))
    assert_as_accurate(at_once, sequential, exact)
    for file in ("student", "student_with_teacher_lora"):  # ComfyUI's files mean the same
        one, two = (read_lora(folder / f"{file}{end}.safetensors") for end in ("", "_comfyui"))
        merged, twin = plain._network(one), plain._network(two)
        assert not torch.equal(
            merged.get_submodule(name).weight, plain._network().get_submodule(name).weight
        )
        for left, right in zip(merged.parameters(), twin.parameters(), strict=True):
            assert torch.equal(left, right)
    role = task.backbone().network.transformer_blocks[0].attn1.to_q.weight
    assert not torch.equal(role, plain.backbone().network.transformer_blocks[0].attn1.to_q.weight)


def test_the_presets_are_the_papers_and_the_scripts():
    paper, official = preset("sana-1.6b").distill, preset("sana-1.6b-official").distill
    assert (paper.aux_updates, paper.student_updates, paper.step_size) == (10, 1, 0.03)
    assert (paper.time_distribution, paper.aux_optim.clip_norm) == ("logit_normal", 0.5)
    assert (official.aux_updates, official.student_updates, official.grid) == (50, 20, 1000)
    assert (official.time_distribution, official.aux_optim.clip_norm) == ("uniform", 1.0)


@pytest.mark.parametrize("gigabytes", MEMORY_PROFILES)
def test_memory_profiles_are_settings_of_the_run(gigabytes):
    train = with_memory(preset("sana-1.6b"), gigabytes).train
    assert {name: getattr(train, name) for name in MEMORY_PROFILES[gigabytes]} == (
        MEMORY_PROFILES[gigabytes]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory-profile", "12"], "--memory-profile must be one of .*, got 12"),
        (["--teacher", "nowhere/"], "nowhere"),
        (["--distill.student-solver", "euler"], "student_solver must be dpmpp_2m"),
        (["--sana.prompts", "none.txt"], "none.txt"),
        (["--sana.teacher-lora", "none.safetensors"], "there is no LoRA file none.safetensors"),
        (["--sana.resolution", "33"], "must be a multiple of 4, got 33"),
    ],
)
def test_a_wrong_request_is_one_sentence(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", "sana-tiny", "--out", "run", *SHORT, *options]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mfd-fast")]
    assert len(error) == 1 and re.search(message, error[0]), error
    assert not (tmp_path / "run").exists()


def test_a_real_checkpoint_needs_prompts(checkpoint, tmp_path, capsys):
    command = ["distill", "sana-tiny", "--teacher", str(checkpoint), "--out", str(tmp_path / "r")]
    assert cli.main([*command, *SHORT]) == 2
    assert "a SANA run needs prompts: --sana.prompts FILE" in capsys.readouterr().err
