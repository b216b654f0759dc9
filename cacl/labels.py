"""Masks as labels of other tools, to train on or to correct there: COCO, YOLO, labelme, CVAT."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cacl._support.cores import usable_cores
from cacl._support.files import naming
from cacl._support.names import is_utf8
from cacl._support.pool import map_processes
from cacl._support.progress import watched
from cacl._support.values import check_choice, check_integer, check_range
from cacl.artifacts import ImageCAMs, cams_of
from cacl.config import Config
from cacl.constants import IGNORE
from cacl.datasets import Dataset
from cacl.errors import InputError, expected, shown
from cacl.images import Mask, photo_size, read_mask
from cacl.label_formats import FORMATS, Drawing, Format, Shape, Size, Writer
from cacl.label_sources import Masked, of_folder, of_run
from cacl.outlines import regions_of
from cacl.runs.session import Session
from cacl.stages.chain import Chain

FIRST = "first.csv"
"""Photos by their agreement, the least first."""
CONFIDENCE = "confidence"
"""The folder of what speaks for each pixel."""
_WORTH = 200
"""Photos that take about as long as to start a process."""


class Exported(NamedTuple):
    """What :func:`export_labels` wrote."""

    out: Path
    photos: int
    labels: int
    """Polygons or masks, of all photos."""
    open: int
    """Photos with pixels that are 255."""
    left_out: int
    """Photos that have no mask."""


def export_labels(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Literal["coco", "yolo", "labelme", "cvat"],
    *,
    stage: Literal["masks", "predict"] | None = None,
    photos: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    shape: Shape = "polygon",
    tolerance: float = 1.0,
    parts: bool = True,
    min_area: int = 1,
    worst_first: bool = False,
    confidence: bool = False,
    copy: bool = False,
    device: str | None = None,
    workers: int | None = None,
    progress: bool = True,
    chain: Chain | None = None,
) -> Exported:
    """Write the masks of a run, or of a folder, as another tool reads labels.

    ``out`` is whole or not there. Photos lie in it by links, called by their ids:

    - ``coco``: ``annotations/instances_<split>.json`` and ``<split>/``, which ``[data] format = "coco"`` reads too;
    - ``yolo``: ``labels/<split>/*.txt``, ``images/<split>/`` and ``data.yaml``, polygons of segmentation;
    - ``labelme``: a JSON beside each photo, and ``labels.txt``;
    - ``cvat``: ``annotations.zip`` (CVAT for images 1.1), with the photos if they are copied, and ``labels.json`` for
      the labels of a task.

    What is 255 is open: a crowd in COCO, ``__ignore__`` in labelme and CVAT; YOLO cannot say it.

    Args:
        source: a run folder, or a folder of masks such as :func:`cacl.predict.predict` writes.
        out: a folder that is not there yet, or is empty.
        format: which tool's.
        stage: of a run: pseudo masks, or what the segmenter predicts; by default that of both which is finished and has
            the photos of training, the segmenter's first.
        photos: of a folder of masks: that of the photos, as it was given to :func:`cacl.predict.predict`.
        classes: of a folder of masks: what the values from 1 on mean.
        shape: polygons, or each pixel as it is; YOLO has polygons only.
        tolerance: how far a polygon may be from the pixels' edges, in pixels; 0 follows every edge.
        parts: a label for each region that hangs together; else one for each class that a photo shows, where the format
            has labels of several pieces.
        min_area: regions of fewer pixels are left out; they are background then.
        worst_first: write ``first.csv`` and list the photos in its order: those first whose masks agree least with the
            run's encoder and the photos' colours (see :mod:`cacl.agreement`), those without tags last.
        confidence: of pseudo masks: write ``confidence/<id>.png``, 8 bits: how much the CAMs that the mask was made of
            speak for each pixel's value, 0 to 255; no probability, but comparable within a photo. What is 255 has 0.
        copy: copy the photos in place of links; for CVAT, into the archive.
        device: a torch device for the encoder; the run's own by default.
        workers: number of processes, one for every 200 photos at most; one a core if None.
        progress: show a progress bar where there is a terminal.
        chain: that of the run, CA-CL's by default.

    Raises:
        ValueError: if ``out`` is in use; if a mask is missing in a run, is not of its photo's size or has a value that
            is no class.
    """
    check_choice("format", format, FORMATS)
    check_choice("shape", shape, ("polygon", "rle"))
    if format == "yolo" and shape != "polygon":
        raise expected("shape", '"polygon" for YOLO, which has no other', repr(shape))
    check_integer("min_area", min_area, 1)
    check_range("tolerance", tolerance, 0, 1000)
    masks, out = Path(source), Path(os.path.abspath(out))
    if os.path.lexists(out) and (not out.is_dir() or out.is_symlink() or any(out.iterdir())):
        raise InputError(f"{shown(out)}: expected a folder that is not there yet, or is empty")
    if (masks / "config.toml").is_file():
        _refuse(f"{shown(masks)} is a run, which knows its own", photos=photos, classes=classes)
        config = Config.of_run(masks, chain=chain)
        own = {} if device is None else {"device": device}
        session = Session(config.changed({"run": {"progress": progress and config.run.progress, **own}}), drawing=False)
        found = of_run(session, stage, worst_first=worst_first, confidence=confidence)
    else:
        run_only = {"stage": stage, "worst_first": worst_first or None, "confidence": confidence or None}
        _refuse(f"{shown(masks)} is no run folder", **run_only)
        found = of_folder(masks, photos, classes)
    drawing = Drawing(found.classes, shape, tolerance)
    labelling = _Labelling(FORMATS[format], drawing, parts, min_area, found.dataset, found.cams)
    most = usable_cores() if workers is None else min(workers, usable_cores())
    labelled = map_processes(labelling, found.items, workers=min(most, 1 + found.total // _WORTH))
    with _whole(out) as folder:
        split = re.sub(r"[^\w.-]+", "-", found.split) or "train"
        writer = FORMATS[format].writer(folder, split, found.classes, copy)
        watching = watched(labelled, total=found.total, desc="labels", progress=progress)
        made = _write(folder, writer, watching, copy=copy, worst_first=worst_first)
        if not made.photos:
            raise InputError(f"{shown(masks)}: expected masks that are called as their photos are, but none is")
    return made._replace(out=out)


def _refuse(why: str, **arguments: object) -> None:
    for name, given in arguments.items():
        if given is not None:
            raise InputError(f"Expected no argument `{name}`: {why}.")


class _Labelled(NamedTuple):
    item: Masked
    file: str
    """The photo's name in the new folder."""
    size: Size
    drawn: list[str]
    open: bool
    confidence: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Labelling:
    """item -> its labels; None stays None."""

    format: Format
    how: Drawing
    parts: bool
    min_area: int
    dataset: Dataset | None
    cams: Path | None

    def __call__(self, item: Masked | None) -> _Labelled | None:
        if item is None:
            return None
        file = f"{item.id}{item.photo.suffix}"
        if not is_utf8(file):
            raise InputError(f"{shown(item.photo)}: expected a name in UTF-8, which files of labels are in")
        mask: Mask = read_mask(item.mask).numpy()
        size = photo_size(item.photo)
        if mask.shape[::-1] != size:
            raise InputError(
                f"{shown(item.mask)}: expected a mask of its photo's {size[0]} x {size[1]} pixels, but got "
                f"{mask.shape[1]} x {mask.shape[0]}"
            )
        count = len(self.how.classes)
        if len(wrong := mask[(mask > count) & (mask != IGNORE)]):
            raise InputError(f"{shown(item.mask)}: expected values 0 to {count} and {IGNORE}, but got {wrong.max()}")
        regions = list(regions_of(mask, parts=self.parts, min_area=self.min_area))
        drawn = self.format.draw(regions, size, self.how)
        confidence = None
        if self.dataset is not None and self.cams is not None:
            confidence = _confidence(cams_of(self.dataset, self.cams, item.number), mask)
        return _Labelled(item, file, size, drawn, bool((mask == IGNORE).any()), confidence)


def _confidence(cams: ImageCAMs, mask: Mask) -> NDArray[np.uint8]:
    """What CAMs say of each pixel's value: the CAM of its class, or how far all of them are from 1."""
    maps = cams.resized(mask.shape)
    said = np.where(mask == 0, 1 - maps.max(0, initial=0.0), 0)
    for k, own in zip(cams.classes.tolist(), maps, strict=True):
        said = np.where(mask == k + 1, own, said)
    confidence: NDArray[np.uint8] = np.rint(255 * said.clip(0, 1)).astype(np.uint8)
    return confidence


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder that takes the place of an empty one, or of none, when the block ends without an error."""
    folder = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    with naming(folder):
        folder.mkdir(parents=True)
    try:
        yield folder
        with naming(out):
            if out.is_dir():
                out.rmdir()
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    folder: Path, writer: Writer, labelled: Iterable[_Labelled | None], *, copy: bool, worst_first: bool
) -> Exported:
    photos = labels = left_open = left_out = 0
    with ExitStack() as stack:
        rows = None
        if worst_first:
            rows = csv.writer(stack.enter_context(open(folder / FIRST, "x", encoding="utf-8", newline="")))
            rows.writerow(("photo", "agreement"))
        for each in labelled:
            if each is None:
                left_out += 1
                continue
            photos, labels, left_open = photos + 1, labels + len(each.drawn), left_open + each.open
            if (place := writer.photo(each.file)) is not None:
                place.parent.mkdir(parents=True, exist_ok=True)
                if copy:
                    shutil.copyfile(each.item.photo, place)
                else:
                    place.symlink_to(os.path.abspath(each.item.photo))
            writer.add(each.file, each.size, each.drawn, each.item.photo)
            if each.confidence is not None:
                picture = folder / CONFIDENCE / f"{each.item.id}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                with open(picture, "xb") as file:  # never through the link to a photo
                    Image.fromarray(each.confidence).save(file, "PNG")
            if rows is not None:
                rows.writerow((each.file, each.item.agreement))
    writer.close()
    return Exported(folder, photos, labels, left_open, left_out)
