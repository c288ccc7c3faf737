"""OmniGen v1: text is tokens inside the network; told 1 - t, answers -v, has no LoRA loader."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mfd_fast.models.diffusers.family import Cond, Family, padded
from mfd_fast.models.diffusers.record import replaced


class OmniGen(Family):
    """cond: ``ids [B, L]`` and, on the CPU, ``length [B]`` of the row's own text and ``first [B]``
    of its prompt, which is the first row of the pipeline's call.

    The network rotates all rows by the positions of the first one: every call has prompts of one
    length, and the null prompt, which is a fixed text, has the positions of the prompt beside it.
    """

    comfyui: ClassVar = None
    why_eager: ClassVar = "the network compares positions on the host"
    one_length: ClassVar = True
    text_length: ClassVar = 128
    ignored: ClassVar = (*Family.ignored, "position_ids")  # of all rows but the first

    @classmethod
    def before(cls) -> None:
        """Its processor makes what loads images, by torchvision, also where there are none."""
        from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

        if not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor"):
            names = ("Compose", "Lambda", "ToTensor", "Normalize")
            unused = dict.fromkeys(names, lambda *_, **__: None)
            processor_omnigen.transforms = SimpleNamespace(**unused)
            made = processor_omnigen.OmniGenMultiModalProcessor
            pipeline_omnigen.OmniGenMultiModalProcessor = made

    @property
    def guidance(self) -> float:
        return float(self.scale)

    def encode_text(self, prompts: list[str]) -> Cond:
        self.null_row = self.encode_null() if self.null_row is None else self.null_row
        cond = self._tokens(prompts)
        length = max(cond["ids"].shape[1], self.null_row["ids"].shape[1])
        return cond | {"ids": padded(cond["ids"], length)}

    @torch.no_grad()
    def encode_null(self) -> Cond:
        call = inspect.signature(type(self.pipe.multimodal_processor).__call__)
        return self._tokens([call.parameters["negative_prompt"].default])

    def _tokens(self, prompts: list[str]) -> Cond:
        read = self.pipe.multimodal_processor.process_multi_modal_prompt
        rows = [torch.tensor(read(prompt, None)["input_ids"]) for prompt in prompts]
        length = torch.tensor([len(row) for row in rows])
        ids = pad_sequence(rows, batch_first=True).to(self.device)
        return {"ids": ids, "length": length, "first": length}

    def null(self, cond: Cond) -> Cond:
        return super().null(cond) | {"first": cond["first"]}

    def blank(self, rows: int) -> Cond:
        length = torch.full((rows,), self.text_length)
        ids = self.zeros(rows, self.text_length, dtype=torch.long)
        return {"ids": ids, "length": length, "first": length}

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return -transformer(
            hidden_states=x,
            timestep=1 - t,
            input_img_latents=[],
            input_image_sizes={},
            return_dict=False,
            **self._sequence(cond),
        )[0]

    def _sequence(self, cond: Cond) -> dict[str, Tensor]:
        """Text from the right, time, image: ids, who sees whom ``[R, S, S]``, and positions."""
        ids, own, first = cond["ids"], cond["length"], set(cond["first"].tolist())
        if len(first) > 1:
            raise ValueError(f"OmniGen's network takes prompts of one length, got {sorted(first)}")
        null = {} if self.null_row is None else self.null_row
        width = max(*first, *own.tolist(), int(null.get("length", 0)))  # as beside the null prompt
        place = torch.arange(width + 1 + self.rows * self.columns, device=ids.device)
        pad = (width - own).to(ids.device)
        from_left = place[:width] - pad[:, None]
        fill = self.pipe.multimodal_processor.collator.pad_token_id
        text = torch.where(from_left < 0, fill, ids.gather(1, from_left.clamp_min(0)))
        query, key, pad = place[:, None], place, pad[:, None, None]
        seen = ((query > width) | (key <= query)) & (key >= pad) | (query < pad)
        positions = (place - (width - min(first))).clamp_min(0).expand(len(ids), -1)
        return {"input_ids": text, "attention_mask": seen.float(), "position_ids": positions}

    def without_values(self, transformer: nn.Module) -> None:
        def rope(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            return (x.new_zeros(x.shape[1], transformer.rope.dim, dtype=torch.float32),) * 2

        transformer.rope.forward = rope

    def call(self, cond: Cond, null: Cond | None) -> dict[str, Any]:
        return {"prompt": [""] * len(cond["ids"]), self.scale_name: self.scale}

    @contextmanager
    def given(self, cond: Cond, null: Cond) -> Iterator[None]:
        both = {name: torch.cat([cond[name], null[name]]) for name in cond}
        made = self._sequence(both) | {"input_pixel_values": [], "input_image_sizes": {}}

        def processor(*_: Any, **__: Any) -> dict[str, Any]:
            return made

        processor.max_image_size = self.pipe.multimodal_processor.max_image_size
        with replaced(self.pipe, "multimodal_processor", processor):
            yield
