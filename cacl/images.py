"""Decode photos and masks: every mode, every orientation, and one line for what does not decode."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import tv_tensors

from cacl.errors import InputError, first_line, shown

Pixels = NDArray[np.uint8]
"""A picture, ``(H, W, 3)``."""
Mask = NDArray[np.uint8]
"""``(H, W)``: 0 background, k the k-th class from 1 on, 255 ignored."""


def voc_colours(size: int = 256) -> Pixels:
    """The colours of PASCAL VOC's masks, ``(size, 3)``: the bits of a value, spread over red, green and blue."""
    values = np.arange(size)
    colours = np.zeros((size, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((values >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


VOC_COLOURS = voc_colours()
"""The palette in the files of masks, which VOC's server checks; :data:`cacl.pictures.COLOURS` is what people see."""
_FILTERS = threading.Lock()
"""Warning filters are the whole process's: threads that change them for a moment do so one after the other."""


def read_image(path: Path) -> tv_tensors.Image:
    """Decode an image of any mode and orientation to ``(3, H, W)`` uint8 RGB; the first of several in one file.

    Raises:
        ValueError: if the file is missing, too large, or does not decode.
    """
    with open_image(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):  # 16 bits: Pillow would clip instead of scale
            values = np.nan_to_num(np.asarray(image, dtype=np.float32))
            image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        pixels = np.array(image.convert("RGB"))
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1), device="cpu")


def read_mask(path: Path) -> tv_tensors.Mask:
    """Decode a palette or grey mask to ``(H, W)`` uint8.

    Raises:
        ValueError: if the file is missing, does not decode, or is a colour image.
    """
    with open_image(path, "a mask") as file:
        if file.mode not in ("P", "L", "1"):
            raise InputError(f"{shown(path)}: expected a palette or grey mask, but got mode {file.mode}")
        return tv_tensors.Mask(torch.from_numpy(np.array(file, dtype=np.uint8)), device="cpu")


@contextmanager
def open_image(path: Path, what: str = "an image") -> Iterator[Image.Image]:
    """A file that Pillow opens; whatever is wrong with it until the block ends is one line."""
    name = shown(path)
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise InputError(f"{name}: no such file")
        Image.init()
        # For EPS Pillow starts Ghostscript, which runs what is in the file.
        kinds = [kind for kind in Image.OPEN if kind != "EPS"]
        with _FILTERS, warnings.catch_warnings():
            # Pillow refuses images that are twice as large as those that it warns of, which some cameras make.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path, formats=kinds)
        with opened as file:
            yield file
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too large ({first_line(error)}); scale it down") from None
    except Exception as error:  # Pillow raises many kinds; each means that the file is broken
        raise InputError(f"{name}: not {what} that decodes ({first_line(error)})") from None
