"""The CRF against a brute-force mean field and against pydensecrf, and everything that can be wrong with its input."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cacl.crf import DenseCRF, check_backend, dense_crf

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "crf.py"
BACKENDS = ["torch", "pydensecrf"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "pydensecrf":
        pytest.importorskip("pydensecrf.densecrf")
    return request.param


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Regions of one colour each, with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    regions = (rows * 2 // height) * 2 + (columns + rows // 3) * 2 // (width + height // 3)
    colours = rng.integers(20, 230, (4, 3))
    return (colours[regions] + rng.normal(0, 4, (height, width, 3))).clip(0, 255).astype(np.uint8)


def given(labels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Probabilities that wander slowly over the image."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [
        np.sin(rows / height * a + b) + np.cos(columns / width * c + d) for a, b, c, d in rng.uniform(0, 6, (labels, 4))
    ]
    values = np.exp(np.array(waves))
    return (values / values.sum(0)).astype(np.float32)


def brute_force(image, probabilities, iterations, gaussian, bilateral):
    """Mean field with the whole (HW)² kernels, each normalised symmetrically, in float64."""
    labels, height, width = probabilities.shape
    rows, columns = (axis.reshape(-1).astype(float) for axis in np.mgrid[:height, :width])
    colours = image.reshape(-1, 3).astype(float)

    def kernel(features, weight):
        distance = ((features[:, None] - features[None]) ** 2).sum(-1)
        values = np.exp(-distance / 2)
        scale = 1 / np.sqrt(values.sum(1))
        return weight * scale[:, None] * values * scale[None]

    places = np.stack((rows, columns), 1)
    near = kernel(places / gaussian[0], gaussian[1])
    alike = kernel(np.concatenate((places / bilateral[0], colours / bilateral[1]), 1), bilateral[2])
    unary = np.log(np.clip(probabilities, 1e-5, None).astype(float)).reshape(labels, -1)
    q = np.exp(unary) / np.exp(unary).sum(0)
    for _ in range(iterations):
        energy = unary + q @ (near + alike)
        q = np.exp(energy - energy.max(0))
        q /= q.sum(0)
    return q.reshape(probabilities.shape)


@pytest.mark.parametrize(("gaussian", "bilateral"), [((3, 3), (50, 5, 10)), ((2, 1), (8, 20, 2)), ((4, 2), (20, 9, 0))])
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_mean_field_is_that_of_the_whole_kernels(backend, gaussian, bilateral, iterations):
    """The lattice is an approximation: it blurs a little less evenly than a Gaussian."""
    image, probabilities = picture(16, 20), given(3, 16, 20)
    found = dense_crf(
        image, probabilities, iterations=iterations, gaussian=gaussian, bilateral=bilateral, backend=backend
    )
    wanted = brute_force(image, probabilities, iterations, gaussian, bilateral)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    if iterations == 0:
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (found.argmax(0) == wanted.argmax(0)).mean() > 0.97
    assert np.abs(found - wanted).mean() < 0.02
    if iterations:  # more than nothing is compared
        assert np.abs(wanted - probabilities).mean() > 0.05


@pytest.mark.parametrize("labels", [2, 3, 5])
@pytest.mark.parametrize("size", [(60, 80), (37, 101), (1, 50), (64, 1)])
def test_torch_gives_what_pydensecrf_gives(labels, size):
    pytest.importorskip("pydensecrf.densecrf")
    image, probabilities = picture(*size, seed=labels), given(labels, *size, seed=labels)
    one, two = (dense_crf(image, probabilities, backend=backend) for backend in BACKENDS)
    np.testing.assert_allclose(one, two, atol=1e-3)
    assert (one.argmax(0) == two.argmax(0)).mean() >= 0.999


def test_pydensecrf_is_called_as_its_manual_says():
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    image, probabilities = picture(30, 40), given(3, 30, 40)
    crf = densecrf.DenseCRF2D(40, 30, 3)
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(probabilities).reshape(3, -1)))
    crf.addPairwiseGaussian(sxy=(1, 1), compat=2)
    crf.addPairwiseBilateral(sxy=(20, 20), srgb=(9, 9, 9), rgbim=image, compat=4)
    wanted = np.array(crf.inference(7)).reshape(3, 30, 40)
    found = dense_crf(image, probabilities, iterations=7, gaussian=(1, 2), bilateral=(20, 9, 4), backend="pydensecrf")
    np.testing.assert_array_equal(found, wanted)


def test_sets_of_labels_share_an_image(backend):
    image = picture(40, 30)
    sets = np.stack([given(3, 40, 30, seed) for seed in range(4)])
    sets[1, 2] = 0  # one set with a label less
    sets[2, :2] = 0  # and one with a single label
    crf = DenseCRF(image, backend=backend)
    together = crf(sets)
    assert together.shape == sets.shape
    for found, probabilities in zip(together, sets, strict=True):
        np.testing.assert_allclose(found, dense_crf(image, probabilities, backend=backend), atol=1e-4)
    assert not together[1, 2].any()
    assert (together[2, 2] == 1).all()


def test_absent_labels_change_nothing(backend):
    image, probabilities = picture(40, 30), given(2, 40, 30)
    more = np.zeros((5, 40, 30), np.float32)
    more[[1, 3]] = probabilities
    found = dense_crf(image, more, backend=backend)
    np.testing.assert_array_equal(found[[1, 3]], dense_crf(image, probabilities, backend=backend))
    assert not found[[0, 2, 4]].any()


def test_a_probability_of_0_is_not_infinite(backend):
    image, probabilities = picture(40, 30), given(3, 40, 30)
    hard = (probabilities == probabilities.max(0)).astype(np.float32)
    found = dense_crf(image, hard, backend=backend)
    assert np.isfinite(found).all()
    assert found.min() >= 0


def test_the_order_of_the_labels_does_not_matter(backend):
    image, probabilities = picture(40, 30), given(4, 40, 30)
    order = [2, 0, 3, 1]
    found = dense_crf(image, probabilities[order], backend=backend)
    np.testing.assert_allclose(found, dense_crf(image, probabilities, backend=backend)[order], atol=1e-4)


def test_any_memory_layout_and_float_type(backend):
    image, probabilities = picture(40, 30), given(3, 40, 30)
    wanted = dense_crf(image, probabilities, backend=backend)
    fortran, strided = np.asfortranarray(image), np.repeat(image, 2, 1)[:, ::2]
    for same in (fortran, strided):
        np.testing.assert_array_equal(dense_crf(same, probabilities, backend=backend), wanted)
    moved = np.ascontiguousarray(probabilities.transpose(1, 2, 0)).transpose(2, 0, 1)
    np.testing.assert_array_equal(dense_crf(image, moved, backend=backend), wanted)
    double = dense_crf(image, probabilities.astype(np.float64), backend=backend)
    np.testing.assert_allclose(double, wanted, atol=1e-5)
    mirrored = dense_crf(image[:, ::-1], probabilities[:, :, ::-1], backend=backend)
    again = dense_crf(image[:, ::-1].copy(), probabilities[:, :, ::-1].copy(), backend=backend)
    np.testing.assert_array_equal(mirrored, again)
    image.flags.writeable = probabilities.flags.writeable = False  # as np.asarray of a Pillow image
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(dense_crf(image, probabilities, backend=backend), wanted)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (20, 2100)])
def test_sizes(backend, size):
    found = dense_crf(picture(*size), given(2, *size), backend=backend)
    assert found.shape == (2, *size)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


def test_one_label_is_certain(backend):
    assert (dense_crf(picture(5, 6), np.full((1, 5, 6), 0.3), backend=backend) == 1).all()


NAN = np.full((2, 8, 9), np.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((8, 9, 3))}, "`image` to be a uint8 array .H, W, 3., but got float64"),
        ({"image": np.zeros((8, 9), np.uint8)}, r"`image` to be an array \(H, W, 3\), but got shape \(8, 9\)"),
        ({"image": torch.zeros(8, 9, 3)}, "but got Tensor"),
        ({"probabilities": given(2, 9, 8)}, r"`probabilities` to be of the image's size \(8, 9\), but got \(9, 8\)"),
        ({"probabilities": np.ones((8, 9))}, r"`probabilities` to be an array \(L, H, W\)"),
        ({"probabilities": NAN}, "`probabilities` to be finite and not negative, but got nan"),
        ({"probabilities": -given(2, 8, 9)}, "`probabilities` to be finite and not negative, but got -"),
        ({"probabilities": np.zeros((2, 8, 9))}, "`probabilities` to be positive for some label, but got 0 everywhere"),
        ({"probabilities": given(2, 8, 9) + 0j}, "`probabilities` to hold real numbers, but got complex"),
        ({"iterations": -1}, "`iterations` to be an integer of at least 0"),
        ({"gaussian": (0.0, 3.0)}, "`gaussian` to be a number in"),
        ({"bilateral": (50.0, -5.0, 10.0)}, "`bilateral` to be a number in"),
        ({"gaussian": 3.0}, "`gaussian` to be 2 numbers, the weight last, but got 3.0"),
        ({"gaussian": (3.0, float("inf"))}, "`gaussian` to be a number in"),
        (
            {"bilateral": (50.0, 1e-4, 10.0), "backend": "torch"},
            "`bilateral` to be wider for an image of 9×8 pixels and the backend torch",
        ),
        ({"bilateral": (50.0, 10.0)}, "`bilateral` to be 3 numbers, the weight last"),
        ({"backend": "numpy"}, '`backend` to be one of "auto", "pydensecrf", "torch", but got \'numpy\''),
    ],
)
def test_errors(change, message):
    arguments = {"image": picture(8, 9), "probabilities": given(2, 8, 9), **change}
    with pytest.raises(ValueError, match=message):
        dense_crf(**arguments)


def test_without_pydensecrf(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    assert check_backend("auto") == "torch"
    assert dense_crf(picture(8, 9), given(2, 8, 9)).shape == (2, 8, 9)
    with pytest.raises(ImportError, match=r"pip install pydensecrf2 .*or take the backend torch"):
        dense_crf(picture(8, 9), given(2, 8, 9), backend="pydensecrf")


def test_autocast_changes_nothing(backend):
    image, probabilities = picture(20, 24), given(2, 20, 24)
    wanted = dense_crf(image, probabilities, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(dense_crf(image, probabilities, backend=backend), wanted)


def test_the_benchmark_runs_and_writes_its_numbers(tmp_path):
    file = tmp_path / "crf.json"
    command = [sys.executable, BENCHMARK, "--size", "60", "80", "--count", "2", "--repeats", "1", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert len(result["images"]) == 2
    assert {"torch", "torch, two"} <= result["images"][0]["ms"].keys()
    if check_backend("auto") == "pydensecrf":
        assert result["ratios"].keys() == {"torch / pydensecrf", "torch / pydensecrf, two"}
        assert min(image["equal"] for image in result["images"]) > 0.99
    assert "torch" in done.stdout
