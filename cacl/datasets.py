"""Images with image-level labels, from a VOC folder or a CSV; masks are there for evaluation and never needed."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from tqdm import tqdm

from cacl._checks import InputError, did_you_mean, expected
from cacl.images import read_image, read_mask
from cacl.metrics import IGNORE

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


class Sample(NamedTuple):
    """One image of a data set."""

    id: str
    image: tv_tensors.Image
    """``(3, H, W)`` uint8."""
    labels: Tensor
    """``(K,)`` uint8, 1 for present classes."""
    mask: tv_tensors.Mask | None
    """``(H, W)`` uint8: 0 background, k the k-th class from 1 on, 255 ignored; None where there is none."""


class Entry(NamedTuple):
    """Where an image's files lie, and the indices of its classes."""

    id: str
    image: Path
    labels: tuple[int, ...]
    mask: Path | None


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
        super().__init__(*_sound(*_read_voc(Path(root), split)))


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
        super().__init__(*_sound(*_read_csv(Path(root), split)))


def open_dataset(format: str, root: str | PathLike[str], split: str) -> Dataset:
    """A split of a data set by the name of its format: ``"voc"`` or ``"csv"``."""
    readers: dict[str, Callable[[str | PathLike[str], str], Dataset]] = {"voc": VOC, "csv": CSVDataset}
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
        format: ``"voc"`` or ``"csv"``; by what lies in the folder if None.
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
    if format == "csv":
        parts = [_read_csv(root, split) for split in splits] if splits else [_read_csv(root, None)]
    else:
        parts = [_read_voc(root, split) for split in splits or _voc_splits(root)]
        if not parts:
            raise InputError(f"{lists}: expected a list of ids for each split, such as train.txt, but there is none")
    problems = [problem for part in parts for problem in part[2]]
    entries = list(dict.fromkeys(entry for part in parts for entry in part[1]))
    problems += check(Dataset(parts[0][0], entries), progress=progress)
    return list(dict.fromkeys(problems))


def _voc_splits(root: Path) -> list[str]:
    splits = sorted(path.stem for path in (root / "ImageSets" / "Segmentation").glob("*.txt"))
    return [*splits, "train_aug"] if "val" in splits and (root / "SegmentationClassAug").is_dir() else splits


_Read = tuple[tuple[str, ...], list[Entry], list[str]]
"""Classes, entries, and what is wrong, a line each."""


def _sound(classes: tuple[str, ...], entries: list[Entry], problems: list[str]) -> tuple[tuple[str, ...], list[Entry]]:
    if problems:
        raise InputError("\n".join(problems))
    return classes, entries


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file in UTF-8, but {error}") from None


def _lines(path: Path) -> list[str]:
    """The lines of a small text file, stripped, without empty ones."""
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _duplicates(words: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for word in words:
        if word in seen:
            yield word
        seen.add(word)


def _read_voc(root: Path, split: str) -> _Read:
    masks = root / "SegmentationClass"
    lists = root / "ImageSets" / "Segmentation"
    if split == "train_aug":
        masks = root / "SegmentationClassAug"
        val = set(_lines(lists / "val.txt"))
        ids = sorted(path.stem for path in masks.glob("*.png") if path.stem not in val)
        if not ids:
            raise InputError(f"{masks}: no masks for the split train_aug")
    elif (lists / f"{split}.txt").is_file():
        ids = [line.split()[0] for line in _lines(lists / f"{split}.txt")]
        if not ids:
            raise InputError(f"{lists / split}.txt: expected an id a line, but it is empty")
    else:
        known = sorted(path.stem for path in lists.glob("*.txt"))
        raise InputError(
            f"{lists}: expected split {split!r} as {split}.txt, but there is {', '.join(known) or 'no such folder'}"
        )
    index = {name.replace(" ", ""): k for k, name in enumerate(VOC_CLASSES)}
    problems = [f"{lists / split}.txt: duplicate id {id}" for id in _duplicates(ids)]
    entries = []
    for id in dict.fromkeys(ids):
        annotation = root / "Annotations" / f"{id}.xml"
        names: list[str] = []
        try:
            tree = ElementTree.parse(annotation)
            names = [(element.text or "").strip() for element in tree.iterfind("object/name")]
        except FileNotFoundError:
            if split != "test":  # the test images' annotations are not public
                problems.append(f"{annotation}: no such file")
        except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: unknown encodings
            problems.append(f"{annotation}: not an annotation that parses ({error})")
        problems += [f"{annotation}: unknown class {name!r}" for name in names if name not in index]
        labels = tuple(sorted({index[name] for name in names if name in index}))
        mask = masks / f"{id}.png"
        entries.append(Entry(id, root / "JPEGImages" / f"{id}.jpg", labels, mask if mask.is_file() else None))
    problems += [f"{entry.image}: no such file" for entry in entries if not entry.image.is_file()]
    return VOC_CLASSES, entries, problems


def _read_csv(root: Path, split: str | None) -> _Read:
    classes = tuple(_lines(root / "classes.txt"))
    if not 1 <= len(classes) < IGNORE:
        raise InputError(f"{root / 'classes.txt'}: expected 1 to 254 class names, a line each, but got {len(classes)}")
    problems = [f"{root / 'classes.txt'}: duplicate class {name!r}" for name in _duplicates(classes)]
    table = root / "dataset.csv"
    reader = csv.reader(io.StringIO(_text(table), newline=""))
    columns = ["image", "labels", "mask", "split"]
    try:
        rows = [(cells, reader.line_num) for cells in reader]
    except csv.Error as error:
        raise InputError(f"{table}: line {reader.line_num}: expected a row of a CSV file, but {error}") from None
    header = rows[0][0] if rows else []
    if [name.strip() for name in header] != columns:
        raise InputError(f"{table}: expected the header {','.join(columns)}, but got {','.join(header)!r}")
    index = {name: k for k, name in enumerate(classes)}
    entries: list[Entry] = []
    splits = set()
    for cells, number in rows[1:]:
        if not cells:
            continue
        if len(cells) != len(columns):
            problems.append(f"{table}: line {number}: expected {len(columns)} columns, but got {len(cells)}")
            continue
        row = {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}
        splits.add(row["split"])
        if split is not None and row["split"] != split:
            continue
        names = [name.strip() for name in row["labels"].split(";") if name.strip()]
        problems += [
            f"{table}: line {number}: unknown label {name!r}{did_you_mean(name, classes)}"
            for name in names
            if name not in index
        ]
        paths = {}
        for column in ("image", "mask"):
            relative = Path(row[column])
            if relative.is_absolute() or ".." in relative.parts:
                problems.append(f"{table}: line {number}: expected a path inside the folder, but got {str(relative)!r}")
            elif relative.name:
                paths[column] = root / relative
                if not os.path.isfile(paths[column]):  # Path.is_file raises for a name that is too long
                    problems.append(f"{paths[column]}: no such file")
        if "image" not in paths:
            if not Path(row["image"]).name:
                problems.append(f"{table}: line {number}: expected an image, but it is empty")
            continue
        id = Path(row["image"]).with_suffix("").as_posix()
        labels = tuple(sorted({index[name] for name in names if name in index}))
        entries.append(Entry(id, paths["image"], labels, paths.get("mask")))
    problems += [f"{table}: duplicate id {id}" for id in _duplicates(entry.id for entry in entries)]
    if not entries and not problems:
        known = ", ".join(sorted(splits)) or "no row"
        wanted = "rows" if split is None else f"rows of split {split!r}"
        raise InputError(f"{table}: expected {wanted}, but there is {known}")
    parents = {Path(entry.id).parent for entry in entries}
    if len(parents) == 1:  # all in one folder: the file's name is enough
        entries = [entry._replace(id=Path(entry.id).name) for entry in entries]
    return classes, entries, problems
