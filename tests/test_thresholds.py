"""Background scores by the values of CAMs alone, against the definitions written out over the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from cacl.artifacts import ImageCAMs, save_cams
from cacl.crf import dense_crf
from cacl.datasets import Dataset
from cacl.mining import pseudo_mask, refine_maps
from cacl.stages.levels import own_scores
from cacl.thresholds import BINS, class_levels, count_maxima, least_cross_entropy, otsu, split_scores


def values(seed: int, objects: float = 0.2) -> np.ndarray:
    """Many faint pixels and some clear ones."""
    rng = np.random.default_rng(seed)
    faint, clear = rng.beta(1, 12, 4000), rng.beta(4, 2, int(4000 * objects))
    return np.concatenate((faint, clear)).astype(np.float32)


def best_split(values: np.ndarray, worth) -> float:
    """The edge between two bins whose split is worth most, each looked at by itself."""
    bins = np.round(values * (BINS - 1))
    inside = (bins + 0.5) / BINS
    edges = [k for k in range(1, BINS) if (bins < k).any() and (bins >= k).any()]
    found = {k: worth(inside[bins < k], inside[bins >= k], len(values)) for k in edges}
    return max(found, key=found.__getitem__) / BINS


def between(low, high, total):
    return -(low.var() * len(low) + high.var() * len(high)) / total


def cross_entropy(low, high, total):
    return low.sum() * np.log(low.mean()) + high.sum() * np.log(high.mean())


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_are_their_definitions(seed):
    own = values(seed, objects=(0.05, 0.2, 0.5, 1.5)[seed])
    counts = count_maxima(own.reshape(1, 1, -1))
    assert otsu(counts) == pytest.approx(best_split(own, between), abs=1e-9)
    assert least_cross_entropy(counts) == pytest.approx(best_split(own, cross_entropy), abs=1e-9)
    low, middle, high = split_scores(counts)
    assert (low, high) == (round(least_cross_entropy(counts), 2), round(otsu(counts), 2))
    assert low < middle < high
    assert middle == pytest.approx((low + high) / 2, abs=0.011)


def test_a_gap_is_split_in_its_middle():
    counts = np.zeros(BINS, np.int64)
    counts[[10, 11, 200]] = 50, 50, 3
    assert split_scores(counts) == (0.41, 0.41, 0.41)


@pytest.mark.parametrize("filled", [[], [0], [BINS - 1], [70]])
def test_what_cannot_be_split_gets_the_fields_score(filled):
    counts = np.zeros(BINS, np.int64)
    counts[filled] = 9
    assert split_scores(counts) == (0.15, 0.15, 0.15)


def test_pixels_are_counted_by_their_largest_map():
    maps = np.array([[[0.0, 0.2], [1.0, 0.5]], [[0.1, 0.0], [0.0, 0.5]]], np.float16)
    counts = count_maxima(maps)
    assert {int(i): int(counts[i]) for i in np.flatnonzero(counts)} == {25: 1, 51: 1, 128: 1, 255: 1}
    assert not count_maxima(np.zeros((0, 3, 4), np.float16)).any()
    assert count_maxima(np.full((1, 1, 1), 1.5))[-1] == 1


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.full((1, 2, 2), np.nan), "finite and not negative"),
        (np.full((1, 2, 2), -0.1), "finite and not negative"),
        (np.zeros((2, 2)), r"an array \(C, h, w\)"),
        ("maps", "real numbers"),
    ],
)
def test_maps_that_are_none(maps, message):
    with pytest.raises((ValueError, TypeError), match=f"`maps` to .*{message}"):
        count_maxima(maps)


@pytest.mark.parametrize("counts", [np.zeros(1), np.array([-1, 2]), np.zeros((2, 2)), [1, "2"]])
def test_counts_that_are_none(counts):
    with pytest.raises((ValueError, TypeError), match="Expected argument `counts`"):
        split_scores(counts)


def test_levels_bring_a_class_half_way_to_the_score_of_all():
    counts = np.stack([count_maxima(values(1).reshape(1, 1, -1)), count_maxima(values(2).reshape(1, 1, -1) / 3)])
    first, second = map(least_cross_entropy, counts)
    levels = class_levels(np.concatenate((counts, np.zeros((1, BINS), np.int64))), 0.2)
    np.testing.assert_allclose(levels, [0.2 / ((0.2 + first) / 2), 0.2 / ((0.2 + second) / 2), 1])
    assert levels[1] > levels[0]
    assert class_levels(counts[:0], 0.2).shape == (0,)


@pytest.mark.parametrize(("counts", "score"), [(np.ones(9), 0.2), (-np.ones((2, 9)), 0.2), (np.ones((2, 9)), 0.0)])
def test_levels_of_what_is_none(counts, score):
    with pytest.raises((ValueError, TypeError), match=r"^Expected argument `(counts|score)`"):
        class_levels(counts, score)


def test_a_folder_of_cams_asks_for_the_scores_of_all_its_values(drawn_dataset, tmp_path):
    every = []
    for seed, entry in enumerate(drawn_dataset.entries):
        maps = values(seed)[: 12 * 16 * len(entry.labels)].reshape(-1, 12, 16).astype(np.float16)
        save_cams(tmp_path / f"{entry.id}.npz", ImageCAMs(np.array(entry.labels, np.int64), maps))
        every.append(maps.max(0).ravel() if len(maps) else [])
    wanted = split_scores(count_maxima(np.concatenate(every).reshape(1, 1, -1)))
    assert own_scores(drawn_dataset, tmp_path) == wanted
    (tmp_path / f"{drawn_dataset.entries[1].id}.npz").unlink()
    with pytest.raises(ValueError, match=f"{drawn_dataset.entries[1].id}.npz: no such file"):
        own_scores(drawn_dataset, tmp_path)


@pytest.fixture
def drawn_dataset(tmp_path):
    """Only names and labels: nobody opens an image or a mask."""
    from cacl.datasets import Entry

    entries = [Entry(str(i), tmp_path / f"{i}.jpg", (0,) if i % 2 else (0, 2), None) for i in range(4)]
    return Dataset(("a", "b", "c"), [*entries, Entry("none", tmp_path / "none.jpg", (), None)])


def scene(classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(classes)
    photo = rng.integers(90, 110, (24, 32, 3), dtype=np.uint8)
    photo[6:18, 8:24] += 90
    maps = rng.random((classes, 6, 8)).astype(np.float32)
    return photo, maps / maps.max((1, 2), keepdims=True)


@pytest.mark.parametrize("classes", [1, 3])
def test_a_crf_trusts_a_pixel_as_far_as_its_cam_is_clear(classes):
    photo, maps = scene(classes)
    indices, full = np.arange(classes)[::-1] + 4, ImageCAMs(np.arange(classes), maps).resized((24, 32))
    made = refine_maps(photo, indices, maps, (0.3, 0.6))
    for score, labels in zip((0.3, 0.6), made, strict=True):
        weights = np.exp(10 * np.concatenate((np.full((1, 24, 32), score), full)))
        after = dense_crf(photo, weights / weights.sum(0))
        assert np.array_equal(labels, np.array([0, *(indices + 1)])[after.argmax(0)])
    plain = refine_maps(photo, indices, maps, (0.5,), iterations=0)[0]
    assert np.array_equal(plain, np.where(full.max(0) > 0.5, indices[full.argmax(0)] + 1, 0))
    assert set(np.unique(plain)) == {0, *(indices + 1).tolist()}


def test_a_pseudo_mask_is_open_where_two_scores_differ():
    photo, maps = scene(2)
    high, low = refine_maps(photo, [0, 1], maps, (0.7, 0.3))
    mask = pseudo_mask(photo, [0, 1], maps, background_score=0.5, unsure=0.2)
    assert np.array_equal(mask[high > 0], high[high > 0])
    assert (mask[(high == 0) & (low == 0)] == 0).all()
    assert (mask[(high == 0) & (low > 0)] == 255).all()
    assert (mask == 255).any()
    assert not pseudo_mask(photo, [], np.zeros((0, 6, 8)), background_score=0.5).any()
    with pytest.raises(ValueError, match="`background_score` to be a number in"):
        pseudo_mask(photo, [0, 1], maps, background_score=1.5)
    with pytest.raises(ValueError, match="`maps` to be one map a class"):
        refine_maps(photo, [0], maps, (0.5,))
