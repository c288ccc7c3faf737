"""Sample videos: MP4 files by diffusers' own exporter, and a contact sheet as one PNG."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mfd_fast.files.whole import written
from mfd_fast.pictures.rows import image_rows

FRAMES = 6  # of a video, on a contact sheet
WIDTH = 320  # pixels of one of them, at most


def no_mp4() -> str:
    """What MP4 files lack here, in a sentence; empty if nothing."""
    missing = [name for name in ("imageio", "imageio_ffmpeg") if find_spec(name) is None]
    if not missing:
        return ""
    return (
        f"MP4 files need {' and '.join(missing)}, which is not installed; run: pip install "
        "'mfd-fast[video]'"
    )


def video_rows(
    rows: Mapping[str, Tensor], path: str | Path, *, captions: Sequence[str], fps: float
) -> list[Path]:
    """A contact sheet, a line for each video with frames from its first to its last, and beside it
    the videos of the last row as MP4, where that can be written (:func:`no_mp4`); the files.

    Args:
        rows: name -> uint8 videos ``[n, F, 3, H, W]``, all of one shape.
        path: the PNG; its folder is made if it is missing.
        captions: of the n videos.
        fps: frames a second.
    """
    path = Path(path)
    last = [*rows.values()][-1]
    picked = torch.linspace(0, last.shape[1] - 1, min(FRAMES, last.shape[1])).round().long()
    lines = {
        f"{name}: {caption}": smaller(video[picked])
        for name, videos in rows.items()
        for caption, video in zip(captions, videos, strict=True)
    }
    image_rows(lines, path, captions=[f"{frame / fps:.2f} s" for frame in picked.tolist()])
    if no_mp4():
        return [path]
    numbers = [""] if len(last) == 1 else [f"-{n + 1}" for n in range(len(last))]
    files = [path.with_name(f"{path.stem}{number}.mp4") for number in numbers]
    for video, file in zip(last, files, strict=True):
        write_mp4(video, file, fps)
    return [path, *files]


def write_mp4(video: Tensor, path: str | Path, fps: float) -> None:
    """Write uint8 frames ``[F, 3, H, W]``; ``ImportError`` says what is missing."""
    if lack := no_mp4():
        raise ImportError(lack)
    from diffusers.utils import export_to_video

    frames = video.permute(0, 2, 3, 1).numpy() / 255  # the exporter takes [0, 1]
    with written(path) as partial:
        export_to_video([*(frames + 1e-6)], str(partial), fps=fps)


def smaller(frames: Tensor) -> Tensor:
    """uint8 images ``[n, 3, H, W]``, at most ``WIDTH`` wide."""
    height, width = frames.shape[-2:]
    if width <= WIDTH:
        return frames
    size = (max(1, round(height * WIDTH / width)), WIDTH)
    return interpolate(frames.float(), size, mode="area").round().to(torch.uint8)
