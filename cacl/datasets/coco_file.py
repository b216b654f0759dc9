"""What is kept of a COCO file: numbers in arrays, names in one piece of memory, places instead of annotations."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from cacl._support.names import composed
from cacl.datasets.entries import Texts
from cacl.datasets.json_stream import JSONStream
from cacl.datasets.rle import draws
from cacl.errors import InputError, shown


class Columns:
    """What is kept of a file's images, annotations and categories."""

    def __init__(self) -> None:
        self.categories: list[tuple[int, str]] = []
        self.images, self.sizes, self.names = array("q"), array("i"), Texts()
        self.forget_annotations()

    def forget_annotations(self) -> None:
        self.image_of, self.category_of, self.crowd = array("q"), array("q"), array("b")
        self.outlined = array("b")
        self.starts, self.lengths = array("q"), array("i")

    # Arrays refuse what is no integer, or too large, by a TypeError or an OverflowError.

    def add_image(self, image: Any, start: int, length: int) -> None:
        image["file_name"].encode()  # an AttributeError or a UnicodeEncodeError for what is no text
        self.names.append(image["file_name"])
        self.images.append(image["id"])
        self.sizes.extend((image["height"], image["width"]))

    def add_annotation(self, annotation: Any, start: int, length: int) -> None:
        self.image_of.append(annotation["image_id"])
        self.category_of.append(annotation["category_id"])
        self.crowd.append(annotation.get("iscrowd", 0))
        self.outlined.append(draws(annotation.get("segmentation")))
        self.starts.append(start)
        self.lengths.append(length)

    def add_category(self, category: Any, start: int, length: int) -> None:
        category["name"].encode()
        if not category["name"].strip():
            raise TypeError
        self.categories.append((array("q", [category["id"]])[0], composed(category["name"])))


_WANTED = {
    "images": "an object with file_name, and the integers id, height and width",
    "annotations": "an object with the integers image_id, category_id and iscrowd",
    "categories": "an object with name, and the integer id",
}


def read_columns(path: Path) -> Columns:
    """Go through a file once.

    Raises:
        ValueError: if it is no JSON, or lacks what is needed.
    """
    columns = Columns()
    add = {
        "images": columns.add_image,
        "annotations": columns.add_annotation,
        "categories": columns.add_category,
    }
    missing = set(add)
    try:
        with open(path, "rb") as file:
            stream = JSONStream(file, path)
            for key in stream.members():
                if key not in add:
                    stream.skip()
                    continue
                missing.discard(key)
                for value, start, length in stream.elements():
                    try:
                        add[key](value, start, length)
                    except (AttributeError, LookupError, OverflowError, TypeError, UnicodeEncodeError) as error:
                        lacks = f" (missing {error})" if isinstance(error, KeyError) else ""
                        raise InputError(
                            f"{shown(path)}: {key}: expected {_WANTED[key]}, but there is something else at byte "
                            f"{start}{lacks}"
                        ) from None
            stream.end()
    except OSError as error:
        raise unreadable(path, error) from None
    if missing:
        raise InputError(f"{shown(path)}: missing {', '.join(repr(key) for key in _WANTED if key in missing)}")
    return columns


def unreadable(path: Path, error: OSError) -> InputError:
    """For a file that the system does not give."""
    return InputError(f"{shown(path)}: expected a file that can be read, but {error.strerror or error}")
