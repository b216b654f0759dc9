"""Mean IoU as in PASCAL VOC: one confusion matrix over all pixels of all images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cacl._support.checks import as_array, as_indices
from cacl._support.values import check_positive
from cacl.constants import IGNORE
from cacl.errors import InputError, InputTypeError, expected
from cacl.thresholds import BINS, count_maxima, split_scores

SCORES = tuple(round(0.01 * i, 2) for i in range(100))
"""The background scores of the sweep: 0.00, 0.01, … 0.99."""


class ConfusionMatrix:
    """Pixel counts of (truth, prediction), streamed image by image.

    Args:
        num_classes: K; masks hold 0 for the background and 1 … K.

    Raises:
        ValueError: if there is no class.

    Example:
        >>> matrix = ConfusionMatrix(1)
        >>> matrix.update(np.array([[0, 1], [1, 255]]), np.array([[0, 1], [0, 1]]))
        >>> matrix.iou
        array([0.5, 0.5])
    """

    def __init__(self, num_classes: int) -> None:
        check_positive("num_classes", num_classes)
        self.size = int(num_classes) + 1
        self.counts = np.zeros((self.size, self.size), dtype=np.int64)

    def update(self, truth: NDArray[np.integer] | Tensor, prediction: NDArray[np.integer] | Tensor) -> None:
        """Add an image: two arrays or tensors of integers and of one shape.

        Pixels whose truth is 255 are left out. A prediction has a class everywhere else: what is unsure in a pseudo
        mask is either background there, or 255 in the truth too.

        Raises:
            ValueError: if the shapes differ or a value is out of range.
            TypeError: if there is something else than integers in them.
        """
        true, predicted = as_array("truth", truth), as_array("prediction", prediction)
        if true.shape != predicted.shape:
            raise expected("prediction", f"of the truth's shape {true.shape}", predicted.shape)
        valid = true != IGNORE
        true, predicted = true[valid], predicted[valid]
        for argument, values in (("truth", true), ("prediction", predicted)):
            if values.size and not 0 <= values.min() <= values.max() < self.size:
                wrong = int(values[(values < 0) | (values >= self.size)][0])
                raise _out_of_range(argument, self.size - 1, wrong)
        pairs = true.astype(np.int64) * self.size + predicted.astype(np.int64)
        self.counts += np.bincount(pairs, minlength=self.size**2).reshape(self.counts.shape)

    @property
    def iou(self) -> NDArray[np.float64]:
        """IoU of background and every class, ``(K + 1,)``; NaN for a class that occurs nowhere."""
        return _iou(self.counts)

    @property
    def miou(self) -> float:
        """Mean of :attr:`iou` over the classes that occur; NaN where there is none."""
        return mean_iou(self.iou)


def _out_of_range(argument: str, largest: int, wrong: int) -> InputError:
    if argument == "truth":
        return expected(argument, f"in [0, {largest}] or {IGNORE} (ignored)", wrong)
    unsure = f"; where it is unsure, set it to 0 to count as background, or the truth to {IGNORE} to leave it out"
    return expected(argument, f"in [0, {largest}]", f"{wrong}{unsure if wrong == IGNORE else ''}")


class Sweep(NamedTuple):
    """IoU of CAMs for a row of background scores."""

    scores: tuple[float, ...]
    iou: NDArray[np.float64]
    """``(S, K + 1)``."""
    images: int
    auto: float
    """The score that the CAMs ask for by their values alone (:func:`cacl.thresholds.split_scores`, its middle)."""

    def miou(self, score: float) -> float:
        """Mean IoU at one of ``scores``."""
        if score not in self.scores:
            raise expected("score", "one of the sweep's scores", score)
        return mean_iou(self.iou[self.scores.index(score)])

    @property
    def oracle(self) -> tuple[float, float]:
        """The best score and its mean IoU: an oracle's, since it looks at the masks."""
        means = [mean_iou(row) for row in self.iou]
        best = int(np.nanargmax(means)) if not np.all(np.isnan(means)) else 0
        return self.scores[best], means[best]


def threshold_sweep(
    samples: Iterable[tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.floating]]],
    num_classes: int,
    *,
    scores: Sequence[float] = SCORES,
) -> Sweep:
    """IoU of CAMs at all background scores in one pass.

    A pixel is the class of its largest map if that map is above the background score, else background.

    Args:
        samples: for each image its mask ``(H, W)``, its class indices ``(C,)`` counted from 0, and their maps
            ``(C, H, W)`` in [0, 1].
        num_classes: K.
        scores: background scores, ascending.

    Raises:
        ValueError: if a shape or value is out of range.
    """
    check_positive("num_classes", num_classes)
    edges = as_array("scores", scores, "(S,)", numbers=True).tolist()
    return sweep_of(count_scores(samples, num_classes, scores=edges), edges)


class Counts(NamedTuple):
    """What :func:`count_scores` counts."""

    pixels: NDArray[np.int64]
    """``(K + 1, K + 1, S + 1)``, by their truth, the class of their largest map, and the number of scores below it."""
    maxima: NDArray[np.int64]
    """``(BINS,)``, of :func:`cacl.thresholds.count_maxima`."""
    images: int


def count_scores(
    samples: Iterable[tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.floating]]],
    num_classes: int,
    *,
    scores: Sequence[float] = SCORES,
) -> Counts:
    """What :func:`threshold_sweep` counts, arguments as there. Counts of several parts add up."""
    edges = np.asarray(scores, dtype=np.float32)
    if edges.ndim != 1 or not len(edges) or not np.isfinite(edges).all() or np.any(np.diff(edges) <= 0):
        raise expected("scores", "ascending background scores", scores)
    size, bins = num_classes + 1, len(edges) + 1
    joint = np.zeros(size * size * bins, dtype=np.int64)  # truth × class of the largest map × scores below it
    maxima, images = np.zeros(BINS, dtype=np.int64), 0
    for sample in samples:
        if not isinstance(sample, tuple | list) or len(sample) != 3:
            raise InputTypeError(
                "Expected argument `samples` to give a mask, class indices and their maps for each image, but got "
                f"{type(sample).__name__}{f' of {len(sample)}' if isinstance(sample, tuple | list) else ''}."
            )
        mask, present, cams = sample
        truth, classes = as_array("truth", mask, "(H, W)"), as_indices("classes", present, num_classes - 1)
        maps = as_array("maps", cams, "(C, H, W)", numbers=True)
        if maps.shape != (len(classes), *truth.shape):
            raise expected("maps", f"of shape {(len(classes), *truth.shape)}", maps.shape)
        valid = truth != IGNORE
        values = truth[valid].astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() < size:
            wrong = values[(values < 0) | (values >= size)][0]
            raise InputError(f"Expected mask values 0 to {num_classes} or 255, but got {wrong}.")
        if len(classes):
            if np.isnan(maps).any():
                raise expected("maps", "without NaN", f"NaN in those of classes {classes.tolist()}")
            best = maps.argmax(0)[valid]
            chosen = classes[best] + 1
            passed = np.searchsorted(edges, maps.max(0)[valid].astype(np.float32), side="left")
        else:
            chosen = passed = np.zeros_like(values)
        joint += np.bincount((values * size + chosen) * bins + passed, minlength=len(joint))
        maxima += count_maxima(maps)
        images += 1
    return Counts(joint.reshape(size, size, bins), maxima, images)


def sweep_of(counts: Counts, scores: Sequence[float]) -> Sweep:
    """The sweep of :func:`count_scores`' counts."""
    iou, pixels = [], counts.pixels
    for i in range(len(scores)):
        above = pixels[:, :, i + 1 :].sum(-1)
        above[:, 0] += pixels[:, :, : i + 1].sum((1, 2))
        iou.append(_iou(above))
    return Sweep(tuple(scores), np.stack(iou), counts.images, split_scores(counts.maxima).middle)


def _iou(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    hit = np.diagonal(counts).astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - hit
    iou: NDArray[np.float64] = np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)
    return iou


def mean_iou(iou: NDArray[np.float64]) -> float:
    """The mean of the IoU of those classes that occur; NaN where there is none."""
    return float(np.nanmean(iou)) if not np.all(np.isnan(iou)) else float("nan")
