"""COCO's ``instances_*.json`` in little memory: what each image shows, and the places of its annotations in the file.

The file (450 MB for the training images of 2014) is gone through once. Masks are drawn when they are asked for, from
annotations that are then read at their places.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacl._support.names import composed, existing, without_ending
from cacl.constants import IGNORE
from cacl.datasets.coco_file import Columns, read_columns, unreadable
from cacl.datasets.entries import Entries, Entry, Listing, Origin, duplicates, outside, short_ids
from cacl.datasets.rle import runs_of
from cacl.errors import InputError, first_line, quoted, shown


def read_coco(root: Path, split: str) -> tuple[Listing, Objects]:
    """A split of COCO, and what its masks are drawn from.

    ``train`` is ``annotations/instances_train2014.json`` with the photos in ``train2014``, or else
    ``instances_train.json`` with those in ``train``.
    """
    folder = root / "annotations"
    for name in (f"{split}2014", split):
        path = existing(folder / f"instances_{name}.json")
        if os.path.isfile(path):  # Path.is_file raises for a name that is too long
            return _resolved(path, existing(root / name), read_columns(path))
    known = ", ".join(map(shown, coco_splits(root))) or "no such file"
    raise InputError(
        f"{folder}: expected split {quoted(split)} as instances_{split}2014.json or instances_{split}.json, "
        f"but there is {known}"
    )


def coco_splits(root: Path) -> list[str]:
    """The splits that a folder of COCO has, such as ``train2014``."""
    return sorted(path.stem.removeprefix("instances_") for path in (root / "annotations").glob("instances_*.json"))


@dataclass(frozen=True, eq=False)
class Objects:
    """The places of the annotations of N images in a file."""

    path: Path
    images: NDArray[np.int64]
    """``(N,)``: their ids in the file."""
    sizes: NDArray[np.int32]
    """``(N, 2)``: height, width."""
    values: dict[int, int]
    """Category id -> mask value."""
    bounds: NDArray[np.int64]
    """``(N + 1,)``: an image's annotations are those from its bound to the next."""
    starts: NDArray[np.int64]
    """``(A,)``: the first byte of each annotation."""
    lengths: NDArray[np.int32]
    """``(A,)``: its number of bytes."""

    def mask(self, image: int) -> NDArray[np.uint8]:
        """``(H, W)`` of the image at an index: crowds are 255, and of objects that overlap, the smaller one is seen.

        Raises:
            ValueError: if the file has changed, or a segmentation does not decode.
            ImportError: if the extra for polygons is missing.
        """
        height, width = self.sizes[image].tolist()
        crowds, objects = [], []
        for annotation in self._annotations(image):
            try:
                runs = runs_of(annotation["segmentation"], height, width)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise InputError(
                    f"{shown(self.path)}: annotation {quoted(annotation.get('id'))}: expected polygons or an RLE of "
                    f"{width}×{height} pixels ({first_line(error)[:200]})"
                ) from None
            if annotation.get("iscrowd"):
                crowds.append((IGNORE, runs))
            else:
                objects.append((self.values[annotation["category_id"]], runs))
        objects.sort(key=lambda one: sum(end - start for start, end in one[1]), reverse=True)
        columns = np.zeros(width * height, dtype=np.uint8)  # one below the other, as RLE counts
        for value, runs in crowds + objects:
            for start, end in runs:
                columns[start:end] = value
        return np.ascontiguousarray(columns.reshape(width, height).T)

    def _annotations(self, image: int) -> Iterator[dict[str, Any]]:
        places = slice(self.bounds[image], self.bounds[image + 1])
        try:
            with open(self.path, "rb") as file:
                for start, length in zip(self.starts[places].tolist(), self.lengths[places].tolist(), strict=True):
                    file.seek(start)
                    try:
                        annotation = json.loads(file.read(length))
                        same = annotation["image_id"] == self.images[image] and "segmentation" in annotation
                        same = same and annotation["category_id"] in self.values
                    except (LookupError, RecursionError, TypeError, ValueError):
                        same = False
                    if not same:
                        raise InputError(
                            f"{shown(self.path)}: expected an annotation of image {self.images[image]} at byte "
                            f"{start}, but the file has changed since it was opened"
                        )
                    yield annotation
        except OSError as error:
            raise unreadable(self.path, error) from None


def _resolved(path: Path, photos: Path, columns: Columns) -> tuple[Listing, Objects]:
    """Ids become indices, and what does not fit becomes a problem."""
    where, names = shown(path), dict(columns.categories)
    categories = sorted(names)
    classes = tuple(names[id] for id in categories)
    if not 1 <= len(classes) < IGNORE:
        raise InputError(f"{where}: expected 1 to 254 categories, but got {len(classes)}")
    if not columns.images:
        raise InputError(f"{where}: expected images, but there is none")
    problems = [f"{where}: duplicate category id {id}" for id in duplicates(id for id, _ in columns.categories)]
    problems += [f"{where}: duplicate category {quoted(name)}" for name in duplicates(classes)]
    problems += [f"{where}: duplicate image id {id}" for id in duplicates(columns.images)]
    listed = np.zeros(len(columns.images), dtype=bool)
    for index, problem in enumerate(_problems_of_images(where, columns)):
        listed[index] = not problem
        problems += problem
    for key, given, known in (
        ("image_id", columns.image_of, columns.images),
        ("category_id", columns.category_of, categories),
    ):
        unknown = np.flatnonzero(_indices(given, np.array(known)) < 0)
        if len(unknown):
            some = f"{len(unknown)} annotation{'s' if len(unknown) > 1 else ''}"
            problems.append(f"{where}: unknown {key} in {some}, such as {given[unknown[0]]}")
    some_outlined = any(columns.outlined)
    objects, labels, whole = _placed(path, columns, listed, categories)

    def entries() -> Iterator[Entry]:
        wanted = (name for name, wanted in zip(columns.names, listed, strict=True) if wanted)
        for name, present, drawn in zip(wanted, labels, whole, strict=True):
            photo = existing(photos / name)
            if not drawn and some_outlined:
                unmasked.append(photo.name)
            mask = path if drawn and some_outlined else None
            yield Entry(composed(without_ending(Path(name)).as_posix()), photo, present, mask)

    unmasked: list[str] = []
    made = Entries(entries())
    problems += [f"{where}: duplicate id {shown(id)}" for id in duplicates(made.ids)]
    origin = Origin(path, path, tuple(_notes(where, unmasked, some_outlined=some_outlined)))
    return Listing(classes, short_ids(made), problems, origin), objects


def _notes(where: str, unmasked: list[str], *, some_outlined: bool) -> Iterator[str]:
    if not some_outlined:
        yield f"{where}: no annotation has an outline in pixels, so no image has a mask and nothing is scored"
    elif unmasked:
        names = ", ".join(map(shown, unmasked[:_NAMED])) + (" and others" if len(unmasked) > _NAMED else "")
        yield (
            f"{where}: {len(unmasked)} image{'s have objects' if len(unmasked) > 1 else ' has an object'} without an "
            f"outline, which {'are labels' if len(unmasked) > 1 else 'is a label'} all the same; not scored: {names}"
        )


_NAMED = 20
"""Images that a message names."""


def _problems_of_images(where: str, columns: Columns) -> Iterator[list[str]]:
    heights, widths = columns.sizes[::2], columns.sizes[1::2]
    for id, name, height, width in zip(columns.images, columns.names, heights, widths, strict=True):
        relative = Path(name)
        if relative.anchor or ".." in relative.parts:
            yield [f"{where}: image {id}: {outside(relative)}"]
        elif not relative.name:
            yield [f"{where}: image {id}: expected a file_name, but it is empty"]
        elif not (height >= 1 and width >= 1 and height * width <= _LARGEST):
            yield [f"{where}: image {id}: expected 1 to {_LARGEST} pixels, but got {width}×{height}"]
        else:
            yield []


_LARGEST = 178956970
"""Pixels; Pillow refuses photos with more."""


def _placed(
    path: Path, columns: Columns, listed: NDArray[np.bool_], categories: list[int]
) -> tuple[Objects, Iterator[tuple[int, ...]], NDArray[np.bool_]]:
    """The annotations in the order of the images that are listed, these images' labels, and whether all of an image's
    annotations can be drawn."""
    images, count = np.array(columns.images), int(listed.sum())
    image, category = _indices(columns.image_of, images), _indices(columns.category_of, np.array(categories))
    moved = np.where(listed, np.cumsum(listed) - 1, -1).astype(np.int32)  # index of an image -> of one that is listed
    image = np.where(image >= 0, moved[image], -1)
    order = np.argsort(image, kind="stable")
    order = order[(image[order] >= 0) & (category[order] >= 0)]
    image, category, bounds = image[order], category[order], np.arange(count + 1)
    objects = Objects(
        path,
        images[listed],
        np.array(columns.sizes).reshape(-1, 2)[listed],
        {id: value for value, id in enumerate(categories, start=1)},
        np.searchsorted(image, bounds),
        np.asarray(columns.starts)[order],
        np.asarray(columns.lengths)[order],
    )
    present = np.unique((image.astype(np.int64) * len(categories) + category)[np.asarray(columns.crowd)[order] == 0])
    ends = np.searchsorted(present, bounds * len(categories))
    labels = (tuple((present[ends[i] : ends[i + 1]] % len(categories)).tolist()) for i in range(count))
    whole = np.ones(count, dtype=bool)
    whole[image[np.asarray(columns.outlined)[order] == 0]] = False
    columns.forget_annotations()
    return objects, labels, whole


def _indices(wanted: array[int], known: NDArray[np.int64]) -> NDArray[np.int32]:
    """The index in ``known`` of each that is wanted, of the first of equal ones; -1 for what is not there."""
    order = np.argsort(known, kind="stable").astype(np.int32)
    ids = np.asarray(wanted)
    found = order[np.minimum(np.searchsorted(known[order], ids), len(known) - 1)]
    return np.where(known[found] == ids, found, -1)
