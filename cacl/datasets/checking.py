"""Every file of a data set opened once, and what is wrong with it, a line each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

import numpy as np

from cacl._support.cores import usable_cores
from cacl._support.progress import watched
from cacl.constants import IGNORE
from cacl.datasets.dataset import Dataset
from cacl.datasets.formats import FORMATS, format_of
from cacl.errors import InputError, shown


def check(
    dataset: Dataset, *, masks: bool = True, indices: Sequence[int] | None = None, progress: bool = False
) -> list[str]:
    """Open every file of a data set once and list what is wrong, a line each with the file's path.

    Args:
        dataset: the data set.
        masks: open the masks too.
        indices: which images; all by default.
        progress: show a progress bar where there is a terminal.
    """

    def problems_of(index: int) -> list[str]:
        entry = dataset.entries[index]
        found = []
        size = None
        try:
            size = tuple(dataset.image(index).shape[-2:])
        except InputError as error:
            found.append(str(error))
        if masks and entry.mask is not None:
            try:
                mask = dataset.mask(index)
            except InputError as error:
                return [*found, str(error)]
            if size is not None and tuple(mask.shape) != size:
                found.append(
                    f"{dataset.mask_name(index)}: expected {size[1]}×{size[0]} pixels as the image, "
                    f"but got {mask.shape[1]}×{mask.shape[0]}"
                )
            values = np.flatnonzero(np.bincount(mask.numpy().ravel(), minlength=256))
            wrong = [int(value) for value in values if len(dataset.classes) < value < IGNORE]
            if wrong:
                found.append(
                    f"{dataset.mask_name(index)}: expected values 0 to {len(dataset.classes)} or 255, "
                    f"but got {wrong[0]}"
                )
        return found

    chosen = range(len(dataset)) if indices is None else indices
    problems: list[str] = []
    with (
        ThreadPoolExecutor(usable_cores() + 4) as pool,  # decoding releases the interpreter's lock
        watched(None, total=len(chosen), desc="check", progress=progress) as bar,
    ):
        for start in range(0, len(chosen), _AT_ONCE):
            for found in pool.map(problems_of, chosen[start : start + _AT_ONCE]):
                problems += found
                bar.update()
    return problems


_AT_ONCE = 1024
"""Images whose tasks wait in the pool; each takes memory."""


def check_folder(
    root: str | PathLike[str],
    *,
    format: str | None = None,
    splits: Iterable[str] | None = None,
    progress: bool = False,
) -> list[str]:
    """Check the data set in a folder.

    Args:
        root: the folder.
        format: one of :data:`cacl.datasets.FORMATS`; by what lies in the folder if None.
        splits: the splits to look at; all of them if None.
        progress: show a progress bar where there is a terminal.

    Returns:
        What is wrong, a line each with the file's path.

    Raises:
        ValueError: if the folder holds no data set.
    """
    root = Path(root)
    problems: list[str] = []
    seen: set[int] = set()  # of hashes: the entries themselves would take a hundred times the memory
    known = FORMATS[format or format_of(root)]
    wanted = list(splits or known.splits(root))
    parts = [known.read(root, split) for split in wanted]
    for part in parts:
        if part.listing.classes != parts[0].listing.classes:
            problems.append(
                f"{shown(part.source)}: expected the categories of the split {wanted[0]}, but it has others"
            )
        problems += part.listing.problems
        new = []
        for index, number in enumerate(map(hash, part.listing.entries)):
            if number not in seen:
                seen.add(number)
                new.append(index)
        problems += check(part.dataset, indices=new, progress=progress)
    return list(dict.fromkeys(problems))
