"""Which images a VOC folder or a CSV lists, with their labels and masks, and what is wrong with the list."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, overload
from xml.etree import ElementTree

from cacl._checks import InputError, did_you_mean, quoted, shown
from cacl.metrics import IGNORE

Word = TypeVar("Word", str, int)

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


class Entry(NamedTuple):
    """Where an image's files lie, and the indices of its classes."""

    id: str
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

    def _path(self, column: int, index: int) -> Path | None:
        folder = self._in[column][index]
        return None if folder < 0 else Path(self._folders[folder], self._files[column][index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and vars(self) == vars(other)  # equal entries are stored in the same way

    def __hash__(self) -> int:
        return hash(self._ids)


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
        return entry._replace(mask=self._folder / f"{entry.id}.png")


class Listing(NamedTuple):
    """What a data set's files say."""

    classes: tuple[str, ...]
    entries: Entries
    problems: list[str]
    """What is wrong, a line each."""


def read_voc(root: Path, split: str) -> Listing:
    """A split of PASCAL VOC."""
    masks = root / "SegmentationClass"
    lists = root / "ImageSets" / "Segmentation"
    if split == "train_aug":
        masks = root / "SegmentationClassAug"
        val = set(_lines(lists / "val.txt"))
        ids = sorted(path.stem for path in masks.glob("*.png") if path.stem not in val)
        if not ids:
            raise InputError(f"{masks}: no masks for the split train_aug")
    elif (lists / f"{split}.txt").is_file():
        ids = [line.split()[0] for line in _lines(lists / f"{split}.txt")]
        if not ids:
            raise InputError(f"{lists / split}.txt: expected an id a line, but it is empty")
    else:
        known = sorted(path.stem for path in lists.glob("*.txt"))
        raise InputError(
            f"{lists}: expected split {split!r} as {split}.txt, but there is {', '.join(known) or 'no such folder'}"
        )
    index = {name.replace(" ", ""): k for k, name in enumerate(VOC_CLASSES)}
    problems = [f"{lists / split}.txt: duplicate id {shown(id)}" for id in duplicates(ids)]
    # Files of an image are called by its id.
    problems += [
        f"{lists / split}.txt: expected an id a line, but got {quoted(id)}" for id in ids if Path(id).name != id
    ]
    ids = [id for id in ids if Path(id).name == id]
    missing = []

    def entries() -> Iterator[Entry]:
        for id in dict.fromkeys(ids):
            annotation = root / "Annotations" / f"{id}.xml"
            names: list[str] = []
            if os.path.isfile(annotation):
                try:
                    tree = ElementTree.parse(annotation)
                    names = [(element.text or "").strip() for element in tree.iterfind("object/name")]
                except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: encodings
                    problems.append(f"{shown(annotation)}: not an annotation that parses ({error})")
            elif split != "test":  # the test images' annotations are not public
                problems.append(f"{shown(annotation)}: no such file")
            problems.extend(f"{shown(annotation)}: unknown class {quoted(name)}" for name in names if name not in index)
            image, mask = root / "JPEGImages" / f"{id}.jpg", masks / f"{id}.png"
            if not os.path.isfile(image):
                missing.append(f"{shown(image)}: no such file")
            labels = tuple(sorted({index[name] for name in names if name in index}))
            yield Entry(id, image, labels, mask if os.path.isfile(mask) else None)

    return Listing(VOC_CLASSES, Entries(entries()), problems + missing)


def read_csv(root: Path, split: str | None) -> Listing:
    """The rows of one split of ``dataset.csv``, or all of them."""
    classes = tuple(_lines(root / "classes.txt"))
    if not 1 <= len(classes) < IGNORE:
        raise InputError(f"{root / 'classes.txt'}: expected 1 to 254 class names, a line each, but got {len(classes)}")
    problems = [f"{root / 'classes.txt'}: duplicate class {quoted(name)}" for name in duplicates(classes)]
    problems += [
        f"{root / 'classes.txt'}: expected class names without a semicolon, which parts labels, but got {quoted(name)}"
        for name in classes
        if ";" in name
    ]
    table = root / "dataset.csv"
    columns = ["image", "labels", "mask", "split"]
    rows = _rows(table)
    header = next(rows, (1, []))[1]
    if [name.strip() for name in header] != columns:
        raise InputError(f"{table}: expected the header {','.join(columns)}, but got {quoted(','.join(header))}")
    index = {name: k for k, name in enumerate(classes)}
    splits = set()

    def read() -> Iterator[Entry]:
        for number, cells in rows:
            if not cells:
                continue
            if len(cells) != len(columns):
                problems.append(f"{table}: line {number}: expected {len(columns)} columns, but got {len(cells)}")
                continue
            row = {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}
            splits.add(row["split"])
            if split is not None and row["split"] != split:
                continue
            names = [name.strip() for name in row["labels"].split(";") if name.strip()]
            problems.extend(
                f"{table}: line {number}: unknown label {quoted(name)}{did_you_mean(name, classes)}"
                for name in names
                if name not in index
            )
            paths = {}
            for column in ("image", "mask"):
                relative = Path(row[column])
                if relative.anchor or ".." in relative.parts:  # in Windows, C:x and \\x are not absolute
                    problems.append(f"{table}: line {number}: {outside(relative)}")
                elif relative.name:
                    paths[column] = root / relative
                    if not os.path.isfile(paths[column]):  # Path.is_file raises for a name that is too long
                        problems.append(f"{shown(paths[column])}: no such file")
            if "image" not in paths:
                if not Path(row["image"]).name:
                    problems.append(f"{table}: line {number}: expected an image, but it is empty")
                continue
            id = Path(row["image"]).with_suffix("").as_posix()
            labels = tuple(sorted({index[name] for name in names if name in index}))
            yield Entry(id, paths["image"], labels, paths.get("mask"))

    entries = Entries(read())
    problems += [f"{table}: duplicate id {shown(id)}" for id in duplicates(entry.id for entry in entries)]
    if not entries and not problems:
        known = ", ".join(sorted(splits)) or "no row"
        wanted = "rows" if split is None else f"rows of split {split!r}"
        raise InputError(f"{table}: expected {wanted}, but there is {known}")
    return Listing(classes, short_ids(entries), problems)


def voc_splits(root: Path) -> list[str]:
    """The splits that a VOC folder has."""
    splits = sorted(path.stem for path in (root / "ImageSets" / "Segmentation").glob("*.txt"))
    return [*splits, "train_aug"] if "val" in splits and (root / "SegmentationClassAug").is_dir() else splits


def outside(path: Path) -> str:
    """What a message says of a path that is absolute, or leads out of the folder."""
    return f"expected a path inside the folder, but got {quoted(str(path))}"


def short_ids(entries: Entries) -> Entries:
    """The file's name is enough where all lie in one folder."""
    folders = {Path(entry.id).parent for entry in entries}
    if len(folders) > 1 or folders == {Path()}:
        return entries
    return Entries(entry._replace(id=Path(entry.id).name) for entry in entries)


def duplicates(words: Iterable[Word]) -> Iterator[Word]:
    """Each word or number that was there before."""
    seen: set[Word] = set()
    for word in words:
        if word in seen:
            yield word
        seen.add(word)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, each with the number of its last line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for cells in reader:
                yield reader.line_num, cells
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: expected a row of a CSV file, but {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file")
    return InputError(f"{path}: expected a text file in UTF-8, but {error}")


def _lines(path: Path) -> list[str]:
    """The lines of a small text file, stripped, without empty ones."""
    return [line.strip() for line in _text(path).splitlines() if line.strip()]
