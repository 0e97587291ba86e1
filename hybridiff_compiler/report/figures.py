"""Figures as PNG files or as self-contained HTML pages; matplotlib is imported at first use."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir import write_atomically, write_text_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..planner import FrontierPoint

__all__ = ["frontier_figure", "save_html", "save_png"]

_DPI = 150
_SPEEDUPS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24)


def frontier_figure(
    points: Sequence[FrontierPoint], *, title: str, unit: str = "s", quantile: float | None = None
) -> Figure:
    """Predicted PSNR over latency, with the speed-up on a second axis.

    Args:
        points: from `frontier`.
        title: of the figure.
        unit: of the latencies.
        quantile: draw that quantile over prompts too (the points must carry it).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    cheap = [point for point in points if point.psnr_db is not None]
    latency = [point.latency_s for point in cheap]
    axes.plot(latency, [point.psnr_db or 0.0 for point in cheap], drawstyle="steps-post", label="mean over prompts")
    if quantile is not None:
        axes.plot(
            latency, [point.psnr_quantile_db or 0.0 for point in cheap], drawstyle="steps-post",
            label=f"{quantile:g} quantile",
        )
    for point in points[-1:]:
        axes.axvline(point.latency_s, linestyle=":", color="grey", label="exact")
    axes.set_xlabel(f"predicted denoising loop, {unit}")
    axes.set_ylabel("predicted PSNR against the exact image, dB")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    if points:
        single = points[0].latency_s * points[0].speedup
        inverse = (lambda value: single / _positive(value),) * 2
        above = axes.secondary_xaxis("top", functions=inverse)
        above.set_xlabel("speed-up over one rank")
        fastest, slowest = points[0].speedup, points[-1].speedup
        above.set_xticks([tick for tick in _SPEEDUPS if slowest <= tick <= fastest])
        above.minorticks_off()
    return figure


def save_png(figures: Sequence[Figure], path: Path) -> Path:
    """Write figures as one PNG, below each other, atomically."""
    from PIL import Image

    tiles = []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=_DPI, format="png")
        tiles.append(Image.open(buffer))
    sheet = Image.new("RGB", (max(tile.width for tile in tiles), sum(tile.height for tile in tiles)), "white")
    top = 0
    for tile in tiles:
        sheet.paste(tile, (0, top))
        top += tile.height
    return write_atomically(path, lambda file: sheet.save(file, format="png"))


def save_html(figures: Sequence[Figure], path: Path, *, title: str, text: str = "") -> Path:
    """Write figures as one HTML page with inline SVG: no scripts, nothing to load.

    Args:
        figures: in order.
        path: file to write.
        title: of the page.
        text: printed below the figures as it is.
    """
    drawings = []
    for figure in figures:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        drawings.append(buffer.getvalue()[buffer.getvalue().index("<svg") :])
    page = (
        f"<!doctype html>\n<html><head><meta charset='utf-8'><title>{html.escape(title)}</title></head>\n"
        f"<body style='font-family: sans-serif; max-width: 60em; margin: auto'>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(drawings)
        + (f"\n<pre>{html.escape(text)}</pre>" if text else "") + "\n</body></html>\n"
    )
    return write_text_atomically(path, page)


def _positive(values: Any) -> Any:
    import numpy as np

    return np.maximum(np.asarray(values, dtype=float), 1e-12)
