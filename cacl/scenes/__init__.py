"""A small world of drawn scenes with pixel masks: the embedded default, and a bench for the method's claims."""

from __future__ import annotations

from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cacl._support.files import read_json, write_json, write_text
from cacl._support.loaders import load
from cacl._support.progress import watched
from cacl._support.values import check_integer, check_positive
from cacl.errors import InputError
from cacl.scenes import scenery
from cacl.scenes.canvas import CLASSES as CLASSES
from cacl.scenes.canvas import WORDS as WORDS
from cacl.scenes.canvas import Canvas, placed
from cacl.scenes.canvas import Scene as Scene

BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "aeroplane": ("sky", "runway", "cloud", "grass", "fence", "mountain", "building"),
    "bird": ("branch", "sky", "leaves", "nest", "grass", "forest", "flower"),
    "boat": ("water", "sky", "pier", "mountain", "buoy", "beach", "lighthouse"),
    "bottle": ("table", "wall", "shelf", "window", "curtain", "floor", "lamp"),
    "car": ("road", "building", "lamp", "forest", "wall", "gravel", "bridge"),
    "cat": ("carpet", "curtain", "cushion", "wall", "window", "floor", "shelf"),
    "chair": ("floor", "wall", "lamp", "curtain", "window", "carpet", "cushion"),
    "cow": ("grass", "fence", "sky", "hay", "barn", "forest", "flower"),
    "sheep": ("grass", "mountain", "stone", "sky", "snow", "fence", "hay"),
    "train": ("rails", "gravel", "forest", "platform", "building", "bridge", "sky"),
}
"""What is seen with each class, the most frequent first; none is the name of a class."""
LOOKS: dict[str, str] = {
    "photo": "a photo of {}.",
    "image": "an image of {}.",
    "picture": "a picture of {}.",
    "snapshot": "a snapshot of {}.",
    "origami": "a clean origami {}.",
}
"""Look -> its wording: textured, flat, outlined, blurred and noisy; :func:`generate` never draws the last, folded."""


def generate(
    out: str | PathLike[str],
    *,
    train: int = 400,
    val: int = 100,
    size: int = 160,
    seed: int = 0,
    workers: int = 0,
    progress: bool = True,
) -> Path:
    """Draw a data set: ``classes.txt``, ``dataset.csv``, ``images/``, ``masks/`` for
    :class:`cacl.datasets.CSVDataset`, ``backgrounds.json`` for :meth:`cacl.BackgroundSet.from_json`, and ``words/``,
    which says what each pixel of the background is (see :attr:`Scene.words`). A folder that holds just that already is
    left as it is.

    Args:
        out: the folder.
        train: scenes of the split ``train``.
        val: scenes of the split ``val``.
        size: side of the square images in pixels, at least 32.
        seed: decides everything that is drawn.
        workers: processes that draw; 0 draws in this one. Changes nothing in the result.
        progress: show a progress bar where there is a terminal or a notebook.

    Returns:
        The folder.

    Raises:
        ValueError: if a setting is out of range, or the folder holds something else than scenes.
    """
    check_positive("train", train)
    check_integer("val", val, 0)
    check_integer("size", size, 32, 4096)
    check_integer("seed", seed, 0)
    check_integer("workers", workers, 0)
    out = Path(out)
    marker = out / "scenes.json"
    settings = {"train": train, "val": val, "size": size, "seed": seed}
    if is_drawn(out, **settings):
        return out
    if not marker.is_file() and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: expected an empty folder, or one with scenes, to draw scenes to")
    write_json(marker, {**settings, "complete": False})
    for folder in ("images", "masks", "words"):
        (out / folder).mkdir(exist_ok=True)
    write_text(out / "classes.txt", "\n".join(CLASSES) + "\n")
    write_json(out / "backgrounds.json", BACKGROUNDS)
    scenes = _Scenes(out, train, val, size, seed)
    drawn = watched(load(scenes, workers=workers), total=len(scenes), desc="scenes", progress=progress)
    rows = [",".join(row) for row in drawn]
    write_text(out / "dataset.csv", "\n".join(("image,labels,mask,split", *rows)) + "\n")
    write_json(marker, {**settings, "complete": True})
    return out


def is_drawn(out: str | PathLike[str], *, train: int, val: int, size: int, seed: int) -> bool:
    """Whether a folder holds just what :func:`generate` would draw."""
    return read_json(Path(out) / "scenes.json") == {
        "train": train, "val": val, "size": size, "seed": seed, "complete": True,
    }  # fmt: skip


class _Scenes(torch.utils.data.Dataset[Any]):
    """Draws and writes scene i, and gives its row."""

    def __init__(self, out: Path, train: int, val: int, size: int, seed: int) -> None:
        self.out, self.train, self.val, self.size, self.seed = out, train, val, size, seed

    def __len__(self) -> int:
        return self.train + self.val

    def __getitem__(self, index: int) -> tuple[str, str, str, str]:
        split, number = ("train", index) if index < self.train else ("val", index - self.train)
        scene = draw(np.random.default_rng((self.seed, split == "val", number)), self.size)
        name = f"{split}_{number:05}"
        scene.image.save(self.out / f"images/{name}.jpg", quality=92)
        Image.fromarray(scene.mask).save(self.out / f"masks/{name}.png")
        Image.fromarray(scene.words).save(self.out / f"words/{name}.png")
        return f"images/{name}.jpg", ";".join(scene.classes), f"masks/{name}.png", split


def draw(
    rng: np.random.Generator,
    size: int = 160,
    *,
    looks: int = 4,
    strange: float = 0.1,
    plain: float = 0.1,
    empty: float = 0.0,
) -> Scene:
    """Draw one scene: one object or two, in front of what goes together with the first one's class.

    Args:
        rng: decides everything.
        size: side in pixels.
        looks: how many of :data:`LOOKS` may be drawn.
        strange: chance that a background is any, not one of the class's own.
        plain: chance that an object's telling parts have no colours of their own.
        empty: chance that there is no object.
    """
    look = list(LOOKS)[rng.integers(looks)]
    count = 0 if rng.random() < empty else 1 + (rng.random() < 0.35)
    classes = [str(name) for name in rng.choice(CLASSES, max(count, 1), replace=rng.random() < 0.3)]
    canvas = Canvas(rng, size, look)
    horizon = rng.uniform(0.35, 0.65)

    def pick(places: Collection[str]) -> str:
        known = WORDS if rng.random() < strange else BACKGROUNDS[classes[0]]
        fitting = [w for w in known if _place(w) in places] or [w for w in WORDS if _place(w) in places]
        weights = 0.6 ** np.arange(len(fitting)) if known is not WORDS else np.ones(len(fitting))
        return str(rng.choice(fitting, p=weights / weights.sum()))

    canvas.background(pick(("above",)), [np.array(((0, 0), (1, 0), (1, horizon), (0, horizon)))])
    canvas.background(pick(("below",)), [np.array(((0, horizon), (1, horizon), (1, 1), (0, 1)))])

    def thing(span: float, low: float) -> None:
        word = pick(scenery.SHAPES)
        matrix = _matrix(rng, (rng.uniform(0.1, 0.9), low + rng.uniform(-0.15, 0.2)), span)
        canvas.background(word, [placed(points, matrix) for points in scenery.SHAPES[_place(word)]])

    for _ in range(rng.integers(1, 3)):
        thing(rng.uniform(0.4, 0.75), horizon)
    left = rng.random() < 0.5
    for i in range(count):
        span = rng.uniform(0.32, 0.7) if count == 1 else rng.uniform(0.28, 0.48)
        x = rng.uniform(0.3, 0.7) if count == 1 else 0.25 + 0.5 * (left != bool(i)) + rng.uniform(-0.05, 0.05)
        canvas.object(classes[i], _matrix(rng, (x, rng.uniform(0.35, 0.7)), span), plain=rng.random() < plain)
    if rng.random() < 0.25:  # something stands in front
        thing(rng.uniform(0.25, 0.4), 0.8)
    return canvas.finish()


def _place(word: str) -> str:
    return scenery.BACKGROUNDS[word].place


def _matrix(rng: np.random.Generator, centre: tuple[float, float], span: float) -> NDArray[np.float64]:
    """(2, 3): from the box of side 1 to the image of side 1: mirrored or not, turned and stretched a little."""
    turn, stretch = rng.normal(0, 0.1), rng.uniform(0.88, 1.12)
    mirror = rng.choice((-1.0, 1.0))
    scale = span * np.array(((mirror * stretch, 0), (0, 1 / stretch)))
    rotation = np.array(((np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))))
    linear = rotation @ scale
    return np.column_stack((linear, np.asarray(centre) - linear @ (0.5, 0.5)))
