"""Seconds and gigabytes of training steps that others published, beside what is predicted here.

The real networks of diffusers are traced without storage (``bench.predict.networks``), a step is
predicted as ``mfd-fast estimate`` does, seconds = max(host, device), and four numbers are fitted to
half of the families: the host's seconds an operator and the shares of the rates (products,
attention, memory).  Families in alphabetical order are fitted and tested in turn.  The fit is the
least sum of |log(predicted / published)|.  Regions under torch.compile have their own host, fitted
to one row and tested on the other.

Nothing was measured here.  SimpleTuner's rows are documentation/experimental/
SEGMENTED_CHECKPOINTING.md, read at commit 363fbc3cc, "bf16": H100 and L40S, every block kept
("none") or computed twice ("layer").  Its example configurations say rank, batch and training data,
whose size is taken where the page names the size of validation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import exp, log
from statistics import median

from bench.predict.networks import Step, traced_step
from bench.running import Options
from mfd_fast.cost import device_named
from mfd_fast.cost.devices import Device, Efficiency, Host, assumed
from mfd_fast.cost.phases import phase_of

SIMPLETUNER = (
    "https://github.com/bghira/SimpleTuner/blob/main/documentation/experimental/"
    "SEGMENTED_CHECKPOINTING.md"
)
UNSLOTH = "https://github.com/unslothai/unsloth/pull/6839"
QLORA = "https://huggingface.co/blog/flux-qlora"
GIB = 2.0**30
DEVICE_BOUND = 1.64  # L40S / H100 above it is the device's: the root of 2.73, their products' rates
DATA_480 = "480^2 pixels, as the data; the page says 832x480, 81 frames"
RAM = "weights stay in the host's memory (RamTorch)"


@dataclass(frozen=True)
class Family:
    """A training configuration: latents' sides, text tokens and rank of the factors.

    steps: "none" or "layer" -> device -> seconds a step; peaks: the same -> bytes, 0 if unknown.
    """

    network: str
    batch: int
    sides: tuple[int, ...]
    text: int
    rank: int
    steps: dict[str, dict[str, float]]
    peaks: dict[str, float]
    caveat: str = ""
    source: str = SIMPLETUNER
    has_weights: bool = True


def both(h100: float, l40s: float) -> dict[str, float]:
    """Seconds on both cards."""
    return {"h100": h100, "l40s": l40s}


# fmt: off
FAMILIES = (
    Family("auraflow", 1, (64, 64), 120, 8,
           {"none": both(0.180, 0.233), "layer": both(1.824, 0.833)},
           {"none": 19.19 * GIB, "layer": 13.37 * GIB},
           "512px, as the data; checkpointed, the H100 is slower than the L40S"),
    Family("chroma", 1, (64, 64), 512, 16,
           {"none": both(0.454, 0.559), "layer": both(1.276, 1.430)},
           {"none": 26.18 * GIB, "layer": 17.67 * GIB},
           "512px, as the data; checkpointed with another attention (native-efficient)"),
    Family("krea2", 1, (64, 64), 512, 64,
           {"none": both(0.272, 0.661), "layer": both(0.371, 0.919)},
           {"none": 40.09 * GIB, "layer": 30.06 * GIB}, "the control without compile; 512px"),
    Family("longcat-image", 1, (64, 64), 512, 16,
           {"none": both(0.193, 0.262), "layer": both(0.327, 0.370)},
           {"none": 16.47 * GIB, "layer": 12.38 * GIB}, "512px"),
    Family("ltx-video-0.9.5", 1, (7, 11, 20), 128, 16,
           {"none": both(0.274, 0.275), "layer": both(0.462, 0.459)},
           {"none": 8.77 * GIB, "layer": 4.21 * GIB},
           "640x352, 480^2 pixels as the data; the page says 768x512, 49 frames"),
    Family("lumina2", 2, (64, 64), 80, 16,
           {"none": both(0.235, 0.332), "layer": both(0.384, 0.457)},
           {"none": 15.99 * GIB, "layer": 6.60 * GIB}, "512px; length of the caption assumed"),
    Family("qwen-image", 1, (128, 128), 32, 8, {"layer": both(1.202, 3.377)},
           {"layer": 41.04 * GIB}, "length of the caption assumed"),
    Family("sd3.5-medium", 3, (128, 128), 231, 128,
           {"none": both(0.529, 1.189), "layer": both(0.721, 1.607)},
           {"none": 34.59 * GIB, "layer": 7.67 * GIB}),
    Family("wan2.1-1.3b", 1, (21, 60, 60), 512, 16,
           {"none": {"h100": 1.407}, "layer": both(2.099, 4.459)},
           {"none": 71.90 * GIB, "layer": 4.73 * GIB},
           f"{DATA_480}; FlashAttention 3 on the H100; {RAM}", has_weights=False),
    Family("wan2.1-14b", 1, (21, 60, 60), 512, 16, {"layer": both(7.162, 21.770)},
           {"layer": 16.28 * GIB}, f"{DATA_480}; FlashAttention 3 on the H100; {RAM}",
           has_weights=False),
    Family("z-image", 1, (64, 64), 64, 64,
           {"none": both(0.243, 0.316), "layer": both(0.479, 0.493)},
           {"none": 21.25 * GIB, "layer": 12.87 * GIB},
           "512px, as the data; caption assumed; a second, frozen adapter is not traced"),
)
LOKR = (
    Family("sana-1.6b", 4, (32, 32), 300, 16, {"none": both(0.529, 0.597)}, {"none": 23.71 * GIB},
           "LoKr, traced as LoRA: the products that make its weights are missing"),
)
COMPILED_ROWS = (
    Family("flux.1-dev", 1, (64, 64), 512, 16, {"layer": {"b200": 1 / 4.12}}, {"layer": 24.7e9},
           "compiled; rank and checkpoints not said: by the memory, blocks computed twice",
           UNSLOTH),
    Family("z-image", 1, (96, 96), 64, 16, {"layer": {"b200": 1 / 6.38}}, {"layer": 13.6e9},
           "compiled; rank and checkpoints not said: by the memory, blocks computed twice",
           UNSLOTH),
)
MEMORY_ONLY = (
    Family("flux.1-dev", 1, (64, 96), 77, 4, {"layer": {}}, {"layer": 26e9},
           "512x768, 8-bit AdamW; \"the base in FP16\"", QLORA),
)
# fmt: on


_traced = lru_cache(maxsize=64)(traced_step)


def step_of(family: Family, mode: str) -> Step:
    """The traced step of a family."""
    shape = family.network, family.batch, family.sides, family.text, family.rank
    return _traced(*shape, checkpoints=mode == "layer")


@dataclass(frozen=True)
class Case:
    """One published number of seconds."""

    family: Family
    mode: str
    device: str
    seconds: float
    half: str


def cases(families: tuple[Family, ...], half: Callable[[int], str]) -> list[Case]:
    """Every number of the families; ``half`` of a family's place: "fit", "test" or another."""
    return [
        Case(family, mode, device, seconds, half(i))
        for i, family in enumerate(families)
        for mode, steps in family.steps.items()
        for device, seconds in steps.items()
    ]


def alternating(place: int) -> str:
    return "test" if place % 2 else "fit"


class Sums:
    """A case's operators at the data sheet's rates, so that a fit need not go through them again.

    Operators by which of both limits decides would depend on the shares: all are kept.
    """

    def __init__(self, case: Case):
        device = device_named(case.device)
        self.case, self.work = case, step_of(case.family, case.mode).work
        self.rows = [
            (op.family, op.flops / device.flops(op.dtype), op.bytes / device.bandwidth, count)
            for op, count in self.work.calls.items()
        ]

    def seconds(self, numbers: tuple[float, ...]) -> float:
        """max(host, device) with (host, products, attention, memory)."""
        host, products, attention, memory = numbers
        device = 0.0
        for family, compute, moved, count in self.rows:
            share = attention if family == "attention" else products
            device += count * max(compute / share, moved / memory)
        return max(host * self.work.num_ops, device)


FACTORS = (0.8, 0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.25)
SHARES = ("product", "attention", "memory")
START = (40e-6, 0.6, 0.3, 0.75)  # seconds an operator; shares as the estimate assumes them


def fitted(points: list[Sums]) -> tuple[float, ...]:
    """The four numbers, each moved in turn while that lowers the error."""

    def error(numbers: tuple[float, ...]) -> float:
        return sum(abs(log(one.seconds(numbers) / one.case.seconds)) for one in points)

    best = START
    while True:
        before = error(best)
        for i in range(len(best)):
            tried = [(*best[:i], best[i] * factor, *best[i + 1 :]) for factor in FACTORS]
            best = min([best, *(one for one in tried if max(one[1:]) <= 1)], key=error)
        if error(best) > before - 1e-9:
            return best


def efficiency_of(numbers: tuple[float, ...]) -> Efficiency:
    """The fitted numbers as the estimate takes them."""
    host, products, attention, memory = numbers
    shares = dict.fromkeys(assumed(is_captured=False).shares, products) | {"attention": attention}
    return Efficiency(shares, memory, Host(host, host, "fitted"), "fitted")


def row(case: Case, used: Efficiency, device: Device) -> dict:
    """Predicted beside published."""
    family, step = case.family, step_of(case.family, case.mode)
    phase = phase_of(step.work, device, used)
    predicted = phase.seconds.low
    return {
        "network": family.network,
        "mode": case.mode,
        "gpu": case.device,
        "half": case.half,
        "published_s": round(case.seconds, 4),
        "predicted_s": round(predicted, 4),
        "ratio": round(predicted / case.seconds, 3),
        "host_s": round(phase.host.low, 4),
        "device_s": round(phase.device, 4),
        "operators": round(step.work.num_ops),
        "tflop": round(step.work.flops / 1e12, 1),
        "caveat": family.caveat,
        "source": family.source,
    }


def memory_row(family: Family, mode: str) -> dict:
    """Weights, factors, their gradients and two moments, and what forward and backward keep."""
    step = step_of(family, mode)
    size = step.kept + 3 * step.factors + family.has_weights * step.weights
    return {
        "network": family.network,
        "mode": mode,
        "half": "memory",
        "published_gb": round(family.peaks[mode] / 1e9, 2),
        "predicted_gb": round(size / 1e9, 2),
        "ratio": round(size / family.peaks[mode], 3),
        "caveat": family.caveat,
        "source": family.source,
    }


def sides(rows: list[dict]) -> dict[str, list[str]]:
    """Held-out pairs of cards whose ratio says host or device, by whether the prediction agrees."""
    found: dict[str, list[str]] = {"right": [], "wrong": []}
    for first, second in pairwise(row for row in rows if row["half"] == "test"):
        name = (first["network"], first["mode"])
        if name != (second["network"], second["mode"]):
            continue
        published, predicted = (
            second[key] / first[key] > DEVICE_BOUND for key in ("published_s", "predicted_s")
        )
        found["right" if published == predicted else "wrong"].append(" ".join(name))
    return found


def factor(ratio: float) -> float:
    """How far from 1, either way."""
    return exp(abs(log(ratio)))


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    known = [Sums(case) for case in cases(FAMILIES, alternating)]
    numbers = fitted([one for one in known if one.case.half == "fit"])
    used = efficiency_of(numbers)
    first = step_of(COMPILED_ROWS[0], "layer").work.num_ops
    host = COMPILED_ROWS[0].steps["layer"]["b200"] / first
    compiled = replace(used, host=Host(host, host, "fitted"))
    others = [(case, used) for case in cases(LOKR, lambda i: "LoKr")]
    others += [(case, compiled) for case in cases(COMPILED_ROWS, lambda i: f"compiled {i + 1}")]
    rows = [row(one.case, used, device_named(one.case.device)) for one in known]
    rows += [row(case, way, device_named(case.device)) for case, way in others]
    tested = [factor(row["ratio"]) for row in rows if row["half"] == "test"]
    config = {
        "host_us": round(numbers[0] * 1e6, 2),
        "compiled_host_us": round(host * 1e6, 2),
        "shares": dict(
            zip(("product", "attention", "memory"), map(float, numbers[1:]), strict=True)
        ),
        "test_median": round(median(tested), 3),
        "test_within_1_6": f"{sum(f <= 1.6 for f in tested)} of {len(tested)}",
        "sides": sides(rows),
    }
    every = (*FAMILIES, *LOKR, *COMPILED_ROWS, *MEMORY_ONLY)
    memory = [memory_row(family, mode) for family in every for mode in family.peaks]
    return "published", config, iter([rows, memory])
