"""A pipeline in diffusers' folder layout: what it is, checked before its weights are read."""

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from mfd_fast.files.plain import read_json
from mfd_fast.hub import fetch, without_loading_bars
from mfd_fast.models.diffusers.family import FAMILIES, adapter_of
from mfd_fast.models.diffusers.teacher_lora import merge_teacher_lora
from mfd_fast.models.sana.lora_files import Lora

INDEX = "model_index.json"
CONFIGS = [INDEX, "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"]


def read_index(
    folder_or_id: str, revision: str | None = None, patterns: list[str] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Folder and model_index.json of a pipeline; of a hub id only the patterns' files are fetched.

    ``ValueError`` or ``OSError``: there is none, or it is no pipeline that can be distilled.
    """
    folder = Path(folder_or_id)
    if not folder.is_dir():
        folder = fetch(folder_or_id, revision, patterns or [INDEX])
    elif revision is not None:
        raise ValueError(f"revision {revision!r} belongs to a hub id; {folder} is a local folder")
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder_or_id} has no {INDEX}; expected the folder of a whole diffusers pipeline, "
            "as save_pretrained writes it"
        )
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{folder / INDEX} names no pipeline (_class_name); copy it again")
    adapter_of(index["_class_name"])
    return folder, index


def parts_of(index: dict[str, Any]) -> dict[str, str]:
    """The components that a model_index.json names, and their classes."""
    parts = {name: part for name, part in index.items() if isinstance(part, list)}
    return {name: part[1] for name, part in parts.items() if len(part) == 2 and part[1]}


def check_parts(folder: Path, index: dict[str, Any], *, is_local: bool) -> float:
    """GB of the weight files; ``ValueError`` names a component that is missing, or why the network
    is no teacher.
    """
    parts = parts_of(index)
    for name in ("transformer", "vae", "scheduler", *parts):
        is_network = any(word in name for word in ("transformer", "vae", "text_encoder"))
        files = list((folder / name).glob("*.safetensors" if is_network and is_local else "*"))
        if name not in parts or not files:
            raise ValueError(
                f"{folder} has no {name}{' (safetensors)' * is_network}, a component of "
                f"{index['_class_name']}; copy the whole pipeline, or mend {INDEX}"
            )
    config = read_json(folder / "transformer" / "config.json")
    if index["_class_name"] == "FluxPipeline" and not config.get("guidance_embeds"):
        raise ValueError(
            f"{folder} is distilled already (FLUX.1 schnell: its network takes no guidance); the "
            "teacher is FLUX.1 dev"
        )
    return sum(path.stat().st_size for path in folder.glob("*/*.safetensors")) / 1e9


def of_diffusers(name: str) -> Any:
    """A class of diffusers; ``ImportError`` if a package that it imports is broken."""
    import diffusers

    try:
        return getattr(diffusers, name)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1]
        raise ImportError(
            f"diffusers cannot import its {name}: {why}. Install that package again (pip install "
            "--force-reinstall NAME), or remove it"
        ) from None


def pipeline_with(name: str, **parts: Any) -> Any:
    """A pipeline of the class ``name`` with these components and no others."""
    adapter_of(name).before()
    cls = of_diffusers(name)
    needed = inspect.signature(cls.__init__).parameters.items()
    missing = {part: None for part, p in needed if p.default is p.empty and part != "self"}
    return cls(**missing | unchecked(cls) | parts)


def unchecked(cls: type) -> dict[str, nn.Module]:
    """A placeholder for the safety checker of a pipeline that wants one, where nothing is made."""
    wants = "safety_checker" in inspect.signature(cls.__init__).parameters
    return {"safety_checker": nn.Module()} if wants else {}


def network_class(name: str) -> type[nn.Module]:
    """The class of the transformer that a pipeline class takes."""
    hint = get_type_hints(of_diffusers(name).__init__)["transformer"]
    return next(iter(get_args(hint)), hint)  # of "the network, or None"


def pipeline_around(transformer: nn.Module, scheduler: Any, vae: nn.Module | None) -> Any:
    """The pipeline that a transformer belongs to, without text encoders.

    ``ValueError`` without a scheduler, or for a network of no pipeline with an adapter.
    """
    if scheduler is None:
        raise ValueError(
            "a transformer alone does not say at which times its pipeline samples: give scheduler, "
            "as the pipeline has it, and cond and null, or the whole pipeline"
        )
    names = [name for name in FAMILIES if network_class(name) is type(transformer)]
    if not names:
        known = sorted({network_class(name).__name__ for name in FAMILIES})
        raise ValueError(f"{type(transformer).__name__} has no adapter; there are {known}")
    if vae is None and names[0].startswith("Flux2"):
        raise ValueError("FLUX.2's pipeline norms latents by its VAE: give vae")
    # One class of network: FLUX.2's klein is told no guidance, Kandinsky 5 of images no frame.
    told = (transformer.config.get(name) for name in ("guidance_embeds", "visual_cond"))
    name = names[len(names) > 1 and any(told)]
    return pipeline_with(name, transformer=transformer, scheduler=scheduler, vae=vae)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block diffusers draws no bars and logs nothing: what it raises says enough."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that its next version drops
            yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


@quiet()
def outline(folder: Path, index: dict[str, Any]) -> Any:
    """The pipeline with network and VAE on ``meta`` and nothing that encodes text."""
    adapter_of(index["_class_name"]).before()
    made: dict[str, Any] = dict.fromkeys(parts_of(index))
    made |= unchecked(of_diffusers(index["_class_name"]))
    del made["scheduler"]  # which is read
    for name in made.keys() & {"transformer", "transformer_2", "vae"}:
        cls = of_diffusers(parts_of(index)[name])
        with torch.device("meta"):
            made[name] = cls.from_config(cls.load_config(folder / name))
    return of_diffusers("DiffusionPipeline").from_pretrained(folder, **made)


@quiet()
def load_pipeline(folder_or_id: str, dtype: torch.dtype, **options: Any) -> Any:
    """The whole pipeline on the CPU, safetensors alone, its networks in eval mode and frozen;
    options are from_pretrained's, components that are there already among them.
    """
    without_loading_bars()
    pipe = of_diffusers("DiffusionPipeline").from_pretrained(
        folder_or_id, torch_dtype=dtype, use_safetensors=True, **options
    )
    for part in networks(pipe).values():
        part.eval().requires_grad_(False)
    return pipe


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that have weights."""
    return {name: x for name, x in pipe.components.items() if isinstance(x, nn.Module)}


@contextmanager
def visiting(parts: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the block the networks are on the device, behind it on the CPU."""
    for part in parts:
        part.to(device)
    try:
        yield
    finally:
        for part in parts:
            part.to("cpu")


@quiet()
def merge_lora_files(pipe: Any, files: str) -> Lora:
    """Add LoRA files, each FILE or FILE:WEIGHT, to the pipeline's network; all of them as one.

    ``ValueError`` or ``OSError`` names a file that is missing, of another model, or that changes a
    text encoder.
    """
    weights = {str(path): weight for path, weight in lora_files(files)}
    try:
        lora = merge_teacher_lora(pipe, weights)
    except Exception as error:  # whatever diffusers, PEFT and safetensors raise over a file
        lora, why = None, " ".join(str(error).split())[:160]
    else:
        why = "none of its layers are in the transformer"
    if lora is None:
        raise ValueError(
            f"{', '.join(weights)} is no LoRA of this {type(pipe).__name__}: {why}; give one made "
            "for it"
        )
    for name, part in networks(pipe).items():
        if any(hasattr(module, "lora_A") for module in part.modules()):
            raise ValueError(
                f"{', '.join(weights)} changes {name} too, which stays as it is here; give a LoRA "
                "of the transformer alone"
            )
    return lora


def lora_files(files: str) -> list[tuple[Path, float]]:
    """FILE[:WEIGHT],... read; ``ValueError`` or ``FileNotFoundError`` names what is wrong."""
    read = []
    for part in files.split(","):
        named = re.fullmatch(r"(.+?)(?::(-?\d*\.?\d+))?", part.strip())
        if named is None:
            raise ValueError(f"pipeline.teacher_lora must be FILE[:WEIGHT],..., got {files!r}")
        path = Path(named.group(1))
        if not path.is_file():
            raise FileNotFoundError(f"there is no LoRA file {path}; give a .safetensors file")
        read.append((path, float(named.group(2) or 1.0)))
    return read
