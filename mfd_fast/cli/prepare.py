"""``mfd-fast prepare``: data sets into the memory-mapped stores that training reads."""

from pathlib import Path

from mfd_fast.cli.options import no_more, options, positional


def prepare(argv: list[str]) -> None:
    """Convert the files of a data set, or make a synthetic one first, or check a store."""
    name, rest = positional(argv, "prepare", "occfm")
    if name != "occfm":
        raise ValueError(f"only occfm data is prepared here, got {name!r}; there is ['occfm']")
    defaults = {
        "data": "",
        "out": "",
        "check": "",
        "latents": "x16",
        "vae": "",
        "splits": "training,validation",
        "skip_missing": False,
        "synthetic": 0,
        "grid": "200,200,16",
        "voxel": 0.4,
        "frames": 40,
        "seed": 0,
    }
    given, rest = options(rest, **defaults)
    no_more(rest, tuple(f"--{key.replace('_', '-')}" for key in defaults))
    if given.check:
        _check(Path(given.check))
        return
    if not given.data or not given.out:
        raise ValueError(
            "expected mfd-fast prepare occfm --data DIR --out STORE; DIR holds nuscenes/ and "
            "nusc_latent_vae/, or with --synthetic N is made anew"
        )
    from mfd_fast.models.occfm.data.store import convert_split

    if given.synthetic:
        _write_synthetic(given)
    splits = _splits(given.splits)
    if given.vae:
        _cache_latents(given, splits)
    for split in splits:
        store = convert_split(
            given.data, given.out, split, size=given.latents, skip_missing=given.skip_missing
        )
        print(_described(store))


def _write_synthetic(given) -> None:
    from mfd_fast.models.occfm.data.synthetic import SyntheticConfig, write_synthetic

    config = SyntheticConfig(
        scenes=given.synthetic,
        frames=given.frames,
        grid=_grid(given.grid),
        voxel=given.voxel,
        seed=given.seed,
    )
    write_synthetic(given.data, config)


def _cache_latents(given, splits: list[str]) -> None:
    """The latents of a VAE, in the files and the form of published ones."""
    from mfd_fast.models.occfm.loading import load_vae
    from mfd_fast.models.occfm.pretrain import cache_latents

    vae = load_vae(given.vae)
    for split in splits:
        print(cache_latents(Path(given.data), split, vae, size=given.latents))


def _check(store: Path) -> None:
    from mfd_fast.models.occfm.data.classes import SPLITS
    from mfd_fast.models.occfm.data.store import OccupancyStore

    found = [store / split for split in SPLITS if (store / split).is_dir()]
    if not found:
        raise ValueError(f"expected a folder with some of {list(SPLITS)}, got {store}")
    for folder in found:
        split = OccupancyStore(folder)
        split.verify()
        print(f"{_described(split)}: every checksum is right")


def _described(store) -> str:
    shapes = ", ".join(f"{name} {list(a.shape[1:])}" for name, a in store.arrays.items())
    return f"{store.folder}: {len(store.scenes)} scenes, {store.num_frames} key frames, {shapes}"


def _splits(text: str) -> list[str]:
    from mfd_fast.models.occfm.data.classes import SPLITS

    splits = text.split(",")
    if unknown := [split for split in splits if split not in SPLITS]:
        raise ValueError(f"--splits takes some of {list(SPLITS)}, got {unknown[0]!r}")
    return splits


def _grid(text: str) -> tuple[int, int, int]:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
        raise ValueError(f"--grid takes three sizes such as 200,200,16, got {text!r}")
    x, y, z = map(int, sizes)
    return x, y, z
