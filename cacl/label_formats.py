"""The files of other tools' labels: COCO, YOLO, labelme and CVAT, each a function of a photo's regions and a writer."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple, Protocol
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cacl import __version__
from cacl.constants import IGNORE
from cacl.datasets.rle import columns_of, compressed, lengths_of
from cacl.errors import InputError, quoted
from cacl.outlines import EDGES, INSIDE, Region, outlines
from cacl.pictures import COLOURS

Shape = Literal["polygon", "rle"]
Size = tuple[int, int]
"""Width, height."""
OPEN = "__ignore__"
"""What labelme calls pixels that are no class's and not the background, such as those that are 255."""


@dataclass(frozen=True)
class Drawing:
    """How a photo's regions are said."""

    classes: tuple[str, ...]
    shape: Shape
    tolerance: float

    def label(self, region: Region) -> str:
        return OPEN if region.value == IGNORE else self.classes[region.value - 1]

    def polygons(self, region: Region, inset: tuple[float, float]) -> list[NDArray[np.float64]]:
        """In pixels of the photo."""
        found = outlines(region.pixels, tolerance=self.tolerance, inset=inset)
        return [points + np.array([region.left, region.top]) for points in found]


def coco(regions: Sequence[Region], size: Size, how: Drawing) -> list[str]:
    """Annotations, without their ids. What is 255 is a crowd of each class that the photo shows, or of the first."""
    shown = sorted({region.value for region in regions} - {IGNORE})
    found = []
    for region in regions:
        crowd = region.value == IGNORE
        segmentation: object
        if crowd or how.shape == "rle":
            segmentation = {
                "size": [size[1], size[0]],
                "counts": compressed(columns_of(region.pixels, region.left, region.top, size)),
            }
        else:
            segmentation = [points.ravel().round(2).tolist() for points in how.polygons(region, EDGES)]
        height, width = region.pixels.shape
        said = {
            "segmentation": segmentation,
            "area": int(region.pixels.sum()),
            "bbox": [region.left, region.top, width, height],
            "iscrowd": int(crowd),
        }
        values = (shown or [1]) if crowd else [region.value]
        found += [_json({"category_id": value, **said}) for value in values]
    return found


def yolo(regions: Sequence[Region], size: Size, how: Drawing) -> list[str]:
    """Lines. What is 255 is left out: the format cannot say it."""
    return [
        " ".join([str(region.value - 1), *(f"{value:.6f}" for value in (points / size).ravel())])
        for region in regions
        if region.value != IGNORE
        for points in how.polygons(region, INSIDE)
    ]


def labelme(regions: Sequence[Region], size: Size, how: Drawing) -> list[str]:
    """Shapes; those of one region that are in several pieces have a number in common."""
    found = []
    for number, region in enumerate(regions, start=1):
        said: dict[str, object] = {"label": how.label(region), "group_id": None, "description": "", "flags": {}}
        if how.shape == "rle":
            height, width = region.pixels.shape
            corners = [[region.left, region.top], [region.left + width - 1, region.top + height - 1]]
            found.append(_json({**said, "shape_type": "mask", "points": corners, "mask": _png(region.pixels)}))
            continue
        pieces = how.polygons(region, INSIDE)
        said |= {"shape_type": "polygon", "mask": None, "group_id": number if len(pieces) > 1 else None}
        found += [_json({**said, "points": points.round(2).tolist()}) for points in pieces]
    return found


def cvat(regions: Sequence[Region], size: Size, how: Drawing) -> list[str]:
    """Elements of an image; those of one region that are in several pieces are a group."""
    found = []
    for number, region in enumerate(regions, start=1):
        start = f'source="auto" occluded="0" z_order="0" label={_xml(how.label(region))}'
        if how.shape == "rle":
            height, width = region.pixels.shape
            lengths = ", ".join(map(str, lengths_of(region.pixels)))
            place = f'left="{region.left}" top="{region.top}" width="{width}" height="{height}"'
            found.append(f'<mask {start} rle="{lengths}" {place}></mask>')
            continue
        pieces = how.polygons(region, EDGES)
        group = f' group_id="{number}"' if len(pieces) > 1 else ""
        for points in pieces:
            corners = ";".join(f"{x:.2f},{y:.2f}" for x, y in points)
            found.append(f'<polygon {start}{group} points="{corners}"></polygon>')
    return found


class Writer(Protocol):
    """Writes what a format has of photos, one after the other."""

    def photo(self, file: str) -> Path | None:
        """Where a photo belongs; None where it can only be packed."""

    def add(self, file: str, size: Size, drawn: Sequence[str], photo: Path) -> None:
        """A photo's labels."""

    def close(self) -> None:
        """All photos have come."""


class _COCO:
    def __init__(self, folder: Path, split: str, classes: Sequence[str], packed: bool) -> None:
        self._photos, self._count, self._shapes = folder / split, 0, 0
        self._images = _spool()  # they come after the annotations
        self._file = _opened(folder / "annotations" / f"instances_{split}.json")
        info = {"description": "labels by cacl", "version": __version__}
        categories = [{"id": k, "name": name, "supercategory": ""} for k, name in enumerate(classes, start=1)]
        self._file.write(f'{{"info": {_json(info)}, "licenses": [],\n"categories": {_json(categories)},\n')
        self._file.write('"annotations": [')

    def photo(self, file: str) -> Path:
        return self._photos / file

    def add(self, file: str, size: Size, drawn: Sequence[str], photo: Path) -> None:
        self._count += 1
        for one in drawn:
            self._file.write(",\n" if self._shapes else "\n")
            self._shapes += 1
            self._file.write(f'{{"id": {self._shapes}, "image_id": {self._count}, {one[1:]}')
        image = {"id": self._count, "file_name": file, "width": size[0], "height": size[1]}
        self._images.write(f"{',' if self._count > 1 else ''}\n{_json(image)}")

    def close(self) -> None:
        self._file.write('],\n"images": [')
        self._images.seek(0)
        shutil.copyfileobj(self._images, self._file)
        self._file.write("]}\n")
        self._images.close()
        self._file.close()


class _YOLO:
    def __init__(self, folder: Path, split: str, classes: Sequence[str], packed: bool) -> None:
        self._folder, self._split = folder, split
        names = "".join(f"  {k}: {_yaml(name)}\n" for k, name in enumerate(classes))
        with _opened(folder / "data.yaml") as file:
            photos = _yaml(f"images/{split}")
            file.write(f"train: {photos}\nval: {photos}  # no others are known here\nnames:\n{names}")

    def photo(self, file: str) -> Path | None:
        return self._folder / "images" / self._split / file

    def add(self, file: str, size: Size, drawn: Sequence[str], photo: Path) -> None:
        inner = f"/images/{self._split}/{Path(file).with_suffix('.txt').as_posix()}"
        place = "/labels/".join(inner.rsplit("/images/", 1))  # YOLO looks there, be the last one a folder of the id
        with _opened(self._folder / place[1:]) as label:
            label.writelines(f"{line}\n" for line in drawn)

    def close(self) -> None:
        pass


class _Labelme:
    def __init__(self, folder: Path, split: str, classes: Sequence[str], packed: bool) -> None:
        self._folder = folder
        with _opened(folder / "labels.txt") as file:
            file.writelines(f"{name}\n" for name in (OPEN, "_background_", *classes))

    def photo(self, file: str) -> Path | None:
        return self._folder / file

    def add(self, file: str, size: Size, drawn: Sequence[str], photo: Path) -> None:
        known = {"imagePath": Path(file).name, "imageData": None, "imageHeight": size[1], "imageWidth": size[0]}
        with _opened((self._folder / file).with_suffix(".json")) as label:
            label.write(f'{{"version": "5.5.0", "flags": {{}}, "shapes": [{", ".join(drawn)}], {_json(known)[1:]}\n')

    def close(self) -> None:
        pass


class _CVAT:
    def __init__(self, folder: Path, split: str, classes: Sequence[str], packed: bool) -> None:
        self._zip = zipfile.ZipFile(folder / "annotations.zip", "w", zipfile.ZIP_DEFLATED, strict_timestamps=False)
        self._spool = _spool()  # an archive is written file by file
        self._packed, self._count = packed, 0
        named = [(name, COLOURS[value]) for value, name in enumerate(classes, start=1)] + [(OPEN, COLOURS[IGNORE])]
        labels = [{"name": name, "color": "#%02x%02x%02x" % tuple(colour)} for name, colour in named]  # noqa: UP031
        with _opened(folder / "labels.json") as file:
            file.write(json.dumps([{**label, "attributes": []} for label in labels], indent=2, ensure_ascii=False))
        self._spool.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta><task>')
        self._spool.write(f"<name>{escape(split)}</name><mode>annotation</mode><labels>\n")
        for label in labels:
            name = f"<name>{_xml(label['name'], escape)}</name><color>{label['color']}</color>"
            self._spool.write(f"<label>{name}<type>any</type><attributes></attributes></label>\n")
        self._spool.write("</labels></task></meta>\n")

    def photo(self, file: str) -> Path | None:
        return None

    def add(self, file: str, size: Size, drawn: Sequence[str], photo: Path) -> None:
        shape = f'width="{size[0]}" height="{size[1]}"'
        self._spool.write(f'<image id="{self._count}" name={_xml(file)} {shape}>\n')
        self._spool.writelines(f"{one}\n" for one in drawn)
        self._spool.write("</image>\n")
        self._count += 1
        if self._packed:
            self._zip.write(photo, f"images/{file}", zipfile.ZIP_STORED)

    def close(self) -> None:
        self._spool.write("</annotations>\n")
        self._spool.seek(0)
        with (
            self._zip.open("annotations.xml", "w", force_zip64=True) as member,
            io.TextIOWrapper(member, "utf-8") as to,
        ):
            shutil.copyfileobj(self._spool, to)
        self._spool.close()
        self._zip.close()


class Format(NamedTuple):
    """How a format draws a photo's regions, and what writes it."""

    draw: Callable[[Sequence[Region], Size, Drawing], list[str]]
    writer: Callable[[Path, str, Sequence[str], bool], Writer]
    """folder, split, classes and whether photos are packed -> it."""


FORMATS = {
    "coco": Format(coco, _COCO),
    "yolo": Format(yolo, _YOLO),
    "labelme": Format(labelme, _Labelme),
    "cvat": Format(cvat, _CVAT),
}


def _png(pixels: NDArray[np.bool_]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _opened(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "x", encoding="utf-8", newline="\n")


def _spool() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _yaml(text: str) -> str:
    """In double quotes, as JSON's strings are, with what YAML does not take as it is escaped."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in _json(text))


_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def _xml(text: str, quote: Callable[[str], str] = quoteattr) -> str:
    if _NOT_XML.search(text):
        raise InputError(f"CVAT's XML: expected names of letters that it can hold, but got {quoted(text)}")
    return quote(text)
