"""README.md of a run: a model card that says what to type for the student's images."""

from pathlib import Path

from mfd_fast.files.whole import write_text
from mfd_fast.models.diffusers.sampler import StudentSampler

CARD = """---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, text-to-image, mean-flow-distillation]
license:  # yours to say; the base model's may bind it
---

A student of {steps} steps of `{base}`, distilled with mfd-fast: a LoRA to be added at strength 1.

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights(".", weight_name="{weights}")  # "." is this folder
{scheduler}image = pipe("a prompt", {call}).images[0]
```
{comfyui}"""
COMFYUI = """
ComfyUI (layers named by its public map; not run there): load `{file}` at strength 1, sample with
`euler` on the sigmas {nodes}, cfg 1{workflow}.
"""
SCHEDULER = 'pipe.scheduler = type(pipe.scheduler).from_pretrained(".")\n'


def write_card(
    path: Path,
    *,
    base: str,
    weights: str,
    comfyui: str,
    workflow: str,
    pipeline: str,
    size: tuple[int, int],
    sampler: StudentSampler,
) -> None:
    """Write the card.

    Args:
        path: of README.md, beside the other files.
        base: hub id, or the name of a local folder.
        weights: the file that is added to the base.
        comfyui: the file that ComfyUI reads, or empty; workflow: one that uses it, or empty.
        pipeline: class of the base.
        size: height and width in pixels.
        sampler: of the student.
    """
    call = sampler.call | dict(zip(("height", "width"), size, strict=True))
    nodes = " ".join(f"{node:.4f}" for node in sampler.schedule.nodes)
    text = CARD.format(
        base=base,
        steps=call["num_inference_steps"],
        pipeline=pipeline,
        weights=weights,
        comfyui=COMFYUI.format(
            file=comfyui, nodes=nodes, workflow=workflow and f"; `{workflow}` does it"
        )
        if comfyui
        else "",
        scheduler=SCHEDULER if sampler.scheduler is not None else "",
        call=", ".join(f"{name}={value!r}" for name, value in call.items()),
    )
    write_text(path, text)
