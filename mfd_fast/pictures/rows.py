"""Sample images at their own size: plain files, and labelled rows as one PNG."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.files.whole import written

LABEL_HEIGHT = 28  # pixels of a line of text
FONT_SIZE = 16
GAP = 8
MIN_CELL = 160  # smaller images are magnified, so that a label fits over them
INK, PAPER, FAINT = (31, 41, 51), (255, 255, 255), (120, 130, 140)


def write_samples(images: Tensor, path: Path, draw_sheet: Callable[[], None]) -> None:
    """Images as they are: one is ``path``; several lie in a folder of its name without suffix, and
    ``draw_sheet`` makes ``path`` of them.

    Args:
        images: uint8 ``[n, 3, H, W]``, or float in [-1, 1] (clamped) with 1 or 3 channels.
    """
    from PIL import Image

    if images.is_floating_point():
        images = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(rows) for rows in pixels]
    if len(pictures) == 1:
        with written(path) as partial:
            pictures[0].save(partial)
        return
    with written(path.with_suffix("")) as folder:
        folder.mkdir()
        for i, picture in enumerate(pictures):
            picture.save(folder / f"{i:04d}.png")
    draw_sheet()


def image_rows(
    rows: Mapping[str, Tensor], path: str | Path, *, captions: Sequence[str] = ()
) -> None:
    """One labelled row of images per name, a caption under every column.

    Args:
        rows: name -> uint8 images ``[n, 3, H, W]``, all of one shape.
        path: the PNG; its folder is made if it is missing.
        captions: one for each column, cut to its width.

    Raises:
        ValueError: no rows, or rows of different shapes.
    """
    from PIL import Image, ImageDraw, ImageFont  # comes with matplotlib and diffusers

    shapes = {tuple(images.shape) for images in rows.values()}
    if len(shapes) != 1 or any(images.dtype != torch.uint8 for images in rows.values()):
        got = {name: (list(i.shape), str(i.dtype)) for name, i in rows.items()}
        raise ValueError(f"image_rows: expected uint8 rows of one shape [n, 3, H, W]; got {got}")
    columns, _, height, width = shapes.pop()
    zoom = max(1, -(-MIN_CELL // width))
    cell = (width * zoom, height * zoom)
    font = ImageFont.load_default(FONT_SIZE)
    widest = max(int(font.getlength(name)) for name in rows) + 2 * GAP
    page = Image.new(
        "RGB",
        (
            max(widest, GAP + columns * (cell[0] + GAP)),
            len(rows) * (LABEL_HEIGHT + cell[1]) + (LABEL_HEIGHT if captions else GAP),
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    for line, (name, images) in enumerate(rows.items()):
        top = line * (LABEL_HEIGHT + cell[1])
        draw.text((GAP, top + 4), _cut(name, page.width - 2 * GAP, draw, font), INK, font=font)
        for column, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(cell, Image.NEAREST)
            page.paste(tile, (GAP + column * (cell[0] + GAP), top + LABEL_HEIGHT))
    for column, caption in enumerate(captions[:columns]):
        at = (GAP + column * (cell[0] + GAP), page.height - LABEL_HEIGHT + 4)
        draw.text(at, _cut(caption, cell[0], draw, font), FAINT, font=font)
    with written(path) as partial:
        page.save(partial)


def _cut(text: str, width: int, draw: Any, font: Any) -> str:
    """The text, shortened with an ellipsis until it is at most ``width`` pixels wide."""
    text = " ".join(text.split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
