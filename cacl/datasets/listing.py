"""Which images a VOC folder or a CSV lists, with their labels and masks, and what is wrong with the list."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from cacl._support.names import composed, existing, stem_of
from cacl.constants import IGNORE
from cacl.datasets.entries import Entries, Entry, Listing, Origin, duplicates, outside, short_ids
from cacl.errors import InputError, did_you_mean, quoted, shown
from cacl.folders import files_of

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


def read_voc(root: Path, split: str) -> Listing:
    """A split of PASCAL VOC."""
    masks = root / "SegmentationClass"
    lists = root / "ImageSets" / "Segmentation"
    if split == "train_aug":
        masks = root / "SegmentationClassAug"
        val = set(lines_of(lists / "val.txt"))
        ids = sorted(id for path in files_of(masks, "*.png") if (id := composed(path.stem)) not in val)
        if not ids:
            raise InputError(f"{masks}: no masks for the split train_aug")
    elif existing(lists / f"{split}.txt").is_file():
        ids = [line.split()[0] for line in lines_of(existing(lists / f"{split}.txt"))]
        if not ids:
            raise InputError(f"{lists / split}.txt: expected an id a line, but it is empty")
    else:
        known = [path.stem for path in files_of(lists, "*.txt")]
        raise InputError(
            f"{lists}: expected split {split!r} as {split}.txt, but there is {', '.join(known) or 'no such folder'}"
        )
    index = {name.replace(" ", ""): k for k, name in enumerate(VOC_CLASSES)}
    problems = [f"{lists / split}.txt: duplicate id {shown(id)}" for id in duplicates(ids)]
    # Files of an image are called by its id.
    problems += [
        f"{lists / split}.txt: expected an id a line, but got {quoted(id)}" for id in ids if Path(id).name != id
    ]
    ids = [id for id in ids if Path(id).name == id]

    def entries() -> Iterator[Entry]:
        for id in dict.fromkeys(ids):
            annotation = existing(root / "Annotations" / f"{id}.xml")
            names: list[str] = []
            if os.path.isfile(annotation):
                try:
                    tree = ElementTree.parse(annotation)
                    names = [(element.text or "").strip() for element in tree.iterfind("object/name")]
                except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: encodings
                    problems.append(f"{shown(annotation)}: not an annotation that parses ({error})")
            elif split != "test":  # the test images' annotations are not public
                problems.append(f"{shown(annotation)}: no such file")
            problems.extend(f"{shown(annotation)}: unknown class {quoted(name)}" for name in names if name not in index)
            image, mask = existing(root / "JPEGImages" / f"{id}.jpg"), existing(masks / f"{id}.png")
            labels = tuple(sorted({index[name] for name in names if name in index}))
            yield Entry(id, image, labels, mask if os.path.isfile(mask) else None)

    listed = lists / f"{split}.txt" if split != "train_aug" else masks
    return Listing(VOC_CLASSES, Entries(entries()), problems, Origin(listed))


def read_csv(root: Path, split: str | None) -> Listing:
    """The rows of one split of ``dataset.csv``, or all of them."""
    classes = tuple(lines_of(root / "classes.txt"))
    if not 1 <= len(classes) < IGNORE:
        raise InputError(f"{root / 'classes.txt'}: expected 1 to 254 class names, a line each, but got {len(classes)}")
    problems = [f"{root / 'classes.txt'}: duplicate class {quoted(name)}" for name in duplicates(classes)]
    problems += [
        f"{root / 'classes.txt'}: expected class names without a semicolon, which parts labels, but got {quoted(name)}"
        for name in classes
        if ";" in name
    ]
    table = root / "dataset.csv"
    columns = ["image", "labels", "mask", "split"]
    rows = _rows(table)
    header = next(rows, (1, []))[1]
    if [name.strip() for name in header] != columns:
        raise InputError(f"{table}: expected the header {','.join(columns)}, but got {quoted(','.join(header))}")
    index = {name: k for k, name in enumerate(classes)}
    splits, split = set(), None if split is None else composed(split)

    def read() -> Iterator[Entry]:
        for number, cells in rows:
            if not cells:
                continue
            if len(cells) != len(columns):
                problems.append(f"{table}: line {number}: expected {len(columns)} columns, but got {len(cells)}")
                continue
            row = {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}
            own = composed(row["split"])
            splits.add(own)
            if split is not None and own != split:
                continue
            names = [name.strip() for name in composed(row["labels"]).split(";") if name.strip()]
            problems.extend(
                f"{table}: line {number}: unknown label {quoted(name)}{did_you_mean(name, classes)}"
                for name in names
                if name not in index
            )
            image, mask = (places.of(row[column]) for column in ("image", "mask"))
            problems.extend(
                f"{table}: line {number}: {outside(Path(row[column]))}"
                for column, place in (("image", image), ("mask", mask))
                if place is None
            )
            if image is None or not image.id:
                if image is not None:
                    problems.append(f"{table}: line {number}: expected an image, but it is empty")
                continue
            labels = tuple(sorted({index[name] for name in names if name in index}))
            yield Entry(composed(image.id), image.path, labels, mask.path if mask and mask.id else None)

    places = _Places(root)
    entries = Entries(read())
    problems += [f"{table}: duplicate id {shown(id)}" for id in duplicates(entries.ids)]
    if not entries and not problems:
        known = ", ".join(sorted(splits)) or "no row"
        wanted = "rows" if split is None else f"rows of split {split!r}"
        raise InputError(f"{table}: expected {wanted}, but there is {known}")
    return Listing(classes, short_ids(entries), problems, Origin(table, root / "classes.txt"))


class _Place(NamedTuple):
    path: Path
    id: str
    """The path without the ending of a photo; empty where the table's cell names nothing."""


class _Places:
    """What the cells of a table name below a folder. Few names of folders stand in many cells, and to make a path of
    each cell would take most of the time of reading a large table."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, tuple[Path, str] | None] = {}

    def of(self, cell: str) -> _Place | None:
        """None where it leads out of the folder."""
        if not cell:
            return _Place(self._root, "")
        folder, slash, name = cell.rpartition("/")
        if os.sep != "/" or name in ("", ".", ".."):
            relative = Path(cell)
            folder, slash, name = str(relative.parent), "/" * bool(relative.parts), relative.name
        if (folder := folder + slash) not in self._folders:
            self._folders[folder] = self._folder(Path(folder))
        known = self._folders[folder]
        if known is None or name == "..":
            return None
        path = known[0] / name
        return _Place(path if cell.isascii() else existing(path), f"{known[1]}{stem_of(name)}")

    def _folder(self, relative: Path) -> tuple[Path, str] | None:
        if relative.anchor or ".." in relative.parts:  # in Windows, C:x and \\x are not absolute
            return None
        return existing(self._root / relative), f"{relative.as_posix()}/" if relative.parts else ""


def csv_splits(root: Path) -> list[str]:
    """The splits that the rows of ``dataset.csv`` name; ``""``, which is all rows, where they name none or too many."""
    splits = dict.fromkeys(composed(cells[-1].strip()) for _, cells in _rows(root / "dataset.csv") if len(cells) == 4)
    splits.pop("split", None)  # of the header
    return [""] if not splits or "" in splits or len(splits) > _MOST_SPLITS else list(splits)


_MOST_SPLITS = 20
"""The table is gone through once for each."""


def voc_splits(root: Path) -> list[str]:
    """The splits that a VOC folder has."""
    splits = [path.stem for path in files_of(root / "ImageSets" / "Segmentation", "*.txt")]
    return [*splits, "train_aug"] if "val" in splits and (root / "SegmentationClassAug").is_dir() else splits


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, each with the number of its last line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for cells in reader:
                yield reader.line_num, cells
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: expected a row of a CSV file, but {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file")
    return InputError(f"{path}: expected a text file in UTF-8, but {error}")


def lines_of(path: Path) -> list[str]:
    """The lines of a small text file, stripped, without empty ones, composed."""
    return [composed(line.strip()) for line in _text(path).splitlines() if line.strip()]
