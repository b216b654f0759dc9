"""Where seeds from elsewhere and trained CAMs disagree: by class, and by photo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cacl._support.distributed import barrier, shard, unshard
from cacl._support.pool import map_processes
from cacl._support.progress import watched
from cacl.artifacts import cams_of
from cacl.datasets import Dataset
from cacl.pictures import threshold
from cacl.settings import Machine


def differences(
    dataset: Dataset,
    seeds: Path,
    own: Path,
    seed_score: float,
    own_score: float,
    *,
    machine: Machine = Machine(),
) -> dict[str, Any]:
    """Where two folders of CAMs disagree about the same images.

    Shared out over processes as :func:`cacl.stages.cams.make_cams` is.

    Args:
        dataset: the images and their labels.
        seeds: folder of the one, as :func:`cacl.artifacts.load_cams` reads them.
        own: folder of the other.
        seed_score: background score of the one.
        own_score: background score of the other.
        machine: where it is computed.

    Returns:
        As JSON has it. ``scores``: the two scores. ``differences``: class -> ``images`` that show it, ``iou`` of its
        two regions in all of them together, ``seeds_only``, the share of the seeds' region that is not in the other's,
        and ``own_only``; a share of nothing is None. ``photos``: (id, mean IoU over its tags), the lowest first.

    Raises:
        ValueError: if a file of CAMs is missing or broken.
    """
    mine = shard(range(len(dataset)))
    task = _Comparing(dataset, seeds, own, seed_score, own_score)
    with barrier():
        results = map_processes(task, mine, workers=machine.workers)
        rows = list(watched(results, total=len(mine), desc="compare", progress=machine.progress))
    counts = np.zeros((len(dataset.classes), 4), dtype=np.int64)
    photos = []
    for entry, row in zip(dataset.entries, unshard(rows), strict=True):
        np.add.at(counts, list(entry.labels), [(1, *pixels) for pixels in row] or np.zeros((0, 4), dtype=np.int64))
        shares = [share for both, one, other in row if (share := _share(both, one + other - both)) is not None]
        if shares:
            photos.append((entry.id, round(sum(shares) / len(shares), 4)))
    found = {
        name: {
            "images": images,
            "iou": _share(both, one + other - both),
            "seeds_only": _share(one - both, one),
            "own_only": _share(other - both, other),
        }
        for name, (images, both, one, other) in zip(dataset.classes, counts.tolist(), strict=True)
        if images
    }
    return {
        "scores": [seed_score, own_score],
        "differences": found,
        "photos": sorted(photos, key=lambda photo: (photo[1], photo[0])),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


@dataclass(frozen=True)
class _Comparing:
    """index -> of each tag the pixels that both have, that the one has, and the other."""

    dataset: Dataset
    seeds: Path
    own: Path
    seed_score: float
    own_score: float

    def __call__(self, index: int) -> list[tuple[int, int, int]]:
        both = [cams_of(self.dataset, folder, index) for folder in (self.seeds, self.own)]
        height, width = both[1].maps.shape[1:]
        size = (2 * height, 2 * width)  # half the photo's: finer than either
        one, other = (
            threshold(cams.classes, cams.resized(size), score)
            for cams, score in zip(both, (self.seed_score, self.own_score), strict=True)
        )
        found = []
        for k in self.dataset.entries[index].labels:
            a, b = one == k + 1, other == k + 1
            found.append((int((a & b).sum()), int(a.sum()), int(b.sum())))
        return found
