"""The background scores of a folder of CAMs, and the levels of its classes, by the CAMs' values alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cacl._support.distributed import all_reduce_counts, barrier, shard
from cacl.artifacts import cams_of
from cacl.datasets import Dataset
from cacl.thresholds import BINS, Scores, class_levels, count_maxima, split_scores


def own_scores(dataset: Dataset, cams: Path) -> Scores:
    """The background scores that a folder of CAMs asks for by their values alone: no mask is opened.

    Shared out over processes as :func:`cacl.stages.cams.make_cams` is.

    Args:
        dataset: the images.
        cams: folder of :func:`cacl.stages.cams.make_cams`, or of :func:`cacl.stages.masks.walk_cams`.

    Raises:
        ValueError: if a file of CAMs is missing or broken.
    """
    return own_levels(dataset, cams)[0]


def own_levels(dataset: Dataset, cams: Path) -> tuple[Scores, NDArray[np.float64]]:
    """:func:`own_scores`, and the levels ``(K,)`` of the classes at which its lowest score suits all of them (see
    :func:`cacl.thresholds.class_levels`); arguments as there."""
    counts = np.zeros((1 + len(dataset.classes), BINS), dtype=np.int64)
    with barrier():
        for index in shard(range(len(dataset))):
            found = cams_of(dataset, cams, index)
            counts[0] += count_maxima(found.maps)
            for k, own in zip(found.classes, found.maps, strict=True):
                counts[1 + k] += count_maxima(own[None])
    counts = all_reduce_counts(counts.reshape(-1)).reshape(counts.shape)
    scores = split_scores(counts[0])
    return scores, class_levels(counts[1:], scores.low)
