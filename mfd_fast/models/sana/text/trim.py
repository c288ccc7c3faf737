"""Text conditions of SANA: ``{"text": [R, L, channels], "mask": [R, L] bool}``."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def trim_text(
    cond: Mapping[str, Tensor], lengths: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Drop the positions after the longest real text of the batch: exact, masked ones weigh 0.

    Args:
        cond: with real tokens first in every row; other entries are passed on.
        lengths: real tokens of every row, known on the host.  None: read from the mask if that is
            on the CPU; on a device nothing is dropped, because reading would wait for it.

    The result's L changes from batch to batch, and a captured step has graphs for every L.
    ``ValueError`` if a length is not in 1 to L.
    """
    text, mask = cond["text"], cond.get("mask")
    if lengths is None:
        if mask is None or mask.device.type != "cpu":
            return dict(cond)
        lengths = (mask.shape[1] - mask.flip(1).int().argmax(1)).tolist()
    if len(lengths) == 0:
        return dict(cond)
    if min(lengths) < 1 or max(lengths) > text.shape[1]:
        raise ValueError(f"trim_text: lengths must be 1 to L = {text.shape[1]}, got {lengths}")
    longest = max(lengths)
    trimmed = dict(cond) | {"text": text[:, :longest]}
    return trimmed if mask is None else trimmed | {"mask": mask[:, :longest]}
