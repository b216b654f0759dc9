"""The formats that a data set may have, each by its name; a new one is a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cacl.constants import Range
from cacl.datasets.listing import csv_splits, read_csv, read_voc, voc_splits
from cacl.errors import InputError, expected, quoted

if TYPE_CHECKING:
    from cacl.datasets.dataset import Dataset
    from cacl.datasets.entries import Listing


class Part(NamedTuple):
    """What a data set's files say of a split, with all that may be wrong about it."""

    listing: Listing
    dataset: Dataset
    source: Path
    """The file that says it."""


@dataclass(frozen=True)
class Format:
    """How a data set is found, read and checked."""

    read: Callable[[Path, str], Part]
    """(root, split) -> what its files say."""
    splits: Callable[[Path], Sequence[str]]
    """root -> the splits that there are, or an error that says where they should be."""
    is_here: Callable[[Path], bool]
    """Whether a folder looks like one; the first of :data:`FORMATS` that says so wins."""
    looks: str
    """What tells such a folder, for the message where none does."""
    brings_words: bool = False
    """Whether a ``backgrounds.json`` in its folder is used without being named."""
    segmented: str = ""
    """The split that segmenters are scored on; empty for the one that CAMs are scored on."""
    disjoint: bool = False
    """Whether a photo may be in one split only; splits of others may hold each other."""
    drawn: bool = False
    """Whether :func:`cacl.scenes.generate` draws it where it is missing."""


def open_dataset(
    format: str, root: str | PathLike[str], split: str, *, range: Range | None = None, look: bool = True
) -> Dataset:
    """A split of a data set by the name of its format, one of :data:`FORMATS`.

    Args:
        format: the name.
        root: the folder.
        split: the split.
        range: what the values of deep images span (see :func:`cacl.images.read_image`); by their type if None.
        look: see that every file is there; else what is missing is an error when it is opened.

    Raises:
        ValueError: if the format is unknown; with one line a problem, if something is missing or unknown.
    """
    if format not in FORMATS:
        raise expected("format", f"one of {', '.join(FORMATS)}", repr(format))
    part = FORMATS[format].read(Path(root), split)
    from cacl.datasets.dataset import sound

    sound(part.listing, look=look)
    part.dataset.range = range
    return part.dataset


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
    for name, format in FORMATS.items():
        if format.is_here(root):
            return name
    looks = ", or ".join(dict.fromkeys(format.looks for format in FORMATS.values()))
    raise InputError(f"{root}: no data set here: expected {looks}")


def _csv(root: Path, split: str) -> Part:
    listing = read_csv(root, split or None)
    return Part(listing, _plain(listing), root / "dataset.csv")


def _voc(root: Path, split: str) -> Part:
    listing = read_voc(root, split)
    lists = root / "ImageSets" / "Segmentation"
    return Part(listing, _plain(listing), lists / f"{split}.txt")


def _coco(root: Path, split: str) -> Part:
    from cacl.datasets.coco import read_coco
    from cacl.datasets.dataset import InOneFile

    listing, objects = read_coco(root, split)
    return Part(listing, InOneFile(listing, objects), objects.path)


def _plain(listing: Listing) -> Dataset:
    from cacl.datasets.dataset import Dataset

    dataset = Dataset(listing.classes, listing.entries)
    dataset.origin = listing.origin
    return dataset


def _voc_splits(root: Path) -> list[str]:
    if splits := voc_splits(root):
        return splits
    lists = root / "ImageSets" / "Segmentation"
    raise InputError(f"{lists}: expected a list of ids for each split, such as train.txt, but there is none")


def _coco_lists(root: Path) -> list[str]:
    from cacl.datasets.coco import coco_splits

    return coco_splits(root)


def _coco_splits(root: Path) -> list[str]:
    if splits := _coco_lists(root):
        return splits
    raise InputError(f"{root / 'annotations'}: expected instances_*.json of COCO, but there is none")


_CSV = Format(
    read=_csv,
    splits=csv_splits,
    is_here=lambda root: (root / "dataset.csv").is_file(),
    looks="dataset.csv",
    brings_words=True,
    disjoint=True,
)
FORMATS: dict[str, Format] = {
    "csv": _CSV,
    "voc": Format(
        read=_voc,
        splits=_voc_splits,
        is_here=lambda root: (root / "ImageSets" / "Segmentation").is_dir(),
        looks="ImageSets/Segmentation of PASCAL VOC",
        segmented="val",
    ),
    "coco": Format(
        read=_coco,
        splits=_coco_splits,
        is_here=lambda root: bool(_coco_lists(root)),
        looks="annotations/instances_*.json of COCO",
    ),
    "scenes": replace(_CSV, drawn=True),
}
"""Name -> format; where a folder fits several, the first one is meant."""
