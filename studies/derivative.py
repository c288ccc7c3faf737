"""Time derivatives of the student in ayf and meanflow: exact, or by differences over .04.

The digits' network sees t through sinusoids of up to 1000 t, as most do, and was fit at single
times: its derivative in t is mostly the sinusoids'.  Compared are directions, at the students as
they start, and the students after the same training.  Not in the paper, which compares with both
methods; ``distill.ayf.derivative_span`` and ``distill.meanflow.derivative_span`` choose.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mfd_fast.baselines.batch import along_flow
from mfd_fast.baselines.config import DERIVATIVE_SPAN
from mfd_fast.baselines.second_time import with_second_time
from mfd_fast.models.digits.data import load_digits
from mfd_fast.models.digits.teacher import load_teacher
from mfd_fast.ops import interpolate_with_target
from studies.digits_runs import digits_config, distil, mean_and_spread, measured
from studies.plots import BLUE, ORANGE, Figure, bars, titled
from studies.verdict import Verdict

CLAIM = "None in the paper: how its rivals are differentiated is not said"
RULE = "there is no claim to test"
METHODS = ("meanflow", "ayf")
SPANS = (0.0, DERIVATIVE_SPAN)
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BATCH = 256
NUM_SEEDS = 3
UPDATES = 100
NUM_SAMPLES = 1000


def run(seed: int, folder: Path) -> dict[str, Any]:
    rows = []
    for method in METHODS:
        for span in SPANS:
            results = [trained(method, span, seed + i) for i in range(NUM_SEEDS)]
            row = {"method": method, "span": span}
            for key in ("frechet_to_data", "frechet_to_teacher50"):
                row[key], row[f"{key}_std"] = mean_and_spread([result[key] for result in results])
            rows.append(row)
    return {"updates": UPDATES, "times": list(TIMES), "cosine": cosines(seed), "rows": rows}


def trained(method: str, span: float, seed: int) -> dict[str, float]:
    """Distances of one run."""
    config = digits_config(updates=UPDATES, objective=method, seed=seed)
    settings = replace(getattr(config.distill, method), derivative_span=span)
    distill = replace(config.distill, **{method: settings})
    return measured(distil(replace(config, distill=distill))[0], NUM_SAMPLES)


@torch.no_grad()
def cosines(seed: int) -> list[float]:
    """Mean cosine of both derivatives along the data's flow, at each of ``TIMES``, end 0."""
    network = with_second_time(load_teacher())
    images, labels = load_digits()
    generator = Generator().manual_seed(seed)
    found = []
    for time in TIMES:
        index = torch.randint(len(images), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *images.shape[1:], generator=generator)
        t, end = torch.full((BATCH,), time), torch.zeros(BATCH)
        x, v = interpolate_with_target(images[index], noise, t)
        exact, quotient = (rate(network, x, t, v, labels[index], end, span) for span in SPANS)
        found.append(F.cosine_similarity(exact.flatten(1), quotient.flatten(1)).mean().item())
    return found


def rate(network, x: Tensor, t: Tensor, v: Tensor, label: Tensor, end: Tensor, over: float):
    """d/dt of the network along the flow ``[B, *S]``."""
    return along_flow(lambda x, t: network(x, t, label, end), x, t, v, end, over=over)[1]


def named(row: dict[str, Any]) -> str:
    """``ayf, exact`` or ``ayf, over 0.04``."""
    return f"{row['method']}, " + (f"over {row['span']:g}" if row["span"] else "exact")


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=2, title="The student's derivative in time: exact, or by differences")
    left, right = figure.axes
    left.plot(figures["times"], figures["cosine"], "o-", color=BLUE)
    left.set_ylim(-0.1, 1)
    titled(left, "direction, before training", "t", "cosine of the two")
    rows = figures["rows"]
    names = [named(row) for row in rows]
    bars(right, names, [row["frechet_to_data"] for row in rows],
         [row["frechet_to_data_std"] for row in rows], "Frechet distance to the data")  # fmt: skip
    for bar, row in zip(right.patches, rows, strict=True):
        bar.set_color(BLUE if row["span"] else ORANGE)
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    cosine = ", ".join(
        f"{value:.2f} at t = {t:g}"
        for t, value in zip(figures["times"], figures["cosine"], strict=True)
    )
    rows = "; ".join(
        f"{named(row)}: {row['frechet_to_data']:.1f} (sd {row['frechet_to_data_std']:.1f}) to the "
        f"data, {row['frechet_to_teacher50']:.1f} (sd {row['frechet_to_teacher50_std']:.1f}) to "
        "the teacher"
        for row in figures["rows"]
    )
    return Verdict("no claim", f"cosine of both derivatives: {cosine}; Frechet distances: {rows}")
