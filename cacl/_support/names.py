"""Names of files and classes: what is an ending, and letters with an accent that are written in two ways."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from cacl.errors import InputError

ENDINGS = {
    ".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".eps", ".exr", ".fit",
    ".fits", ".flc", ".fli", ".gif", ".hdr", ".heic", ".heics", ".heif", ".heifs", ".hif", ".icns", ".ico",
    ".im", ".j2c", ".j2k", ".jfif", ".jif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpm", ".jpx",
    ".jxl", ".mpo", ".msp", ".pbm", ".pcd", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr",
    ".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp", ".wmf", ".xbm",
    ".xpm",
}  # fmt: skip
"""Of photos, in small letters: of formats that Pillow and its plugins read. They are written down, since an image's id
must not follow from what is installed."""


def without_ending(path: Path) -> Path:
    """A path without the ending of a photo: ``a/b.JPG`` is ``a/b``, and ``a/frame.0001`` stays as it is."""
    return path.with_name(stem) if (stem := stem_of(path.name)) != path.name else path


def stem_of(name: str) -> str:
    """A file's name without the ending of a photo."""
    stem, dot, ending = name.rpartition(".")
    return stem if stem.strip(".") and f"{dot}{ending}".lower() in ENDINGS else name


def composed(text: str) -> str:
    """A text in Unicode's form NFC: ``é`` is one character, also where it was written as ``e`` and an accent."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def plain(name: str) -> str:
    """A class name without regard to case, spaces, hyphens and underscores."""
    return composed(re.sub(r"[\s_-]+", "", name)).casefold()


def existing(path: Path) -> Path:
    """A path as the disk has it: letters with an accent may be composed there or not, whatever was written down.

    Where there is no such file in either form, the path as it is.
    """
    if str(path).isascii() or os.path.lexists(path):
        return path
    folder = existing(path.parent)
    forms = (folder / unicodedata.normalize(form, path.name) for form in ("NFC", "NFD"))
    return next((form for form in forms if os.path.lexists(form)), path)


def check_working_folder() -> None:
    """Require the current folder, from which relative paths begin, to be there.

    Raises:
        ValueError: if it was removed.
    """
    try:
        os.getcwd()
    except OSError:
        raise InputError("the current folder: it was removed; change to one that is there") from None


def state_of(file: Path) -> list[int]:
    """Size and time of a file; nothing for what is a name."""
    return [file.stat().st_size, file.stat().st_mtime_ns] if file.name and file.is_file() else []


def is_utf8(text: str) -> bool:
    """Names of files need not be; what is no UTF-8 in them Python keeps as half characters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
