"""Regions of masks, and their outlines: polygons that fill exactly a region's pixels, holes cut open to the outside."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cacl.constants import IGNORE
from cacl.images import Mask

EDGES = (0.0, 0.0)
"""Outlines along the pixels' edges, for readers that take a polygon for an area: pycocotools, CVAT."""
INSIDE = (0.05, 0.55)
"""Outlines through the pixels themselves, for readers that draw the line too: OpenCV and Pillow, and so YOLO's, labelme
and supervision. Both those that round and those that cut off find the right pixel."""
_TOUCHING = np.ones((3, 3), dtype=bool)
"""Pixels that touch at a corner belong together."""
_LEFT, _UP = 2, 3
_STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
"""(x, y) of the four directions: right, down, left, up."""


class Region(NamedTuple):
    """Pixels of one value in a mask."""

    value: int
    left: int
    top: int
    pixels: NDArray[np.bool_]
    """``(h, w)``: the part of the mask that holds all of them."""


def regions_of(mask: Mask, *, parts: bool = True, min_area: int = 1) -> Iterator[Region]:
    """The regions of a mask, class by class from 1 on; at last what is 255, in one.

    Args:
        mask: ``(H, W)``: 0, class + 1, or 255.
        parts: a region for what hangs together, be it by a corner; else one for each class.
        min_area: parts of fewer pixels are left out, but for those that are 255.
    """
    for value in np.flatnonzero(np.bincount(mask.ravel(), minlength=1)[1:]) + 1:
        left_open = value == IGNORE
        numbers, count = ndimage.label(mask == value, _TOUCHING)
        if min_area > 1 and not left_open:
            small = np.bincount(numbers.ravel()) < min_area
            small[0] = False
            numbers[small[numbers]] = 0
        if left_open or not parts:
            numbers, count = (numbers > 0).astype(np.int32), 1
        for number, place in enumerate(ndimage.find_objects(numbers, count), start=1):
            if place is not None:
                rows, columns = place
                yield Region(int(value), columns.start, rows.start, numbers[place] == number)


def outlines(
    region: NDArray[np.bool_], *, tolerance: float = 0.0, inset: tuple[float, float] = EDGES
) -> list[NDArray[np.float64]]:
    """A polygon around each part of a region that hangs together, be it by a corner.

    A hole is cut open: the polygon goes in on a line, around the hole, and out on the same line.

    Args:
        region: ``(H, W)``.
        tolerance: in pixels; points that are nearer to the line between others are left out (Douglas & Peucker 1973).
            Small parts keep more of them, so that the area of none changes by more than a twentieth; 0 for all.
        inset: how far lines lie within the region's pixels, from their left and upper edges and from the others:
            :data:`EDGES` or :data:`INSIDE`.

    Returns:
        Polygons ``(N, 2)`` of x, y in pixels from the upper left corner, N at least 4; the last point is not the first.

    Example:
        >>> outlines(np.array([[0, 1, 1]], dtype=bool))
        [array([[3., 0.],
               [3., 1.],
               [1., 1.],
               [1., 0.]])]
    """
    numbers, count = ndimage.label(region, _TOUCHING)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbers, count), start=1):
        points, fixed = _outline(numbers[rows, columns] == number, inset)
        points = _simplified(points, fixed, tolerance)
        found.append(points + np.array([columns.start, rows.start]))
    return found


def _outline(part: NDArray[np.bool_], inset: tuple[float, float]) -> tuple[NDArray[np.float64], list[int]]:
    """The polygon of a region that hangs together, and the points that have to stay: those of the cuts.

    Its boundary is made of edges between pixels, with the region on the right hand. Of two ways on, where pixels touch
    at a corner, the left one holds them together.
    """
    around = np.pad(part, 1)
    upper, lower = np.s_[:-1], np.s_[1:]
    ul, ur, dl, dr = (around[rows, columns] for rows in (upper, lower) for columns in (upper, lower))
    leaving = np.stack([dr & ~ur, dl & ~dr, ul & ~dl, ur & ~ul])  # (direction, y, x) of the corner
    way, y, x = np.nonzero(leaving)
    number = np.full(leaving.shape, -1)
    number[leaving] = np.arange(len(way))
    x, y = x + _STEPS[way, 0], y + _STEPS[way, 1]  # where each edge ends
    left, straight, right = (number[(way + turn) % 4, y, x] for turn in (3, 0, 1))
    after = np.where(left >= 0, left, np.where(straight >= 0, straight, right))
    ends = np.stack([x, y], 1) + _offsets(way, inset, end=True)
    starts = np.stack([x, y], 1) + _offsets(way[after], inset, end=False)
    corners = np.where((way % 2 == 1)[:, None] == [True, False], ends, starts)  # x of the upright edge, y of the other
    points: list[list[list[float]]] = [[] for _ in way]  # that come at the end of each edge
    for i in np.flatnonzero(way[after] != way).tolist():
        touching = left[i] >= 0 and right[i] >= 0
        points[i] = [ends[i].tolist(), starts[i].tolist()] if touching else [corners[i].tolist()]

    rings, before = after.tolist(), np.argsort(after).tolist()
    seen, cuts = _ring(rings, 0), []
    for first in np.flatnonzero(way == _LEFT).tolist():  # by row and column: of a hole the uppermost comes first
        if first not in seen:
            seen |= _ring(rings, first)
            cuts.append(first)
    order, fixed = rings.copy(), set[int]()
    low, high = inset
    for first in cuts:  # to what is on the left of it
        row, column = int(y[first]), int(x[first])
        outside = np.flatnonzero(~part[row, :column])
        start = int(outside[-1]) + 1 if len(outside) else 0
        to, count = int(number[_UP, row + 1, start]), len(order)
        cut = [[start + low, row + low], [column - high, row + low]]
        points += [cut, points[first][:1], cut[::-1]]
        order += [first, count + 2, to]
        order[before[to]], order[before[first]] = count, count + 1
        fixed |= {count, count + 1, count + 2, first}

    found: list[list[float]] = []
    stay: list[int] = []
    edge = 0
    while not found or edge:
        if edge in fixed:
            stay += range(len(found), len(found) + len(points[edge]))
        found += points[edge]
        edge = order[edge]
    return np.array(found), stay


def _ring(order: list[int], first: int) -> set[int]:
    """The edges that follow one, until it comes again."""
    found, edge = {first}, order[first]
    while edge != first:
        found.add(edge)
        edge = order[edge]
    return found


def _offsets(way: NDArray[np.intp], inset: tuple[float, float], *, end: bool) -> NDArray[np.float64]:
    """From the corner where an edge ends (or starts) into the pixel on its right hand that is there, (x, y)."""
    low, high = inset
    #            right        down           left          up
    at_end = [(-high, low), (-high, -high), (low, -high), (low, low)]
    at_start = [(low, low), (-high, low), (-high, -high), (low, -high)]
    return np.array(at_end if end else at_start)[way]


def _simplified(points: NDArray[np.float64], fixed: list[int], tolerance: float) -> NDArray[np.float64]:
    points, fixed = _without_doubles(points, fixed)
    area = abs(_area(points))
    while tolerance >= 0.25:
        kept = _kept(points, fixed, tolerance)
        if len(kept) > 3 and abs(abs(_area(kept)) - area) <= 0.05 * area:
            return kept
        tolerance /= 2
    return points


def _without_doubles(points: NDArray[np.float64], fixed: list[int]) -> tuple[NDArray[np.float64], list[int]]:
    """Without points that are the one before; the first is, where it is the last."""
    new = (points != np.roll(points, 1, 0)).any(1)
    place = np.cumsum(new) - 1
    return points[new], sorted({int(place[i]) % int(new.sum()) for i in fixed})


def _area(points: NDArray[np.float64]) -> float:
    x, y = points.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _kept(points: NDArray[np.float64], fixed: list[int], tolerance: float) -> NDArray[np.float64]:
    """Douglas' and Peucker's choice of the points of a closed line; those that are fixed stay."""
    first = fixed[0] if fixed else 0
    points = np.roll(points, -first, 0)
    closed = np.concatenate([points, points[:1]])
    far = int(((points - points[0]) ** 2).sum(1).argmax())
    anchors = sorted({*((i - first) % len(points) for i in fixed), 0, far, len(points)})
    keep = np.zeros(len(closed), dtype=bool)
    keep[anchors] = True
    stack = list(pairwise(anchors))
    while stack:
        start, end = stack.pop()
        if end - start < 2:
            continue
        between, line = closed[start + 1 : end] - closed[start], closed[end] - closed[start]
        length = float(line @ line)
        along = np.clip(between @ line / length, 0, 1) if length else np.zeros(len(between))
        distances = ((between - along[:, None] * line) ** 2).sum(1)
        if distances.max() > tolerance**2:
            middle = start + 1 + int(distances.argmax())
            keep[middle] = True
            stack += [(start, middle), (middle, end)]
    return points[keep[:-1]]
