"""What operators take per sample: times, spans, weights, rows of coefficients."""

import torch
from torch import Tensor


def check_rows(op: str, rows: Tensor, name: str, x: Tensor, *columns: int) -> Tensor:
    """``[B, *columns]`` for x ``[B, ...]`` as the kernels read it: contiguous, float32, or float64
    for float64 samples, which take either.  ``ValueError`` names what is wrong.
    """
    allowed = (torch.float32, torch.float64)[: 2 if x.dtype == torch.float64 else 1]
    shape = (x.shape[0], *columns)
    if rows.shape != shape or rows.dtype not in allowed or rows.device != x.device:
        raise ValueError(
            f"{op}: {name} must be {' or '.join(map(str, allowed))} {list(shape)} on {x.device}; "
            f"got {rows.dtype} {list(rows.shape)} on {rows.device}"
        )
    return (rows.double() if x.dtype == torch.float64 else rows).contiguous()
