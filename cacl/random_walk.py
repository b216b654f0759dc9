"""Random walks: seeds spread over an image until they meet an edge (IRNet, Ahn et al. 2019), or another colour."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, reduce
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from cacl._support.chebyshev import applied, of_power, of_restarts
from cacl._support.checks import check_tensor, kind_of, shape
from cacl._support.values import check_integer, check_positive, check_range
from cacl.errors import expected

Offset = tuple[int, int]
"""(dy, dx) in pixels, down and to the right."""
RESTART = 0.02
"""How often, a step, the walk of :func:`spread` starts again: it goes some 50 steps far."""


def propagate(cams: Tensor, edges: Tensor, *, radius: int = 5, beta: float = 10.0, steps: int = 256) -> Tensor:
    r"""Spread seeds by a random walk that hardly crosses edges (IRNet, Ahn et al. 2019).

    Two pixels less than ``radius`` apart have the affinity :math:`a_{ij} = (1 - \max_{k \in \Pi_{ij}} e_k)^\beta`
    with the largest edge on the path between them (:func:`paths`), and each pixel has the affinity 1 to itself.
    A step replaces every pixel by the mean of its neighbours, weighted by their affinity:

    .. math:: D^{-1} A \dots D^{-1} A \, (m \cdot (1 - e)), \quad D_{ii} = \textstyle\sum_j a_{ij}

    The dense (hw)² matrix is never made: time and memory grow with hw · radius², and time with √steps. Nothing is
    recorded for gradients.

    Args:
        cams: the seeds of C classes, ``(C, h, w)``.
        edges: the probability of an edge at each pixel, ``(h, w)`` in [0, 1], on the same device.
        radius: how far apart neighbours may be in pixels; 1 has no neighbours.
        beta: the larger, the more a weak edge stops.
        steps: of the walk. IRNet squares its matrix 8 times, which is 256.

    Returns:
        ``(C, h, w)`` of the type of ``cams``; computed in float32, or in float64 if ``cams`` are. Every value lies
        within the range that its class's seeds · (1 − edge) have.

    Raises:
        ValueError: if the shapes or devices differ, an edge lies outside [0, 1], a seed is not finite, or ``radius``,
            ``beta`` or ``steps`` is too small or of a wrong type.

    Example:
        >>> edges = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
        >>> propagate(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), edges)
        tensor([[[0.5000, 0.5000, 0.0000, 0.0000]]])
    """
    _check(cams, edges)
    check_positive("radius", radius)
    check_range("beta", beta, 0, float("inf"))
    check_integer("steps", steps, 0)
    with torch.no_grad(), torch.autocast(cams.device.type, enabled=False):
        dtype = torch.promote_types(cams.dtype, torch.float32)
        edges = edges.to(dtype)
        seeds = cams.to(dtype) * (1 - edges)
        # All that is left out of a row adds up to less than rounding does, whatever the number of steps.
        negligible = torch.finfo(dtype).eps / ((2 * radius) ** 2 * max(1, steps))
        affinities = (
            (offset, F.threshold((1 - edge).pow_(beta), negligible, 0.0)) for offset, edge in along_paths(edges, radius)
        )
        return _walked(seeds, affinities, radius, of_power(steps, torch.finfo(dtype).eps)).to(cams.dtype)


def spread(cams: Tensor, photo: Tensor, *, radius: int = 5, colour: float = 5.0, restart: float = RESTART) -> Tensor:
    r"""Spread seeds to near pixels of like colour by a random walk with restart: an affinity that nothing learns.

    Two pixels less than ``radius`` apart have the affinity :math:`a_{ij} = e^{-|c_i - c_j|^2 / 2 \sigma^2}`, and each
    pixel has the affinity 1 to itself. Every step of a walk over :math:`D^{-1} A, D_{ii} = \sum_j a_{ij}`, starts
    again with the probability ``restart``, so that it never goes far from where the CAMs are (random walk with
    restart; Grady 2006 has the affinity):

    .. math:: r \sum_t (1 - r)^t (D^{-1} A)^t \, m = r \, (I - (1 - r) \, D^{-1} A)^{-1} m

    Nothing is recorded for gradients; time and memory as for :func:`propagate`.

    Args:
        cams: the seeds of C classes, ``(C, h, w)``.
        photo: the photo at their size, ``(3, h, w)``, floats up to 255 or uint8, on the same device.
        radius: how far apart neighbours may be in pixels; 1 has no neighbours.
        colour: standard deviation σ in colour values (of 255).
        restart: r in (0, 1]; 1 gives the seeds.

    Returns:
        ``(C, h, w)`` of the type of ``cams``; computed in float32, or in float64 if ``cams`` are. Every value lies
        within the range of its class's seeds.

    Raises:
        ValueError: if the shapes or devices differ, a value is not finite, or a setting is out of range.

    Example:
        >>> photo = torch.tensor([0.0, 0.0, 255.0]).expand(3, 1, 3)
        >>> spread(torch.tensor([[[1.0, 0.0, 0.0]]]), photo, restart=0.5)
        tensor([[[0.7500, 0.2500, 0.0000]]])
    """
    check_tensor("cams", cams, "(C, h, w)")
    if isinstance(photo, Tensor) and photo.dtype == torch.uint8:
        photo = photo.float()
    check_tensor("photo", photo, "(3, h, w)")
    if len(photo) != 3 or photo.shape[1:] != cams.shape[1:] or 0 in photo.shape:
        raise expected("photo", f"of three colours and the size of `cams` {tuple(cams.shape[1:])}", shape(photo))
    if photo.device != cams.device:
        raise expected("photo", f"on the device of `cams`, {cams.device}", photo.device)
    for name, values in (("cams", cams), ("photo", photo)):
        if not bool(values.detach().isfinite().all()):
            raise expected(name, "finite", "NaN or infinity")
    check_positive("radius", radius)
    check_range("colour", colour, 1e-3, float("inf"))
    check_range("restart", restart, 1e-4, 1)
    with torch.no_grad(), torch.autocast(cams.device.type, enabled=False):
        dtype = torch.promote_types(cams.dtype, torch.float32)
        colours = photo.to(dtype)
        negligible = torch.finfo(dtype).eps / (2 * radius) ** 2 * restart

        def affinities() -> Iterator[tuple[Offset, Tensor]]:
            height, width = colours.shape[1:]
            for (dy, dx), _ in paths(radius):
                if dy >= height or abs(dx) >= width:
                    continue
                first, second = (colours[:, *end] for end in ends((dy, dx), (height, width)))
                apart = (first - second).square_().sum(0)
                yield (dy, dx), F.threshold(apart.mul_(-0.5 / colour**2).exp_(), negligible, 0.0)

        series = of_restarts(restart, torch.finfo(dtype).eps)
        return _walked(cams.to(dtype), affinities(), radius, series).to(cams.dtype)


@lru_cache
def paths(radius: int) -> tuple[tuple[Offset, tuple[Offset, ...]], ...]:
    """The pairs of pixels that are less than ``radius`` apart, and the pixels between them.

    A path is the pixels of the pair's bounding box that are closer than 1 to the line between the two, both ends
    included.

    Args:
        radius: in pixels, at least 1.

    Returns:
        ``(offset, path)`` of every offset of the half disc dy² + dx² < radius² with dy > 0, or dy = 0 and dx > 0 (the
        other half is its mirror image), those with the shortest paths first. A path is offsets from the first pixel.

    Raises:
        ValueError: if ``radius`` is no positive integer.

    Example:
        >>> paths(2)[0]
        ((0, 1), ((0, 0), (0, 1)))
    """
    check_positive("radius", radius)
    result = []
    for dy, dx in product(range(radius), range(1 - radius, radius)):
        if (dy, dx) > (0, 0) and dy**2 + dx**2 < radius**2:
            box = product(range(dy + 1), range(min(dx, 0), max(dx, 0) + 1))
            path = tuple((y, x) for y, x in box if (dy * x - dx * y) ** 2 < dy**2 + dx**2)
            result.append(((dy, dx), path))
    return tuple(sorted(result, key=lambda pair: len(pair[1])))


def ends(offset: Offset, size: Sequence[int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the first and the second pixels of all pairs lie in a map ``(h, w)`` that is larger than the offset."""
    (dy, dx), (height, width) = offset, size
    left, right = max(0, -dx), width - max(0, dx)
    return (slice(0, height - dy), slice(left, right)), (slice(dy, height), slice(left + dx, right + dx))


def along_paths(edges: Tensor, radius: int) -> Iterator[tuple[Offset, Tensor]]:
    """The largest edge on the path of every pair of pixels, one offset at a time.

    Differentiable. Long paths are made of shorter ones: an offset costs about one elementwise maximum, and the maps
    of all offsets are kept until the last. Do not change them in place.

    Args:
        edges: ``(..., h, w)``.
        radius: in pixels, as in :func:`paths`.

    Yields:
        ``(dy, dx)`` in the order of :func:`paths`, and ``(..., h − dy, w − |dx|)``: the maxima of the pairs whose
        first pixel has y in [0, h − dy) and x in [max(0, −dx), w − max(0, dx)). Offsets that no two pixels of the
        image have are left out.

    Raises:
        ValueError: if ``radius`` is no positive integer.
    """
    if not isinstance(edges, Tensor) or edges.ndim < 2:
        raise expected("edges", "a tensor (..., h, w)", shape(edges) if isinstance(edges, Tensor) else kind_of(edges))
    height, width = edges.shape[-2:]
    maxima = {(0, 0): edges}
    for (dy, dx), parts in _parts(radius):
        rows, columns = height - dy, width - abs(dx)
        if rows < 1 or columns < 1:
            continue
        views = [maxima[part][..., y : y + rows, x : x + columns] for part, (y, x) in parts]
        maxima[dy, dx] = reduce(torch.maximum, views)
        yield (dy, dx), maxima[dy, dx]


@lru_cache
def _parts(radius: int) -> tuple[tuple[Offset, tuple[tuple[Offset, Offset], ...]], ...]:
    """Every offset with the few shorter paths that together are its path: ``(offset, ((offset, corner), ...))``.

    A corner is where the top left of the part's bounding box lies in that of the whole, as (y, x).
    """
    pixels = {(0, 0): 1}  # a path as a set of bits, bit y · radius + x for (y, x) of its bounding box
    result = []
    for (dy, dx), path in paths(radius):
        whole = sum(1 << (y * radius + x - min(0, dx)) for y, x in path)
        moved = {
            ((v, u), (y, x)): bits << (y * radius + x)
            for (v, u), bits in pixels.items()
            for y, x in product(range(dy - v + 1), range(abs(dx) - abs(u) + 1))
        }
        moved = {part: bits for part, bits in moved.items() if bits & whole == bits}
        missing, parts = whole, []
        while missing:
            best = max(moved, key=lambda part: (moved[part] & missing).bit_count())
            missing &= ~moved[best]
            parts.append(best)
        result.append(((dy, dx), tuple(parts)))
        pixels[dy, dx] = whole
    return tuple(result)


def _check(cams: Tensor, edges: Tensor) -> None:
    check_tensor("cams", cams, "(C, h, w)")
    check_tensor("edges", edges, "(h, w)")
    if edges.shape != cams.shape[1:]:
        raise expected("edges", f"of the size of `cams` {tuple(cams.shape[1:])}", shape(edges))
    if edges.device != cams.device:
        raise expected("edges", f"on the device of `cams`, {cams.device}", edges.device)
    if edges.numel() == 0:
        raise expected("edges", "at least one pixel", shape(edges))
    low, high = (float(x) for x in edges.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise expected("edges", "probabilities in [0, 1]", f"values in [{low:g}, {high:g}]")
    if not bool(cams.detach().isfinite().all()):
        raise expected("cams", "finite", "NaN or infinity")


def _walked(
    seeds: Tensor, affinities: Iterable[tuple[Offset, Tensor]], radius: int, series: tuple[float, ...]
) -> Tensor:
    """Seeds ``(C, h, w)`` after a walk: a series of Chebyshev polynomials of D⁻¹A that adds up to 1.

    Its eigenvalues are real and in [−1, 1], as such series ask for: it is similar to the symmetric D^-½ A D^-½.
    """
    if seeds.numel() == 0:
        return seeds
    change = _change(seeds[0], radius, affinities)
    walked = applied(change, seeds.flatten(1).t().contiguous(), series)
    low, high = seeds.flatten(1).aminmax(dim=1)
    # A mean never leaves the range of the seeds; what the series' rounding adds would, by some 1e-6.
    return walked.t().clamp(low[:, None], high[:, None]).reshape(seeds.shape)


def _change(like: Tensor, radius: int, affinities: Iterable[tuple[Offset, Tensor]]) -> Tensor:
    """What a step adds to each pixel: the sparse matrix D⁻¹A − I, ``(hw, hw)``.

    All rows have an entry for every offset of the disc, so that it needs neither sorting nor counting; neighbours
    outside the image have weight 0 and any index. Without the − I, float32 would lose what a pixel that is almost
    closed in gives and takes, some 1e-5 a step.

    Args:
        like: ``(h, w)``, of the wanted type and device.
        radius: of the disc.
        affinities: of the pairs of each offset of the half disc, as :func:`along_paths` has them. None is so small
            that it would be denormal once it is divided: products with such numbers take several times as long.
    """
    height, width = like.shape
    half = [offset for offset, _ in paths(radius)]
    disc = sorted([(0, 0), *half, *((-dy, -dx) for dy, dx in half)])
    place = {offset: i for i, offset in enumerate(disc)}
    weights = like.new_zeros(height, width, len(disc))
    for (dy, dx), affinity in affinities:
        first, second = ends((dy, dx), (height, width))
        weights[*first, place[dy, dx]] = affinity
        weights[*second, place[-dy, -dx]] = affinity
    others = weights.sum(-1)
    weights[..., place[0, 0]] = -others
    weights /= (1 + others)[..., None]

    # int32 has half of int64's bytes to read, and is what MKL, behind the CPU's products, would convert int64 to.
    dtype = torch.int32 if weights.numel() < 2**31 else torch.int64
    pixels = torch.arange(like.numel() + 1, dtype=dtype, device=like.device)
    moves = torch.tensor([dy * width + dx for dy, dx in disc], dtype=dtype, device=like.device)
    neighbours = (pixels[:-1, None] + moves).clamp_(0, like.numel() - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls all of CSR "beta"
        return torch.sparse_csr_tensor(
            pixels * len(disc), neighbours.flatten(), weights.flatten(), device=like.device, check_invariants=False
        )
