"""Gaussian filters in a few dimensions on the permutohedral lattice (Adams, Baek and Davis, 2010), in torch operations.

A value at a point of the d-dimensional feature space is spread over the d + 1 corners of the simplex of the lattice
that the point lies in ("splat"), the lattice is blurred with (1/2, 1, 1/2) along each of its d + 1 axes, and read at
the points again ("slice"). All of it is linear: a filter is a handful of sparse matrices, which are built once and
applied to any number of channels at a time.

A lattice point has d + 1 integer coordinates that add up to 0 and are all equal to r modulo d + 1: it is a colour r
and the integers q of its coordinates r + (d + 1) q. A simplex has one corner of each colour, and from one corner to
the next, or from a point to its neighbour on an axis, r changes by 1 and one q by 1 (from colour 0 to d, all other q).
Hence r and the first d of q are packed into one number, the key, in which every such step is an addition.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from cacl.errors import InputError

_FARTHEST = 32767  # of a lattice coordinate from 0; float32 is good enough for so many, and their keys are short


class GaussianFilter:
    r"""Filters N points by :math:`w D^{-1/2} K D^{-1/2}`, where :math:`K_{ij} \approx \exp(-\|f_i - f_j\|^2 / 2)`.

    D holds the row sums of K. That is Krähenbühl and Koltun's symmetric normalisation.

    Args:
        features: f in units of the standard deviation, float32 ``(d, N)``, on the device where the filter is to work.
        weight: w.

    Raises:
        InputError: if the features are too many standard deviations apart.
    """

    size: int
    """Number of lattice points."""

    def __init__(self, features: Tensor, weight: float = 1.0) -> None:
        d, points = features.shape
        weights, keys, step = _simplices(features)
        rows = [row.sort() for row in keys]  # much faster than keys.sort(1); all keys of a colour lie below the next's
        keys, pixels = torch.cat([row.values for row in rows]), torch.cat([row.indices for row in rows])
        new = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[1:], keys[:-1], out=new[1:])
        first = new.nonzero()[:, 0]
        corners = torch.empty_like(pixels).view(d + 1, points)
        corners.scatter_(1, pixels.view_as(corners), new.cumsum(0).sub_(1).view_as(corners))
        self.size = len(first)
        self._blurs = _blurs(keys[first], step)

        # One row more, of the point that stands for all that do not exist
        starts = torch.cat((first, first.new_tensor([len(keys), len(keys)])))
        splat = weights.gather(1, pixels.view_as(weights)).view(-1)
        self._splat = _csr(starts, pixels, splat, points)
        read = weights.t().reshape(-1)
        self._slice = _csr(_every(d + 1, points, keys), corners.t().reshape(-1), read, self.size + 1)

        # From K to the wanted filter, in the matrices themselves, which share the memory of their values
        read /= 1 + 2.0**-d  # the gain of the blur
        scale = self(features.new_ones(points, 1))[:, 0].add_(1e-20).rsqrt_()
        splat *= scale[pixels]
        read.view(points, d + 1).mul_((scale * weight)[:, None])

    def __call__(self, values: Tensor, *, add_to: Tensor | None = None) -> Tensor:
        """``(N, C)`` filtered; with ``add_to``, that tensor grows by it and is returned."""
        values = self._splat @ values
        for blur in self._blurs:
            values = blur @ values
        return self._slice @ values if add_to is None else torch.addmm(add_to, self._slice, values, out=add_to)


class _Step(NamedTuple):
    """What is added to a key when one q, or the colour, grows by 1."""

    q: list[int]
    """Of the d + 1 components; 0 for the last, which is not in the key."""
    colour: int


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, _Step]:
    """Barycentric weights and keys, both ``(d + 1, N)``, of the corners of colour 0 ... d of each point's simplex."""
    d, points = features.shape
    # On the plane where d + 1 coordinates add up to 0, at the scale that gives the blur standard deviation 1
    deviation = torch.tensor(math.sqrt(2 / 3) * (d + 1), dtype=torch.float32, device="cpu").item()  # as in pydensecrf
    position = features.new_empty(d + 1, points)
    total = features.new_zeros(points)
    for j in range(d, 0, -1):
        part = features[j - 1] * (deviation / math.sqrt(j * (j + 1)))
        torch.sub(total, part * j, out=position[j])
        total += part
    position[0] = total

    # The corner of colour 0: the nearest multiples of d + 1, put right where they do not add up to 0. The order of the
    # remainders, smallest first, says where to put them right, and in which order the q fall from corner to corner.
    q = (position * (1 / (d + 1))).round_()
    rest = position - q * (d + 1)
    order = torch.arange(d, -1, -1, dtype=torch.int8, device=features.device)[:, None].repeat(1, points)
    for i in range(d):
        for j in range(i + 1, d + 1):
            less = (rest[i] < rest[j]).view(torch.int8)
            order[i] -= less
            order[j] += less
    order -= q.sum(0).to(torch.int8)
    wrap = (order > d).to(torch.int8) - (order < 0).to(torch.int8)
    order -= wrap * (d + 1)
    q += wrap
    rest = (position - q * (d + 1)) * (1 / (d + 1))

    ranks = order.long()
    ranked = torch.empty_like(rest).scatter_(0, ranks, rest)
    weights = ranked.clone()
    weights[1:] -= ranked[:-1]
    weights[0] += 1 - ranked[-1]

    low, high = (bound.tolist() for bound in torch.aminmax(q[:d], dim=1))
    sizes = [int(b - a) + 4 for a, b in zip(low, high, strict=True)]  # corners lie up to 1 below, neighbours up to 2
    step = _Step([*(math.prod(sizes[:i]) for i in range(d)), 0], math.prod(sizes))
    if max(-min(low), max(high)) * (d + 1) > _FARTHEST or step.colour * (d + 1) >= 2**62:
        raise InputError("The standard deviations of a filter are too small for the size or the colours of the image.")
    steps = torch.tensor(step.q, device=features.device)[:, None]
    falls = torch.empty_like(ranks).scatter_(0, ranks, steps.expand_as(ranks))
    keys = torch.empty_like(ranks)
    torch.sum((q[:d] - (q.new_tensor(low)[:, None] - 2)).long() * steps[:d], 0, out=keys[0])
    torch.sub(step.colour, falls[:d], out=keys[1:])
    return weights, keys.cumsum_(0), step


def _blurs(keys: Tensor, step: _Step) -> list[Tensor]:
    """For each axis a matrix with 1 for a lattice point itself and 1/2 for its neighbour to either side.

    Lattice points that no pixel touches do not exist; the last row stands for them and stays 0, so that every row has
    three entries, which is faster than fewer would be.
    """
    size, axes = len(keys), len(step.q)
    below = keys - step.colour
    below[: int((keys < step.colour).sum())] += axes * step.colour - sum(step.q)
    padded = torch.cat((keys, keys.new_tensor([torch.iinfo(keys.dtype).max])))
    itself = torch.arange(size + 1, device=keys.device)
    starts, values = (
        _every(3, size + 1, keys),
        torch.tensor([0.5, 1, 0.5], dtype=torch.float32, device=keys.device).repeat(size + 1),
    )
    blurs = []
    for q in step.q:
        wanted = below + q
        left = torch.searchsorted(keys, wanted)
        left[padded[left] != wanted] = size
        left = torch.cat((left, left.new_tensor([size])))
        right = torch.full_like(itself, size).scatter_(0, left, itself)
        right[size] = size
        blurs.append(_csr(starts, torch.stack((left, itself, right), 1).view(-1), values, size + 1))
    return blurs


def _every(entries: int, rows: int, like: Tensor) -> Tensor:
    """Where the rows of a matrix start that all have as many entries."""
    return torch.arange(0, entries * rows + 1, entries, device=like.device)


def _csr(starts: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A sparse matrix; with 32-bit indices, which the CPU's library needs and would otherwise make in every product."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            starts.int(), columns.int(), values, (len(starts) - 1, width), device=values.device, check_invariants=False
        )
