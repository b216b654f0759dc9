"""The files of a data set without a look into them: which are missing, and what tells data from data that changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from cacl._support.cores import usable_cores
from cacl.constants import Range
from cacl.datasets.entries import Entries, Entry
from cacl.errors import InputError, shown

State = tuple[int, int]
"""Size in bytes and time in nanoseconds of a file."""


class Listed(Protocol):
    """A data set (:class:`cacl.datasets.Dataset`) by what its list says."""

    classes: tuple[str, ...]
    entries: Sequence[Entry]
    range: Range | None


class Fingerprint(NamedTuple):
    """What tells a split from what it was before: hashes."""

    listed: str
    """Of what its list says: classes, ids, labels, names of files; and of the range of its values."""
    sample: str
    """Of the sizes and times of a sample of its images and their masks."""
    images: str
    """:meth:`cacl.datasets.Dataset.fingerprint`."""
    masks: str
    """The same with the masks."""


def fingerprint(dataset: Listed, *, sample: int, known: Mapping[str, object] | None = None) -> Fingerprint:
    """What tells a data set from what it was before.

    Args:
        dataset: the data set.
        sample: how many of its images, evenly spread, are enough to look at where it has been looked at before.
        known: its fingerprint then, as a dictionary. Where list and sample are as they were, so is the rest.

    Raises:
        ValueError: if files are missing, one line each.
    """
    listed, some = _hash(dataset), spread(len(dataset.entries), sample)
    if known is not None and known.keys() == set(Fingerprint._fields) and known["listed"] == listed:
        digest = hashlib.sha256()
        for at, files in _found(dataset.entries, some):
            digest.update(repr((at, files)).encode())
        if known["sample"] == digest.hexdigest():
            return Fingerprint(**{name: str(each) for name, each in known.items()})
    digest, images, masks = hashlib.sha256(), _begun(dataset), _begun(dataset)
    chosen = set(some)
    for at, files in _found(dataset.entries, range(len(dataset.entries))):
        entry = dataset.entries[at]
        images.update(_of(entry, files[:1]))
        masks.update(_of(entry, files))
        if at in chosen:
            digest.update(repr((at, files)).encode())
    return Fingerprint(listed, digest.hexdigest(), images.hexdigest(), masks.hexdigest())


def fingerprint_of(dataset: Listed, *, masks: bool) -> str:
    """:meth:`cacl.datasets.Dataset.fingerprint`."""
    digest = _begun(dataset)
    for at, files in _found(dataset.entries, range(len(dataset.entries)), masks=masks):
        digest.update(_of(dataset.entries[at], files))
    return digest.hexdigest()


def missing(entries: Sequence[Entry], indices: Sequence[int] | None = None) -> list[str]:
    """A line for each file that is not there, or for the folder that it should be in; of all entries, or of some."""
    lines: dict[str, None] = {}
    for at, files in _states(entries, range(len(entries)) if indices is None else indices):
        if None in files:
            entry = entries[at]
            lines |= {
                _absent(path): None
                for path, file in zip((entry.image, entry.mask), files, strict=False)
                if file is None and path is not None
            }
    return list(lines)


def reason(error: InputError, path: Path | None) -> str:
    """Why a file was not opened: an error, or, as of :func:`missing`, that its folder is not there."""
    return str(error) if path is None or path.parent.is_dir() else _absent(path)


def spread(count: int, sample: int | None) -> Sequence[int]:
    """``sample`` indices of ``count``, evenly spread; all of them where there are no more, or where it is None."""
    return range(count) if sample is None or count <= sample else [i * count // sample for i in range(sample)]


def _begun(dataset: Listed) -> hashlib._Hash:
    digest = hashlib.sha256(repr(dataset.classes).encode())
    if dataset.range is not None:
        digest.update(repr(dataset.range).encode())
    return digest


def _hash(dataset: Listed) -> str:
    digest = _begun(dataset)
    entries = dataset.entries if isinstance(dataset.entries, Entries) else Entries(dataset.entries)
    for part in entries.parts():
        digest.update(part)
    return digest.hexdigest()


def _of(entry: Entry, files: Sequence[State | None]) -> bytes:
    return repr((entry.id, entry.labels, list(files))).encode()


def _found(
    entries: Sequence[Entry], indices: Sequence[int], *, masks: bool = True
) -> Iterator[tuple[int, list[State | None]]]:
    """As :func:`_states`; all that is missing is an error."""
    for at, files in _states(entries, indices, masks=masks):
        if None in files:
            raise InputError("\n".join(missing(entries)))
        yield at, files


def _states(
    entries: Sequence[Entry], indices: Sequence[int], *, masks: bool = True
) -> Iterator[tuple[int, list[State | None]]]:
    """(index, state of its image, and of its mask where there is one); None for a file that is missing.

    By threads: where files lie on another machine, each is waited for.
    """

    def look(start: int) -> list[list[State | None]]:
        rows: list[list[State | None]] = []
        last: tuple[Path, State | None] = Path(), None  # all masks may be in one file
        for at in indices[start : start + _AT_ONCE]:
            entry = entries[at]
            row = [_state(entry.image)]
            if masks and entry.mask is not None:
                if entry.mask != last[0]:
                    last = entry.mask, _state(entry.mask)
                row.append(last[1])
            rows.append(row)
        return rows

    with ThreadPoolExecutor(usable_cores() + 4) as pool:
        for start in range(0, len(indices), _AT_ONCE * _WAITING):
            starts = range(start, min(start + _AT_ONCE * _WAITING, len(indices)), _AT_ONCE)
            for first, rows in zip(starts, pool.map(look, starts), strict=True):
                yield from zip(indices[first : first + _AT_ONCE], rows, strict=True)


_AT_ONCE = 1024
"""Images whose files one thread looks at."""
_WAITING = 64
"""Such tasks that wait in the pool; what they find takes memory."""


def _state(path: Path) -> State | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # such as a name that is too long, or with a zero in it
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _absent(path: Path) -> str:
    if os.path.isdir(path.parent):
        return f"{shown(path)}: no such file"
    return f"{shown(path.parent)}: no such folder"
