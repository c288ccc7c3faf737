"""Z-Image: lists of rows, told 1 - t, answers -v, v_c + s (v_c - v_u)."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mfd_fast.models.diffusers.constants import CALL, Constant
from mfd_fast.models.diffusers.family import Cond, Family, padded


class ZImage(Family):
    """cond: ``text [B, L, C]`` and ``length [B]``, the real tokens of every row: padding would
    count as text.  Keep ``length`` on the CPU, where it is read.
    """

    why_eager: ClassVar = "the lengths of the prompts are Python numbers, fixed at capture"

    text_length: ClassVar = 128

    @property
    def guidance(self) -> float:
        return 1.0 + max(float(self.scale), 0.0)

    @property
    def unguided(self) -> float:
        return 0.0

    @torch.no_grad()
    def encode_null(self) -> Cond:
        return self._encoded([""])

    def encode_text(self, prompts: list[str]) -> Cond:
        self.null_row = self.encode_null() if self.null_row is None else self.null_row
        cond = self._encoded(prompts)
        length = max(cond["text"].shape[1], self.null_row["text"].shape[1])
        return cond | {"text": padded(cond["text"], length)}

    def _encoded(self, prompts: list[str]) -> Cond:
        rows, _ = self.pipe.encode_prompt(
            list(prompts),  # which it overwrites
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),
        )
        length = torch.tensor([len(row) for row in rows])
        return {"text": pad_sequence(rows, batch_first=True), "length": length}

    def blank(self, rows: int) -> Cond:
        text = self.zeros(rows, self.text_length, self.config.cap_feat_dim)
        return {"text": text, "length": torch.full((rows,), self.text_length)}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        refiners = (f"context_refiner.{i}" for i in range(len(transformer.context_refiner)))
        yield Constant(CALL, tuple(refiners))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        frames = list(x.unsqueeze(2).unbind())
        v = transformer(frames, 1 - t, self._rows(cond), return_dict=False)[0]
        return -torch.stack(v).squeeze(2)

    def call(self, cond: Cond, null: Cond | None) -> dict[str, Any]:
        given = {"prompt_embeds": self._rows(cond), self.scale_name: self.scale}
        return given | ({} if null is None else {"negative_prompt_embeds": self._rows(null)})

    @staticmethod
    def _rows(cond: Cond) -> list[Tensor]:
        lengths = cond["length"].tolist()
        return [row[:length] for row, length in zip(cond["text"], lengths, strict=True)]
