"""Where CAMs split into object and background, by their values alone: scores that nobody has to choose."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cacl._support.checks import as_array
from cacl._support.values import check_range
from cacl.constants import BACKGROUND_SCORE
from cacl.errors import expected

BINS = 256
"""Of the counts of values in [0, 1]."""


class Scores(NamedTuple):
    """Background scores of a set of CAMs, in hundredths."""

    low: float
    """The lower one of :func:`otsu` and :func:`least_cross_entropy`, nearly always the latter: for masks that a CRF
    draws to the edges, which takes from faint objects, and for what is surely background."""
    middle: float
    """Half-way between the two: for masks of the CAMs as they are."""
    high: float
    """The higher one, nearly always Otsu's: for what is surely an object."""


def count_maxima(maps: NDArray[np.floating]) -> NDArray[np.int64]:
    """How many pixels have their largest value in which of the bins of [0, 1].

    Args:
        maps: CAMs of the classes that an image shows, ``(C, h, w)`` in [0, 1].

    Returns:
        ``(BINS,)``; zeros for an image without a class. Counts of several images add up.

    Raises:
        ValueError: if the shape or a value is wrong.
    """
    maps = as_array("maps", maps, "(C, h, w)", numbers=True)
    if not maps.size:
        return np.zeros(BINS, dtype=np.int64)
    if not np.isfinite(maps).all() or maps.min() < 0:
        raise expected("maps", "finite and not negative", f"{maps.min()} to {maps.max()}")
    bins = (np.minimum(maps.max(0), 1).astype(np.float32) * (BINS - 1)).round().astype(np.int64)
    return np.bincount(bins.ravel(), minlength=BINS).astype(np.int64)


def split_scores(counts: NDArray[np.integer]) -> Scores:
    """The background scores that CAMs ask for by their values.

    Otsu's threshold lies above the score with the best mean IoU where most pixels are faint, that of Li and Lee below
    it: their middle was never more than half a point of mean IoU from the best, on sets whose best score lay between
    0.18 and 0.33. Once a CRF has drawn the masks to the edges, the lower one is best.

    Args:
        counts: of :func:`count_maxima`, of all images together.

    Returns:
        The scores; all of them the field's 0.15 where there is nothing to split, as all values fall into one bin.

    Raises:
        ValueError: if the shape or a count is wrong.
    """
    counts = as_array("counts", counts, "(BINS,)", numbers=True)
    if len(counts) < 2 or counts.min() < 0:
        raise expected("counts", "numbers of pixels in at least two bins", counts)
    if np.count_nonzero(counts) < 2:
        return Scores(BACKGROUND_SCORE, BACKGROUND_SCORE, BACKGROUND_SCORE)
    low, high = sorted((otsu(counts), least_cross_entropy(counts)))
    return Scores(*(min(0.99, max(0.01, round(score, 2))) for score in (low, (low + high) / 2, high)))


def class_levels(counts: NDArray[np.integer], score: float) -> NDArray[np.float64]:
    """By what to multiply the CAMs of each class so that one background score suits all of them.

    A class whose CAMs are faint asks for a lower score than others. Half of that is believed: the score of a class is
    half-way between its own (:func:`least_cross_entropy`) and that of all.

    Args:
        counts: ``(K, BINS)``, of :func:`count_maxima`, of each class's CAMs alone.
        score: of all CAMs, :attr:`Scores.low`.

    Returns:
        ``(K,)``, in (0, 2); 1 where a class has nothing to split.

    Raises:
        ValueError: if the shape, a count or the score is wrong.
    """
    counts = as_array("counts", counts, "(K, BINS)", numbers=True)
    if counts.shape[1] < 2 or (counts.size and counts.min() < 0):
        raise expected("counts", "numbers of pixels in at least two bins", counts)
    check_range("score", score, 0.01, 1)
    own = [least_cross_entropy(row) if np.count_nonzero(row) > 1 else score for row in counts]
    return np.asarray(2 * score / (score + np.array(own, dtype=np.float64)))


def otsu(counts: NDArray[np.integer]) -> float:
    """The threshold with the largest variance between what is below and above it (Otsu 1979).

    Args:
        counts: of values in equal bins of [0, 1], at least two of them filled.

    Returns:
        Between the last bin below it and the first one above it.
    """
    share, mean, whole = _cumulated(counts)
    return _best((whole * share - mean) ** 2 / (share * (1 - share)), len(counts))


def least_cross_entropy(counts: NDArray[np.integer]) -> float:
    """The threshold whose two means describe the values with the least cross-entropy (Li and Lee 1993).

    Args:
        counts: of values in equal bins of [0, 1], at least two of them filled.

    Returns:
        Between the last bin below it and the first one above it.
    """
    share, mean, whole = _cumulated(counts)
    below, above = mean / share, (whole - mean) / (1 - share)
    return _best(mean * np.log(below) + (whole - mean) * np.log(above), len(counts))


def _cumulated(counts: NDArray[np.integer]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Of what lies below each edge between two bins the share and the sum of values, and the mean of all values.

    Edges with nothing below or nothing above them are NaN.
    """
    share = np.asarray(counts, dtype=np.float64) / np.sum(counts, dtype=np.float64)
    values = (np.arange(len(share)) + 0.5) / len(share)
    below, mean = np.cumsum(share)[:-1], np.cumsum(share * values)
    filled = np.flatnonzero(share)
    below[: filled[0]] = below[filled[-1] :] = np.nan
    return below, mean[:-1], float(mean[-1])


def _best(criterion: NDArray[np.float64], bins: int) -> float:
    best = np.flatnonzero(criterion >= np.nanmax(criterion) - 1e-12)  # a gap between values has one criterion all over
    return float(best[0] + best[-1] + 2) / (2 * bins)
