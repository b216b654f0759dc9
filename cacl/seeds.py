"""Seeds from elsewhere: masks or soft maps that other tools made, held to the tags of their photos."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from cacl._support.distributed import barrier, shard, unshard
from cacl._support.pool import map_processes
from cacl._support.progress import watched
from cacl.artifacts import ImageCAMs, load_cams, map_size, save_cams
from cacl.constants import IGNORE
from cacl.datasets import Dataset
from cacl.errors import InputError, shown
from cacl.images import Mask, open_image, photo_size, read_mask
from cacl.mining import snap
from cacl.settings import Machine

ENDINGS = (".png", ".npz")
"""Of masks, and of soft maps."""
SEEDS = "seeds.json"
"""What is known of the seeds of a run, beside their files."""


class Found(NamedTuple):
    """What of an image's seeds does not go with its tags."""

    dropped: tuple[int, ...]
    """Classes with a pixel that are no tags of the image."""
    empty: tuple[int, ...]
    """Tags without a pixel."""


class Held(NamedTuple):
    """What :func:`hold_to_tags` found: images by class name."""

    images: int
    dropped: dict[str, int]
    """In how many images a class had pixels though it is no tag of the image; they are left out."""
    empty: dict[str, int]
    """In how many images a tag had no pixel."""

    def __str__(self) -> str:
        """In one line."""
        parts = [f"{self.images} images"]
        for what, counts in (
            ("tags without a pixel", self.empty),
            ("classes that are no tags, left out", self.dropped),
        ):
            if counts:
                most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
                named = ", ".join(f"{name} {count}" for name, count in most[:5])
                more = f", {len(most) - 5} more classes" if len(most) > 5 else ""
                parts.append(f"{sum(counts.values())} {what} ({named}{more})")
        return "; ".join(parts)


def check_seeds(dataset: Dataset, folder: Path, what: str = "seeds", endings: Sequence[str] = ENDINGS) -> None:
    """Require a file of each image in a folder of seeds.

    Raises:
        ValueError: if there is no such folder, or one of its images has no file or two.
    """
    if not folder.is_dir():
        raise InputError(f"{shown(folder)}: no such folder of {what}")
    files = [[ending for ending in endings if (folder / f"{e.id}{ending}").is_file()] for e in dataset.entries]
    if missing := [entry.id for entry, found in zip(dataset.entries, files, strict=True) if not found]:
        raise InputError(
            f"{shown(folder)}: expected {what} of each of {len(dataset)} images, "
            f"{' or '.join(f'<id>{ending}' for ending in endings)}, but {len(missing)} have none, such as "
            f"{shown(missing[0])}"
        )
    if twice := [entry.id for entry, found in zip(dataset.entries, files, strict=True) if len(found) > 1]:
        raise InputError(f"{shown(folder)}: expected one file of {what} an image, but {shown(twice[0])} has two")


def check_outside(folder: Path, run: Path) -> None:
    """Require a folder that is not a stage's own in a run, which makes it anew and removes what is there.

    Raises:
        ValueError: if it is.
    """
    folder, run = folder.resolve(), run.resolve()
    inside = folder.relative_to(run).parts if folder.is_relative_to(run) else ()
    if inside and (run / inside[0] / "stage.json").is_file():
        raise InputError(
            f"{shown(folder)}: expected a folder of other tools, but it is the run's own, which the run would remove: "
            "copy it first"
        )


def state_of(dataset: Dataset, folder: Path, endings: Sequence[str] = ENDINGS) -> str:
    """A hash of sizes and times of the files of a folder of seeds: changes when they do."""
    digest = hashlib.sha256()
    for entry in dataset.entries:
        for ending in endings:
            path = folder / f"{entry.id}{ending}"
            if path.is_file():
                state = path.stat()
                digest.update(repr((entry.id, ending, state.st_size, state.st_mtime_ns)).encode())
    return digest.hexdigest()


def read_seeds(dataset: Dataset, folder: Path, index: int) -> tuple[ImageCAMs, Found]:
    """The seeds of an image as CAMs of its tags, and what had to be changed.

    ``<id>.png`` is a mask of the photo's size, palette or grey: 0 for the background, class + 1, and 255 where nobody
    knows, which counts half for each tag. ``<id>.npz`` is what :func:`cacl.artifacts.load_cams` reads: ``classes``
    ``(C,)`` and ``maps`` ``(C, h, w)`` in [0, 1], of any size. What is of no tag is left out, a tag without a pixel has
    a map of zeros. Maps of a mask have the maximum 1 however small the object is.

    Raises:
        ValueError: if the file is missing or holds something else.
    """
    entry, count = dataset.entries[index], len(dataset.classes)
    width, height = photo_size(entry.image)
    size = map_size((height, width))
    path = folder / f"{entry.id}.npz"
    if not path.is_file():
        path = folder / f"{entry.id}.png"
        maps = _of_mask(path, (height, width), entry.labels, count)
    else:
        given = load_cams(path, count)
        if given.maps.size and given.maps.max() > 1:
            raise InputError(f"{shown(path)}: expected maps in [0, 1], but got {given.maps.max():g}")
        if len(set(given.classes.tolist())) < len(given.classes):
            raise InputError(f"{shown(path)}: expected each class once, but got {given.classes.tolist()}")
        maps = {int(k): torch.from_numpy(own).float() for k, own in zip(given.classes, given.maps, strict=True)}
    seen = {k for k, own in maps.items() if own.any()}
    nothing = torch.zeros(size, device="cpu")
    held = [_resized(maps[k], size) if k in seen else nothing for k in entry.labels]
    if path.suffix == ".png":
        held = [own / own.max().clamp(min=1e-6) for own in held]  # a line of a pixel is no faint area
    tags = set(entry.labels)
    found = Found(tuple(sorted(seen - tags)), tuple(sorted(tags - seen)))
    stacked = torch.stack(held) if held else torch.zeros(0, *size, device="cpu")
    return ImageCAMs(np.array(entry.labels, dtype=np.int64), stacked.half().numpy()), found


def hold_to_tags(dataset: Dataset, folder: Path, out: Path, *, machine: Machine = Machine()) -> Held:
    """Write :func:`read_seeds` of every image as ``<id>.npz``, as :func:`cacl.artifacts.load_cams` reads them.

    Shared out over processes as :func:`cacl.stages.cams.make_cams` is.

    Args:
        dataset: the images and their labels.
        folder: of the seeds.
        out: folder of the files.
        machine: where it is computed; each worker takes one image at a time.

    Raises:
        ValueError: if a file is missing or holds something else, or if no image has a pixel of a tag.
    """
    check_seeds(dataset, folder)
    mine = shard(range(len(dataset)))
    with barrier():
        results = map_processes(_Holding(dataset, folder, out), mine, workers=machine.workers)
        own = list(watched(results, total=len(mine), desc="seeds", progress=machine.progress))
    found = unshard(own)
    dropped = Counter(dataset.classes[k] for each in found for k in each.dropped)
    empty = Counter(dataset.classes[k] for each in found for k in each.empty)
    if sum(empty.values()) == sum(len(entry.labels) for entry in dataset.entries):
        raise InputError(f"{shown(folder)}: expected seeds of the images' tags, but none has a pixel of any")
    return Held(len(dataset), dict(dropped), dict(empty))


def snapped(dataset: Dataset, index: int, mask: Mask, regions: Path | None) -> Mask:
    """The mask of an image, snapped to the proposals ``<id>.png`` in a folder (see :func:`cacl.mining.snap`); as it is
    without a folder.

    Raises:
        ValueError: if the file is missing, no image of one channel of integers, or of another size.
    """
    if regions is None:
        return mask
    path = regions / f"{dataset.entries[index].id}.png"
    with open_image(path) as file:
        numbers = np.asarray(file)
    if numbers.ndim != 2 or numbers.dtype.kind not in "iub":
        raise InputError(f"{shown(path)}: expected numbers of regions in one channel, but got the mode {file.mode}")
    if numbers.shape != mask.shape:
        raise InputError(
            f"{shown(path)}: expected regions of the photo's {mask.shape[1]} x {mask.shape[0]} pixels, but got "
            f"{numbers.shape[1]} x {numbers.shape[0]}"
        )
    return snap(mask, numbers.astype(np.int64), labels=dataset.entries[index].labels)


@dataclass(frozen=True)
class _Holding:
    """index -> what had to be changed; writes the image's CAMs."""

    dataset: Dataset
    folder: Path
    out: Path

    def __call__(self, index: int) -> Found:
        cams, found = read_seeds(self.dataset, self.folder, index)
        save_cams(self.out / f"{self.dataset.entries[index].id}.npz", cams)
        return found


def _of_mask(path: Path, size: tuple[int, int], tags: Sequence[int], count: int) -> dict[int, torch.Tensor]:
    mask: Mask = read_mask(path).numpy()
    if mask.shape != size:
        raise InputError(
            f"{shown(path)}: expected a mask of its photo's {size[1]} x {size[0]} pixels, but got {mask.shape[1]} x "
            f"{mask.shape[0]}"
        )
    values = set(np.unique(mask).tolist()) - {0, IGNORE}
    if wrong := [value for value in values if value > count]:
        raise InputError(f"{shown(path)}: expected values 0 to {count} and 255, but got {max(wrong)}")
    unknown = torch.from_numpy((mask == IGNORE).astype(np.float32)) / 2
    maps = {value - 1: torch.from_numpy((mask == value).astype(np.float32)) for value in values}
    return {k: maps[k] + unknown if k in tags else maps[k] for k in maps}


def _resized(own: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    larger = own.shape[0] > size[0] or own.shape[1] > size[1]
    if larger:
        return F.interpolate(own[None, None], size=size, mode="area")[0, 0]
    return F.interpolate(own[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
