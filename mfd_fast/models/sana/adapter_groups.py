"""The adapters of layers that share their input, added to the layers' common product.

``AdapterBank`` adds to each target in a forward hook; a network that computes q, k and v in one
product never calls the targets, so it asks the bank for their factors and adds them together, one
operator for all of them (``ops/segmented_lora.py``).

Letters in shapes: R rows, T tokens, G targets of a group.
"""

import torch
from torch import Tensor, nn

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.ops.segmented_lora import segmented_lora, segmented_lora_


class AdapterGroup:
    """Adapters of G targets that follow each other in the bank and have equal shapes."""

    def __init__(self, bank: AdapterBank, first: int, count: int, rows: dict):
        self.bank, self.first, self.count = bank, first, count
        self.rows = rows  # (lanes that use the adapter, R) -> device tensor; shared by all groups

    @classmethod
    def of(cls, bank: AdapterBank, layers: list[nn.Linear], rows: dict) -> "AdapterGroup | None":
        """None if not all layers are targets of the bank: their hooks do the work then."""
        index = {id(target.module): i for i, target in enumerate(bank.targets)}
        places = [index.get(id(layer)) for layer in layers]
        if None in places or places != list(range(places[0], places[0] + len(layers))):
            return None
        return cls(bank, places[0], len(layers), rows)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y ``[R, T, G * out]`` of x ``[R, T, in]`` plus the adapters of every row's lane.

        Without gradients y itself, updated.  ``ValueError`` if R does not divide into the lanes.
        """
        call = self.bank.call_in_force()
        if call is None:
            return y
        self.bank.mark_called(self.first, self.count)
        add = segmented_lora if torch.is_grad_enabled() else segmented_lora_
        for name, lanes in call.runs:
            a, b = self._factors(name)
            rows = self._rows(lanes, call.num_lanes, x)
            y = add(y, x, a, b, rows, self.bank.scale(name))
        return y

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A ``[1, G, r, in]`` and B ``[1, G, out, r]``; views if no gradient is wanted."""
        pairs = self.bank._factors(name)[self.first : self.first + self.count]
        if self.count > 1 and pairs[0][0].requires_grad:
            a, b = (torch.stack(factors)[None] for factors in zip(*pairs, strict=True))
            return a, b
        step = sum(factor.numel() for factor in pairs[0])
        a, b = (
            factor.as_strided((1, self.count, *factor.shape), (step, step, *factor.stride()))
            if self.count > 1
            else factor[None, None]
            for factor in pairs[0]
        )
        return a, b

    def _rows(self, lanes: tuple[int, ...] | None, num_lanes: int, x: Tensor) -> Tensor:
        """``[R]`` int32: 0 where the row's lane uses the adapter, -1 elsewhere; made once."""
        key = (lanes, num_lanes, len(x), x.device)
        if key not in self.rows:
            if len(x) % num_lanes:
                raise ValueError(
                    f"the network got {len(x)} rows; with {num_lanes} lanes it must get n * "
                    f"{num_lanes}"
                )
            used = range(num_lanes) if lanes is None else lanes
            pattern = [0 if lane in used else -1 for lane in range(num_lanes)]
            each = pattern * (len(x) // num_lanes)
            self.rows[key] = torch.tensor(each, dtype=torch.int32, device=x.device)
        return self.rows[key]
