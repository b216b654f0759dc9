"""A canvas of the drawn world: layer upon layer, with mask and words beside the image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from cacl.scenes import scenery

CLASSES: tuple[str, ...] = tuple(scenery.OBJECTS)
"""The object classes."""
WORDS: tuple[str, ...] = tuple(scenery.BACKGROUNDS)
"""All background words; a map of words holds their place in this list, from 1 on."""


@dataclass(frozen=True)
class Scene:
    """One drawn scene."""

    image: Image.Image
    mask: NDArray[np.uint8]
    """``(H, W)``: 0 background, k the k-th of :data:`CLASSES` from 1 on."""
    words: NDArray[np.uint8]
    """``(H, W)``: 0 an object, i the i-th of :data:`WORDS` from 1 on."""
    look: str

    @property
    def classes(self) -> list[str]:
        """The classes that can be seen."""
        return [CLASSES[k - 1] for k in np.unique(self.mask) if k]

    @property
    def backgrounds(self) -> list[str]:
        """The background words that can be seen."""
        return [WORDS[i - 1] for i in np.unique(self.words) if i]


class Canvas:
    """Paints layer upon layer, in twice the size; mask and words are kept beside the image."""

    def __init__(self, rng: np.random.Generator, size: int, look: str) -> None:
        self.rng, self.size, self.look = rng, size, look
        self.image = Image.new("RGB", (2 * size, 2 * size))
        self.ids = Image.new("L", (size, size))
        self.words = Image.new("L", (size, size))
        self.strength = {"photo": 0.26, "image": 0.06, "picture": 0.16, "snapshot": 0.26, "origami": 0.0}[look]

    def background(self, word: str, outlines: list[NDArray[np.float64]]) -> None:
        colours = scenery.BACKGROUNDS[word].colours
        colour = colours[self.rng.integers(len(colours))]
        self._paint(outlines, self._jitter(colour, 16), scenery.BACKGROUNDS[word].pattern)
        self._mark(self.words, outlines, 1 + WORDS.index(word))
        self._mark(self.ids, outlines, 0)

    def object(self, name: str, matrix: NDArray[np.float64], *, plain: bool) -> None:
        body = self._jitter(scenery.BODY[self.rng.integers(len(scenery.BODY))], 20)
        for part in scenery.OBJECTS[name]:
            outlines = [placed(points, matrix) for points in _outlines(part)]
            if plain or isinstance(part.paint, str):
                colour = body + self.rng.normal(0, 14)
            else:
                colour = self._jitter(part.paint, 14)
            self._paint(outlines, colour, part.pattern)
            self._mark(self.ids, outlines, 1 + CLASSES.index(name))
            self._mark(self.words, outlines, 0)

    def finish(self) -> Scene:
        image = self.image.reduce(2)
        rng, size = self.rng, self.size
        if self.look == "snapshot":
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 1.6) * size / 160))
        noise = {"photo": 5.0, "image": 0.0, "picture": 2.0, "snapshot": 16.0, "origami": 0.0}[self.look]
        pixels = np.asarray(image, dtype=np.float32)
        if self.look in ("photo", "snapshot"):  # light from one side
            one, other = rng.uniform(0.75, 1.2, 2)
            ramp = np.linspace(one, other, size, dtype=np.float32)
            pixels = pixels * (ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None])
        if noise:
            pixels = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * noise
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        return Scene(image, np.array(self.ids), np.array(self.words), self.look)

    def _jitter(self, colour: scenery.Colour, amount: float) -> NDArray[np.float64]:
        light = self.rng.normal(0, amount)
        return np.clip(np.asarray(colour) + light + self.rng.normal(0, amount / 2, 3), 0, 255)

    def _paint(self, outlines: list[NDArray[np.float64]], colour: NDArray[np.float64], pattern: str) -> None:
        side = 2 * self.size
        points = [outline * side for outline in outlines]
        every = np.concatenate(points)
        low, high = every.min(0).clip(0, side - 1).astype(int), np.ceil(every.max(0)).clip(1, side).astype(int)
        if np.any(high <= low):
            return
        box = (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
        cover = Image.new("L", (box[2] - box[0], box[3] - box[1]))
        pen = ImageDraw.Draw(cover)
        shifted = [[(x - box[0], y - box[1]) for x, y in outline.tolist()] for outline in points]
        for outline in shifted:
            pen.polygon(outline, fill=255)
        if self.look == "origami":  # each piece is two folds of paper
            fold = Image.linear_gradient("L").resize(cover.size).point([96] * 128 + [160] * 128)
            patch, strength = fold, 0.35
        else:
            at = self.rng.integers(0, scenery.TILE, 2)
            patch = _window(scenery.pattern(pattern), at, cover.size)
            strength = self.strength
        factor = 1 + strength * (np.arange(256) - 128) / 64
        palette = (factor[:, None] * colour).clip(0, 255).astype(np.uint8)
        patch.putpalette(palette.tobytes())
        self.image.paste(patch.convert("RGB"), box[:2], cover)
        if self.look == "picture":
            pen = ImageDraw.Draw(self.image)
            for closed in (np.vstack((outline, outline[:1])) for outline in points):
                pen.line([tuple(p) for p in closed.tolist()], fill=(24, 22, 30), width=4)

    def _mark(self, layer: Image.Image, outlines: list[NDArray[np.float64]], value: int) -> None:
        pen = ImageDraw.Draw(layer)
        for outline in outlines:
            pen.polygon([tuple(p) for p in (outline * self.size - 0.25).tolist()], fill=value)


def _window(tile: Image.Image, at: NDArray[np.int64], size: tuple[int, int]) -> Image.Image:
    """A window of a tile that goes on beyond its edges."""
    x, y = int(at[0]), int(at[1])
    if x + size[0] > scenery.TILE or y + size[1] > scenery.TILE:
        tile = ImageChops.offset(tile, -x, -y)
        x = y = 0
    if max(size) > scenery.TILE:
        return tile.resize(size)
    return tile.crop((x, y, x + size[0], y + size[1]))


def placed(points: scenery.Points, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    placed: NDArray[np.float64] = np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]
    return placed


def _outlines(part: scenery.Part) -> list[scenery.Points]:
    """A part as polygons."""
    if part.shape == "polygon":
        return [part.points]
    if part.shape == "oval":
        (x0, y0), (x1, y1) = part.points
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        xs, ys = (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(angles), (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(angles)
        return [tuple(zip(xs.tolist(), ys.tolist(), strict=True))]
    pieces: list[scenery.Points] = []
    for (x0, y0), (x1, y1) in zip(part.points, part.points[1:], strict=False):
        length = max(np.hypot(x1 - x0, y1 - y0), 1e-9)
        dx, dy = -(y1 - y0) / length * part.width / 2, (x1 - x0) / length * part.width / 2
        pieces.append(((x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)))
    return pieces
