"""A workflow of ComfyUI for a student's LoRA, in the layout of its API.

Nodes and their inputs are ComfyUI's public ones; the program itself was not run.  The base's files
have names to be chosen there.
"""

from collections.abc import Sequence
from typing import Any

SD3_LATENT, FLUX2_LATENT = "EmptySD3LatentImage", "EmptyFlux2LatentImage"
# Pipeline -> what loads its text encoders, how many they are, the loader's type, its empty latent.
LOADERS = {
    "StableDiffusion3Pipeline": ("TripleCLIPLoader", 3, "", SD3_LATENT),
    "FluxPipeline": ("DualCLIPLoader", 2, "flux", SD3_LATENT),
    "Flux2Pipeline": ("CLIPLoader", 1, "flux2", FLUX2_LATENT),
    "Flux2KleinPipeline": ("CLIPLoader", 1, "flux2", FLUX2_LATENT),
    "QwenImagePipeline": ("CLIPLoader", 1, "qwen_image", SD3_LATENT),
    "ZImagePipeline": ("CLIPLoader", 1, "lumina2", SD3_LATENT),
    "Lumina2Pipeline": ("CLIPLoader", 1, "lumina2", SD3_LATENT),
    "ChromaPipeline": ("CLIPLoader", 1, "chroma", SD3_LATENT),
    "HiDreamImagePipeline": ("QuadrupleCLIPLoader", 4, "", SD3_LATENT),
}
TOLD = ("FluxPipeline", "Flux2Pipeline")  # their networks are told the guidance


def workflow(
    pipeline: str, lora: str, nodes: Sequence[float], size: tuple[int, int], guidance: float | None
) -> dict[str, Any] | None:
    """The graph, or None for a pipeline without loaders of its own in ComfyUI.

    Args:
        pipeline: class of the base.
        lora: the file that ComfyUI reads, at strength 1.
        nodes: the student's times from 1 to 0, which are its sigmas.
        size: height and width in pixels.
        guidance: what a network is told that is told it.
    """
    if pipeline not in LOADERS:
        return None
    loader, count, kind, latent = LOADERS[pipeline]
    numbers = [""] if count == 1 else range(1, count + 1)
    clips: dict[str, Any] = {f"clip_name{n}": f"TEXT_ENCODER{n}.safetensors" for n in numbers}
    positive, sigmas = ["prompt", 0], ", ".join(f"{node:.4f}" for node in nodes)
    graph = {
        "base": _node("UNETLoader", unet_name="BASE.safetensors", weight_dtype="default"),
        "text": _node(loader, **clips, **({"type": kind} if kind else {})),
        "vae": _node("VAELoader", vae_name="VAE.safetensors"),
        "student": _node(
            "LoraLoaderModelOnly", lora_name=lora, strength_model=1.0, model=["base", 0]
        ),
        "prompt": _node("CLIPTextEncode", text="a red fox in the snow", clip=["text", 0]),
        "latent": _node(latent, width=size[1], height=size[0], batch_size=1),
        "noise": _node("RandomNoise", noise_seed=0),
        "sampler": _node("KSamplerSelect", sampler_name="euler"),
        "sigmas": _node("ManualSigmas", sigmas=sigmas),
    }
    if pipeline in TOLD and guidance is not None:
        graph["guidance"] = _node("FluxGuidance", guidance=guidance, conditioning=positive)
        positive = ["guidance", 0]
    graph["guider"] = _node("BasicGuider", model=["student", 0], conditioning=positive)
    inputs = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
    graph["steps"] = _node("SamplerCustomAdvanced", **inputs, latent_image=["latent", 0])
    graph["image"] = _node("VAEDecode", samples=["steps", 0], vae=["vae", 0])
    graph["file"] = _node("SaveImage", images=["image", 0], filename_prefix="student")
    return graph


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
