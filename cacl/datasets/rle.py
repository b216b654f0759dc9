"""Masks in COCO's run lengths."""

from __future__ import annotations

import importlib
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacl.errors import quoted


def draws(segmentation: Any) -> bool:
    """Whether a segmentation is an outline or an RLE that encloses something, or is broken and will be told when it is
    drawn; not where there is none, an empty one, or a box, points or shares of the image (0 to 1) in its place."""
    if isinstance(segmentation, list):
        return any(map(_encloses, segmentation))
    if not isinstance(segmentation, dict):
        return bool(segmentation)
    counts = segmentation.get("counts")
    if isinstance(counts, str) and len(counts) <= _LETTERS:
        try:
            counts = uncompressed(counts)
        except ValueError:
            return True
    return any(counts[1::2]) if isinstance(counts, list) else bool(counts)


_LETTERS = 8
"""No single number takes more in COCO's code; an RLE of one number is background alone."""


def _encloses(part: Any) -> bool:
    if not isinstance(part, list):
        return isinstance(part, dict | str)  # neither a number nor None
    if len(part) < 6 or isinstance(part[0], list):
        return False
    if _inside_a_pixel(part):
        return False
    # Else all points lie on one line; mostly the second point tells, and there are many annotations.
    return all(any(value != part[i] for value in islice(part, i + 2, None, 2)) for i in (0, 1))


def _inside_a_pixel(part: list[Any]) -> bool:
    """Whether all numbers are from 0 to 1; mostly the first one tells."""
    return all(isinstance(value, int | float) and 0 <= value <= 1 for value in part)


def runs_of(segmentation: Any, height: int, width: int) -> list[tuple[int, int]]:
    """The pixels of a segmentation, column by column, as (first, one after the last) of each run."""
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon, dtype=np.float64) for polygon in segmentation]
        if not all(polygon.ndim == 1 and (np.abs(polygon) < _FAR).all() for polygon in polygons):
            raise ValueError("a polygon is no list of numbers near the image")
        # Less than three points have no area, and pycocotools would take two of them for a box.
        polygons = [polygon for polygon in polygons if len(polygon) >= 6]
        if not polygons:
            return []
        api = _pycocotools()
        counts = uncompressed(api.merge(api.frPyObjects(polygons, height, width))["counts"].decode())
    else:
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its size is {quoted(segmentation['size'])}")
        counts = segmentation["counts"]
        counts = uncompressed(counts) if isinstance(counts, str) else counts
    lengths = np.asarray(counts)
    if lengths.dtype.kind != "i" or (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError("its counts do not add up")
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    return list(zip(ends[::2], ends[1::2], strict=False))  # background and object take turns


_FAR = 1e6
"""Pixels; pycocotools takes memory for every pixel of an outline."""


def uncompressed(text: str) -> list[int]:
    """The run lengths of an RLE in COCO's code: 5 bits a letter from the lowest on, and a sign; from the fourth on
    the difference to the one two before."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - ord("0")
        if not 0 <= code < 64:
            raise ValueError(f"unknown letter {letter!r}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:  # the last letter of a number
            value -= (code & 16) // 16 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("it is cut off")
    return counts


def lengths_of(pixels: NDArray[np.bool_]) -> list[int]:
    """The run lengths of an array, row by row: background and object take turns, the background first."""
    values = pixels.ravel()
    changes = np.flatnonzero(np.diff(values, prepend=False))
    lengths: list[int] = np.diff(changes, prepend=0, append=values.size).tolist()
    return lengths


def columns_of(pixels: NDArray[np.bool_], left: int, top: int, size: tuple[int, int]) -> list[int]:
    """The run lengths, column by column, of an array that lies in an image of ``size``, width and height."""
    band = np.zeros((pixels.shape[1], size[1]), dtype=bool)  # its columns, as rows
    band[:, top : top + pixels.shape[0]] = pixels.T
    lengths = lengths_of(band)
    lengths[0] += left * size[1]
    rest = (size[0] - left - len(band)) * size[1]
    if len(lengths) % 2:
        lengths[-1] += rest
    elif rest:
        lengths.append(rest)
    return lengths


def compressed(counts: list[int]) -> str:
    """Run lengths in COCO's code, which :func:`uncompressed` reads."""
    letters = []
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            code, value = value & 31, value >> 5
            more = value != (-1 if code & 16 else 0)  # the last letter's fifth bit is the sign
            letters.append(chr(code + 32 * more + ord("0")))
    return "".join(letters)


def _pycocotools() -> ModuleType:
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise ImportError(f"Masks of COCO need an extra: pip install 'cacl[coco]' ({error})") from None
