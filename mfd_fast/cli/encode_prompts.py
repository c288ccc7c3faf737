"""``mfd-fast encode-prompts``: prompts into the store of embeddings that training reads."""

import argparse
import sys
from pathlib import Path

from mfd_fast.cli.options import no_more, options, positional

COMMAND = "encode-prompts"
DTYPES = ("bfloat16", "float32")
DEFAULTS = {
    "prompts": "",
    "out": "",
    "prompt_key": "",
    "skip_bad": False,
    "max_prompts": 0,
    "batch": 32,
    "shard_size": 1024,
    "device": "auto",
    "dtype": DTYPES[0],
    "revision": "",
    "variant": "",
}


def encode_prompts(argv: list[str]) -> None:
    """Encode prompts with a checkpoint's text encoder, go on with an interrupted store, or check
    one.
    """
    if argv[:1] == ["--check"]:
        given, rest = options(argv, check="")
        no_more(rest, ("--check",))
        _check(given.check)
        return
    checkpoint, rest = positional(argv, COMMAND, "CHECKPOINT")
    given, rest = options(rest, **DEFAULTS)
    no_more(rest, tuple(f"--{key.replace('_', '-')}" for key in DEFAULTS))
    if not given.prompts or not given.out:
        raise ValueError(
            f"expected mfd-fast {COMMAND} CHECKPOINT --prompts FILE --out STORE; FILE is a .txt, "
            ".tsv, .jsonl, .parquet or a folder of a data set"
        )
    _check_numbers(given)
    _encode(checkpoint, given)


def _check_numbers(given: argparse.Namespace) -> None:
    if given.batch < 1 or given.shard_size < 1 or given.max_prompts < 0:
        raise ValueError(
            "--batch and --shard-size must be >= 1 and --max-prompts >= 0 (0: all), got "
            f"{given.batch}, {given.shard_size} and {given.max_prompts}"
        )
    if given.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {list(DTYPES)}, got {given.dtype!r}")


def _encode(checkpoint: str, given: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from mfd_fast.models.sana.text.encoder import load_sana_text_encoder
    from mfd_fast.models.sana.text.prompts import open_prompts
    from mfd_fast.models.sana.text.store import write_text_store

    device = _device(given.device)
    prompts = open_prompts(
        given.prompts,
        key=given.prompt_key or None,
        skip_bad=given.skip_bad,
        max_prompts=given.max_prompts,
    )
    encoder = load_sana_text_encoder(
        checkpoint,
        revision=given.revision or None,
        variant=given.variant or None,
        dtype=getattr(torch, given.dtype),
        device=device,
    )
    with tqdm(total=len(prompts), unit=" prompts") as bar:
        try:
            store = write_text_store(
                given.out,
                prompts,
                encoder,
                batch=given.batch,
                shard_size=given.shard_size,
                progress=bar.update,
            )
        except KeyboardInterrupt:
            bar.close()
            print(
                f"mfd-fast {COMMAND}: {given.out} keeps the complete shards; repeat this command "
                "to go on",
                file=sys.stderr,
            )
            raise
    skipped = f", {prompts.num_bad} bad lines skipped" if prompts.num_bad else ""
    print(_described(store) + skipped)


def _device(name: str):
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


def _check(path: str) -> None:
    from mfd_fast.models.sana.text.store import TextStore

    print(f"{_described(TextStore(Path(path), verify=True))}: every checksum is right")


def _described(store) -> str:
    total = int(store.lengths.sum())
    return (
        f"{store.path}: {len(store)} prompts, {total} tokens of {store.null.shape[1]} channels, "
        f"{total / len(store):.1f} a prompt, at most {store.longest}"
    )
