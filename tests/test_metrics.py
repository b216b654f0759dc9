"""Mean IoU against counting in plain Python, and the sweep against one threshold at a time."""

import numpy as np
import pytest

from cacl.metrics import SCORES, ConfusionMatrix, threshold_sweep


def plain_iou(pairs, size):
    """IoU of each class by sets of pixels."""
    result = []
    for k in range(size):
        hit = union = 0
        for truth, prediction in pairs:
            for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
                if t != 255:
                    hit += t == k and p == k
                    union += t == k or p == k
        result.append(hit / union if union else float("nan"))
    return np.array(result)


def images(seed=0, count=4):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        truth = rng.integers(0, 4, (9, 11)).astype(np.uint8)
        truth[0, :3] = 255
        yield truth, rng.integers(0, 4, (9, 11)).astype(np.uint8)


def test_confusion_matrix_equals_counting():
    matrix = ConfusionMatrix(4)
    for truth, prediction in images():
        matrix.update(truth, prediction)
    wanted = plain_iou(list(images()), 5)
    np.testing.assert_allclose(matrix.iou, wanted)
    assert np.isnan(matrix.iou[4])  # occurs nowhere: left out of the mean
    assert matrix.miou == pytest.approx(np.nanmean(wanted))


def test_an_absent_class_that_is_predicted_counts():
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([[0, 0, 1, 1]]), np.array([[0, 2, 1, 1]]))
    np.testing.assert_allclose(matrix.iou, [0.5, 1, 0])


def test_nothing_seen_is_nan():
    assert np.isnan(ConfusionMatrix(3).miou)


def test_confusion_matrix_refuses():
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=r"Expected argument `prediction` to be of the truth's shape \(2, 2\), but"):
        matrix.update(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match=r"Expected argument `truth` to be in \[0, 2\] or 255 \(ignored\), but got 3."):
        matrix.update(np.full((2, 2), 3), np.zeros((2, 2), int))
    assert matrix.counts.sum() == 0


def test_sweep_equals_one_threshold_at_a_time():
    rng = np.random.default_rng(1)
    samples = []
    for truth, _ in images(2):
        classes = np.sort(rng.choice(3, size=rng.integers(0, 4), replace=False))
        maps = rng.random((len(classes), *truth.shape)).astype(np.float32)
        maps[:, :2] = 0.15  # a tie with a score: background
        samples.append((truth, classes, maps))
    sweep = threshold_sweep(iter(samples), 3)
    assert sweep.images == 4
    for score in (0.0, 0.15, 0.3, 0.6):
        pairs = []
        for truth, classes, maps in samples:
            stack = np.concatenate((np.full((1, *truth.shape), score, np.float32), maps))
            pairs.append((truth, np.array([0, *(classes + 1)])[stack.argmax(0)]))
        np.testing.assert_allclose(sweep.iou[SCORES.index(score)], plain_iou(pairs, 4), equal_nan=True)
        assert sweep.miou(score) == pytest.approx(np.nanmean(plain_iou(pairs, 4)))
    means = [np.nanmean(row) for row in sweep.iou]
    assert sweep.oracle == (SCORES[int(np.argmax(means))], pytest.approx(max(means)))


def test_sweep_by_hand():
    truth = np.array([[1, 1, 0, 0]], dtype=np.uint8)
    maps = np.array([[[0.9, 0.4, 0.4, 0.1]]], dtype=np.float32)
    sweep = threshold_sweep([(truth, np.array([0]), maps)], 1, scores=(0.2, 0.5))
    np.testing.assert_allclose(sweep.iou, [[1 / 2, 2 / 3], [2 / 3, 1 / 2]])


def test_sweep_refuses():
    truth, maps = np.zeros((2, 2), np.uint8), np.zeros((1, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"Expected argument `maps` to be of shape \(1, 2, 2\), but got \(1, 3, 3\)."):
        threshold_sweep([(truth, np.array([0]), maps)], 2)
    with pytest.raises(ValueError, match="Expected mask values 0 to 2 or 255, but got 9"):
        threshold_sweep([(truth + 9, np.array([0]), maps[:, :2, :2])], 2)
    with pytest.raises(ValueError, match="Expected argument `scores` to be ascending"):
        threshold_sweep([], 2, scores=(0.5, 0.5))
