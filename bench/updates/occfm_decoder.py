"""OccFM's decoder, latents to class ids: the reference, and the fast one for frozen weights.

python -m bench.bench_occfm_decoder [--smoke] [--out FILE.json]

Random weights of the published sizes.  Both decode the same latents in turns; their scores are held
to the tolerance rule before anything is timed.  Operators that compute are counted, and the bytes
that they read and write.
"""

import argparse
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from bench.harness import measure
from bench.record import header, write
from mfd_fast.models.occfm.vae.config import VAE_CONFIGS, VaeConfig
from mfd_fast.models.occfm.vae.fast_decoder import FastDecoder
from mfd_fast.models.occfm.vae.vae import OccupancyVae
from mfd_fast.testing.counting import Count, Traffic
from mfd_fast.testing.numerics import assert_as_accurate

OP = "occfm_decoder"
CASES = [(1, torch.float32), (1, torch.bfloat16)]  # frames, dtype


def make_vae(config: VaeConfig, device: str) -> OccupancyVae:
    torch.manual_seed(0)
    return OccupancyVae(config).eval().requires_grad_(False).to(device)


def verify(vae: OccupancyVae, dtype: torch.dtype, latents: Tensor) -> None:
    """``AssertionError`` unless the fast scores are as accurate as the reference's."""
    config, device = vae.config, str(latents.device)
    eager = make_vae(config, device).to(dtype).decode(latents)
    exact = make_vae(config, device).double().decode(latents.double())
    assert_as_accurate(FastDecoder(vae).to(dtype)(latents), eager, exact)


def run_case(config: VaeConfig, frames: int, dtype: torch.dtype, device: str) -> list[dict]:
    """One row each for the reference decoder ("eager") and the fast one ("ours")."""
    vae = make_vae(config, device)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(frames, *config.latent_shape, generator=generator).to(device, dtype)
    verify(vae, dtype, latents[:1])
    fast = FastDecoder(vae).to(dtype)
    impls = {"eager": vae.to(dtype).decode_classes, "ours": fast.decode_classes}
    rows = []
    with torch.no_grad():
        timed = measure(impls, lambda: (latents,), device)
        for name, decode in impls.items():
            with Count() as count, Traffic() as traffic:
                decode(latents)
            head = {"frames": frames, "dtype": str(dtype).removeprefix("torch."), "impl": name}
            cost = {"operators": count.total, "gb_moved": round(traffic.bytes / 1e9, 3)}
            rows.append(head | _times(*timed[name]) | cost)
    rows[1]["speedup"] = round(rows[0]["ms"] / rows[1]["ms"], 2)
    return rows


def _times(us: list[float], timing: str) -> dict:
    samples = [sample / 1e3 for sample in us]
    tenths = quantiles(samples, n=10)
    return {
        "ms": round(median(samples), 1),
        "ms_p10": round(tenths[0], 1),
        "ms_p90": round(tenths[-1], 1),
        "samples": len(samples),
        "timing": timing,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m bench.bench_{OP}", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--smoke", action="store_true", help="the tiny VAE, one frame")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    config = VAE_CONFIGS["tiny" if args.smoke else "occfm_vae"]
    head = header(OP, args.device, {"smoke": args.smoke, "vae": vars(config)})
    rows: list[dict] = []
    for frames, dtype in CASES[: 1 if args.smoke else None]:
        rows += run_case(config, frames, dtype, args.device)
        for row in rows[-2:]:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if args.out:
            write(args.out, head, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
