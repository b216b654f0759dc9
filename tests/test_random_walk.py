"""The random walk equals IRNet's dense one, without its (hw)² matrix."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cacl._support.chebyshev import of_power, of_restarts
from cacl.random_walk import along_paths, paths, propagate, spread

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "random_walk.py"


def between(first, second):
    """The pixels of the path from one pixel to the other, by their distance to the line."""
    first, second = np.array(first), np.array(second)
    low, high = np.minimum(first, second), np.maximum(first, second)
    line = (second - first) / max(np.linalg.norm(second - first), 1e-9)
    for pixel in product(range(low[0], high[0] + 1), range(low[1], high[1] + 1)):
        away = pixel - first
        if np.linalg.norm(away - (away @ line) * line) < 1 - 1e-9:
            yield pixel


def dense(cams, edges, radius, beta, steps):
    """The walk in float64, with its whole matrix, pair by pair."""
    cams, edges = cams.double().numpy(), edges.double().numpy()
    pixels = list(product(*(range(side) for side in edges.shape)))
    matrix = np.zeros((len(pixels), len(pixels)))
    for (i, a), (j, b) in product(enumerate(pixels), repeat=2):
        if i == j:
            matrix[i, j] = 1
        elif (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < radius**2:
            matrix[i, j] = (1 - max(edges[pixel] for pixel in between(a, b))) ** beta
    matrix /= matrix.sum(1, keepdims=True)
    seeds = (cams * (1 - edges)).reshape(len(cams), -1)
    return torch.from_numpy(seeds @ np.linalg.matrix_power(matrix, steps).T).reshape(cams.shape)


def assert_equal(ours, reference, tolerance):
    assert ours.shape == reference.shape
    assert (ours.double() - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.fixture
def rand():
    generator = torch.Generator().manual_seed(0)
    return lambda *size: torch.rand(size, generator=generator)


@pytest.mark.parametrize(("radius", "number"), [(1, 0), (2, 4), (5, 34), (10, 152)])
def test_paths_of_the_half_disc(radius, number):
    pairs = dict(paths(radius))
    assert len(paths(radius)) == len(pairs) == number
    for (dy, dx), path in pairs.items():
        assert dy > 0 or (dy == 0 and dx > 0)
        assert dy**2 + dx**2 < radius**2
        assert sorted(path) == sorted(between((0, 0), (dy, dx)))


def test_paths_by_hand():
    pairs = {offset: set(path) for offset, path in paths(6)}
    assert pairs[0, 3] == {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert pairs[2, 1] == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)}  # two pixels are 2/√5 away from the line
    assert pairs[1, -2] == {(0, 0), (0, -1), (0, -2), (1, 0), (1, -1), (1, -2)}
    assert pairs[2, 2] == {(0, 0), (1, 1), (2, 2), (0, 1), (1, 0), (1, 2), (2, 1)}
    assert (1, 3) not in pairs[3, 4]  # exactly 1 away


@pytest.mark.parametrize("size", [(11, 13), (3, 20), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("radius", [1, 4, 10])
def test_along_paths(rand, size, radius):
    edges = rand(2, 3, *size)
    found = dict(along_paths(edges, radius))
    height, width = size
    for (dy, dx), path in paths(radius):
        rows, columns = height - dy, width - abs(dx)
        if rows < 1 or columns < 1:
            assert (dy, dx) not in found
            continue
        left = max(0, -dx)
        views = [edges[..., y : y + rows, left + x : left + x + columns] for y, x in path]
        assert torch.equal(found[dy, dx], torch.stack(views).amax(0))


def test_along_paths_is_differentiable(rand):
    edges = rand(2, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda edges: tuple(largest for _, largest in along_paths(edges, 3)), (edges,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-12), (torch.float16, 1e-3)])
@pytest.mark.parametrize("size", [(9, 7), (4, 12), (1, 9), (9, 1), (3, 2), (1, 1)])
def test_equals_the_dense_walk(rand, size, dtype, tolerance):
    cams, edges = rand(3, *size).to(dtype), (rand(*size) ** 3).to(dtype)
    ours = propagate(cams, edges)
    assert ours.dtype == dtype
    assert_equal(ours, dense(cams, edges, 5, 10, 256), tolerance)


@pytest.mark.parametrize(("radius", "beta"), [(1, 10), (2, 1), (3, 0), (4, 0.5), (8, 20)])
def test_radius_and_beta(rand, radius, beta):
    cams, edges = rand(2, 6, 7), rand(6, 7)
    assert_equal(propagate(cams, edges, radius=radius, beta=beta), dense(cams, edges, radius, beta, 256), 3e-5)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 20, 255, 1000])
def test_steps(rand, steps):
    cams, edges = rand(2, 6, 7), rand(6, 7)
    assert_equal(propagate(cams, edges, steps=steps), dense(cams, edges, 5, 10, steps), 3e-5)


@pytest.mark.parametrize("strength", [0.97, 0.9999, 1.0])
def test_almost_closed_pixels_keep_float32_s_accuracy(rand, strength):
    """Their rows of the matrix are within 1e-7 of the unit matrix, which 256 steps make visible."""
    cams, edges = rand(2, 8, 8) * (rand(8, 8) > 0.7), strength * (rand(8, 8) > 0.5)
    assert_equal(propagate(cams, edges), dense(cams, edges, 5, 10, 256), 3e-5)


def test_a_closed_wall_keeps_the_seed_on_its_side():
    edges, cams = torch.zeros(8, 11), torch.zeros(2, 8, 11)
    edges[:, 5] = 1
    cams[0, 2, 1] = cams[1, 7, 10] = 1
    left, right = propagate(cams, edges)
    assert (left[:, :5] > 0.01).all()
    assert (right[:, 6:] > 0.01).all()
    assert not left[:, 5:].any()
    assert not right[:, :6].any()


@pytest.mark.parametrize("steps", [3, 256])
def test_what_is_constant_stays_so(steps):
    cams = torch.tensor([0.3, 0.0, 1.0]).view(3, 1, 1).expand(3, 7, 9)
    assert torch.equal(propagate(cams, torch.zeros(7, 9), steps=steps), cams)


def test_results_lie_between_the_seeds(rand):
    cams, edges = rand(4, 20, 20) * (rand(20, 20) > 0.9), rand(20, 20) ** 2
    assert (propagate(cams, edges) >= 0).all()


def test_the_edge_cases_of_the_arguments(rand):
    cams, edges = rand(2, 5, 6), rand(5, 6)
    seeds = cams * (1 - edges)
    assert torch.equal(propagate(cams, edges, steps=0), seeds)
    torch.testing.assert_close(propagate(cams, edges, radius=1), seeds, rtol=1e-6, atol=0)
    assert torch.equal(propagate(cams * 0, edges), cams * 0)
    assert propagate(cams[:0], edges).shape == (0, 5, 6)


def test_inputs_stay_and_nothing_is_recorded(rand):
    cams, edges = rand(2, 5, 6).requires_grad_(), rand(5, 6).requires_grad_()
    copies = cams.detach().clone(), edges.detach().clone()
    assert not propagate(cams, edges).requires_grad
    assert torch.equal(cams, copies[0])
    assert torch.equal(edges, copies[1])


def test_autocast_does_not_reach_it(rand):
    cams, edges = rand(2, 5, 6), rand(5, 6)
    outside = propagate(cams, edges)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(propagate(cams, edges), outside)


CAMS, EDGES = torch.zeros(2, 4, 5), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("cams", "edges", "options", "message"),
    [
        (CAMS[0], EDGES, {}, r"`cams` to be a tensor \(C, h, w\), but got shape \(4, 5\)"),
        (CAMS.long(), EDGES, {}, "`cams` to be of a floating point type"),
        (CAMS, CAMS, {}, r"`edges` to be a tensor \(h, w\), but got shape \(2, 4, 5\)"),
        (CAMS, EDGES.t(), {}, r"`edges` to be of the size of `cams` \(4, 5\), but got shape \(5, 4\)"),
        (CAMS, EDGES.to("meta"), {}, "`edges` to be on the device of `cams`, cpu, but got meta"),
        (CAMS[:, :0], EDGES[:0], {}, r"`edges` to be at least one pixel, but got shape \(0, 5\)"),
        (CAMS, EDGES + 1.5, {}, r"`edges` to be probabilities in \[0, 1\], but got values in \[1.5, 1.5\]"),
        (CAMS, EDGES - 0.1, {}, r"`edges` to be probabilities in \[0, 1\], but got values in \[-0.1, -0.1\]"),
        (CAMS, EDGES.clone().fill_diagonal_(torch.nan), {}, r"`edges` to be probabilities in \[0, 1\], but got .*nan"),
        (CAMS / 0, EDGES, {}, "`cams` to be finite, but got NaN or infinity"),
        (CAMS, EDGES, {"radius": 0}, "`radius` to be a positive integer, but got 0"),
        (CAMS, EDGES, {"radius": 2.5}, "`radius` to be a positive integer, but got 2.5"),
        (CAMS, EDGES, {"beta": -1}, r"`beta` to be a number in \[0, inf\], but got -1"),
        (CAMS, EDGES, {"beta": float("nan")}, r"`beta` to be a number in \[0, inf\], but got nan"),
        (CAMS, EDGES, {"steps": -1}, "`steps` to be an integer of at least 0, but got -1"),
    ],
)
def test_errors(cams, edges, options, message):
    with pytest.raises(ValueError, match=f"^Expected argument {message}.*") as error:
        propagate(cams, edges, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 6, 256, 100_001])
def test_the_series_is_the_power(steps):
    coefficients = of_power(steps, 1e-7)
    assert len(coefficients) <= 1 + min(steps, 6 * steps**0.5)
    x = torch.linspace(-1, 1, 999, dtype=torch.float64)
    series = sum(c * torch.cos(k * torch.arccos(x)) for k, c in enumerate(coefficients))
    torch.testing.assert_close(series, x**steps, rtol=0, atol=2e-7)


@pytest.mark.parametrize("restart", [1e-3, 0.02, 0.5, 1.0])
def test_the_series_is_the_walk_with_restart(restart):
    coefficients = of_restarts(restart, 1e-7)
    x = torch.linspace(-1, 1, 999, dtype=torch.float64)
    series = sum(c * torch.cos(k * torch.arccos(x)) for k, c in enumerate(coefficients))
    torch.testing.assert_close(series, restart / (1 - (1 - restart) * x), rtol=0, atol=1e-6)


def colour_walk(cams, photo, radius, colour, restart):
    """The walk with restart in float64 as one linear system, pair by pair."""
    size = cams.shape[1:]
    pixels, values = list(product(*map(range, size))), photo.double().flatten(1).t().numpy()
    matrix = np.eye(len(pixels))
    for (i, a), (j, b) in product(enumerate(pixels), repeat=2):
        if i != j and (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < radius**2:
            matrix[i, j] = math.exp(-((values[i] - values[j]) ** 2).sum() / (2 * colour**2))
    matrix /= matrix.sum(1, keepdims=True)
    seeds = cams.double().flatten(1).t().numpy()
    system = np.eye(len(pixels)) - (1 - restart) * matrix
    return torch.from_numpy(np.linalg.solve(system, restart * seeds).T).reshape(cams.shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-11), (torch.float16, 1e-3)])
@pytest.mark.parametrize("size", [(9, 7), (4, 12), (1, 9), (9, 1), (3, 2), (1, 1)])
def test_equals_the_walk_over_colours_as_a_linear_system(rand, size, dtype, tolerance):
    cams, photo = rand(3, *size).to(dtype), (60 * rand(3, *size)).to(dtype)
    ours = spread(cams, photo, colour=9.0)
    assert ours.dtype == dtype
    assert_equal(ours, colour_walk(cams, photo, 5, 9.0, 0.02), tolerance)


@pytest.mark.parametrize(("radius", "restart"), [(1, 0.02), (2, 0.5), (3, 1.0), (8, 1e-3)])
def test_radius_and_restart_of_the_walk_over_colours(rand, radius, restart):
    cams, photo = rand(2, 6, 8).double(), 60 * rand(3, 6, 8).double()
    ours = spread(cams, photo, radius=radius, colour=20.0, restart=restart)
    assert_equal(ours, colour_walk(cams, photo, radius, 20.0, restart), 1e-9)


def test_a_seed_stays_in_its_colour():
    photo = torch.zeros(3, 8, 8)
    photo[:, :, 4:] = 100
    seeds = torch.zeros(1, 8, 8)
    seeds[0, 3, 1] = 1
    walked = spread(seeds, photo)
    assert walked[..., :4].min() > 0.01
    assert not walked[..., 4:].any()
    assert not spread(seeds[:0], photo).numel()


@pytest.mark.parametrize(
    ("cams", "photo", "options", "message"),
    [
        (CAMS, torch.zeros(3, 2, 2), {}, "`photo` to be of three colours and the size of `cams` "),
        (CAMS, torch.zeros(1, *EDGES.shape), {}, "`photo` to be of three colours and the size of `cams` "),
        (CAMS, torch.full((3, *EDGES.shape), float("nan")), {}, "`photo` to be finite"),
        (CAMS * float("inf"), torch.zeros(3, *EDGES.shape), {}, "`cams` to be finite"),
        (CAMS, torch.zeros(3, *EDGES.shape), {"colour": 0}, "`colour` to be a number"),
        (CAMS, torch.zeros(3, *EDGES.shape), {"restart": 0}, "`restart` to be a number"),
        (CAMS, torch.zeros(3, *EDGES.shape), {"radius": 0}, "`radius` to be a positive integer, but got 0"),
    ],
)
def test_errors_of_the_walk_over_colours(cams, photo, options, message):
    with pytest.raises(ValueError, match=f"^Expected argument {message}.*") as error:
        spread(cams, photo, **options)
    assert "\n" not in str(error.value)


def test_memory_grows_with_the_pixels_not_with_their_square(rand):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            strided = (x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.layout == torch.strided)
            self.elements = max(self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in strided), 0)
            return result

    cams, edges = rand(2, 120, 160), rand(120, 160)
    with Largest() as largest:
        propagate(cams, edges, steps=9)
    assert largest.elements <= 69 * edges.numel()


def test_the_benchmark_runs_and_writes_its_numbers(tmp_path):
    file = tmp_path / "random_walk.json"
    options = ["--size", "12", "15", "--classes", "3", "--repeats", "1", "--json", file]
    done = subprocess.run([sys.executable, BENCHMARK, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["size"] == [12, 15]
    assert result["classes"] == 3
    assert result["dense"]["size"] == [4, 5]
    assert result["ms"].keys() == {"cacl", "scipy", "dense"}
    assert min(result["ms"].values()) > 0
    assert result["ratios"].keys() == {"scipy/cacl", "dense/cacl"}
    assert result["relative_error"].keys() == {"scipy", "dense"}
    assert max(result["relative_error"].values()) < 1e-4
    assert result["megabytes"] >= 0
    for line in ("scipy/cacl", "dense/cacl", "4×5", "MB"):
        assert line in done.stdout
