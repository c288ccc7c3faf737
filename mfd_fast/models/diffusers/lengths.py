"""Texts of their own lengths that nothing masks: rows of one length share a call of the network."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.family import Cond, Family, padded
from mfd_fast.models.diffusers.text import joined

Rows = slice | Tensor


class OwnLengths(Family):
    """A pipeline that attends to all of a text, padding of a batch too.

    cond: ``text [B, L, C]``, zeros behind ``length [B]`` rows of each.  Every prompt is encoded
    alone and evaluated as long as it is then, whatever is beside it.  Keep ``length`` on the CPU,
    where it is read.
    """

    why_eager: ClassVar = "texts of each length are a call of their own, chosen on the host"
    calls_vary: ClassVar = True
    null_length: ClassVar[int | None] = None
    """Tokens of the null condition in an estimate; None: as many as of a text."""

    def encode_text(self, prompts: list[str]) -> Cond:
        self.null_row = self.encode_null() if self.null_row is None else self.null_row
        cond = joined([self.encode_alone(prompt) for prompt in prompts])
        length = max(cond["text"].shape[1], self.null_row["text"].shape[1])
        return cond | {"text": padded(cond["text"], length)}

    @torch.no_grad()
    def encode_null(self) -> Cond:
        return self.encode_alone("")

    def encode_alone(self, prompt: str) -> Cond:
        """The condition of one row, no longer than the pipeline makes it."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_alone")

    def blank(self, rows: int) -> Cond:
        return self.blank_text(rows, self.text_length)

    def blank_null(self) -> Cond:
        return self.blank_text(1, self.null_length or self.text_length)

    def blank_text(self, rows: int, length: int) -> Cond:
        """A condition of zeros, all rows of one length."""
        raise NotImplementedError(f"{type(self).__name__} must define blank_text")

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        def evaluate(rows: Rows) -> Tensor:
            part = cut({name: leaf[rows] for name, leaf in cond.items()})
            return self.velocity_alone(transformer, x[rows], t[rows], part)

        return by_length(cond["length"], evaluate)

    def velocity_alone(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """:meth:`velocity` of rows whose text is as long as ``cond["text"]``."""
        raise NotImplementedError(f"{type(self).__name__} must define velocity_alone")

    def call(self, cond: Cond, null: Cond | None) -> dict[str, Any]:
        return super().call(cut(cond), None if null is None else cut(null))


def by_length(lengths: Tensor, evaluate: Callable[[Rows], Tensor]) -> Tensor:
    """What ``evaluate`` makes of the rows of each length, in the order of ``lengths [R]``."""
    found = lengths.unique()
    if len(found) == 1:
        return evaluate(slice(None))
    rows = [(lengths == length).nonzero().flatten() for length in found]
    return torch.cat([evaluate(part) for part in rows])[torch.cat(rows).argsort()]


def cut(cond: Cond) -> Cond:
    """The condition with no more than its text; ``ValueError`` for rows of several lengths."""
    lengths = cond["length"].unique().tolist()
    if len(lengths) > 1:
        raise ValueError(
            f"a call of this pipeline takes texts of one length, got lengths {lengths}: give it "
            "one row at a time"
        )
    return cond | {"text": cond["text"][:, : lengths[0]]}
