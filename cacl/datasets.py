"""Images with image-level labels, from a VOC folder or a CSV; masks are there for evaluation and never needed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from tqdm import tqdm

from cacl._checks import InputError, expected
from cacl._listing import Entry, read_csv, read_voc, voc_splits
from cacl.images import read_image, read_mask
from cacl.metrics import IGNORE


class Sample(NamedTuple):
    """One image of a data set."""

    id: str
    image: tv_tensors.Image
    """``(3, H, W)`` uint8."""
    labels: Tensor
    """``(K,)`` uint8, 1 for present classes."""
    mask: tv_tensors.Mask | None
    """``(H, W)`` uint8: 0 background, k the k-th class from 1 on, 255 ignored; None where there is none."""


class Dataset(torch.utils.data.Dataset[Sample]):
    """Entries and class names; VOC and CSV only differ in how they are read.

    Args:
        classes: the K class names; the first has mask value 1.
        entries: the images.
    """

    def __init__(self, classes: Sequence[str], entries: Sequence[Entry]) -> None:
        self.classes = tuple(classes)
        self.entries = tuple(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        mask = None if self.entries[index].mask is None else self.mask(index)
        return Sample(self.entries[index].id, self.image(index), self.labels(index), mask)

    def image(self, index: int) -> tv_tensors.Image:
        """``(3, H, W)`` uint8."""
        return read_image(self.entries[index].image)

    def labels(self, index: int) -> Tensor:
        """``(K,)`` uint8."""
        labels = torch.zeros(len(self.classes), dtype=torch.uint8)
        labels[list(self.entries[index].labels)] = 1
        return labels

    def mask(self, index: int) -> tv_tensors.Mask:
        """``(H, W)`` uint8.

        Raises:
            ValueError: if the image has no mask, or it does not decode.
        """
        path = self.entries[index].mask
        if path is None:
            raise InputError(f"{self.entries[index].image}: the image has no mask")
        return read_mask(path)

    @property
    def masked(self) -> list[int]:
        """The indices of the images that have a mask."""
        return [i for i, entry in enumerate(self.entries) if entry.mask is not None]

    def with_masks(self, folder: Path) -> Dataset:
        """The same images with other masks: ``<id>.png`` in a folder."""
        other = copy.copy(self)
        other.entries = tuple(entry._replace(mask=folder / f"{entry.id}.png") for entry in self.entries)
        return other

    def fingerprint(self, *, masks: bool = False) -> str:
        """A hash of classes, ids, labels, and sizes and times of the images (and masks): changes when the data does."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for entry in self.entries:
            files = [path.stat() for path in (entry.image, entry.mask if masks else None) if path is not None]
            digest.update(repr((entry.id, entry.labels, [(f.st_size, f.st_mtime_ns) for f in files])).encode())
        return digest.hexdigest()


class VOC(Dataset):
    """A split of PASCAL VOC 2012.

    Args:
        root: the folder with ``JPEGImages``, ``Annotations`` and ``ImageSets``, such as ``VOCdevkit/VOC2012``.
        split: a list in ``ImageSets/Segmentation`` (``train``, ``val``, ``trainval``, ``test``), or ``train_aug``:
            every id with a mask in ``SegmentationClassAug`` that is not in ``val``. Labels come from the XML files.

    Raises:
        ValueError: with one line a problem, if something is missing or unknown.
    """

    def __init__(self, root: str | PathLike[str], split: str) -> None:
        super().__init__(*_sound(*read_voc(Path(root), split)))


class CSVDataset(Dataset):
    """Own photos: ``classes.txt`` and ``dataset.csv`` in one folder.

    ``classes.txt`` has a class name a line; the first has mask value 1. ``dataset.csv`` has the header
    ``image,labels,mask,split``: paths relative to the folder, labels separated by ``;``, an empty mask where there is
    none. An image's id is its path without the ending, or its file's name without it where all lie in one folder.

    Args:
        root: the folder.
        split: which rows, by their ``split``; all of them if None.

    Raises:
        ValueError: with one line a problem, if something is missing or unknown.
    """

    def __init__(self, root: str | PathLike[str], split: str | None = None) -> None:
        super().__init__(*_sound(*read_csv(Path(root), split)))


def open_dataset(format: str, root: str | PathLike[str], split: str) -> Dataset:
    """A split of a data set by the name of its format: ``"voc"``, ``"csv"``, or ``"scenes"``, which is a CSV."""
    readers: dict[str, Callable[[str | PathLike[str], str], Dataset]]
    readers = {"voc": VOC, "csv": CSVDataset, "scenes": CSVDataset}
    if format not in readers:
        raise expected("format", f"one of {', '.join(readers)}", repr(format))
    return readers[format](root, split)


def check(dataset: Dataset, *, masks: bool = True, progress: bool = False) -> list[str]:
    """Open every file of a data set once and list what is wrong, a line each with the file's path.

    Args:
        dataset: the data set.
        masks: open the masks too.
        progress: show a progress bar where there is a terminal.
    """

    def problems_of(index: int) -> list[str]:
        entry = dataset.entries[index]
        found = []
        size = None
        try:
            size = tuple(dataset.image(index).shape[-2:])
        except InputError as error:
            found.append(str(error))
        if masks and entry.mask is not None:
            try:
                mask = dataset.mask(index)
            except InputError as error:
                return [*found, str(error)]
            if size is not None and tuple(mask.shape) != size:
                found.append(
                    f"{entry.mask}: expected {size[1]}×{size[0]} pixels as the image, "
                    f"but got {mask.shape[1]}×{mask.shape[0]}"
                )
            values = np.flatnonzero(np.bincount(mask.numpy().ravel(), minlength=256))
            wrong = [int(value) for value in values if len(dataset.classes) < value < IGNORE]
            if wrong:
                found.append(f"{entry.mask}: expected values 0 to {len(dataset.classes)} or 255, but got {wrong[0]}")
        return found

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        results = tqdm(
            pool.map(problems_of, range(len(dataset))),
            total=len(dataset),
            desc="check",
            unit="image",
            disable=None if progress else True,
        )
        return [problem for found in results for problem in found]


def check_folder(
    root: str | PathLike[str],
    *,
    format: str | None = None,
    splits: Iterable[str] | None = None,
    progress: bool = False,
) -> list[str]:
    """Check the data set in a folder.

    Args:
        root: the folder.
        format: ``"voc"``, ``"csv"`` or ``"scenes"``; by what lies in the folder if None.
        splits: the splits to look at; all of them if None.
        progress: show a progress bar where there is a terminal.

    Returns:
        What is wrong, a line each with the file's path.

    Raises:
        ValueError: if the folder holds no data set.
    """
    root = Path(root)
    lists = root / "ImageSets" / "Segmentation"
    if format is None:
        if not (root / "dataset.csv").is_file() and not lists.is_dir():
            raise InputError(f"{root}: no data set here: expected dataset.csv, or ImageSets/Segmentation of PASCAL VOC")
        format = "csv" if (root / "dataset.csv").is_file() else "voc"
    if format != "voc":
        parts = [read_csv(root, split) for split in splits] if splits else [read_csv(root, None)]
    else:
        parts = [read_voc(root, split) for split in splits or voc_splits(root)]
        if not parts:
            raise InputError(f"{lists}: expected a list of ids for each split, such as train.txt, but there is none")
    problems = [problem for part in parts for problem in part[2]]
    entries = list(dict.fromkeys(entry for part in parts for entry in part[1]))
    problems += check(Dataset(parts[0][0], entries), progress=progress)
    return list(dict.fromkeys(problems))


def _sound(classes: tuple[str, ...], entries: list[Entry], problems: list[str]) -> tuple[tuple[str, ...], list[Entry]]:
    if problems:
        raise InputError("\n".join(problems))
    return classes, entries
