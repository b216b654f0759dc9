"""Which images a VOC folder or a CSV lists, with their labels and masks, and what is wrong with the list."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from cacl._checks import InputError, did_you_mean
from cacl.metrics import IGNORE

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


class Entry(NamedTuple):
    """Where an image's files lie, and the indices of its classes."""

    id: str
    image: Path
    labels: tuple[int, ...]
    mask: Path | None


Listing = tuple[tuple[str, ...], list[Entry], list[str]]
"""Classes, entries, and what is wrong, a line each."""


def read_voc(root: Path, split: str) -> Listing:
    """A split of PASCAL VOC."""
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


def read_csv(root: Path, split: str | None) -> Listing:
    """The rows of one split of ``dataset.csv``, or all of them."""
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


def voc_splits(root: Path) -> list[str]:
    """The splits that a VOC folder has."""
    splits = sorted(path.stem for path in (root / "ImageSets" / "Segmentation").glob("*.txt"))
    return [*splits, "train_aug"] if "val" in splits and (root / "SegmentationClassAug").is_dir() else splits


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
