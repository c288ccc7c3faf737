"""The files of a student: its LoRA for diffusers and for ComfyUI, its scheduler, its card."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.files.whole import write_text
from mfd_fast.models.diffusers.card import write_card
from mfd_fast.models.diffusers.family import Family
from mfd_fast.models.diffusers.sampler import StudentSampler
from mfd_fast.models.diffusers.workflow import workflow
from mfd_fast.models.sana.lora_files import Lora, save_comfyui_lora, save_diffusers_lora
from mfd_fast.run.folder import STUDENT

WITH_TEACHER, COMFYUI = "student_with_teacher_lora.safetensors", "student_comfyui.safetensors"
MERGED = "student_transformer"
WORKFLOW = "comfyui_workflow.json"


def save_student(
    bank: AdapterBank,
    path: Path,
    family: Family,
    sampler: StudentSampler,
    *,
    base: str,
    teacher_lora: Lora | None = None,
    teacher_files: str = "a LoRA",
) -> list[Path]:
    """Write the student's LoRA, of two networks ``student.safetensors`` and
    ``student_2.safetensors``, and beside it what belongs to it; the files.

    A LoRA for the plain base too if the teacher has one; one in ComfyUI's names where needed, and a
    workflow; ``scheduler_config.json`` if the pipeline's own will not do; README.md.

    Args:
        bank: with the student's weights (averaged ones if they are kept).
        path: of student.safetensors.
        base: hub id or folder of the pipeline; of a folder the files have the name alone.
        teacher_lora, teacher_files: what the teacher is besides, and its name.
    """
    base = Path(base).name if Path(base).is_dir() else base
    below = base if teacher_lora is None else f"{base} with {teacher_files}"
    loads, written, names_there = {}, [], []
    for number, (network, student) in enumerate(parts_of(family, Lora.of(bank, "student")), 1):
        of_second = f"_{number}" * (number > 1)
        file, whole = path.with_stem(path.stem + of_second), student
        save_diffusers_lora(student, file, description=_about(below))
        written.append(file)
        if teacher_lora is not None:
            file, whole = path.with_name(WITH_TEACHER), student.stacked_on(teacher_lora)
            save_diffusers_lora(whole, file, description=_about(base))
            written.append(file)
        if not family.takes_lora:
            written.append(file := save_merged(family, student, path.parent / MERGED))
        loads[network] = file.name
        if wholes := comfyui_layers(family, whole):
            comfyui = path.with_stem(Path(COMFYUI).stem + of_second)
            save_comfyui_lora(whole, comfyui, description=_about(base), wholes=wholes)
            written.append(comfyui)
            names_there.append(comfyui.name)
    if sampler.scheduler is not None:
        sampler.scheduler.save_pretrained(path.parent)
        written.append(path.with_name("scheduler_config.json"))
    comfyui = [*loads.values()] if family.comfyui == {} else names_there
    written += (graph := save_workflow(family, comfyui, sampler, path.with_name(WORKFLOW)))
    write_card(
        path.with_name("README.md"),
        base=base,
        loads=loads,
        comfyui=comfyui,
        workflow=WORKFLOW if graph else "",
        pipe=family.pipe,
        size=(family.height, family.width),
        fps=getattr(family, "fps", None),
        output=family.output,
        sampler=sampler,
    )
    return [*written, path.with_name("README.md")]


@torch.no_grad()
def save_merged(family: Family, student: Lora, folder: Path) -> Path:
    """Write the network with the student in its weights, a folder for ``from_pretrained``."""
    network = family.pipe.transformer
    state = {name: x.detach().cpu().contiguous() for name, x in network.state_dict().items()}
    for name, (a, b) in student.factors.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight.float() + b.cpu() @ a.cpu()).to(weight.dtype)
    network.save_config(folder)
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def save_workflow(
    family: Family, files: list[str], sampler: StudentSampler, path: Path
) -> list[Path]:
    """Write ComfyUI's workflow of a student that is one file there; what was written."""
    size, pipeline = (family.height, family.width), type(family.pipe).__name__
    graph = len(files) == 1 and workflow(
        *(pipeline, files[0], sampler.schedule.nodes, size, sampler.call.get("guidance_scale"))
    )
    if not graph:
        return []
    write_text(path, json.dumps(graph, indent=1) + "\n")
    return [path]


def parts_of(family: Family, lora: Lora) -> list[tuple[str, Lora]]:
    """Every network of the family and what is its own, under its modules' names."""
    return [
        (
            network,
            Lora(
                {
                    name.removeprefix(f"{network}."): pair
                    for name, pair in lora.factors.items()
                    if name.startswith(f"{network}.")
                }
            ),
        )
        for network in family.networks
    ]


def load_student(folder: Path, family: Family, scale: float) -> dict[str, Tensor]:
    """What :func:`save_student` wrote, for a bank over the family's networks whose adapters have
    this scale.
    """
    state = {}
    for number, network in enumerate(family.networks, 1):
        file = (folder / STUDENT).with_stem(Path(STUDENT).stem + f"_{number}" * (number > 1))
        for key, factor in load_file(file).items():
            key = f"{network}.{key.removeprefix('transformer.')}"
            state[key] = factor / scale if ".lora_B." in key else factor
    return state


def _about(base: str) -> str:
    return f"student of {base}, to be added to it at strength 1"


def comfyui_layers(family: Family, lora: Lora) -> dict[str, tuple[str, ...]]:
    """ComfyUI's layer -> ours that are it, for a family whose layers are named otherwise there;
    nothing if it has no name for one of them, or ours are not all of it.
    """
    found = {}
    for name in lora.factors:
        number = re.search(r"\.(\d+)\.", name)
        general = re.sub(r"\.\d+\.", ".{}.", name, count=1)
        for theirs, ours in (family.comfyui or {}).items():
            if number and general in ours:
                found[theirs.format(number[1])] = tuple(part.format(number[1]) for part in ours)
    is_all = {part for parts in found.values() for part in parts} == set(lora.factors)
    return found if is_all else {}
