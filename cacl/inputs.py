"""Which photos :mod:`cacl.predict` is given and what their masks are called, however many there are."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cacl._support.names import without_ending
from cacl.errors import InputError, quoted, shown
from cacl.folders import Seen, walk

OVERLAYS = "overlays"
"""The folder of pictures in that of the masks."""
_SAID = 20


class Shard(NamedTuple):
    """One part of several that photos are shared out to, each by its name alone: whatever comes and goes beside it."""

    number: int = 1
    """From 1 on."""
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"`` is the second of eight.

        Raises:
            ValueError: if it is something else.
        """
        parts = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if parts and 1 <= int(parts[1]) <= int(parts[2]):
            return cls(int(parts[1]), int(parts[2]))
        raise InputError(
            f"Expected argument `shard` to be a part such as 2/8, from 1/8 to 8/8, but got {quoted(text)}."
        )

    @classmethod
    def of_process(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """That of one of torchrun's processes, of a job of a Slurm array, or of both; the whole, if this is neither.

        Raises:
            ValueError: if the array has gaps.
        """
        known = environment.get
        rank, world_size, place, jobs = 0, 1, 0, 1
        if known("WORLD_SIZE") and known("RANK"):
            rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        if known("SLURM_ARRAY_TASK_ID") and known("SLURM_ARRAY_TASK_COUNT"):
            first, step = int(known("SLURM_ARRAY_TASK_MIN") or 0), int(known("SLURM_ARRAY_TASK_STEP") or 1)
            jobs = int(environment["SLURM_ARRAY_TASK_COUNT"])
            last = int(known("SLURM_ARRAY_TASK_MAX") or first + step * (jobs - 1))
            place = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
            if not place < jobs == (last - first) // step + 1:
                raise InputError(
                    f"SLURM_ARRAY_TASK_COUNT: an array with gaps has no {jobs} parts that fit together; say the part "
                    "by --shard I/N (`shard`)"
                )
        return cls(place * world_size + rank + 1, jobs * world_size)


class Photo(NamedTuple):
    """A photo, and what it is called in the folder of masks."""

    path: Path
    name: Path
    """Without its ending, where no other photo has the same one but for it."""


class Survey(NamedTuple):
    """What going through all that was named has found."""

    photos: int
    """Those of the shard."""
    others: int
    """Files of folders that are no photos."""
    other: Path | None
    """The first of them."""
    shared: frozenset[int]
    """Hashes of names that several photos have but for their endings."""
    again: frozenset[int]
    """Hashes of places that were named more than once."""


class Inputs:
    """Photos of folders, files and a list, gone through twice and never in memory: a few numbers of each are.

    ``a/photo.jpg`` of a folder is called ``a/photo``, a file that is named itself ``photo``, and one of a list what it
    is called there, without the first ``/``. Photos of one name but other endings keep them.

    Args:
        named: files, and folders, which are searched for photos (see :func:`cacl.folders.find_photos`).
        listed: a file with a path a line, as seen from the current folder; or an open one, such as standard input.
        out: folder of the masks; what is in it and below a folder that is named is no photo.
        shard: the part that is wanted.
    """

    def __init__(
        self,
        named: Iterable[str | os.PathLike[str]],
        out: Path,
        *,
        listed: str | os.PathLike[str] | IO[bytes] | None = None,
        shard: Shard = Shard(),
    ) -> None:
        self.named, self.out, self.shard = [Path(path) for path in named], out, shard
        self._list = Path(listed) if isinstance(listed, str | os.PathLike) else None
        self._spool: IO[bytes] | None = None
        if self._list is not None and os.path.exists(self._list) and not os.path.isfile(self._list):
            with self._opened(self._list) as pipe:  # which can be read once
                self._spool = _spooled(pipe)
        elif listed is not None and not isinstance(listed, str | os.PathLike):
            self._spool = _spooled(listed)

    def __iter__(self) -> Iterator[Photo | str]:
        """The photos of the shard; from the first shard also a line for whatever else was left out."""
        known, gone = self.survey, set()
        for seen, name in self._all():
            if seen.kind == "problem" and self.shard.number == 1:
                yield seen.line
            if seen.kind != "photo":
                continue
            if (place := _hash(_place(seen.path))) in known.again:
                if place in gone:
                    continue
                gone.add(place)
            short = without_ending(name)
            if self._wants(name):
                yield Photo(seen.path, name if _hash(short) in known.shared else short)

    @cached_property
    def survey(self) -> Survey:
        """All of them once: how many, and which names are not a photo's alone.

        Raises:
            ValueError: if there is no photo, two would have one mask, or a mask would be written over a photo.
        """
        places, shorts, longs = array("Q"), array("Q"), array("Q")
        inside: dict[int, Path] = {}
        lines: list[str] = []
        others, other = 0, None
        for seen, name in self._all():
            if seen.kind == "problem":
                lines += [seen.line] * (len(lines) < _SAID)
            elif seen.kind == "other":
                others, other = others + 1, other or seen.path
            else:
                places.append(_hash(_place(seen.path)))
                shorts.append(_hash(without_ending(name)))
                longs.append(_hash(name))
                inside |= self._replaced(seen.path)
        if not places:
            raise InputError("\n".join(lines) or "Expected photos, but none was named.")
        first, again = _first(places)
        short, long = np.asarray(shorts)[first], np.asarray(longs)[first]
        shared = _several(short)
        names = np.where(np.isin(short, shared), long, short)
        if len(double := _several(names)):
            self._refuse_double(frozenset(shared.tolist()), int(double[0]))
        if inside and len(hit := names[np.isin(names, list(inside))]):
            photo = inside[int(hit[0])]
            raise InputError(f"{shown(photo)}: expected another folder `out`: this photo would be replaced")
        mine = int((long % np.uint64(self.shard.of) == self.shard.number - 1).sum())
        return Survey(mine, others, other, frozenset(shared.tolist()), again)

    def _wants(self, name: Path) -> bool:
        return _hash(name) % self.shard.of == self.shard.number - 1

    def _all(self) -> Iterator[tuple[Seen, Path]]:
        """What there is, photos with their names."""
        out = os.path.realpath(self.out)
        for path in self.named:
            if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
                there = os.path.exists(path)
                line = "" if there else f"{shown(path)}: no such file or folder"
                yield Seen("photo" if there else "problem", path, line), Path(path.name)
                continue
            photos = made = 0
            for seen in walk(path):
                if seen.kind == "photo":
                    if _is_in(_folder(seen.path.parent), out):  # what an earlier call made
                        made += 1
                        continue
                    photos += 1
                yield seen, seen.path.relative_to(path)
            if not photos:
                reason = f"besides those in `out`, {self.out}" if made else "(by the endings that Pillow knows)"
                yield Seen("problem", path, f"{shown(path)}: no photos here {reason}"), path
        for path in self._listed():
            yield Seen("photo", path), _name_of(path)

    def _listed(self) -> Iterator[Path]:
        if self._spool is not None:
            self._spool.seek(0)
            yield from _paths(self._spool)
        elif self._list is not None:
            with self._opened(self._list) as file:
                yield from _paths(file)

    @staticmethod
    def _opened(path: Path) -> IO[bytes]:
        try:
            return open(path, "rb")
        except OSError as error:
            raise InputError(f"{shown(path)}: expected a list of photos, but {error.strerror}") from None

    def _replaced(self, photo: Path) -> dict[int, Path]:
        """A photo in the folder of masks, by the names whose mask or overlay would take its place."""
        out, real = os.path.realpath(self.out), Path(_place(photo, follow=True))
        if not _is_in(str(real), out):
            return {}
        name = real.relative_to(out)
        found = {_hash(name.with_suffix("")): photo} if name.suffix == ".png" else {}
        if name.suffix == ".jpg" and name.parts[0] == OVERLAYS and len(name.parts) > 1:
            found[_hash(name.relative_to(OVERLAYS).with_suffix(""))] = photo
        return found

    def _refuse_double(self, shared: frozenset[int], double: int) -> None:
        both: dict[str, Path] = {}
        for seen, name in self._all():
            if seen.kind == "photo":
                short = without_ending(name)
                if _hash(name if _hash(short) in shared else short) == double:
                    both.setdefault(_place(seen.path), seen.path)
        first, second, *_ = map(shown, both.values())
        raise InputError(f"{first} and {second}: expected photos of different names; name a folder that holds both")


def _spooled(file: IO[bytes]) -> IO[bytes]:
    """A copy that can be read again, as long as it is there."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(file, copy)
    return copy


def _paths(file: IO[bytes]) -> Iterator[Path]:
    for number, line in enumerate(file):
        text = (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).rstrip(b"\r\n")
        if b"\0" in text:
            raise InputError(f"line {number + 1} of the list: expected the path of a photo, but it has a zero byte")
        if text:
            yield Path(os.fsdecode(text))


def _name_of(path: Path) -> Path:
    """What a photo of a list is called: as it stands there, and what leads out of the current folder by all of it."""
    name = Path(os.path.normpath(path))
    if name.is_absolute() or name.parts[:1] == ("..",):
        name = Path(os.path.abspath(path))
    return name.relative_to(name.anchor) if name.anchor else name


def _hash(name: str | Path) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")


@lru_cache(maxsize=1024)
def _folder(path: Path) -> str:
    """A folder without links; a loop of them, at which ``Path.resolve`` raises an error, stays."""
    return os.path.realpath(path)


def _place(photo: Path, *, follow: bool = False) -> str:
    """Where a photo is: one that is a link is another than what it leads to, unless that is followed."""
    if follow and os.path.islink(photo):
        return os.path.realpath(photo)
    return os.path.join(_folder(photo.parent), photo.name)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _first(places: array[int]) -> tuple[NDArray[np.intp], frozenset[int]]:
    """Where each place comes first, and those that come again."""
    values, first, times = np.unique(np.asarray(places), return_index=True, return_counts=True)
    return np.sort(first), frozenset(values[times > 1].tolist())


def _several(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What stands several times."""
    found, times = np.unique(values, return_counts=True)
    several: NDArray[np.uint64] = found[times > 1]
    return several
