"""Images side by side in one picture: a row per prompt, a column per way to make it, both labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..ir import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["image_grid", "to_image"]

_MARGIN, _LINE, _ASIDE, _CHARACTER = 4, 14, 150, 6


def to_image(pixels: Tensor) -> Image:
    """A PIL image of one [3, H, W] tensor with values in [0, 1]."""
    from PIL import Image as images

    array = (pixels.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return images.fromarray(array)


def image_grid(columns: Mapping[str, Tensor], prompts: Sequence[str], *, title: str = "", least: int = 96) -> Image:
    """The picture.

    Args:
        columns: heading -> [N, 3, H, W] images with values in [0, 1], one per prompt.
        prompts: labels of the rows.
        title: above everything.
        least: smaller images are enlarged by a whole factor to about so many pixels.

    Raises:
        UsageError: a column has another number of images than there are prompts.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    for heading, batch in columns.items():
        if len(batch) != len(prompts):
            raise UsageError(f"column {heading!r} has {len(batch)} images for {len(prompts)} prompts")
    factor = max(1, round(least / max(next(iter(columns.values())).shape[-2:])))
    height, width = (size * factor for size in next(iter(columns.values())).shape[-2:])
    wide = max(width, max(len(heading) for heading in columns) * _CHARACTER + _MARGIN)
    top = _LINE * (2 if title else 1) + 2 * _MARGIN
    picture = images.new("RGB", (_ASIDE + len(columns) * (wide + _MARGIN), top + len(prompts) * (height + _MARGIN)),
                         "white")
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((_MARGIN, _MARGIN), title, fill="black")
    for row, prompt in enumerate(prompts):
        y = top + row * (height + _MARGIN)
        draw.multiline_text((_MARGIN, y + _MARGIN), _fold(prompt, _ASIDE // _CHARACTER), fill="black")
    for column, (heading, batch) in enumerate(columns.items()):
        x = _ASIDE + column * (wide + _MARGIN)
        draw.text((x, top - _LINE - _MARGIN // 2), heading, fill="black")
        for row in range(len(prompts)):
            tile = to_image(batch[row]).resize((width, height), images.Resampling.NEAREST)
            picture.paste(tile, (x, top + row * (height + _MARGIN)))
    return picture


def _fold(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:4])
