"""A file an image: CAMs and masks as stages leave them, and which of them are missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from cacl._support.clock import timed
from cacl._support.distributed import rank_zero, shard
from cacl._support.files import replacing
from cacl._support.weights import check_inflated
from cacl.datasets import Dataset
from cacl.errors import InputError, first_line
from cacl.images import VOC_COLOURS, Mask, read_mask


class ImageCAMs(NamedTuple):
    """CAMs of the classes that one image shows."""

    classes: NDArray[np.int64]
    """``(C,)`` class indices from 0."""
    maps: NDArray[np.float16]
    """``(C, ⌈H/4⌉, ⌈W/4⌉)`` in [0, 1], each with maximum 1, or all 0 where no score was positive."""

    def resized(self, size: tuple[int, int]) -> NDArray[np.float32]:
        """``(C, H, W)`` float32, bilinear."""
        if not len(self.classes):
            return np.zeros((0, *size), dtype=np.float32)
        maps = torch.from_numpy(self.maps).float()[None]
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0].numpy()

    def levelled(self, levels: NDArray[np.floating] | None) -> ImageCAMs:
        """Each map times the level ``(K,)`` of its class (see :func:`cacl.thresholds.class_levels`); None for none."""
        if levels is None:
            return self
        maps = self.maps * levels[self.classes].astype(np.float32)[:, None, None]
        return ImageCAMs(self.classes, maps.astype(np.float16))


def map_size(size: Sequence[int]) -> tuple[int, int]:
    """``(H, W)`` of an image -> ``(⌈H/4⌉, ⌈W/4⌉)`` of its CAMs."""
    return -(-size[0] // 4), -(-size[1] // 4)


def to_make(dataset: Dataset, out: Path, ending: str, *, keep: bool) -> list[int]:
    """The indices of this process's share of the images, but for those that have a file in ``out`` which is kept."""

    def missing() -> Sequence[int]:
        if not _has_entries(out):
            return range(len(dataset))
        return [i for i, entry in enumerate(dataset.entries) if not (out / f"{entry.id}{ending}").is_file()]

    return list(shard(rank_zero(missing) if keep else range(len(dataset))))


def _has_entries(folder: Path) -> bool:
    """Whether anything is in a folder, which is not listed for that."""
    try:
        with os.scandir(folder) as found:
            return next(found, None) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False


@timed("files")
def save_cams(path: Path, cams: ImageCAMs) -> None:
    """Write a file that :func:`load_cams` reads."""
    with replacing(path) as file:
        np.savez_compressed(file, classes=cams.classes, maps=cams.maps)


@timed("files")
def load_cams(path: Path, num_classes: int) -> ImageCAMs:
    """Read a file of :func:`save_cams`, such as :func:`cacl.stages.cams.make_cams` leaves.

    Raises:
        ValueError: if the file is missing or holds something else.
    """
    try:
        check_inflated(path)
        with np.load(path, allow_pickle=False) as arrays:
            classes, maps = np.asarray(arrays["classes"]), np.asarray(arrays["maps"])
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # NumPy raises many kinds; each means that the file is something else
        raise InputError(f"{path}: not a file of CAMs ({first_line(error)})") from None
    if classes.dtype.kind not in "iu" or maps.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(
            f"{path}: expected classes of integers and maps of floats, but got {classes.dtype}, {maps.dtype}"
        )
    if classes.ndim != 1 or maps.ndim != 3 or len(maps) != len(classes):
        raise InputError(f"{path}: expected classes (C,) and maps (C, h, w), but got {classes.shape} and {maps.shape}")
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise InputError(f"{path}: expected classes 0 to {num_classes - 1}, but got {classes.tolist()}")
    if len(classes) and not maps.size:
        raise InputError(f"{path}: expected maps of at least one pixel, but got {maps.shape}")
    if not np.isfinite(maps).all() or (maps.size and maps.min() < 0):
        raise InputError(f"{path}: expected maps that are finite and not negative")
    return ImageCAMs(classes.astype(np.int64), maps)


@timed("files")
def save_mask(path: Path, mask: Mask) -> None:
    """Write ``(H, W)`` as a palette PNG with VOC's colours."""
    image = Image.fromarray(mask)
    image.putpalette(VOC_COLOURS.tobytes())
    with replacing(path) as file:
        image.save(file, "PNG")


def made_mask(dataset: Dataset, masks: Path | Callable[[int], Mask], index: int) -> Mask:
    """The mask ``(H, W)`` of an image: ``<id>.png`` in a folder, or what a function gives for the image's index."""
    if not isinstance(masks, Path):
        return masks(index)
    mask: Mask = read_mask(masks / f"{dataset.entries[index].id}.png").numpy()
    return mask


def cams_of(dataset: Dataset, folder: Path, index: int) -> ImageCAMs:
    """The CAMs of an image, ``<id>.npz`` in a folder; see :func:`load_cams`."""
    return load_cams(folder / f"{dataset.entries[index].id}.npz", len(dataset.classes))
