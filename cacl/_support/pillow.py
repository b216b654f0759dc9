"""What Pillow opens, and which way up; also PNGs that it refuses for what they do not show."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

from PIL import ExifTags, Image

_UNREAD = ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")
"""For EPS Pillow starts Ghostscript, which runs what is in the file; of the others it reads no pixels."""


def formats() -> list[str]:
    """The formats whose pixels Pillow reads here."""
    Image.init()
    return [kind for kind in Image.OPEN if kind not in _UNREAD]


def endings() -> frozenset[str]:
    """The endings of files in these formats, in small letters, such as ``.jpg``."""
    read = formats()
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in read)


def opened(path: Path) -> Image.Image:
    """A file that Pillow opens; its errors are of many kinds."""
    try:
        image = Image.open(path, formats=formats())
        # With a name Pillow maps files of plain pixels, and garbles those of a TIFF that is to be turned by a quarter.
        image.filename = ""
        return image
    except Image.DecompressionBombError:
        raise
    except Exception as error:
        try:
            return Image.open(io.BytesIO(_bare_png(path)), formats=("PNG",))
        except Exception:
            raise error from None


_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _bare_png(path: Path) -> bytes:
    """A PNG without texts and colour profile, for which Pillow refuses it if they are large, and without what is broken
    and not needed to show it.

    Raises:
        ValueError: if it is none.
    """
    with open(path, "rb") as file:
        if file.read(8) != _SIGNATURE:
            raise ValueError("not a PNG")
        content = file.read()
    kept, start = [_SIGNATURE], 0
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        kind, checked = content[start + 4 : start + 8], zlib.crc32(content[start + 4 : end - 4])
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and content[end - 4 : end] == checked.to_bytes(4, "big")):
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def orientation(file: Image.Image) -> int:
    """The EXIF orientation of an open image, 1 to 8; 1, which is upright, where nothing that can be read says it."""
    try:
        found = file.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found) if found in range(1, 9) else 1
    except Exception:  # Pillow raises many kinds; the pixels are none the worse for it
        return 1
