"""Which files of a folder are photos: what Pillow can read; what is left out, and what systems leave behind."""

from __future__ import annotations

import mimetypes
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from cacl._support.pillow import endings, opened
from cacl.errors import shown

_LITTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found"}
"""What systems leave in folders, in small letters."""
_IMAGES = {".heic", ".heif", ".jxl", ".svg", ".dng", ".arw", ".cr2", ".cr3", ".nef", ".orf", ".raf", ".rw2"}
"""Endings of images that Pillow reads nowhere, or not all of; others the system may know."""


class Found(NamedTuple):
    """What :func:`find_photos` finds."""

    photos: list[Path]
    problems: list[str]
    """A line for each image that is left out, and for each folder that cannot be read."""
    others: list[Path]
    """Files of other kinds, such as texts and tables."""


def find_photos(folder: Path) -> Found:
    """The photos in a folder and in those below it: the files whose ending is that of a format that Pillow reads.

    Linked folders are gone into, after the others. A folder that is there twice, or that is linked into itself, is gone
    into once. What systems leave behind is no data and is passed over: hidden folders such as ``.ipynb_checkpoints``,
    ``__MACOSX``, ``.DS_Store``, ``._*``, ``Thumbs.db``.
    """
    found = Found([], [], [])
    for kind, path, line in walk(folder):
        if kind == "photo":
            found.photos.append(path)
        elif kind == "problem":
            found.problems.append(line)
        else:
            found.others.append(path)
    return found


class Seen(NamedTuple):
    """What :func:`walk` comes by."""

    kind: Literal["photo", "problem", "other"]
    path: Path
    line: str = ""
    """What is wrong."""


def walk(folder: Path) -> Iterator[Seen]:
    """What :func:`find_photos` finds, one by one; of a folder no more than its names is in memory."""
    known = endings()
    for path, error in _files(folder):
        if error:
            yield Seen("problem", path, error)
        elif path.suffix.lower() in known:
            yield Seen("photo", path)
        elif _is_image(path):
            yield Seen("problem", path, f"{shown(path)}: left out: {_why(path)}")
        else:
            yield Seen("other", path)


def is_litter(name: str, *, folder: bool) -> bool:
    """Whether a file or folder of this name is what a system leaves behind."""
    hidden = name.startswith("." if folder else "._") or name == ".DS_Store"
    return hidden or name.lower() in _LITTER


def files_of(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder that a pattern such as ``*.png`` fits, without what systems leave behind."""
    return sorted(path for path in folder.glob(pattern) if not is_litter(path.name, folder=False))


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    """All files below a folder, in order; links to folders last. Of a folder that cannot be read, why."""
    folders, links, seen = deque([root]), deque[Path](), set[str]()
    while folders:
        folder = folders.popleft()
        if (real := os.path.realpath(folder)) not in seen:
            seen.add(real)
            try:
                with os.scandir(folder) as entries:
                    inside = sorted((entry.name, _is_folder(entry), entry.is_symlink()) for entry in entries)
            except OSError as error:
                yield folder, f"{shown(folder)}: cannot be read ({error.strerror})"
                inside = []
            for name, is_folder, is_link in inside:
                if is_litter(name, folder=is_folder):
                    continue
                if is_folder:
                    (links if is_link else folders).append(folder / name)
                else:
                    yield folder / name, ""
        if not folders:
            folders, links = links, deque()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()  # a loop of links is none


def _is_image(path: Path) -> bool:
    """Whether a file without a known ending is an image all the same, by its name or its content."""
    kind = mimetypes.guess_type(path.name)[0] or ""
    if path.suffix.lower() in _IMAGES or kind.startswith("image/"):
        return True
    return not kind and _decodes(path)


def _decodes(path: Path) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        with opened(path):
            return True
    except Exception:  # Pillow raises many kinds
        return False


def _why(path: Path) -> str:
    if _decodes(path):
        return "its ending is that of no format; rename it, or name the file itself"
    return f"Pillow does not read {path.suffix.lower()} here; convert it"
