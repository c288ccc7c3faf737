"""Where a SANA run's text comes from: a store, or prompts encoded while it trains."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mfd_fast.models.sana.presets import SanaRun
from mfd_fast.models.sana.text.conditions import EncodedText, StoredText, TextConditions
from mfd_fast.models.sana.text.encoder import (
    SanaTextEncoder,
    check_sana_text_encoder,
    load_sana_text_encoder,
)
from mfd_fast.models.sana.text.prompts import open_prompts
from mfd_fast.models.sana.text.store import HEADER, TextStore, check_fits
from mfd_fast.models.sana.text.trim import trim_text

TINY_PROMPTS = ("a red cube", "two cats on a sofa", "a lighthouse at night, oil painting", "fog")


class SanaText:
    """The text conditions of one run, and those of prompts given by hand.

    Args:
        config: ``sana.prompts`` names a store or a prompt file.
        checkpoint: folder or hub id whose text encoder is used.
        channels: width of the embeddings that the network takes.
        device: of the conditions.

    The source is opened when it is first needed: sampling from a finished run needs no prompt file.
    """

    def __init__(self, config: SanaRun, checkpoint: str, *, channels: int, device: torch.device):
        self.config, self.checkpoint, self.channels = config, checkpoint, channels
        self.device = device

    @cached_property
    def conditions(self) -> TextConditions:
        """``ValueError`` or ``OSError`` names the file that is missing or broken."""
        settings, train = self.config.sana, self.config.train
        source = self._source()
        return TextConditions(
            source,
            batch_size=train.batch_size,
            seed=self.config.distill.seed,
            device=self.device,
            length=settings.text_length or None,
            multiple=settings.text_multiple,
        )

    def next_cond(self, n: int) -> dict[str, Tensor]:
        """``{"text": [B, L, C], "mask": [B, L]}`` of update n."""
        return self.conditions.next_cond(n)

    def null_cond(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The empty prompt in the shapes of cond."""
        return self.conditions.null_cond(cond)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of prompts given by hand, trimmed to the longest of them."""
        text, mask = self._encoder.encode(prompts)
        lengths = mask.sum(1).clamp_min(len(self.conditions.source.null)).tolist()
        return trim_text({"text": text, "mask": mask}, lengths)

    def grid(self, num: int) -> tuple[list[str], dict[str, Tensor]]:
        """Captions and condition of a sample grid: ``sana.preview_prompt``, or the first prompts of
        the run.
        """
        if chosen := self.config.sana.preview_prompt:
            return [chosen] * num, self.encode([chosen] * num)
        source = self.conditions.source
        num = min(num, len(source))
        if isinstance(source, StoredText):
            cond = source.store.batch(range(num))
            captions = [f"prompt {i} of the store" for i in range(num)]
            return captions, {name: leaf.to(self.device) for name, leaf in cond.items()}
        captions = source.prompts[:num]
        return captions, self.encode(captions)

    def captions(self, num: int, file: str = "") -> list[str]:
        """The prompts of the first ``num`` conditions of the run.

        Args:
            num: of them.
            file: for a run from a store, which keeps no prompts: what it was encoded from.

        ``ValueError``: no such file is given, or it holds other prompts.
        """
        prompts = self._opened
        if isinstance(prompts, TextStore):
            prompts = self._prompts_of(prompts, file)
        updates = range(-(-num // self.conditions.batch_size))
        return [prompts[i] for n in updates for i in self.conditions.indices(n)][:num]

    def check(self) -> str:
        """What the prompts are, every line checked, the text encoder not loaded."""
        source = self._opened
        if isinstance(source, TextStore):
            check_fits(source.longest, self.config.sana.text_length or source.longest)
            return f"{source.path}, a store of {len(source):,} encoded prompts"
        self._check_encoder()
        where = self.config.sana.prompts or "packaged with mfd-fast"
        return f"{where}, {len(source):,} prompts, encoded while training"

    def check_grid(self) -> None:
        """What the captions of a grid need is there; raises as :meth:`grid` would."""
        if self.config.sana.preview_prompt:
            self._check_encoder()

    @property
    def digest(self) -> str:
        """The same for the same prompts in the same order, in a file or a store."""
        source = self._opened
        if isinstance(source, TextStore):
            return source.header["prompts"]["digest"]
        return getattr(source, "digest", "")  # none of the packaged ones

    def _check_encoder(self) -> None:
        settings = self.config.sana
        check_sana_text_encoder(
            self.checkpoint,
            revision=settings.revision or None,
            variant=settings.variant or None,
        )

    def _prompts_of(self, store: TextStore, file: str) -> Sequence[str]:
        if not file:
            raise ValueError(
                f"{store.path} keeps no prompts, which scores need; name the file it was encoded "
                "from: --prompts FILE"
            )
        key = self.config.sana.prompt_column or None
        prompts = open_prompts(file, key=key, skip_bad=True, max_prompts=len(store))
        if prompts.digest != store.header["prompts"]["digest"]:
            raise ValueError(f"{store.path} was not encoded from {file}; name that file")
        return prompts

    def _source(self) -> StoredText | EncodedText:
        source = self._opened
        if isinstance(source, TextStore):
            return StoredText(source)
        return EncodedText(source, self._encoder, ahead=self.config.sana.encode_ahead)

    @cached_property
    def _opened(self) -> TextStore | Sequence[str]:
        """The store, or the prompts."""
        settings = self.config.sana
        if (Path(settings.prompts) / HEADER).is_file():
            store = TextStore(settings.prompts)
            if store.null.shape[1] != self.channels:
                raise ValueError(
                    f"{settings.prompts} holds embeddings of width {store.null.shape[1]}; this "
                    f"checkpoint takes {self.channels}: encode the prompts with its text encoder"
                )
            return store
        if settings.prompts:
            return open_prompts(
                settings.prompts, key=settings.prompt_column or None, skip_bad=settings.skip_bad
            )
        if self.config.teacher:
            raise ValueError(
                "a SANA run needs prompts: --sana.prompts FILE (.tsv, .txt, .jsonl, a table, a "
                "data set's folder), or a store made by mfd-fast encode-prompts"
            )
        return TINY_PROMPTS

    @cached_property
    def _encoder(self) -> SanaTextEncoder:
        settings = self.config.sana
        return load_sana_text_encoder(
            self.checkpoint,
            revision=settings.revision or None,
            variant=settings.variant or None,
            device=self.device,
            stays=settings.keep_text_encoder,
        )
