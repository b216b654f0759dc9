"""CAMs and masks beside their photos, in one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cacl._support.checks import as_array, as_indices
from cacl._support.values import check_range
from cacl.constants import BACKGROUND_SCORE, IGNORE
from cacl.errors import expected
from cacl.images import VOC_COLOURS, Mask, Pixels

COLOURS: Pixels = VOC_COLOURS
"""``(256, 3)``: the colours in which people see classes, here, in figures and in the report; files have their own."""


def palette() -> Pixels:
    """:data:`COLOURS`, and white for what is ignored."""
    colours = COLOURS.copy()
    colours[IGNORE] = 255
    return colours


def heatmap(photo: Pixels, maps: NDArray[np.float32]) -> Pixels:
    """The largest of ``(C, H, W)`` CAMs in [0, 1], from blue over green to red, over an ``(H, W, 3)`` photo.

    Raises:
        ValueError: if the sizes differ.
        TypeError: if there is something else than numbers in them.
    """
    photo, maps = _photo(photo), as_array("maps", maps, "(C, H, W)", numbers=True)
    if maps.shape[1:] != photo.shape[:2]:
        raise expected("maps", f"of the photo's size {photo.shape[:2]}", maps.shape[1:])
    heat = maps.max(0, initial=0.0)[..., None]
    if np.isnan(heat).any():
        raise expected("maps", "without NaN", "NaN")
    colours = np.clip(1.5 - np.abs(4 * heat - np.array((3.0, 2.0, 1.0))), 0, 1) * 255
    mixed: Pixels = (0.45 * photo + 0.55 * colours).astype(np.uint8)
    return mixed


def overlay(photo: Pixels, mask: NDArray[np.integer]) -> Pixels:
    """The classes of an ``(H, W)`` mask in their colours over a darkened photo; what is ignored in white.

    Raises:
        ValueError: if the sizes differ, or a value of the mask is not in 0 … 255.
        TypeError: if there is something else than integers in the mask.
    """
    photo, mask = _photo(photo), as_array("mask", mask, "(H, W)")
    if mask.shape != photo.shape[:2]:
        raise expected("mask", f"of the photo's size {photo.shape[:2]}", mask.shape)
    if mask.size and not 0 <= mask.min() <= mask.max() <= IGNORE:
        raise expected("mask", f"in [0, {IGNORE}]", f"{mask.min()} to {mask.max()}")
    mask = mask.astype(np.uint8)
    colours = palette()
    shown = np.where(mask[..., None] > 0, 0.35 * photo + 0.65 * colours[mask], 0.35 * photo)
    return shown.astype(np.uint8)


def _photo(photo: Pixels) -> Pixels:
    pixels: Pixels = as_array("photo", photo, "(H, W, 3)")
    if pixels.shape[2] != 3:
        raise expected("photo", "an array (H, W, 3)", f"shape {pixels.shape}")
    if pixels.dtype != np.uint8 and pixels.size and not 0 <= pixels.min() <= pixels.max() <= 255:
        raise expected("photo", "in [0, 255]", f"{pixels.min()} to {pixels.max()}")
    return pixels


def legend(picture: Pixels, mask: NDArray[np.integer], classes: Sequence[str]) -> Image.Image:
    """An :func:`overlay` with the classes of its mask, named, in a strip below; a small picture is made larger."""
    shown = _enlarged(picture)
    measure = ImageDraw.Draw(shown)
    entries = [(classes[k - 1], k) for k in np.unique(mask).tolist() if 0 < k <= len(classes)]
    places, left, line, height = [], _PAD, 0, 20
    for name, k in entries:
        width = round(measure.textlength(name)) + 2 * _PAD + 12
        if left > _PAD and left + width > shown.width:
            left, line = _PAD, line + 1
        places.append((left, shown.height + line * height + 4, name, k))
        left += width
    result = Image.new("RGB", (shown.width, shown.height + (line + 1) * height), "white")
    result.paste(shown)
    pen = ImageDraw.Draw(result)
    for x, y, name, k in places:
        pen.rectangle((x, y, x + 11, y + 11), fill=tuple(COLOURS[k].tolist()))
        pen.text((x + 16, y), name, fill="black")
    if not entries:
        pen.text((_PAD, shown.height + 4), "background only", fill=(90, 90, 90))
    return result


_PAD = 6


def _enlarged(picture: Pixels, least: int = 240) -> Image.Image:
    image = Image.fromarray(picture)
    if image.width >= least:
        return image
    scale = -(-least // image.width)
    longest = 16 * least  # a strip of one pixel's width is not made any longer than this
    size = (image.width * scale, max(1, min(image.height * scale, max(longest, image.height))))
    return image.resize(size, Image.Resampling.NEAREST)


def threshold(classes: NDArray[np.int64], maps: NDArray[np.float32], score: float = BACKGROUND_SCORE) -> Mask:
    """``(C, H, W)`` CAMs of ``classes`` -> ``(H, W)``: the class + 1 of the largest above ``score``, or else 0."""
    check_range("score", score, -float("inf"), float("inf"))
    classes, maps = as_indices("classes", classes, IGNORE - 2), as_array("maps", maps, "(C, H, W)", numbers=True)
    if len(classes) != len(maps):
        raise expected("maps", f"one map a class, ({len(classes)}, H, W)", f"shape {maps.shape}")
    if not len(classes):
        return np.zeros(maps.shape[1:], dtype=np.uint8)
    return np.where(maps.max(0) > score, classes[maps.argmax(0)] + 1, 0).astype(np.uint8)


def sheet(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Pixels]]], *, height: int = 160) -> Image.Image:
    """A table of pictures.

    Args:
        titles: of the columns.
        rows: each a caption and a picture for every column.
        height: of a row in pixels; wide pictures are shown smaller, so that none is wider than 3/2 of that.
    """
    gap, line = 6, 16
    sized = [(caption, [_fit(pixels, height) for pixels in pictures]) for caption, pictures in rows]
    widths = [max((pictures[c].width for _, pictures in sized), default=0) for c in range(len(titles))]
    lefts = [gap + sum(widths[:c]) + c * gap for c in range(len(titles) + 1)]
    table = Image.new("RGB", (lefts[-1], line + gap + len(rows) * (height + line + gap)), "white")
    pen = ImageDraw.Draw(table)
    for left, title in zip(lefts, titles, strict=False):
        pen.text((left, 4), title, fill="black")
    for r, (caption, pictures) in enumerate(sized):
        top = line + gap + r * (height + line + gap)
        pen.text((gap, top), caption, fill=(90, 90, 90))
        for left, picture in zip(lefts, pictures, strict=False):
            table.paste(picture, (left, top + line))
    return table


def _fit(pixels: Pixels, height: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    scale = min(height / picture.height, 1.5 * height / picture.width)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
