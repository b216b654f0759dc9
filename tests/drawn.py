"""Small drawn data sets: a red or a green rectangle on noise."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("boat", "train")


def picture(index: int, size: tuple[int, int]) -> tuple[Image.Image, Image.Image, list[int]]:
    """Photo, mask and class indices; every third picture shows both classes."""
    rng = np.random.default_rng(index)
    height, width = size
    pixels = rng.integers(90, 160, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    shown = [0, 1] if index % 3 == 2 else [index % 3]
    for k in shown:
        left = 2 if k == 0 else width // 2
        window = np.s_[height // 4 : height // 4 * 3, left : left + width // 2 - 4]
        pixels[window] = (230, 20, 20) if k == 0 else (20, 220, 20)
        mask[window] = k + 1
    return Image.fromarray(pixels), Image.fromarray(mask), shown


def write_csv(root: Path, *, train: int = 6, val: int = 3, size: tuple[int, int] = (48, 64)) -> Path:
    """A folder for ``CSVDataset``."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    with open(root / "dataset.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "labels", "mask", "split"])
        for i in range(train + val):
            photo, mask, shown = picture(i, size)
            photo.save(root / f"images/{i}.png")
            mask.save(root / f"masks/{i}.png")
            labels = ";".join(CLASSES[k] for k in shown)
            table.writerow([f"images/{i}.png", labels, f"masks/{i}.png", "train" if i < train else "val"])
    return root


def write_voc(root: Path, *, train: int = 4, val: int = 2) -> Path:
    """A folder for ``VOC``; the masks of its classes boat and train have their VOC values."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    ids = [f"2007_{i:06}" for i in range(train + val)]
    for i, id in enumerate(ids):
        photo, mask, shown = picture(i, (48, 64))
        photo.save(root / f"JPEGImages/{id}.jpg", quality=95)
        values = np.array([0, 4, 19], dtype=np.uint8)[np.array(mask)]
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            Image.fromarray(values).save(root / f"{folder}/{id}.png")
        objects = "".join(f"<object><name>{CLASSES[k]}</name></object>" for k in shown)
        (root / f"Annotations/{id}.xml").write_text(f"<annotation>{objects}</annotation>")
    for split, members in (("train", ids[:train]), ("val", ids[train:])):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(members))
    return root
