"""Masks of CAMs after a CRF, an image at a time in several processes: what the stages irn and masks have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacl._support.distributed import all_reduce_counts, barrier, shard
from cacl._support.pool import map_processes
from cacl._support.progress import watched
from cacl.artifacts import cams_of, save_mask, to_make
from cacl.constants import BACKGROUND_SCORE
from cacl.crf import CRFArguments
from cacl.datasets import Dataset
from cacl.errors import InputError
from cacl.images import Mask
from cacl.metrics import ConfusionMatrix
from cacl.mining import refine_maps
from cacl.seeds import snapped
from cacl.settings import CRF, Machine


def write_labels(
    dataset: Dataset,
    cams: Path,
    out: Path,
    labels: Callable[..., Mask],
    crf: CRF,
    *,
    levels: NDArray[np.floating] | None = None,
    regions: Path | None = None,
    machine: Machine,
    keep: bool,
    desc: str,
) -> None:
    """Write the labels of every image as ``<id>.png``, a palette image with VOC's colours.

    Shared out over processes as :func:`cacl.stages.cams.make_cams` is.

    Args:
        dataset: the images and their labels.
        cams: folder of :func:`cacl.stages.cams.make_cams`.
        out: folder of the files.
        labels: photo, classes, maps and what a CRF takes -> labels ``(H, W)``.
        crf: settings of the CRF.
        levels: by what the CAMs of each class are multiplied before (see :func:`cacl.thresholds.class_levels`).
        regions: folder of proposals that the labels are snapped to (see :func:`cacl.mining.snap`), if any.
        machine: where it is computed; each worker takes one image at a time.
        keep: leave out images that have a file already.
        desc: what the progress bar says.

    Raises:
        ValueError: if a file is missing or broken.
    """
    wanted = to_make(dataset, out, ".png", keep=keep)
    task = _Writing(_Drawing(dataset, cams, labels, levels, regions, crf.arguments(machine)), out)
    with barrier():
        for _ in _done(task, wanted, machine, desc):
            pass


def refine_cams(
    dataset: Dataset,
    cams: Path,
    indices: Sequence[int],
    settings: CRF = CRF(),
    *,
    background_score: float = BACKGROUND_SCORE,
    levels: NDArray[np.floating] | None = None,
    regions: Path | None = None,
    machine: Machine = Machine(),
) -> Iterator[tuple[int, Mask]]:
    """(index, mask of the CAMs after a CRF) of some images: what IRNet is not needed for.

    Args:
        dataset: the images.
        cams: folder of :func:`cacl.stages.cams.make_cams`, or of :func:`cacl.stages.masks.walk_cams`.
        indices: which images.
        settings: of the CRF.
        background_score: of the CAMs before the CRF.
        levels: by what the CAMs of each class are multiplied before (see :func:`cacl.thresholds.class_levels`).
        regions: folder of proposals that the masks are snapped to (see :func:`cacl.mining.snap`), if any.
        machine: where it is computed.
    """
    refined = partial(_refined, score=background_score)
    task = _Drawing(dataset, cams, refined, levels, regions, settings.arguments(machine))
    return zip(indices, _done(task, indices, machine, "CRF"), strict=True)


def evaluate_refined(
    dataset: Dataset,
    cams: Path,
    settings: CRF = CRF(),
    *,
    background_score: float = BACKGROUND_SCORE,
    levels: NDArray[np.floating] | None = None,
    regions: Path | None = None,
    machine: Machine = Machine(),
) -> tuple[ConfusionMatrix, int]:
    """CAMs after a CRF against the masks, arguments as for :func:`refine_cams`; also the number of images.

    Shared out over processes as :func:`cacl.stages.cams.make_cams` is.
    """
    masked = dataset.masked
    matrix = ConfusionMatrix(len(dataset.classes))
    with barrier():
        for index, mask in refine_cams(
            dataset, cams, shard(masked), settings, background_score=background_score, levels=levels,
            regions=regions, machine=machine,
        ):  # fmt: skip
            matrix.update(dataset.mask(index).numpy(), mask)
    matrix.counts = all_reduce_counts(matrix.counts)
    return matrix, len(masked)


def _done(task: Any, indices: Sequence[int], machine: Machine, desc: str) -> Iterator[Any]:
    results = map_processes(task, indices, workers=machine.crf_workers)
    return iter(watched(results, total=len(indices), desc=desc, progress=machine.progress))


@dataclass(frozen=True)
class _Drawing:
    """index -> the labels of the image's CAMs."""

    dataset: Dataset
    cams: Path
    labels: Callable[..., Mask]
    levels: NDArray[np.floating] | None
    regions: Path | None
    crf: CRFArguments

    def __call__(self, index: int) -> Mask:
        photo, cams = _photo(self.dataset, index), cams_of(self.dataset, self.cams, index).levelled(self.levels)
        with _naming(self.dataset, index):
            labels = self.labels(photo, cams.classes, cams.maps, **self.crf)
            return snapped(self.dataset, index, labels, self.regions)


@dataclass(frozen=True)
class _Writing:
    """index -> nothing; writes the labels of the image's CAMs."""

    drawing: _Drawing
    out: Path

    def __call__(self, index: int) -> None:
        labels = self.drawing(index)
        save_mask(self.out / f"{self.drawing.dataset.entries[index].id}.png", labels)


def _refined(
    photo: NDArray[np.uint8], classes: NDArray[np.int64], maps: NDArray[np.float16], *, score: float, **crf: Any
) -> Mask:
    """The mask of CAMs after a CRF at one background score."""
    mask: Mask = refine_maps(photo, classes, maps, [score], **crf)[0]
    return mask


@contextmanager
def _naming(dataset: Dataset, index: int) -> Iterator[None]:
    """Say which image it was."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{dataset.entries[index].image}: {error}") from None


def _photo(dataset: Dataset, index: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(dataset.image(index).permute(1, 2, 0).numpy())
