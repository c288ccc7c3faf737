"""Rows in e4m3: what enters SANA's large products at 1024px, one sample and three lanes of it.

python -m bench.bench_quantize_rows [--smoke] [--out FILE.json]
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, main
from mfd_fast.ops import quantize_rows, reference

OP = "quantize_rows"
TOKENS = 1024
# (lanes, columns): the width, and the hidden width of the gated convolution.
SHAPES = [(1, 2240), (3, 2240), (3, 5600), (12, 2240)]


def _impls() -> dict[str, Callable]:
    quantize = {
        "eager": reference.quantize_rows,
        "compile": torch.compile(reference.quantize_rows, dynamic=False),
        "ours": quantize_rows,
    }
    return {name: partial(_as_bytes, run) for name, run in quantize.items()}


def _as_bytes(quantize: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
    """The values as bytes, which can be compared on every device."""
    values, scale = quantize(x)
    return values.view(torch.uint8), scale


def _inputs(rows: int, columns: int, device: str) -> tuple[Tensor]:
    return (torch.randn(rows, columns, device=device).bfloat16(),)


def cases(device: str, smoke: bool) -> Iterator[Case]:
    for lanes, columns in SHAPES[:1] if smoke else SHAPES:
        rows = 16 if smoke else lanes * TOKENS
        yield Case(
            shape="smoke" if smoke else f"sana-1024 x{lanes} {columns}",
            dtype="bfloat16",
            impls=_impls(),
            inputs=partial(_inputs, rows, columns, device),
            bytes_moved=3 * rows * columns,
        )


if __name__ == "__main__":
    raise SystemExit(main(OP, cases))
