"""Images of a data set in little memory: where their files lie, and which classes they show."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

from cacl._support.names import existing
from cacl.errors import quoted

Word = TypeVar("Word", str, int)


class Entry(NamedTuple):
    """Where an image's files lie, and the indices of its classes."""

    id: str
    """In Unicode's form NFC; files that are made of the image are called by it."""
    image: Path
    labels: tuple[int, ...]
    mask: Path | None


class Texts:
    """Strings that are added one by one, in little more memory than their letters take."""

    def __init__(self, words: Iterable[str] = ()) -> None:
        self._letters, self._ends = bytearray(), array("I", [0])
        for word in words:
            self.append(word)

    def append(self, word: str) -> None:
        self._letters += word.encode("utf-8", "surrogatepass")  # names of files may hold what is no letter
        self._ends.append(len(self._letters))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._letters[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def parts(self) -> Iterator[bytes | memoryview]:
        """Pieces of memory that are the same for the same words only."""
        yield self._ends.tobytes()
        yield memoryview(self._letters).toreadonly()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Texts) and (self._letters, self._ends) == (other._letters, other._ends)

    def __hash__(self) -> int:
        return hash(bytes(self._letters))


class Entries(Sequence[Entry]):
    """Entries in some 100 to 150 bytes each, where objects would take 1000; they cannot be changed.

    An entry is made when it is asked for. All that is stored lies in a few pieces of memory without references to
    objects, so that it stays shared with the processes that are forked to load images: to look at an object is to
    count a reference, and copies its page.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._ids = Texts()
        self._files = Texts(), Texts()  # names of images and masks, and the numbers of their folders
        self._in = array("i"), array("i")  # -1 for no mask
        self._labels, self._ends = array("H"), array("I", [0])
        folders: dict[Path, int] = {}
        for entry in entries:
            self._ids.append(entry.id)
            for path, names, numbers in zip((entry.image, entry.mask), self._files, self._in, strict=True):
                names.append("" if path is None else path.name)
                numbers.append(-1 if path is None else folders.setdefault(path.parent, len(folders)))
            self._labels.extend(entry.labels)
            self._ends.append(len(self._labels))
        self._folders = Texts(map(str, folders))

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Entries: ...
    def __getitem__(self, index: int | slice) -> Entry | Entries:
        if isinstance(index, slice):
            return Entries(self[i] for i in range(len(self))[index])
        at = range(len(self))[index]
        image = self._path(0, at)
        assert image is not None
        labels = self._labels[self._ends[at] : self._ends[at + 1]]
        return Entry(self._ids[at], image, tuple(labels), self._path(1, at))

    @property
    def ids(self) -> Iterable[str]:
        return self._ids

    def renamed(self, ids: Iterable[str]) -> Entries:
        """The same with other ids."""
        other = Entries()
        vars(other).update(vars(self), _ids=Texts(ids))
        return other

    def parts(self) -> Iterator[bytes | memoryview]:
        """Pieces of memory that are the same for the same entries only, wherever the folder lies that all are in."""
        for words in (self._ids, *self._files):
            yield from words.parts()
        yield repr(_below(list(self._folders))).encode("utf-8", "surrogatepass")
        for numbers in (self._labels, self._ends, *self._in):
            yield numbers.tobytes()

    def masked(self) -> list[int]:
        """The indices of those that have a mask."""
        return [index for index, folder in enumerate(self._in[1]) if folder >= 0]

    def _path(self, column: int, index: int) -> Path | None:
        folder = self._in[column][index]
        return None if folder < 0 else Path(self._folders[folder], self._files[column][index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and vars(self) == vars(other)  # equal entries are stored in the same way

    def __hash__(self) -> int:
        return hash(self._ids)


def _below(folders: Sequence[str]) -> list[str]:
    """Folders as seen from the one that all of them are in."""
    try:
        shared = os.path.commonpath(folders)
    except ValueError:  # there is none: no folder at all, drives, absolute ones and others
        return list(folders)
    return [os.path.relpath(folder, shared) for folder in folders] if len(folders) > 1 else [os.path.basename(shared)]


class MasksIn(Sequence[Entry]):
    """The same entries with other masks: ``<id>.png`` in a folder."""

    def __init__(self, entries: Sequence[Entry], folder: Path) -> None:
        self._entries, self._folder = entries, folder

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> MasksIn: ...
    def __getitem__(self, index: int | slice) -> Entry | MasksIn:
        if isinstance(index, slice):
            return MasksIn(self._entries[index], self._folder)
        entry = self._entries[index]
        return entry._replace(mask=existing(self._folder / f"{entry.id}.png"))


class Origin(NamedTuple):
    """Where a data set was read from, for messages."""

    listed: Path | None = None
    """The file that lists its images."""
    named: Path | None = None
    """The file that names its classes."""
    notes: tuple[str, ...] = ()
    """What is no mistake and should be known, a line each."""


class Listing(NamedTuple):
    """What a data set's files say."""

    classes: tuple[str, ...]
    entries: Entries
    problems: list[str]
    """What is wrong, a line each."""
    origin: Origin = Origin()


def outside(path: Path) -> str:
    """What a message says of a path that is absolute, or leads out of the folder."""
    return f"expected a path inside the folder, but got {quoted(str(path))}"


def short_ids(entries: Entries) -> Entries:
    """The file's name is enough where all lie in one folder."""
    folders = {id.rpartition("/")[0] for id in entries.ids}
    if len(folders) > 1 or folders == {""}:
        return entries
    return entries.renamed(id.rpartition("/")[2] for id in entries.ids)


def duplicates(words: Iterable[Word]) -> Iterator[Word]:
    """Each word or number that was there before."""
    seen: set[Word] = set()
    for word in words:
        if word in seen:
            yield word
        seen.add(word)


def shared(parts: Mapping[str, Sequence[Entry]]) -> dict[tuple[str, str], list[Path]]:
    """The photos that are in two of some parts, by these parts' names."""
    seen: dict[int, str] = {}  # of hashes: the paths themselves would take far more memory
    found: dict[tuple[str, str], list[Path]] = {}
    for part, entries in parts.items() if len(parts) > 1 else ():
        for entry in entries:
            if (other := seen.setdefault(hash(entry.image), part)) != part:
                found.setdefault((other, part), []).append(entry.image)
    return found
