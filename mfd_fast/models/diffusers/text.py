"""The text of a run: prompts encoded by the pipeline itself and kept on the host."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mfd_fast.flow.solvers import to_device
from mfd_fast.models.diffusers.family import Cond, Family, padded
from mfd_fast.models.order import shuffled
from mfd_fast.run.console import progress

HOST_LEAVES = ("length", "first")  # read on the CPU (z_image, omnigen)


class HostText:
    """``next_cond(n)``: the condition of update n, a function of n alone.

    Every prompt is encoded by itself, so its bits do not depend on what else is encoded, and once,
    before the first update that needs it, with all others that fit.

    Args:
        family: with its text encoders.
        prompts: all of the run, shuffled anew in every epoch.
        batch_size: prompts in one update.
        seed: of their order.
        num_updates: of both roles in the whole run: what is encoded ahead.
        most_bytes: of encoded prompts on the host; at least one update's.
        device: where the conditions go.
        encoders: the block in which the text encoders are on the device.
    """

    def __init__(
        self,
        family: Family,
        prompts: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        num_updates: int,
        most_bytes: float,
        device: torch.device,
        encoders: Callable[[], AbstractContextManager],
    ):
        self.family, self.prompts, self.device = family, prompts, device
        self.batch_size, self.seed, self.num_updates = batch_size, seed, num_updates
        self.most_bytes, self.encoders = most_bytes, encoders
        self.visits = 0  # of the encoders to the device
        self._rows: dict[int, Cond] = {}

    def indices(self, n: int) -> list[int]:
        """The prompts of update n, by their place in the file."""
        places = range(n * self.batch_size, (n + 1) * self.batch_size)
        return [shuffled(place, len(self.prompts), self.seed) for place in places]

    def next_cond(self, n: int) -> Cond:
        """The family's condition of update n, leaves ``[B, ...]``."""
        wanted = self.indices(n)
        if not self._rows.keys() >= set(wanted):
            self._fill(n)
        return self._placed([self._rows[index] for index in wanted])

    def encode(self, prompts: Sequence[str]) -> Cond:
        """The condition of prompts given by hand."""
        with self.encoders():
            return self._placed([self._encoded(prompt) for prompt in prompts])

    def _fill(self, n: int) -> None:
        """Encode the prompts of update n and of those behind it, until the memory is full."""
        self._rows, size, self.visits = {}, 0, self.visits + 1
        most = min(len(self.prompts), max(1, self.num_updates - n) * self.batch_size)
        with self.encoders(), progress(None, "encoding prompts", most) as bar:
            for m in range(n, max(self.num_updates, n + 1)):
                for index in set(self.indices(m)) - self._rows.keys():
                    self._rows[index] = row = self._encoded(self.prompts[index])
                    size += sum(leaf.nbytes for leaf in row.values())
                    bar.update()
                if size >= self.most_bytes or len(self._rows) == len(self.prompts):
                    break

    def _encoded(self, prompt: str) -> Cond:
        cond = self.family.encode([prompt])
        if self.family.has_null and self.family.null_row is None:
            self.family.null(cond)  # made while the encoders are here
        return {name: leaf.cpu() for name, leaf in cond.items()}

    def _placed(self, rows: list[Cond]) -> Cond:
        return {
            name: leaf if name in HOST_LEAVES else to_device(leaf, self.device)
            for name, leaf in joined(rows).items()
        }


def joined(rows: list[Cond]) -> Cond:
    """One batch of conditions of one row each, padded to the longest text."""

    def leaf(leaves: list[Tensor]) -> Tensor:
        if leaves[0].ndim > 1:
            longest = max(x.shape[1] for x in leaves)
            leaves = [padded(x, longest) if x.shape[1] < longest else x for x in leaves]
        return torch.cat(leaves)

    return {name: leaf([row[name] for row in rows]) for name in rows[0]}
