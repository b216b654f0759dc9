"""What the world of :mod:`cacl.scenes` is made of: objects in parts, backgrounds, patterns and looks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Colour = tuple[int, int, int]
Points = tuple[tuple[float, float], ...]


class Part(NamedTuple):
    """A piece of an object, in a box of side 1, y pointing down."""

    shape: str
    """``"polygon"``; ``"oval"``, by two corners of its box; or ``"line"``."""
    points: Points
    paint: str | Colour
    """A colour, or ``"body"``: a colour of the object that says nothing about its class."""
    pattern: str = "plain"
    width: float = 0.05
    """Of a line."""


class Background(NamedTuple):
    """A background word: how it is painted, and where it lies."""

    place: str
    """``"above"`` or ``"below"`` the horizon, or the name of a shape in :data:`SHAPES`."""
    colours: tuple[Colour, ...]
    pattern: str


BODY: tuple[Colour, ...] = (
    (178, 64, 58), (62, 96, 160), (214, 206, 190), (92, 82, 76), (190, 150, 96), (96, 140, 110), (150, 110, 150),
    (120, 126, 132),
)  # fmt: skip
"""Colours of objects, the same for all classes."""


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


# The last parts of each object are the telling ones: their colours are the class's own.
OBJECTS: dict[str, tuple[Part, ...]] = {
    "aeroplane": (
        Part("oval", ((0.05, 0.42), (1.0, 0.62)), "body"),
        Part("polygon", ((0.38, 0.52), (0.62, 0.52), (0.46, 0.95), (0.32, 0.95)), "body", "planks"),
        Part("polygon", ((0.45, 0.48), (0.6, 0.48), (0.5, 0.2), (0.4, 0.2)), "body", "planks"),
        Part("line", ((0.25, 0.5), (0.9, 0.5)), (40, 44, 60), "dots", 0.04),
        Part("polygon", ((0.03, 0.2), (0.14, 0.2), (0.25, 0.5), (0.08, 0.5)), (236, 60, 130), "stripes"),
    ),
    "bird": (
        Part("polygon", ((0.3, 0.5), (0.02, 0.62), (0.0, 0.8), (0.35, 0.68)), "body", "stripes"),
        Part("oval", ((0.18, 0.34), (0.78, 0.8)), "body", "scales"),
        Part("line", ((0.45, 0.78), (0.43, 1.0)), (70, 52, 40), "plain", 0.03),
        Part("line", ((0.55, 0.78), (0.56, 1.0)), (70, 52, 40), "plain", 0.03),
        Part("polygon", ((0.25, 0.45), (0.62, 0.45), (0.4, 0.75), (0.2, 0.65)), (84, 76, 74), "scales"),
        Part("oval", ((0.62, 0.14), (0.9, 0.46)), (250, 120, 20)),
        Part("polygon", ((0.86, 0.24), (1.0, 0.31), (0.86, 0.36)), (255, 220, 60)),
        Part("oval", ((0.75, 0.22), (0.82, 0.29)), (10, 10, 10)),
    ),
    "boat": (
        Part("polygon", ((0.0, 0.7), (1.0, 0.7), (0.84, 1.0), (0.16, 1.0)), "body", "planks"),
        Part("polygon", _box(0.2, 0.56, 0.5, 0.7), (222, 216, 204)),
        Part("line", ((0.52, 0.0), (0.52, 0.7)), (80, 60, 44), "plain", 0.035),
        Part("polygon", ((0.56, 0.05), (0.95, 0.62), (0.56, 0.62)), (235, 40, 40), "planks"),
    ),
    "bottle": (
        Part("polygon", _box(0.36, 0.32, 0.64, 1.0), "body", "gloss"),
        Part("polygon", ((0.45, 0.08), (0.55, 0.08), (0.64, 0.34), (0.36, 0.34)), "body", "gloss"),
        Part("polygon", _box(0.36, 0.52, 0.64, 0.8), (20, 200, 190), "checks"),
        Part("polygon", _box(0.44, 0.0, 0.56, 0.1), (20, 200, 190)),
    ),
    "car": (
        Part("polygon", ((0.22, 0.5), (0.35, 0.25), (0.7, 0.25), (0.84, 0.5)), "body"),
        Part("polygon", ((0.3, 0.48), (0.38, 0.31), (0.52, 0.31), (0.52, 0.48)), (170, 200, 214), "gloss"),
        Part("polygon", ((0.56, 0.48), (0.56, 0.31), (0.67, 0.31), (0.76, 0.48)), (170, 200, 214), "gloss"),
        Part("polygon", ((0.0, 0.52), (0.2, 0.48), (0.9, 0.48), (1.0, 0.6), (1.0, 0.76), (0.0, 0.76)), "body", "gloss"),
        Part("oval", ((0.12, 0.62), (0.34, 0.88)), (28, 28, 30)),
        Part("oval", ((0.66, 0.62), (0.88, 0.88)), (28, 28, 30)),
        Part("oval", ((0.17, 0.68), (0.29, 0.82)), (255, 210, 0)),
        Part("oval", ((0.71, 0.68), (0.83, 0.82)), (255, 210, 0)),
    ),
    "cat": (
        Part("line", ((0.16, 0.75), (0.04, 0.5), (0.12, 0.28)), "body", "stripes", 0.08),
        Part("oval", ((0.1, 0.48), (0.72, 0.96)), "body", "stripes"),
        Part("polygon", _box(0.48, 0.7, 0.58, 1.0), "body", "stripes"),
        Part("polygon", _box(0.62, 0.7, 0.72, 1.0), "body", "stripes"),
        Part("oval", ((0.52, 0.2), (0.98, 0.62)), (60, 60, 66)),
        Part("polygon", ((0.55, 0.36), (0.56, 0.08), (0.72, 0.24)), (60, 60, 66)),
        Part("polygon", ((0.95, 0.36), (0.94, 0.08), (0.78, 0.24)), (60, 60, 66)),
        Part("oval", ((0.6, 0.34), (0.72, 0.46)), (90, 255, 60)),
        Part("oval", ((0.78, 0.34), (0.9, 0.46)), (90, 255, 60)),
    ),
    "chair": (
        Part("line", ((0.26, 0.6), (0.2, 1.0)), "body", "plain", 0.06),
        Part("line", ((0.76, 0.6), (0.82, 1.0)), "body", "plain", 0.06),
        Part("line", ((0.36, 0.58), (0.36, 0.92)), "body", "plain", 0.05),
        Part("line", ((0.66, 0.58), (0.66, 0.92)), "body", "plain", 0.05),
        Part("polygon", ((0.26, 0.5), (0.74, 0.5), (0.84, 0.64), (0.18, 0.64)), "body", "weave"),
        Part("polygon", _box(0.28, 0.0, 0.72, 0.42), (150, 40, 210), "checks"),
        Part("line", ((0.3, 0.4), (0.3, 0.54)), "body", "plain", 0.05),
        Part("line", ((0.7, 0.4), (0.7, 0.54)), "body", "plain", 0.05),
    ),
    "cow": (
        Part("polygon", _box(0.16, 0.6, 0.24, 1.0), (70, 56, 48)),
        Part("polygon", _box(0.3, 0.6, 0.38, 0.98), (70, 56, 48)),
        Part("polygon", _box(0.56, 0.6, 0.64, 1.0), (70, 56, 48)),
        Part("oval", ((0.06, 0.3), (0.76, 0.76)), "body", "blotches"),
        Part("line", ((0.08, 0.42), (0.0, 0.72)), (70, 56, 48), "plain", 0.03),
        Part("polygon", ((0.68, 0.2), (0.94, 0.2), (0.96, 0.5), (0.72, 0.52)), (96, 50, 34)),
        Part("oval", ((0.74, 0.4), (1.0, 0.58)), (255, 150, 170)),
        Part("line", ((0.7, 0.22), (0.64, 0.08)), (250, 240, 210), "plain", 0.04),
        Part("line", ((0.92, 0.22), (0.98, 0.08)), (250, 240, 210), "plain", 0.04),
    ),
    "sheep": (
        Part("line", ((0.26, 0.7), (0.26, 1.0)), (44, 40, 40), "plain", 0.06),
        Part("line", ((0.56, 0.7), (0.56, 1.0)), (44, 40, 40), "plain", 0.06),
        Part("oval", ((0.06, 0.34), (0.46, 0.78)), "body", "wool"),
        Part("oval", ((0.3, 0.26), (0.74, 0.76)), "body", "wool"),
        Part("oval", ((0.2, 0.44), (0.66, 0.84)), "body", "wool"),
        Part("oval", ((0.68, 0.24), (0.96, 0.62)), (20, 30, 110)),
        Part("line", ((0.66, 0.3), (0.58, 0.4)), (20, 30, 110), "plain", 0.06),
        Part("oval", ((0.78, 0.32), (0.86, 0.4)), (255, 255, 255)),
    ),
    "train": (
        Part("polygon", _box(0.0, 0.3, 0.36, 0.8), "body", "planks"),
        Part("polygon", _box(0.39, 0.3, 0.76, 0.8), "body", "planks"),
        Part("line", ((0.04, 0.46), (0.32, 0.46)), (200, 222, 232), "windows", 0.14),
        Part("line", ((0.43, 0.46), (0.72, 0.46)), (200, 222, 232), "windows", 0.14),
        Part("line", ((0.02, 0.84), (0.94, 0.84)), (40, 40, 44), "dots", 0.1),
        Part("polygon", ((0.76, 0.3), (0.88, 0.34), (1.0, 0.66), (1.0, 0.8), (0.76, 0.8)), (30, 230, 60), "stripes"),
        Part("oval", ((0.9, 0.66), (0.97, 0.74)), (255, 255, 220)),
    ),
}

BACKGROUNDS: dict[str, Background] = {
    "sky": Background("above", ((110, 170, 230), (150, 196, 236), (70, 130, 210)), "clouds"),
    "mountain": Background("above", ((120, 118, 136), (96, 104, 130)), "facets"),
    "forest": Background("above", ((36, 84, 46), (50, 100, 52)), "leaves"),
    "wall": Background("above", ((214, 196, 160), (196, 172, 168), (186, 200, 190)), "plain"),
    "curtain": Background("above", ((150, 60, 70), (80, 70, 140), (180, 140, 70)), "folds"),
    "building": Background("above", ((150, 130, 120), (168, 156, 146)), "windows"),
    "water": Background("below", ((40, 98, 150), (30, 120, 140)), "waves"),
    "beach": Background("below", ((226, 202, 148), (236, 216, 170)), "grain"),
    "grass": Background("below", ((86, 150, 52), (110, 164, 64)), "blades"),
    "hay": Background("below", ((204, 172, 74), (190, 156, 66)), "blades"),
    "snow": Background("below", ((232, 238, 246), (244, 246, 250)), "clouds"),
    "road": Background("below", ((84, 84, 88), (102, 102, 104)), "grain"),
    "runway": Background("below", ((116, 112, 104), (128, 124, 116)), "dashes"),
    "gravel": Background("below", ((146, 134, 122), (128, 118, 110)), "pebbles"),
    "platform": Background("below", ((176, 168, 158), (190, 180, 170)), "tiles"),
    "floor": Background("below", ((164, 112, 66), (186, 132, 80)), "boards"),
    "carpet": Background("below", ((150, 44, 52), (52, 68, 120), (120, 60, 110)), "weave"),
    "table": Background("below", ((122, 76, 44), (140, 92, 56)), "rings"),
    "pier": Background("pier", ((120, 90, 62), (136, 106, 76)), "boards"),
    "buoy": Background("ball", ((240, 120, 30), (230, 90, 40)), "stripes"),
    "lighthouse": Background("tower", ((236, 232, 226), (226, 220, 210)), "planks"),
    "rails": Background("rails", ((84, 64, 54), (98, 76, 62)), "plain"),
    "bridge": Background("arch", ((150, 100, 84), (130, 96, 88)), "bricks"),
    "branch": Background("branch", ((92, 64, 42), (108, 76, 50)), "bark"),
    "leaves": Background("bush", ((70, 140, 50), (110, 160, 40)), "leaves"),
    "cloud": Background("puff", ((244, 246, 250), (228, 232, 240)), "clouds"),
    "nest": Background("bowl", ((140, 104, 60), (156, 120, 76)), "weave"),
    "flower": Background("flower", ((236, 90, 160), (250, 220, 70)), "plain"),
    "fence": Background("fence", ((170, 130, 90), (226, 220, 210)), "bark"),
    "barn": Background("house", ((140, 40, 36), (156, 56, 46)), "boards"),
    "stone": Background("mound", ((132, 132, 130), (112, 114, 116)), "pebbles"),
    "lamp": Background("lamp", ((54, 56, 60), (70, 72, 78)), "plain"),
    "cushion": Background("cushion", ((220, 120, 130), (120, 170, 200)), "checks"),
    "window": Background("window", ((186, 220, 240), (160, 200, 230)), "gloss"),
    "shelf": Background("shelf", ((150, 104, 64), (170, 124, 80)), "rings"),
}

SHAPES: dict[str, tuple[Points, ...]] = {
    "pier": (
        _box(0.0, 0.3, 1.0, 0.48),
        _box(0.1, 0.48, 0.18, 1.0),
        _box(0.46, 0.48, 0.54, 1.0),
        _box(0.82, 0.48, 0.9, 1.0),
    ),
    "ball": (
        ((0.5, 0.3), (0.78, 0.42), (0.88, 0.7), (0.72, 0.96), (0.28, 0.96), (0.12, 0.7), (0.22, 0.42)),
        _box(0.46, 0.02, 0.54, 0.3),
    ),
    "tower": (((0.36, 0.2), (0.64, 0.2), (0.72, 1.0), (0.28, 1.0)), _box(0.32, 0.06, 0.68, 0.18)),
    "rails": (
        _box(0.0, 0.3, 1.0, 0.38),
        _box(0.0, 0.66, 1.0, 0.74),
        *(_box(x, 0.22, x + 0.05, 0.82) for x in (0.04, 0.2, 0.36, 0.52, 0.68, 0.84)),
    ),
    "arch": (
        (
            (0.0, 0.3),
            (1.0, 0.3),
            (1.0, 1.0),
            (0.86, 1.0),
            (0.76, 0.6),
            (0.5, 0.48),
            (0.24, 0.6),
            (0.14, 1.0),
            (0.0, 1.0),
        ),
    ),
    "branch": (
        ((0.0, 0.44), (1.0, 0.56), (1.0, 0.64), (0.0, 0.6)),
        ((0.3, 0.5), (0.5, 0.12), (0.55, 0.14), (0.42, 0.54)),
        ((0.6, 0.56), (0.8, 0.9), (0.76, 0.92), (0.52, 0.58)),
    ),
    "bush": (
        (
            (0.1, 0.6),
            (0.05, 0.36),
            (0.3, 0.12),
            (0.55, 0.2),
            (0.8, 0.1),
            (0.96, 0.4),
            (0.9, 0.8),
            (0.5, 0.94),
            (0.16, 0.86),
        ),
    ),
    "puff": (
        (
            (0.06, 0.62),
            (0.16, 0.42),
            (0.34, 0.44),
            (0.46, 0.28),
            (0.68, 0.32),
            (0.76, 0.46),
            (0.94, 0.5),
            (0.94, 0.66),
            (0.5, 0.74),
        ),
    ),
    "bowl": (((0.04, 0.5), (0.96, 0.5), (0.84, 0.82), (0.6, 0.94), (0.36, 0.94), (0.14, 0.8)),),
    "flower": (
        (
            (0.5, 0.02),
            (0.62, 0.2),
            (0.84, 0.14),
            (0.76, 0.36),
            (0.9, 0.54),
            (0.64, 0.52),
            (0.5, 0.7),
            (0.36, 0.52),
            (0.1, 0.54),
            (0.24, 0.36),
            (0.16, 0.14),
            (0.38, 0.2),
        ),
        _box(0.47, 0.62, 0.53, 1.0),
    ),
    "fence": (
        _box(0.0, 0.34, 1.0, 0.42),
        _box(0.0, 0.66, 1.0, 0.74),
        *(_box(x, 0.2, x + 0.07, 0.95) for x in (0.05, 0.29, 0.53, 0.77)),
    ),
    "house": (((0.06, 0.4), (0.5, 0.1), (0.94, 0.4), (0.94, 1.0), (0.06, 1.0)),),
    "mound": (((0.02, 0.9), (0.16, 0.5), (0.4, 0.36), (0.7, 0.42), (0.92, 0.62), (0.98, 0.9)),),
    "lamp": (_box(0.46, 0.3, 0.54, 1.0), ((0.3, 0.3), (0.38, 0.08), (0.62, 0.08), (0.7, 0.3))),
    "cushion": (
        ((0.08, 0.22), (0.5, 0.28), (0.92, 0.22), (0.88, 0.55), (0.94, 0.88), (0.5, 0.82), (0.06, 0.88), (0.12, 0.55)),
    ),
    "window": (
        _box(0.1, 0.1, 0.47, 0.47),
        _box(0.53, 0.1, 0.9, 0.47),
        _box(0.1, 0.53, 0.47, 0.9),
        _box(0.53, 0.53, 0.9, 0.9),
    ),
    "shelf": (
        _box(0.0, 0.24, 1.0, 0.36),
        _box(0.0, 0.7, 1.0, 0.82),
        _box(0.0, 0.1, 0.08, 0.95),
        _box(0.92, 0.1, 1.0, 0.95),
    ),
}

TILE = 512


@cache
def pattern(name: str) -> Image.Image:
    """A pattern as a grey image of :data:`TILE` pixels a side, 128 where it leaves a colour as it is."""
    rng = np.random.default_rng(sum(map(ord, name)))
    y, x = np.mgrid[0:TILE, 0:TILE].astype(np.float32)
    smooth = _noise(rng, 24)
    fields: dict[str, Callable[[], NDArray[np.floating]]] = {
        "plain": lambda: 0.12 * smooth,
        "grain": lambda: 0.7 * _noise(rng, 2),
        "clouds": lambda: 0.8 * _noise(rng, 40) + 0.3 * _noise(rng, 12),
        "facets": lambda: np.sign(np.sin(x / 17 + 2.2 * smooth)) * np.sin(y / 26 + 1.5 * smooth),
        "leaves": lambda: np.clip(2.2 * _noise(rng, 6), -1, 1),
        "folds": lambda: np.sin(x / 7 + 1.2 * smooth),
        "windows": lambda: np.where((x % 26 < 13) & (y % 30 < 17), -0.9, 0.25),
        "waves": lambda: np.sin(y / 4 + 2.5 * np.sin(x / 19) + 2 * smooth),
        "blades": lambda: np.clip(1.6 * _streaks(rng, 9), -1, 1),
        "dashes": lambda: np.where((y % 44 < 5) & (x % 60 < 36), 1.0, 0.15 * smooth),
        "pebbles": lambda: np.clip(1.8 * np.abs(_noise(rng, 5)) - 0.8, -1, 1),
        "tiles": lambda: np.where((x % 34 < 3) | (y % 34 < 3), -0.9, 0.15),
        "boards": lambda: np.where(x % 22 < 3, -0.9, 0.3 * _streaks(rng, 30)),
        "planks": lambda: np.where(y % 14 < 3, -0.8, 0.2),
        "weave": lambda: 0.8 * np.sin(x / 2.6) * np.sin(y / 2.6),
        "rings": lambda: np.sin(y / 5 + 6 * smooth),
        "bricks": lambda: np.where((y % 16 < 3) | ((x + 17 * (y // 16 % 2)) % 34 < 3), -0.8, 0.2),
        "bark": lambda: np.clip(1.4 * _streaks(rng, 16), -1, 1),
        "stripes": lambda: np.where(x % 18 < 7, -0.8, 0.3),
        "scales": lambda: np.where((x % 12 - 6) ** 2 + (y % 12 - 3) ** 2 < 30, 0.4, -0.5),
        "dots": lambda: np.where((x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 22, -0.9, 0.2),
        "checks": lambda: np.where((x // 10 + y // 10) % 2 > 0, -0.6, 0.4),
        "gloss": lambda: np.sin((x + y) / 24),
        "wool": lambda: np.clip(1.5 * np.abs(_noise(rng, 9)) - 0.5, -1, 1),
        "blotches": lambda: np.where(_noise(rng, 16) > 0.15, -0.9, 0.35),
    }
    return Image.fromarray((128 + 127 * np.clip(fields[name](), -1, 1)).astype(np.uint8))


def _noise(rng: np.random.Generator, scale: int) -> NDArray[np.floating]:
    """Smooth noise with blobs of about ``scale`` pixels, standard deviation about 0.5."""
    grid = rng.normal(128, 50, (TILE // scale + 2,) * 2).clip(0, 255).astype(np.uint8)
    big = Image.fromarray(grid).resize((TILE, TILE), Image.Resampling.BICUBIC)
    return np.asarray(big, dtype=np.float32) / 100 - 1.28


def _streaks(rng: np.random.Generator, length: int) -> NDArray[np.floating]:
    """Upright streaks of noise."""
    grid = rng.normal(128, 50, (TILE // length + 2, TILE // 2)).clip(0, 255).astype(np.uint8)
    big = Image.fromarray(grid).resize((TILE, TILE), Image.Resampling.BILINEAR)
    return np.asarray(big, dtype=np.float32) / 100 - 1.28
