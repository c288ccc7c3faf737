"""README.md of a run: a model card that says what to type for the student's images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfd_fast.files.whole import write_text
from mfd_fast.models.diffusers.sampler import StudentSampler

CARD = """---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-{kind}
tags: [lora, text-to-{kind}, mean-flow-distillation]
license:  # yours to say; the base model's may bind it
---

A student of {steps} steps of `{base}`, distilled with mfd-fast: a LoRA to be added at strength 1.

```python
import torch
from diffusers import {pipeline}{scheduler_class}{export}

pipe = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")
{loads}
{scheduler}{kind} = pipe("a prompt", {call}).{output}[0]
{written}```
{comfyui}"""
COMFYUI = """
ComfyUI (layers named by its public map; not run there): load {file} at strength 1, sample with
`euler` on the sigmas {nodes}, cfg 1{workflow}.
"""
# By network of the pipeline.
LOADS = {
    "transformer": 'pipe.load_lora_weights(".", weight_name="{}")  # "." is this folder',
    "transformer_2": 'pipe.load_lora_weights(".", weight_name="{}", load_into_transformer_2=True)',
}
SCHEDULER = 'pipe.scheduler = {}.from_pretrained(".")\n'
# Of a pipeline without a loader of its own.
LOAD = 'pipe.transformer.load_lora_adapter(".", weight_name="{}")  # "." is this folder'
# Of a network that loads none.
MERGED = (
    'pipe.transformer = type(pipe.transformer).from_pretrained("./{}", torch_dtype=pipe.dtype)'
    ".to(pipe.device)"
)


def write_card(
    path: Path,
    *,
    base: str,
    loads: dict[str, str],
    comfyui: Sequence[str],
    workflow: str,
    pipe: Any,
    size: tuple[int, int],
    fps: float | None,
    output: str,
    sampler: StudentSampler,
) -> None:
    """Write the card.

    Args:
        path: of README.md, beside the other files.
        base: hub id, or the name of a local folder.
        loads: network of the pipeline -> the file that is added to it.
        comfyui: the files that ComfyUI reads, one for each network, or none.
        workflow: a file that uses them, or empty.
        pipe: the base.
        size: height and width in pixels.
        fps: frames a second of videos; None: it makes images.
        output: where the call's answer has them.
        sampler: of the student.
    """
    own = LOAD if hasattr(pipe.transformer, "load_lora_adapter") else MERGED
    lines = LOADS if hasattr(pipe, "load_lora_weights") else {"transformer": own}
    call = sampler.call | dict(zip(("height", "width"), size, strict=True))
    scheduler = "" if sampler.scheduler is None else type(sampler.scheduler).__name__
    nodes = " ".join(f"{node:.4f}" for node in sampler.schedule.nodes)
    text = CARD.format(
        base=base,
        steps=call["num_inference_steps"],
        pipeline=type(pipe).__name__,
        loads="\n".join(lines[network].format(file) for network, file in loads.items()),
        comfyui=COMFYUI.format(
            file=" and ".join(f"`{x}`" for x in comfyui),
            nodes=nodes,
            workflow=workflow and f"; `{workflow}` does it",
        )
        if comfyui
        else "",
        kind="image" if fps is None else "video",
        output=output,
        export="" if fps is None else "\nfrom diffusers.utils import export_to_video",
        written="" if fps is None else f'export_to_video(video, "video.mp4", fps={fps:g})\n',
        scheduler=SCHEDULER.format(scheduler) if scheduler else "",
        scheduler_class=f", {scheduler}" if scheduler else "",
        call=", ".join(f"{name}={value!r}" for name, value in call.items()),
    )
    write_text(path, text)
