"""Photos, heatmaps and masks in a table, as in the paper's figures 3 to 7."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cacl.errors import InputError
from cacl.figures.style import (
    MUTED,
    new_figure,
    styled,
)
from cacl.images import Pixels
from cacl.pictures import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def photo_grid(
    titles: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Pixels]]],
    *,
    legend: Mapping[int, str] | None = None,
    height: float = 1.3,
) -> Figure:
    """A table of photos, heatmaps and masks, as in the paper's figures 3 to 7.

    Pictures come from :func:`cacl.pictures.heatmap` and :func:`cacl.pictures.overlay`.

    Args:
        titles: of the columns.
        rows: each a caption and an ``(H, W, 3)`` uint8 picture for every column.
        legend: mask value -> class name, shown below in the colours of its masks.
        height: of a picture in inches; none is wider than 3/2 of that.
    """
    if not rows or any(len(pictures) != len(titles) for _, pictures in rows):
        raise InputError(f"Expected at least one row, and a picture for each of {len(titles)} columns.")
    sizes = [[_fitted(picture.shape[:2], height) for picture in pictures] for _, pictures in rows]
    widths = [max(row[c][1] for row in sizes) for c in range(len(titles))]
    gap, line = 0.06, 0.24
    heads = ["\n".join(textwrap.wrap(title, max(4, int(w / 0.088)))) for title, w in zip(titles, widths, strict=True)]
    head = 0.1 + 0.16 * max(text.count("\n") + 1 for text in heads)
    entries = list((legend or {}).items())
    width = sum(widths) + gap * (len(widths) + 1)
    columns = max(1, int(width // 1.2))
    foot = line * -(-len(entries) // columns)
    figure = new_figure((width, head + len(rows) * (line + height) + gap + foot), constrained=False)
    tall = figure.get_figheight()
    lefts = [gap + sum(widths[:c]) + gap * c for c in range(len(widths))]
    for left, text in zip(lefts, heads, strict=True):
        figure.text(left / width, 1 - (head - 0.03) / tall, text, va="bottom", fontweight="bold")
    for r, (caption, pictures) in enumerate(rows):
        top = head + r * (line + height)
        figure.text(gap / width, 1 - (top + 0.5 * line) / tall, caption, va="center", color=MUTED)
        for left, picture, (high, wide) in zip(lefts, pictures, sizes[r], strict=True):
            box = (left / width, 1 - (top + line + high) / tall, wide / width, high / tall)
            axes = figure.add_axes(box)
            axes.imshow(picture, aspect="auto", interpolation="none")
            axes.set_axis_off()
    colours = palette() / 255
    for i, (value, name) in enumerate(entries):
        left = gap + (i % columns) * (width / columns)
        y = (foot - (i // columns + 0.5) * line) / tall
        figure.text(left / width, y, "■", va="center", color=tuple(colours[value]), fontsize=12)
        figure.text((left + 0.18) / width, y, name, va="center")
    return figure


def _fitted(size: tuple[int, ...], height: float) -> tuple[float, float]:
    """Height and width in inches of a picture that is ``size`` pixels, at most ``height`` and 3/2 of that."""
    scale = min(height / size[0], 1.5 * height / size[1])
    return size[0] * scale, size[1] * scale
