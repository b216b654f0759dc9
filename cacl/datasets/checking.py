"""Every file of a data set opened once, and what is wrong with it, a line each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np

from cacl._support.cores import usable_cores
from cacl._support.progress import watched
from cacl.constants import IGNORE, Range
from cacl.datasets.dataset import Dataset, InOneFile
from cacl.datasets.entries import shared
from cacl.datasets.files import missing, reason, spread
from cacl.datasets.formats import FORMATS, format_of
from cacl.datasets.labels_and_masks import LabelsAndMasks, numbered, problems_of_classes
from cacl.errors import InputError, quoted, shown
from cacl.prompts import words_for

NOTE = "note: "
"""What lines begin with that a run says too, and does not stop for."""


@dataclass
class Findings:
    """What is wrong with data, and what is worth knowing, a line each."""

    problems: list[str] = field(default_factory=list)
    """A run refuses them."""
    notes: list[str] = field(default_factory=list)
    """A run says them and goes on."""

    @property
    def lines(self) -> list[str]:
        """Each line once; the notes say that they are."""
        return [*dict.fromkeys(self.problems), *(f"{NOTE}{note}" for note in dict.fromkeys(self.notes))]


def check(
    dataset: Dataset, *, masks: bool = True, indices: Sequence[int] | None = None, progress: bool = False
) -> list[str]:
    """Open every file of a data set once and list what is wrong, a line each with the file's path.

    Args:
        dataset: the data set.
        masks: open the masks too, and compare them with the labels.
        indices: which images; all by default.
        progress: show a progress bar where there is a terminal or a notebook.

    Returns:
        As of :func:`check_folder`.
    """
    found = check_lists({"": dataset}, (), disjoint=False)
    both = _opened_all(dataset, "", found, {}, masks=masks, indices=indices, progress=progress)
    _compare(dataset, "", both, found)
    return found.lines


def check_folder(
    root: str | PathLike[str],
    *,
    format: str | None = None,
    splits: Iterable[str] | None = None,
    range: Range | None = None,
    sample: int | None = None,
    progress: bool = False,
) -> list[str]:
    """Check the data set in a folder: its lists, every file, and whether labels and masks say the same.

    A run finds the same in the splits that it uses, since it does the same (of a sample) before its first step.

    Args:
        root: the folder.
        format: one of :data:`cacl.datasets.FORMATS`; by what lies in the folder if None.
        splits: the splits to look at; all of them if None. Those with ``train`` in their name are taken to be trained
            on, and need labels, but for those with ``unlabel``; where no name has it, one of all splits does.
        range: what the values of deep images span (see :func:`cacl.images.read_image`); by their type if None.
        sample: the most images of a split, evenly spread, that are opened; all if None. The lists are gone through
            whole, and so is what files there are.
        progress: show a progress bar where there is a terminal or a notebook.

    Returns:
        What is wrong, a line each with the file's path. Lines that begin with ``note:`` do not stop a run, which says
        them too: scores mean something else there than one would think.

    Raises:
        ValueError: if the folder holds no data set.
    """
    root = Path(root)
    format = format or format_of(root)
    wanted = list(splits or FORMATS[format].splits(root))
    trained = [name for name in wanted if re.search("(?<!un)train", name.lower()) and "unlabel" not in name.lower()]
    unknown = not trained and not splits
    found, classes = check_parts(
        root, format, wanted, None if unknown else trained, range=range, sample=sample, progress=progress
    )
    beside = root / "backgrounds.json"
    if FORMATS[format].brings_words and beside.is_file() and classes:
        try:
            words_for(classes, beside)
        except InputError as error:
            found.problems.append(str(error))
    return found.lines


def check_parts(
    root: Path,
    format: str,
    splits: Sequence[str],
    trained: Collection[str] | None,
    *,
    range: Range | None = None,
    sample: int | None = None,
    progress: bool = False,
) -> tuple[Findings, tuple[str, ...]]:
    """What is found in splits of a folder, of which some are trained on; and the classes, if a list has no mistake."""
    known = FORMATS[format]
    parts = {split: known.read(root, split) for split in splits}
    for part in parts.values():
        part.dataset.range = range
        part.listing.problems.extend(missing(part.listing.entries))
    # What is said of a list with mistakes would be about these.
    sound = {split: part.dataset for split, part in parts.items() if not part.listing.problems}
    found = check_lists(sound, trained, disjoint=known.disjoint)
    found.problems[:0] = [problem for part in parts.values() for problem in part.listing.problems]
    check_files(
        {split: part.dataset for split, part in parts.items()}, found, compared=sound, sample=sample, progress=progress
    )
    return found, next((dataset.classes for dataset in sound.values()), ())


def check_lists(datasets: Mapping[str, Dataset], trained: Collection[str] | None, *, disjoint: bool) -> Findings:
    """What is found in the lists of splits, of which some are trained on (any, if None), without a look at a file;
    ``disjoint``: whether a photo in two of them is wrong."""
    found = Findings()
    first = next(iter(datasets), "")
    for split, dataset in datasets.items():
        where = _where(dataset, split)
        found.problems += [f"{_named(dataset)}{problem}" for problem in problems_of_classes(dataset.classes)]
        if dataset.classes != datasets[first].classes:
            found.problems.append(f"{where}expected the categories of the split {first}, but it has others")
        found.notes += dataset.origin.notes
    bare = [split for split, dataset in datasets.items() if not any(entry.labels for entry in dataset.entries)]
    if trained is None:
        trained = datasets if len(bare) == len(datasets) else ()
    found.problems += [
        f"{_where(datasets[split], split)}expected photos with labels, which are all that is learnt from, but none of "
        f"the {numbered(len(datasets[split]), 'photo')} has one"
        for split in bare
        if split in trained
    ]
    if disjoint:
        found.problems += _in_two(datasets)
    return found


def _in_two(datasets: Mapping[str, Dataset]) -> Iterable[str]:
    """A line for each two splits that share photos."""
    for (one, other), photos in shared({split: dataset.entries for split, dataset in datasets.items()}).items():
        yield (
            f"{_where(datasets[other], '')}expected each photo in one split, but {numbered(len(photos), 'photo')} "
            f"{'is' if len(photos) == 1 else 'are'} in {quoted(one)} and {quoted(other)}, such as {shown(photos[0])}"
        )


def check_files(
    datasets: Mapping[str, Dataset],
    found: Findings,
    *,
    compared: Collection[str] | None = None,
    sample: int | None = None,
    progress: bool = False,
) -> None:
    """Add what is found in the files of splits, each of which is opened once.

    Args:
        datasets: split -> data set.
        found: what is added to.
        compared: the splits whose labels and masks are compared; all if None.
        sample: the most images of a split that are opened; all if None.
        progress: show a progress bar where there is a terminal or a notebook.
    """
    seen: dict[int, int] = {}
    for split, dataset in datasets.items():
        some = spread(len(dataset), sample)
        if len(some) < len(dataset):
            found.notes.append(f"{_where(dataset, split)}{len(some)} of {numbered(len(dataset), 'photo')} were opened")
        both = _opened_all(dataset, split, found, seen, indices=some, progress=progress)
        if compared is None or split in compared:
            _compare(dataset, split, both, found)


def _compare(dataset: Dataset, split: str, both: LabelsAndMasks, found: Findings) -> None:
    if problems_of_classes(dataset.classes):  # whose values are not what they should be
        return
    if problem := both.problem():
        found.problems.append(f"{_where(dataset, split)}{problem}")
    else:
        found.notes += [f"{_where(dataset, split)}{note}" for note in both.notes()]


def _opened_all(
    dataset: Dataset,
    split: str,
    found: Findings,
    seen: dict[int, int],
    *,
    masks: bool = True,
    indices: Sequence[int] | None = None,
    progress: bool = False,
) -> LabelsAndMasks:
    """``seen``: the hash of an entry whose files have been opened -> the values in its mask, a bit each."""

    def look_at(index: int) -> tuple[int, int, list[str]]:
        entry = dataset.entries[index]
        number = hash(entry)
        if number in seen:
            return number, seen[number], []
        return number, *_opened(dataset, index, faint, masks=masks and entry.mask is not None)

    faint: list[str] = []
    chosen = range(len(dataset)) if indices is None else indices
    whole = len(chosen) >= len(dataset)
    both = LabelsAndMasks(dataset.classes, drawn=isinstance(dataset, InOneFile), whole=whole)
    with (
        ThreadPoolExecutor(usable_cores() + 4) as pool,  # decoding releases the interpreter's lock
        watched(None, total=len(chosen), desc="check", progress=progress) as bar,
    ):
        for start in range(0, len(chosen), _AT_ONCE):
            some = chosen[start : start + _AT_ONCE]
            for index, (number, values, problems) in zip(some, pool.map(look_at, some), strict=True):
                found.problems += problems
                seen[number] = values
                if values:
                    both.add(dataset.entries[index].labels, values)
                bar.update()
    if faint and dataset.range:
        found.notes.append(
            f"{_where(dataset, split)}{len(faint)} of {numbered(len(chosen), 'photo')} come out nearly black or white, "
            f"such as {min(faint)}: does `[data] range = [{dataset.range[0]:g}, {dataset.range[1]:g}]` span the values?"
        )
    return both


def _opened(dataset: Dataset, index: int, faint: list[str], *, masks: bool) -> tuple[int, list[str]]:
    """The values in an image's mask, a bit each, 0 where there is none that is sound, and what is wrong.

    ``faint``: what is added to where the data set's range leaves nothing to be seen of the image.
    """
    found = []
    size = None
    entry = dataset.entries[index]
    try:
        image = dataset.image(index)
        size = tuple(image.shape[-2:])
        if dataset.range and (image.max() < _FAINT or image.min() > 255 - _FAINT):
            faint.append(shown(entry.image))
    except InputError as error:
        found.append(reason(error, entry.image))
    if not masks:
        return 0, found
    try:
        mask = dataset.mask(index)
    except InputError as error:
        return 0, [*found, reason(error, entry.mask)]
    if size is not None and tuple(mask.shape) != size:
        found.append(
            f"{dataset.mask_name(index)}: expected {size[1]}×{size[0]} pixels as the image, "
            f"but got {mask.shape[1]}×{mask.shape[0]}"
            + ("; is one of them turned by its EXIF data?" if tuple(mask.shape) == size[::-1] else "")
        )
    values = np.flatnonzero(np.bincount(mask.numpy().ravel(), minlength=256)).tolist()
    if wrong := [value for value in values if len(dataset.classes) < value < IGNORE]:
        found.append(
            f"{dataset.mask_name(index)}: expected values 0 to {len(dataset.classes)} or 255, but got {wrong[0]}"
        )
    return 0 if found else sum(1 << value for value in values), found


_FAINT = 16
"""An image whose values are all nearer to black or to white than this shows nothing."""
_AT_ONCE = 1024
"""Images whose tasks wait in the pool; each takes memory."""


def _where(dataset: Dataset, split: str) -> str:
    """What a line about a split begins with."""
    listed = f"{shown(dataset.origin.listed)}: " if dataset.origin.listed else ""
    return f"{listed}split {quoted(split)}: " if split else listed


def _named(dataset: Dataset) -> str:
    return f"{shown(dataset.origin.named)}: " if dataset.origin.named else ""
