"""A step of operators as a CUDA graph, against the same step run eagerly."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_captured_equals_eager(step: Callable[[], tuple[Tensor, ...]]) -> None:
    """The replayed results of ``step`` are the eager ones, bit for bit.

    What the eager step returns must not keep its autograd graph: the accumulators of its leaves
    belong to the stream that made them, and a capture that has to wait for another stream fails,
    and with it every later capture of the process.
    """
    expected = [x.detach().clone() for x in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
