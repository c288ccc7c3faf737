"""``mfd-fast prepare | encode-prompts``: data into the memory-mapped stores that training reads."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from mfd_fast.cli.parse import Optional, Switch, command
from mfd_fast.settings import Count, CountOrOff, Positive

File = Optional[Path | None]


@command(noun="DATA", names={"occfm": "Occupancy grids and latents of OccFM."})
def prepare(
    *,
    data: File = None,
    out: File = None,
    check: File = None,
    latents: str = "x16",
    vae: File = None,
    splits: str = "training,validation",
    skip_missing: Switch = False,
    synthetic: CountOrOff = 0,
    grid: str = "200,200,16",
    voxel: Positive = 0.4,
    frames: Count = 40,
    seed: int = 0,
) -> None:
    """Convert the files of a data set, or make a synthetic one first, or check a store.

    Example: mfd-fast prepare occfm --data DATA --out store

    Args:
        data: Folder with nuscenes/ and nusc_latent_vae/; with --synthetic it is made anew.
        out: Store to make.
        check: Store whose checksums are to be compared, in place of all else.
        latents: Size of the latents in the data's folder names.
        vae: File of a VAE that makes the latents first.
        splits: Comma-separated.
        skip_missing: Leave out frames whose files are missing.
        synthetic: Scenes to make up; 0: none.
        grid: X,Y,Z cells of the made-up scenes.
        voxel: Edge of a cell in metres.
        frames: Key frames of a made-up scene.
        seed: Of the made-up scenes.
    """
    if check:
        return _check_occupancy(check)
    if not data or not out:
        raise ValueError(
            "expected mfd-fast prepare occfm --data DIR --out STORE; DIR holds nuscenes/ and "
            "nusc_latent_vae/, or with --synthetic N is made anew"
        )
    from mfd_fast.models.occfm.data.store import convert_split
    from mfd_fast.models.occfm.data.synthetic import SyntheticConfig, write_synthetic

    if synthetic:
        made = SyntheticConfig(
            scenes=synthetic, frames=frames, grid=_grid(grid), voxel=voxel, seed=seed
        )
        write_synthetic(str(data), made)
    chosen = _splits(splits)
    if vae:
        _cache_latents(data, chosen, vae, latents)
    for split in chosen:
        store = convert_split(data, out, split, size=latents, skip_missing=skip_missing)
        print(_occupancy(store))


def _cache_latents(data: Path, splits: list[str], file: Path, size: str) -> None:
    """The latents of a VAE, in the files and the form of published ones."""
    from mfd_fast.models.occfm.loading import load_vae
    from mfd_fast.models.occfm.pretrain import cache_latents

    vae = load_vae(file)
    for split in splits:
        print(cache_latents(data, split, vae, size=size))


def _check_occupancy(store: Path) -> None:
    from mfd_fast.models.occfm.data.classes import SPLITS
    from mfd_fast.models.occfm.data.store import OccupancyStore

    found = [store / split for split in SPLITS if (store / split).is_dir()]
    if not found:
        raise ValueError(f"expected a folder with some of {', '.join(SPLITS)}, got {store}")
    for folder in found:
        split = OccupancyStore(folder)
        split.verify()
        print(f"{_occupancy(split)}: every checksum is right")


def _occupancy(store: Any) -> str:
    shapes = ", ".join(f"{name} {list(a.shape[1:])}" for name, a in store.arrays.items())
    return f"{store.folder}: {len(store.scenes)} scenes, {store.num_frames} key frames, {shapes}"


def _splits(text: str) -> list[str]:
    from mfd_fast.models.occfm.data.classes import SPLITS

    splits = text.split(",")
    if unknown := [split for split in splits if split not in SPLITS]:
        raise ValueError(f"--splits takes some of {', '.join(SPLITS)}, got {unknown[0]!r}")
    return splits


def _grid(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
        raise ValueError(f"--grid takes three sizes such as 200,200,16, got {text!r}")
    return tuple(map(int, sizes))


def encode_prompts(
    checkpoint: Annotated[str, Positional, arg(metavar="CHECKPOINT")] = "",
    *,
    prompts: str = "",
    out: File = None,
    check: File = None,
    prompt_key: str = "",
    skip_bad: Switch = False,
    max_prompts: CountOrOff = 0,
    batch: Count = 32,
    shard_size: Count = 1024,
    device: str = "auto",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    revision: str = "",
    variant: str = "",
) -> None:
    """Encode prompts with a checkpoint's text encoder, go on with a store, or check one.

    Example: mfd-fast encode-prompts CHECKPOINT --prompts prompts.txt --out store

    Args:
        checkpoint: Folder or hub id of a SANA pipeline.
        prompts: A .txt, .tsv, .jsonl, .parquet or a folder of a data set.
        out: Store to make, or to go on with.
        check: Store whose checksums are to be compared, in place of all else.
        prompt_key: Key or column of the prompt; prompt, text or caption if left out.
        skip_bad: Leave out lines that are no prompt, in place of refusing the file.
        max_prompts: Take so many; 0: all.
        batch: Prompts encoded at once.
        shard_size: Prompts in a file of the store.
        device: auto, cpu, cuda or cuda:N.
        dtype: Of the text encoder.
        revision: Branch, tag or commit of a checkpoint on the hub.
        variant: Of the checkpoint's weight files, such as fp16.
    """
    if check:
        from mfd_fast.models.sana.text.store import TextStore

        print(f"{_texts(TextStore(check, verify=True))}: every checksum is right")
        return
    if not (checkpoint and prompts and out):
        raise ValueError(
            "expected mfd-fast encode-prompts CHECKPOINT --prompts FILE --out STORE; FILE is a "
            ".txt, .tsv, .jsonl, .parquet or a folder of a data set"
        )
    import torch

    from mfd_fast.models.sana.text.encoder import load_sana_text_encoder
    from mfd_fast.models.sana.text.prompts import open_prompts

    kind = {"dtype": getattr(torch, dtype), "device": _device(device)}
    taken = {"key": prompt_key or None, "skip_bad": skip_bad, "max_prompts": max_prompts}
    source = open_prompts(prompts, **taken)
    of_hub = {"revision": revision or None, "variant": variant or None}
    encoder = load_sana_text_encoder(checkpoint, **of_hub, **kind)
    _write_texts(out, source, encoder, batch=batch, shard_size=shard_size)


def _write_texts(out: Path, source: Any, encoder: Any, **sizes: int) -> None:
    from tqdm import tqdm

    from mfd_fast.models.sana.text.store import write_text_store
    from mfd_fast.run.console import BAR

    with tqdm(total=len(source), bar_format=BAR, dynamic_ncols=True) as bar:
        try:
            store = write_text_store(out, source, encoder, progress=bar.update, **sizes)
        except KeyboardInterrupt:
            bar.close()
            print(
                f"mfd-fast encode-prompts: {out} keeps the complete shards; repeat this command to "
                "go on",
                file=sys.stderr,
            )
            raise
    skipped = f", {source.num_bad} bad lines skipped" if source.num_bad else ""
    print(_texts(store) + skipped)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name}, but no NVIDIA GPU is visible; use cpu or auto")
    return device


def _texts(store: Any) -> str:
    total = int(store.lengths.sum())
    return (
        f"{store.path}: {len(store)} prompts, {total} tokens of {store.null.shape[1]} channels, "
        f"{total / len(store):.1f} a prompt, at most {store.longest}"
    )
