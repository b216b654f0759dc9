"""What a random walk costs, against 256 products with a scipy matrix and against squaring a dense one.

    python benchmarks/random_walk.py
    python benchmarks/random_walk.py --size 500 667 --json random_walk.json
    python benchmarks/random_walk.py --device cuda

All walk from the same seeds over the same random edge map, building included, in turn. ``scipy`` is the walk in plain
sparse products on the CPU, in float32 too; ``dense`` squares the (hw)² matrix 8 times on the device, as IRNet does.
Dense is measured on a grid of a third of both sides, at most 42 pixels, and scaled by the operations of a matrix
product, (hw)³; its building is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from math import ceil, prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from cacl.random_walk import propagate

RADIUS, BETA, STEPS = 5, 10, 256
CLAIMS = {"scipy/cacl": 8, "dense/cacl": 2000}
NOISY = 1.5  # longest time by shortest, from which on a machine is too busy to prove anything


def plain_matrix(edges: np.ndarray) -> sparse.csr_matrix:
    """IRNet's transition matrix, ``(hw, hw)``, pixel by pixel of every path."""
    height, width = edges.shape
    index = np.arange(height * width).reshape(height, width)
    rows, columns, values = [index.ravel()], [index.ravel()], [np.ones(index.size, edges.dtype)]
    for dy in range(min(RADIUS, height)):
        for dx in range(max(-RADIUS, -width) + 1, min(RADIUS, width)):
            if (dy, dx) <= (0, 0) or dy**2 + dx**2 >= RADIUS**2:
                continue
            bottom, left, right = height - dy, max(0, -dx), width - max(0, dx)
            largest = np.zeros((bottom, right - left), edges.dtype)
            for y in range(dy + 1):
                for x in range(min(0, dx), max(0, dx) + 1):
                    if (dy * x - dx * y) ** 2 < dy**2 + dx**2:
                        largest = np.maximum(largest, edges[y : bottom + y, left + x : right + x])
            first, second = index[:bottom, left:right].ravel(), index[dy:, left + dx : right + dx].ravel()
            rows += [first, second]
            columns += [second, first]
            values += [(1 - largest).ravel() ** BETA] * 2
    where = (np.concatenate(rows), np.concatenate(columns))
    matrix = sparse.coo_matrix((np.concatenate(values), where), (index.size, index.size)).tocsr()
    return (sparse.diags(1 / np.asarray(matrix.sum(1)).ravel()) @ matrix).astype(edges.dtype)


def with_scipy(cams: np.ndarray, edges: np.ndarray) -> np.ndarray:
    matrix = plain_matrix(edges)
    walked = (cams * (1 - edges)).reshape(len(cams), -1).T
    for _ in range(STEPS):
        walked = matrix @ walked
    return walked.T.reshape(cams.shape)


def with_dense(matrix: Tensor, cams: Tensor, edges: Tensor) -> Tensor:
    for _ in range(STEPS.bit_length() - 1):
        matrix = matrix @ matrix
    return ((cams * (1 - edges)).flatten(1) @ matrix.t()).reshape(cams.shape)


def milliseconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def resident(field: str) -> float:
    """This process's memory in MB, from Linux: ``VmRSS`` now, ``VmHWM`` at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def extra_memory(cams: Tensor, edges: Tensor) -> float:
    """What ``propagate`` needs at most above what is there before, in MB."""
    propagate(cams[..., :9, :9], edges[:9, :9])  # loads the libraries and starts their threads
    if edges.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        propagate(cams, edges)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resident("VmRSS")
    propagate(cams, edges)
    return resident("VmHWM") - before


def draw(classes: int, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(classes, *size).to(device), (torch.rand(*size) ** 3).to(device)


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(ours.cpu().numpy() - theirs).max() / np.abs(theirs).max())


def measure(size: tuple[int, int], classes: int, repeats: int, device: str) -> dict[str, Any]:
    cams, edges = draw(classes, size, device)
    small = (min(42, ceil(size[0] / 3)), min(42, ceil(size[1] / 3)))
    small_cams, small_edges = cams[:, : small[0], : small[1]], edges[: small[0], : small[1]]
    matrix = torch.from_numpy(plain_matrix(small_edges.cpu().numpy()).toarray()).to(device)
    ways: dict[str, Callable[[], Any]] = {
        "cacl": partial(propagate, cams, edges, radius=RADIUS, beta=BETA, steps=STEPS),
        "scipy": partial(with_scipy, cams.cpu().numpy(), edges.cpu().numpy()),
        "dense": partial(with_dense, matrix, small_cams, small_edges),
    }
    double = [x.double().cpu().numpy() for x in (cams, edges)]
    small_double = [x.double().cpu().numpy() for x in (small_cams, small_edges)]
    exact = np.linalg.matrix_power(plain_matrix(small_double[1]).toarray(), STEPS)
    seeds = small_double[0] * (1 - small_double[1])
    error = {
        "scipy": relative(ways["cacl"](), with_scipy(*double)),
        "dense": relative(propagate(small_cams, small_edges).flatten(1), seeds.reshape(classes, -1) @ exact.T),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + repeats):  # the first round warms up
        for name in random.sample(list(ways), len(ways)):
            times[name].append(milliseconds(ways[name], device))
    times = {name: all_[1:] for name, all_ in times.items()}
    ms = {name: median(all_) for name, all_ in times.items()}
    scale = (prod(size) / prod(small)) ** 3
    dense = {"size": small, "ms": ms["dense"], "scale": scale}
    ms["dense"] *= scale
    return {
        "ms": ms,
        "ratios": {"scipy/cacl": ms["scipy"] / ms["cacl"], "dense/cacl": ms["dense"] / ms["cacl"]},
        "dense": dense,
        "max/min": {name: max(all_) / min(all_) for name, all_ in times.items()},
        "relative_error": error,
        "all_ms": times,
    }


def show(result: dict[str, Any]) -> None:
    size, small = ("{}×{}".format(*pair) for pair in (result["size"], result["dense"]["size"]))
    print(f"{size} pixels, {result['classes']} classes, radius {RADIUS}, beta {BETA}, {STEPS} steps")
    print("{device}, torch {torch}, medians of {repeats}".format(**result))
    print(f"\n{'':10}{'ms':>12}{'max/min':>10}")
    for name, ms in result["ms"].items():
        print(f"{name:10}{ms:12.1f}{result['max/min'][name]:10.1f}")
    print("dense: {ms:.1f} ms at {small}, times {scale:.0f} for (hw)³".format(**result["dense"], small=small))
    print()
    for name, ratio in result["ratios"].items():
        print(f"{name} {ratio:.1f} (claim: at least {CLAIMS[name]} at 94×125 on two CPU cores)")
    if max(result["max/min"].values()) > NOISY:
        print(f"The machine was busy (max/min above {NOISY}): these ratios prove nothing, neither way.")
    print(f"cacl needs {result['megabytes']:.0f} MB at most (claim: below 100 MB at 94×125)")
    scipy, dense = (result["relative_error"][name] for name in ("scipy", "dense"))
    print(f"cacl differs from float64 by {scipy:.0e} of the largest value at {size} (scipy),")
    print(f"by {dense:.0e} at {small} (dense; claim: at most 1e-4)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", type=int, nargs=2, default=(94, 125), metavar=("H", "W"))
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--memory-only", action="store_true", help="print only the MB that cacl needs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random.seed(0)
    size = (args.size[0], args.size[1])
    if args.memory_only:
        print(extra_memory(*draw(args.classes, size, args.device)))
        return

    device = f"CPU with {args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    result = {"size": size, "classes": args.classes, "repeats": args.repeats}
    result |= {"device": device, "torch": torch.__version__}
    result |= measure(size, args.classes, args.repeats, args.device)
    # In a process of its own: here, earlier walks have left memory that the next one would take without being seen.
    command = [sys.executable, *sys.argv, "--memory-only"]
    result["megabytes"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
