"""The text condition of every update: from a store, or encoded shortly before it is needed.

Both sources serve the n-th update from n alone, so a resumed run needs no data state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mfd_fast.flow.solvers import to_device
from mfd_fast.models.order import shuffled
from mfd_fast.models.sana.text.encoder import MAX_LENGTH, SanaTextEncoder
from mfd_fast.models.sana.text.prompts import Prompts
from mfd_fast.models.sana.text.store import TextStore, check_fits
from mfd_fast.models.sana.text.trim import trim_text

Order = Callable[[int], list[int]]  # update number -> indices of its prompts
Length = Callable[[int], int]  # longest prompt of a batch -> what the batch is padded to


class TextSource(Protocol):
    """Embeddings of prompts, by the number of the update."""

    null: Tensor
    """The real tokens of the empty prompt ``[l, dim]``."""
    longest: int
    """The most tokens a prompt may have."""

    def __len__(self) -> int: ...

    def batch(self, n: int, order: Order, length: Length) -> dict[str, Tensor]:
        """``{"text": [B, L, dim], "mask": [B, L] bool}`` of update n.

        L is ``length`` of the longest of these prompts and the empty one.
        """
        ...


class TextConditions:
    """``next_cond(n)`` and ``null_cond(cond)`` for SANA, on the device.

    Args:
        source: ``StoredText`` or ``EncodedText``.
        batch_size: B, prompts in one update.
        seed: of the order.  Every epoch is another permutation; a batch may span two.
        device: where the conditions go.
        length: one L for all updates; the longest prompt of the source (``source.longest``)
            always fits.  None: every batch has the L it needs.
        multiple: what every L is raised to a multiple of, 300 (what the encoder gives) at most:
            a captured step has graphs for every L.

    ``ValueError`` if ``length`` is above the source's, or shorter than a prompt that comes.
    """

    def __init__(
        self,
        source: TextSource,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        length: int | None = None,
        multiple: int = 1,
    ):
        if length is not None and not len(source.null) <= length <= source.longest:
            raise ValueError(
                f"the text length must be {len(source.null)} to {source.longest}, got {length}"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.device, self.length, self.multiple = torch.device(device), length, multiple
        null = source.null.to(self.device)
        most = max(source.longest, MAX_LENGTH)
        self._null_text = null.new_zeros(most, null.shape[1])
        self._null_text[: len(null)] = null
        self._null_mask = torch.arange(most, device=self.device) < len(null)

    def indices(self, n: int) -> list[int]:
        """The prompts of update n, by their place in the file."""
        first = n * self.batch_size
        places = range(first, first + self.batch_size)
        return [shuffled(place, len(self.source), self.seed) for place in places]

    def next_cond(self, n: int) -> dict[str, Tensor]:
        """``{"text": [B, L, dim] bfloat16, "mask": [B, L] bool}`` of update n, counted from 0."""
        cond = self.source.batch(n, self.indices, self._length_of)
        return {name: to_device(value, self.device) for name, value in cond.items()}

    def _length_of(self, longest: int) -> int:
        whole = -(-longest // self.multiple) * self.multiple
        return self.length or max(longest, min(whole, MAX_LENGTH))  # from every source the same

    def null_cond(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The empty prompt in the shapes of cond; everything else in it is passed on."""
        rows, length = cond["text"].shape[:2]
        return dict(cond) | {
            "text": self._null_text[:length].expand(rows, -1, -1),
            "mask": self._null_mask[:length].expand(rows, -1),
        }


class StoredText:
    """Embeddings from a ``TextStore``."""

    def __init__(self, store: TextStore):
        self.store, self.null, self.longest = store, store.null, store.longest

    def __len__(self) -> int:
        return len(self.store)

    def batch(self, n: int, order: Order, length: Length) -> dict[str, Tensor]:
        indices = order(n)
        longest = max(len(self.null), *(int(self.store.lengths[i]) for i in indices))
        return self.store.batch(indices, length(longest))


class EncodedText:
    """Embeddings made while training, ``ahead`` updates in one call of the encoder.

    The call for the next updates is queued on a stream of its own when these begin.  An encoder
    that does not stay on the device (``SanaTextEncoder.stays``) gets the training's stream and its
    memory instead, when it is its turn; make ``ahead`` large then.

    Args:
        prompts: read from their file as they are needed.
        encoder: on the device of the training.
        ahead: updates in one call.  Which prompts share a call follows from n, so that an update
            gets the same bits in a resumed run.
    """

    def __init__(self, prompts: Prompts, encoder: SanaTextEncoder, *, ahead: int = 8):
        if ahead < 1:
            raise ValueError(f"ahead must be >= 1, got {ahead}")
        self.prompts, self.encoder, self.ahead = prompts, encoder, ahead
        self.null = encoder.null().bfloat16()
        self.longest = encoder.max_length
        self._is_queued = encoder.device.type == "cuda" and encoder.stays
        self._stream = torch.cuda.Stream(encoder.device) if self._is_queued else None
        self._calls: dict[int, _Call] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, n: int, order: Order, length: Length) -> dict[str, Tensor]:
        number, place = divmod(n, self.ahead)
        wanted = (number, number + 1) if self._is_queued else (number,)
        self._calls = {k: self._calls.get(k) or self._encode(k, order) for k in wanted}
        text, mask, lengths = self._calls[number].result()
        size = len(lengths) // self.ahead
        rows = slice(place * size, (place + 1) * size)
        padded = length(max(*lengths[rows], len(self.null)))
        check_fits(max(lengths[rows]), padded)
        cond = {"text": text[rows], "mask": mask[rows]}
        return trim_text(cond, [padded] * size)

    def _encode(self, number: int, order: Order) -> "_Call":
        updates = range(number * self.ahead, (number + 1) * self.ahead)
        prompts = [self.prompts[index] for n in updates for index in order(n)]
        with torch.cuda.stream(self._stream):  # None: the current one
            return _Call(*self.encoder.encode(prompts))


class _Call:
    """What the encoder gives, perhaps still being computed on the stream that is current here."""

    def __init__(self, text: Tensor, mask: Tensor):
        self.text, self.mask = text.bfloat16(), mask
        # Padding may hold anything; zeros make a batch the same from either source.
        self.text = self.text.masked_fill_(~mask[..., None], 0)
        self._host_mask = mask.to("cpu", non_blocking=True)
        self._lengths: list[int] | None = None
        self._done = torch.cuda.Event() if text.is_cuda else None
        if self._done is not None:
            self._done.record()

    def result(self) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Text, mask and lengths, ready for the current stream."""
        if self._lengths is None:
            if self._done is not None:
                self._done.synchronize()  # long done: it was queued a call before this one
                for tensor in (self.text, self.mask):
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            self._lengths = self._host_mask.sum(1).tolist()
        return self.text, self.mask, self._lengths
