"""Decode photos and masks: every mode, every orientation, and one line for what does not decode."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors

from cacl._support.clock import timed
from cacl._support.pillow import opened, orientation
from cacl._support.values import check_span
from cacl.constants import IGNORE, Range
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
_DARK = 1 / 16
"""An image that fills less than this of its range comes out nearly black, of 16 levels at most."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what makes the photo upright."""


@timed("photos")
def read_image(path: Path, range: Range | None = None) -> tv_tensors.Image:
    """Decode an image of any mode and orientation to ``(3, H, W)`` uint8 RGB; the first of several in one file.

    What is transparent is seen over white. Deep values become 0 … 255 in proportion, by their type and whatever this
    image holds, so that images stay comparable: integers of 16 and 32 bits from 0 … 65535 (or from what the file says,
    such as the largest value of a PGM), floats from 0 … 1. NaN is black.

    Args:
        path: the file.
        range: what deep values span instead; others are clipped. Images of 8 bits stay as they are.

    Raises:
        ValueError: if the file is missing, too large, does not decode, or is transparent everywhere; without ``range``,
            if deep values do not fit into that of their type, or fill so little of it that all would be nearly black.
    """
    if range is not None:
        range = check_span(range, "range: ")
    with open_image(path) as file:
        depth = _depth(file)
        file.load()
        image = _from_deep(path, file, depth, range) if depth.deep else _from_bytes(path, file, depth, range)
        turn = _TURNS.get(orientation(file))
        pixels = np.array(image if turn is None else image.transpose(turn))
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1), device="cpu")


def photo_size(path: Path) -> tuple[int, int]:
    """Width and height of a photo as :func:`read_image` decodes it, upright; its pixels are not decoded.

    Raises:
        ValueError: if the file is missing, or is no image.
    """
    with open_image(path) as file:
        width, height = file.size
        return (height, width) if orientation(file) >= 5 else (width, height)


def read_mask(path: Path) -> tv_tensors.Mask:
    """Decode a mask to ``(H, W)`` uint8: a palette image, or a grey one of any depth; its numbers stay as they are.

    Grey may be stored in channels, as long as they are equal, and opaque.

    Raises:
        ValueError: if the file is missing, does not decode, is a colour image, or holds something else than whole
            numbers from 0 to 255.
    """
    with open_image(path, "a mask") as file:
        mode, depth = file.mode, _depth(file)
        values: NDArray[Any] = np.asarray(file)
    channels = mode in ("LA", "PA", "RGB", "RGBA")
    if not (channels or depth.deep or mode in ("P", "L", "1")):
        raise _no_mask(path, f"mode {mode}")
    if depth.high_bytes:
        raise _no_mask(path, f"mode {mode} of 16 bits, of which Pillow reads only the high ones")
    if channels:
        if values.shape[2] in (2, 4) and (values[..., -1] < 255).any():
            raise _no_mask(path, f"mode {mode} with transparent pixels")
        if values.shape[2] > 2 and (values[..., :1] != values[..., 1:3]).any():
            raise _no_mask(path, f"mode {mode}")
        values = values[..., 0]
    values = depth.in_file(values)
    if depth.deep:
        wrong = values[~((values >= 0) & (values <= IGNORE) & (values == np.rint(values)))]
        if wrong.size:
            raise InputError(
                f"{shown(path)}: expected whole numbers from 0 to {IGNORE}, which is for pixels to ignore, but got "
                f"{wrong[0]:g}"
            )
    return tv_tensors.Mask(torch.from_numpy(values.astype(np.uint8)), device="cpu")


class _Depth(NamedTuple):
    """How deep an image is."""

    top: int
    """The largest value that its file can hold, by what it says of itself; 1 for floats."""
    read: int
    """What Pillow makes of that value."""
    deep: bool
    """Whether Pillow gives more than 8 bits."""

    @property
    def high_bytes(self) -> bool:
        """Whether Pillow leaves out the low bytes: it knows no colours of 16 bits."""
        return self.top > self.read

    def in_file(self, values: NDArray[Any]) -> NDArray[Any]:
        """Pixels of Pillow's -> the values in the file."""
        return values if self.top == self.read else np.rint(values * (self.top / self.read))


def _depth(file: Image.Image) -> _Depth:
    """Of an image that is not loaded yet."""
    if file.mode == "F":
        return _Depth(1, 1, True)
    deep = file.mode == "I" or file.mode.startswith("I;")
    read = 65535 if deep else 255
    codec, _, _, given = (getattr(file, "tile", None) or [("", None, 0, "")])[0]
    arguments = given if isinstance(given, tuple) else (given,)
    if codec.startswith("ppm") and len(arguments) > 1:  # it scales to 8 or 16 bits
        return _Depth(arguments[1], read, deep)
    raw = str(arguments[0]) if arguments else ""
    if bits := re.match("L;([24])", raw):  # which it stretches to 8 bits
        return _Depth(2 ** int(bits[1]) - 1, read, deep)
    if raw.startswith("I;12"):
        return _Depth(4095, 4095, deep)
    return _Depth(65535 if ";16" in raw or codec == "SGI16" else read, read, deep)


def _from_deep(path: Path, file: Image.Image, depth: _Depth, range: Range | None) -> Image.Image:
    """An image of one deep channel -> RGB."""
    values = depth.in_file(np.asarray(file, dtype=np.float32))
    low, high = range or (0, depth.top)
    if range is None:
        _check_fit(path, values, depth)
    grey = np.rint((np.where(np.isnan(values), low, values).clip(low, high) - low) * (255 / (high - low)))
    if (hidden := file.info.get("transparency")) is not None:
        grey[values == hidden] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _check_fit(path: Path, values: NDArray[np.float32], depth: _Depth) -> None:
    """Refuse what its type's range would make (nearly) black, or clip."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    over = 0.01 if depth.top == 1 else 0  # what resampling leaves
    dark = high < depth.top * _DARK
    if low == high or (-over <= low and high <= depth.top + over and not dark):
        return
    likely = next((top for top in (255, 1023, 4095, 16383, 65535) if low >= 0 and top * _DARK <= high <= top), high)
    raise InputError(
        f"{shown(path)}: expected values that fill 0 to {depth.top}, but got {low:g} to {high:g}; say what the data "
        f"set's span, such as `[data] range = [{min(low, 0):g}, {likely:g}]`"
        + (f", or [0, {depth.top}] if it is meant to be dark" if low >= 0 and dark else "")
    )


def _from_bytes(path: Path, file: Image.Image, depth: _Depth, range: Range | None) -> Image.Image:
    """An image of 8 bits a channel -> RGB, as it is seen over white."""
    if depth.high_bytes and file.mode in ("L", "RGB", "RGBA"):
        _check_high_bytes(path, file, depth, range)
    if isinstance(hidden := file.info.get("transparency"), tuple):  # a colour, in the file's own values
        file.info["transparency"] = tuple(value * depth.read // depth.top for value in hidden)
    elif file.mode == "L" and isinstance(hidden, int):
        file.info["transparency"] = hidden * depth.read // depth.top
    if (
        file.mode in ("LA", "PA", "RGBA", "RGBa")
        or hidden is not None
        or (file.palette and file.palette.mode == "RGBA")
    ):
        layer = file.convert("RGBA")
        least, most = layer.getchannel("A").getextrema()
        if most == 0:
            raise InputError(f"{shown(path)}: expected a photo, but all of it is transparent; save it without alpha")
        if least != 255:
            return Image.alpha_composite(Image.new("RGBA", file.size, "white"), layer).convert("RGB")
    return file.convert("RGB")


def _check_high_bytes(path: Path, file: Image.Image, depth: _Depth, range: Range | None) -> None:
    """Refuse colours of 16 bits where what Pillow has read of them does not do."""
    mend = f"write it with 8 bits: of mode {file.mode} with 16, Pillow reads only the high ones"
    if range is not None:
        if list(range) == [0, depth.top]:
            return
        raise InputError(f"{shown(path)}: expected grey or 8 bits where `[data] range` is set; {mend}")
    brightest = int(np.asarray(file.convert("RGB")).max())
    if brightest < 256 * _DARK:
        raise InputError(
            f"{shown(path)}: expected values that fill 0 to {depth.top}, but got none above "
            f"{(brightest + 1) * (depth.top + 1) // 256 - 1}; {mend}, or say `[data] range = [0, {depth.top}]` if it "
            "is meant to be dark"
        )


def _no_mask(path: Path, got: str) -> InputError:
    return InputError(
        f"{shown(path)}: expected a palette or grey mask, but got {got}; write class numbers as one channel of 8 bits"
    )


@contextmanager
def open_image(path: Path, what: str = "an image") -> Iterator[Image.Image]:
    """A file that Pillow opens; whatever is wrong with it until the block ends is one line."""
    name = shown(path)
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise InputError(f"{name}: no such file")
        with _FILTERS, warnings.catch_warnings():
            # Pillow refuses images that are twice as large as those that it warns of, which some cameras make.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opening = opened(path)
        with opening as file:
            yield file
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too large ({first_line(error)}); scale it down") from None
    except Exception as error:  # Pillow raises many kinds; each means that the file is broken
        raise InputError(f"{name}: not {what} that decodes ({first_line(error)})") from None
