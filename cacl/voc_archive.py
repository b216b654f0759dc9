"""The archive that PASCAL VOC 2012's evaluation server takes: masks are checked, and then packed as they are."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image

from cacl._support.cores import usable_cores
from cacl._support.files import replacing
from cacl._support.pillow import orientation
from cacl._support.progress import watched
from cacl._support.values import check_choice
from cacl.constants import IGNORE
from cacl.datasets.listing import VOC_CLASSES
from cacl.errors import InputError, expected, shown
from cacl.folders import files_of
from cacl.images import VOC_COLOURS, open_image


def export_voc(
    masks: Path,
    root: Path,
    out: Path,
    *,
    split: str = "test",
    competition: Literal["comp5", "comp6"] = "comp6",
    progress: bool = True,
) -> Path:
    """Pack the masks of a split as ``results/VOC2012/Segmentation/{competition}_{split}_cls/{id}.png`` in a tar.gz.

    Everything is checked before anything is written, and the archive is read back before it takes the place of one
    that is there. The same masks give the same bytes.

    Args:
        masks: folder with ``<id>.png`` for every id of the split: 8-bit palette images with VOC's colours, of their
            photo's size, with the values 0 (background) to 20; 255 is none of them. Files of other kinds are ignored.
        root: VOC's folder, such as ``VOCdevkit/VOC2012``; the list of the split and its photos are read, no labels.
        out: the archive, a path that ends in ``.tgz`` or ``.tar.gz``.
        split: a list in ``ImageSets/Segmentation``.
        competition: ``"comp5"`` if nothing but VOC's own images was trained on; ``"comp6"`` if anything else was, such
            as the weights of ImageNet or CLIP.
        progress: show a progress bar where there is a terminal or a notebook.

    Returns:
        ``out``.

    Raises:
        ValueError: with one line a problem, if a mask is missing, of no id of the split, or not as above; a line is
            the file's path and what is wrong with it, and after 20 lines it says how many more there are.
    """
    check_choice("competition", competition, ("comp5", "comp6"))
    if not out.name.endswith((".tgz", ".tar.gz")):
        raise expected("out", "a path that ends in .tgz or .tar.gz", repr(str(out)))
    if not masks.is_dir():
        raise InputError(f"{masks}: no such folder")
    ids, problems = _read_ids(root / "ImageSets" / "Segmentation", split)

    def check(id: str) -> tuple[list[str], bytes]:
        return _check(masks / f"{id}.png", root / "JPEGImages" / f"{id}.jpg")

    digests = []
    with ThreadPoolExecutor(usable_cores() + 4) as pool:  # decoding releases the interpreter's lock
        for found, digest in watched(pool.map(check, ids), total=len(ids), desc="export-voc", progress=progress):
            problems += found
            digests.append(digest)
    known = {f"{id}.png" for id in ids}
    others = [path for path in files_of(masks, "*.[pP][nN][gG]") if path.name not in known]
    problems += [
        f"{shown(path)}: expected only masks of the split {split}, but {shown(path.stem)} is not in it"
        for path in others
    ]
    if problems:
        more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise InputError("\n".join(problems[:_SHOWN] + more))

    folder = f"results/VOC2012/Segmentation/{competition}_{split}_cls"
    sources = {f"{folder}/{id}.png": masks / f"{id}.png" for id in ids}
    with replacing(out) as file:
        _write(file, sources)
        file.flush()
        for (name, path), digest, member in zip(sources.items(), digests, _read_back(Path(file.name)), strict=True):
            if member != (name, digest):
                raise InputError(f"{path}: expected the mask that was checked, but it has changed since")
    return out


_SHOWN = 20
"""Problems that are listed; the rest are counted."""

_COLOURS = VOC_COLOURS[: 1 + len(VOC_CLASSES)].ravel().tolist()


def _read_ids(lists: Path, split: str) -> tuple[list[str], list[str]]:
    """The ids of a split, sorted, and what is wrong with its list."""
    known = [path.stem for path in files_of(lists, "*.txt")]
    if split not in known:
        there = ", ".join(known) or "no such folder"
        raise InputError(f"{lists}: expected split {split!r} as {split}.txt, but there is {there}")
    table = lists / f"{split}.txt"
    try:
        counts = Counter(line.split()[0] for line in table.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{table}: expected a text file in UTF-8, but {error}") from None
    if not counts:
        raise InputError(f"{table}: expected an id a line, but it is empty")
    problems = [f"{table}: expected an id a line, but got {id!r}" for id in counts if Path(id).name != id]
    problems += [f"{table}: duplicate id {id}" for id, count in counts.items() if count > 1]
    return sorted(id for id in counts if Path(id).name == id), problems


def _check(path: Path, photo: Path) -> tuple[list[str], bytes]:
    """What is wrong with a mask, and a digest of its file."""
    problems = []
    size = None
    try:
        with open_image(photo) as file:  # the header only
            sideways = orientation(file) in (5, 6, 7, 8)
            size = file.size[::-1] if sideways else file.size
    except InputError as error:
        problems.append(str(error))
    if not os.path.isfile(path):  # a pipe would be waited for
        return [*problems, f"{path}: no such file"], b""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as file:
            mode, depth = file.mode, data[24]  # Pillow's mode is P for 1, 2 and 4 bits too
            colours = file.getpalette()
            pixels = np.array(file)
    except Exception:
        return [*problems, f"{path}: not a PNG that decodes"], b""
    height, width = pixels.shape[:2]
    if size is not None and size != (width, height):
        problems.append(f"{path}: expected {size[0]}×{size[1]} pixels as the photo, but got {width}×{height}")
    mend = "write masks as cacl.artifacts.save_mask does"
    if colours is None or depth != 8:
        problems.append(f"{path}: expected a palette PNG of 8 bits, but got mode {mode}, depth {depth}; {mend}")
        return problems, b""
    if colours[: len(_COLOURS)] != _COLOURS:
        problems.append(f"{path}: expected the palette of VOC's masks, but got other colours; {mend}")
    wrong = [int(value) for value in np.flatnonzero(np.bincount(pixels.ravel())) if value > len(VOC_CLASSES)]
    if wrong:
        void = ", and the server takes no void" if wrong == [IGNORE] else ""
        problems.append(f"{path}: expected values 0 to {len(VOC_CLASSES)}, but got {wrong[0]}{void}")
    return problems, hashlib.sha256(data).digest()


def _write(file: IO[bytes], sources: Mapping[str, Path]) -> None:
    """A tar.gz of some files, by their names in it, which depends on nothing but names and contents."""
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name, path in sources.items():
            data = path.read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 315532800  # 1980: GNU tar warns of files from 1970
            tar.addfile(member, io.BytesIO(data))


def _read_back(path: Path) -> list[tuple[str, bytes]]:
    """Names and digests of the files in a tar.gz."""
    packed = []
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            content = tar.extractfile(member)
            packed.append((member.name, hashlib.sha256(content.read() if content else b"").digest()))
    return packed
