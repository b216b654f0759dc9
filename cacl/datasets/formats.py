"""The formats that a data set may have, each by its name; a new one is a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from cacl.datasets.coco import coco_splits, read_coco
from cacl.datasets.dataset import COCO, VOC, CSVDataset, Dataset, InOneFile
from cacl.datasets.entries import Listing
from cacl.datasets.listing import read_csv, read_voc, voc_splits
from cacl.errors import InputError, expected, quoted


class Part(NamedTuple):
    """What a data set's files say, with all that may be wrong about it."""

    split: str
    listing: Listing
    dataset: Dataset
    source: Path
    """The file that says it."""


@dataclass(frozen=True)
class Format:
    """How a data set is found, opened and checked."""

    open: Callable[[str | PathLike[str], str], Dataset]
    """(root, split) -> the images of the split, or one line for each problem of the listing."""
    parts: Callable[[Path, Sequence[str]], Iterator[Part]]
    """(root, splits, or none for all) -> what there is to check."""
    is_here: Callable[[Path], bool]
    """Whether a folder looks like one."""
    looks: str
    """What tells such a folder."""
    brings_words: bool = False
    """Whether a ``backgrounds.json`` in its folder is used without being named."""
    segmented: str = ""
    """The split that segmenters are scored on; empty for the one that CAMs are scored on."""
    drawn: bool = False
    """Whether :func:`cacl.scenes.generate` draws it where it is missing."""


def open_dataset(format: str, root: str | PathLike[str], split: str) -> Dataset:
    """A split of a data set by the name of its format, one of :data:`FORMATS`.

    Raises:
        ValueError: if the format is unknown; with one line a problem, if something is missing or unknown.
    """
    if format not in FORMATS:
        raise expected("format", f"one of {', '.join(FORMATS)}", repr(format))
    return FORMATS[format].open(root, split)


def check_format(name: str) -> str:
    """A format's name, or an error that lists them."""
    if name not in FORMATS:
        *others, last = map(repr, FORMATS)
        raise ValueError(f"input should be {', '.join(others)} or {last}, but got {quoted(name)}")
    return name


def format_of(root: Path) -> str:
    """The format of the data set in a folder.

    Raises:
        ValueError: if there is none.
    """
    own_list_first = sorted(FORMATS, key=lambda name: FORMATS[name].open is not CSVDataset)
    for name in own_list_first:
        if FORMATS[name].is_here(root):
            return name
    looks = ", or ".join(dict.fromkeys(FORMATS[name].looks for name in own_list_first))
    raise InputError(f"{root}: no data set here: expected {looks}")


def _voc_parts(root: Path, splits: Sequence[str]) -> Iterator[Part]:
    lists = root / "ImageSets" / "Segmentation"
    known = splits or voc_splits(root)
    if not known:
        raise InputError(f"{lists}: expected a list of ids for each split, such as train.txt, but there is none")
    for split in known:
        listing = read_voc(root, split)
        yield Part(split, listing, Dataset(listing.classes, listing.entries), lists / f"{split}.txt")


def _csv_parts(root: Path, splits: Sequence[str]) -> Iterator[Part]:
    for split in splits or (None,):
        listing = read_csv(root, split)
        yield Part(split or "", listing, Dataset(listing.classes, listing.entries), root / "dataset.csv")


def _coco_parts(root: Path, splits: Sequence[str]) -> Iterator[Part]:
    known = splits or coco_splits(root)
    if not known:
        raise InputError(f"{root / 'annotations'}: expected instances_*.json of COCO, but there is none")
    for split in known:
        listing, objects = read_coco(root, split)
        yield Part(split, listing, InOneFile(listing.classes, listing.entries, objects), objects.path)


_CSV = Format(CSVDataset, _csv_parts, lambda root: (root / "dataset.csv").is_file(), "dataset.csv", brings_words=True)
FORMATS: dict[str, Format] = {
    "voc": Format(
        VOC,
        _voc_parts,
        lambda root: (root / "ImageSets" / "Segmentation").is_dir(),
        "ImageSets/Segmentation of PASCAL VOC",
        segmented="val",
    ),
    "coco": Format(COCO, _coco_parts, lambda root: bool(coco_splits(root)), "annotations/instances_*.json of COCO"),
    "csv": _CSV,
    "scenes": replace(_CSV, drawn=True),
}
"""Name -> format."""
