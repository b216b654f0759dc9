"""COCO at its real size: opening the annotations, and the memory while images are loaded from them.

Makes a folder like COCO 2014's training images: annotations of the real size (7.3 objects an image, 5.6 kB of JSON an
image), and photos of 640×480 pixels, of which most are links to a few files. Then, each in a process of its own, on
Linux only:

- open: `cacl.datasets.COCO` against research code (`json.load`, a dictionary of each image's annotations, a list of
  samples): seconds, and the peak of memory over that of the imported libraries;
- train: seconds until the first step of a warm-up is done, opening included, and what the main process holds over the
  libraries and its two workers hold for themselves alone, after 20 steps, half and all of them. Once as it is, and once
  with the list of images as Python objects, as research code has it.

    python benchmarks/coco.py --images 2000,20000,80000

Another use writes a small folder of drawn photos, COCO's 80 classes as coloured shapes, to try things on:

    python benchmarks/coco.py --draw coco-drawn --images 200
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from cacl.camnet import CAMNet
from cacl.datasets import COCO, Dataset
from cacl.datasets.entries import Entry
from cacl.log import Callback, Journal
from cacl.prompts import BackgroundSet
from cacl.settings import Machine
from cacl.stages.warmup import train_classifier
from cacl.tables import Warmup

NAMES = tuple(BackgroundSet.coco())
IDS = [id for id in range(1, 91) if id not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
"""COCO's category ids have gaps."""
CATEGORIES = [{"supercategory": "thing", "id": id, "name": name} for id, name in zip(IDS, NAMES, strict=True)]
SETTLED = 20
"""Steps after which the workers have started and read their first images."""
KINDS = ("train", "train, objects")


def write_like_coco(root: Path, images: int, photos: int = 64) -> int:
    """Photos and annotations of a split train; returns the size of the JSON file."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    (root / "train2014").mkdir()
    files = [draw_noise(root / f"photo-{i}.jpg", rng) for i in range(min(photos, images))]
    ids = rng.permutation(images * 7)[:images].tolist()
    for i, id in enumerate(ids):
        os.link(files[i % len(files)], root / f"train2014/COCO_train2014_{id:012}.jpg")
    path = root / "annotations" / "instances_train2014.json"
    shapes = [segmentation(rng) for _ in range(2000)]
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"info": {"description": "drawn", "year": 2014},"images": [')
        for i, id in enumerate(ids):
            name, photo = f"COCO_train2014_{id:012}.jpg", "farm4.staticflickr.com/3153/2970773875_164f0c0b83_z.jpg"
            file.write(
                f'{"," * (i > 0)}{{"license": 5,"file_name": "{name}",'
                f'"coco_url": "http://images.cocodataset.org/train2014/{name}","height": 480,"width": 640,'
                f'"date_captured": "2013-11-14 16:28:13","flickr_url": "http://{photo}","id": {id}}}'
            )
        file.write('],"licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/","id": 4}],"annotations": [')
        number = 0
        for id in ids:
            categories = rng.choice(IDS, rng.integers(1, 6)).tolist()
            for _ in range(0 if rng.random() < 0.01 else min(int(rng.geometric(1 / 7.4)), 90)):
                shape = shapes[rng.integers(len(shapes))]
                category = categories[number % len(categories)]
                file.write(f'{"," * (number > 0)}{shape},"image_id": {id},"category_id": {category},"id": {number}}}')
                number += 1
        file.write(f'],"categories": {json.dumps(CATEGORIES)}}}')
    return path.stat().st_size


def draw_noise(path: Path, rng: np.random.Generator) -> Path:
    """A JPEG of 640×480 pixels with about as much detail as a photo."""
    noise = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(2))
    pixels = (np.asarray(noise, np.float32) - 128) * 4 + 128
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def segmentation(rng: np.random.Generator) -> str:
    """The beginning of an annotation: one or more outlines as long as COCO's, or the RLE of a crowd."""
    if rng.random() < 0.01:
        counts = rng.multinomial(480 * 640, rng.dirichlet(np.ones(501))).tolist()
        rle = json.dumps({"counts": counts, "size": [480, 640]})
        return f'{{"segmentation": {rle},"area": {sum(counts[1::2])},"iscrowd": 1,"bbox": [0,0,640,480]'
    outlines = []
    for _ in range(1 + int(rng.geometric(0.9)) // 2):
        points = max(4, int(rng.lognormal(3.4, 0.7)))
        angles = np.sort(rng.random(points)) * 2 * np.pi
        radius = rng.uniform(10, 120) * rng.uniform(0.8, 1.2, points)
        x, y = rng.uniform(120, 520) + radius * np.cos(angles), rng.uniform(120, 360) + radius * np.sin(angles)
        outlines.append(np.stack([x, y], 1).ravel().round(2).tolist())
    text = json.dumps(outlines, separators=(",", ":"))
    return f'{{"segmentation": {text},"area": 4321.5678,"iscrowd": 0,"bbox": [116.95,305.86,285.3,266.03]'


class Plain:
    """The photos and labels as research code has them; all annotations stay in memory for the masks."""

    def __init__(self, root: Path) -> None:
        with open(root / "annotations" / "instances_train2014.json") as file:
            data = json.load(file)
        self.annotations = defaultdict(list)
        for annotation in data["annotations"]:
            self.annotations[annotation["image_id"]].append(annotation)
        classes = {category["id"]: k for k, category in enumerate(data["categories"])}
        self.samples = []
        for image in data["images"]:
            own = self.annotations[image["id"]]
            labels = sorted({classes[annotation["category_id"]] for annotation in own if not annotation["iscrowd"]})
            self.samples.append((str(root / "train2014" / image["file_name"]), labels))

    def __len__(self) -> int:
        return len(self.samples)


def measure_open(root: Path, read: Callable[[Path], Sized]) -> dict[str, float]:
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    data = read(root)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "MB": status_mb("VmHWM") - before, "images": len(data)}


def measure_train(root: Path, steps: int, crop: int, *, objects: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    some = itertools.islice((root / "train2014").iterdir(), 16)
    warm_up(Dataset(NAMES, [Entry(path.stem, path, (0,), None) for path in some]), 2, crop)  # imports what is needed
    gc.collect()
    gc.freeze()  # else a collection in a worker, sooner or later, copies all that the libraries hold
    before = status_mb("RssAnon")
    start = time.perf_counter()
    rows: dict[str, Any] = {"main MB": [], "workers MB": []}

    def look(record: dict[str, Any]) -> None:
        if record["step"] == 1:
            rows["first step"] = time.perf_counter() - start
        if record["step"] in looks_at(steps):
            rows["main MB"].append(status_mb("RssAnon") - before)
            rows["workers MB"].append(sum(map(own_mb, children())))

    data = COCO(root, "train")
    if objects:
        data.entries = tuple(data.entries)
    warm_up(data, steps, crop, look)
    return rows


def warm_up(data: Dataset, steps: int, crop: int, callback: Callback | None = None) -> None:
    net, settings = CAMNet(len(data.classes), backbone="scenes"), Warmup(epochs=steps * 16 / len(data), crop=crop)
    machine = Machine(workers=2, progress=False)
    train_classifier(net, data, settings, machine=machine, journal=Journal(callback=callback))


def looks_at(steps: int) -> tuple[int, int, int]:
    """The steps after which memory is looked at."""
    return min(SETTLED, max(1, steps // 4)), max(1, steps // 2), steps


def status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def own_mb(pid: int) -> float:
    """What a process holds and shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


MEASURES = {
    "cacl": lambda args: measure_open(args.root, lambda root: COCO(root, "train")),
    "plain": lambda args: measure_open(args.root, Plain),
    KINDS[0]: lambda args: measure_train(args.root, args.steps, args.crop, objects=False),
    KINDS[1]: lambda args: measure_train(args.root, args.steps, args.crop, objects=True),
}


def row_of(images: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        row: dict[str, Any] = {"images": images, "JSON MB": write_like_coco(Path(name), images) / 1e6}
        for measure in MEASURES:
            command = [sys.executable, __file__, "--measure", measure, "--root", name]
            command += ["--steps", str(args.steps), "--crop", str(args.crop)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row[measure] = json.loads(done.stdout)
    return row


def draw(root: Path, count: int) -> None:
    """A folder like COCO 2014: three quarters of the photos in the split train, the others in val.

    Each class has a colour and a shape. A photo shows none to four objects, every tenth none; every eighth also has a
    crowd of three small ones, as an RLE.
    """
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(count * 3 // 4)), ("val", range(count * 3 // 4, count))):
        (root / f"{split}2014").mkdir(exist_ok=True)
        images, annotations = [], []
        classes = every_class(np.random.default_rng(numbers.start))
        for number in numbers:
            rng = np.random.default_rng(number)
            photo, found = draw_photo(rng, 0 if number % 10 == 9 else int(rng.integers(1, 5)), number % 8 == 0, classes)
            name = f"COCO_{split}2014_{number:012}.jpg"
            photo.save(root / f"{split}2014" / name, quality=95)
            images.append({"id": number, "file_name": name, "width": photo.width, "height": photo.height})
            for annotation in found:
                annotations.append({"id": len(annotations), "image_id": number, **annotation})
        data = {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(data))


def every_class(rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(len(NAMES)).tolist()


def draw_photo(
    rng: np.random.Generator, objects: int, crowd: bool, classes: Iterator[int], size: tuple[int, int] = (160, 120)
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """A photo, and its annotations."""
    width, height = size
    base = rng.integers(70, 180, 3) + rng.normal(0, 12, (height, width, 3))
    photo = Image.fromarray(base.clip(0, 255).astype(np.uint8))
    annotations = []
    if crowd:
        k = int(rng.integers(len(NAMES)))
        outlines = [outline(k, x, height * 0.85, 9) for x in width * rng.uniform(0.1, 0.7) + np.array([0, 18, 36])]
        region = Image.new("L", size)
        for points in outlines:
            ImageDraw.Draw(region).polygon(points, fill=1)
            ImageDraw.Draw(photo).polygon(points, fill=colour(k))
        annotations.append({"category_id": IDS[k], "iscrowd": 1, "segmentation": rle(np.array(region))})
    shapes = []
    for radius in rng.uniform(12, 40, objects):
        k = next(classes)
        shapes.append(
            (k, outline(k, rng.uniform(radius, width - radius), rng.uniform(radius, height - radius), radius))
        )
    for k, points in sorted(shapes, key=lambda shape: area(shape[1]), reverse=True):  # as in masks: the smallest last
        ImageDraw.Draw(photo).polygon(points, fill=colour(k))
        annotations.append(
            {"category_id": IDS[k], "iscrowd": 0, "segmentation": [[round(value, 2) for xy in points for value in xy]]}
        )
    return photo, annotations


def outline(k: int, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """One of eight shapes around a point."""
    corners, inner = ((3, 1), (4, 1), (5, 1), (6, 1), (16, 1), (10, 0.45), (8, 0.4), (12, 0.6))[k // 10]
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    radii = radius * np.where(np.arange(corners) % 2, inner, 1)
    return list(zip((x + radii * np.cos(angles)).tolist(), (y + radii * np.sin(angles)).tolist(), strict=True))


def area(points: list[tuple[float, float]]) -> float:
    x, y = np.array(points).T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def colour(k: int) -> tuple[int, int, int]:
    """One of ten colours."""
    return (
        (230, 25, 25), (25, 200, 25), (40, 60, 240), (240, 220, 20), (230, 30, 230),
        (20, 220, 220), (250, 130, 10), (110, 40, 10), (250, 250, 250), (10, 10, 10),
    )[k % 10]  # fmt: skip


def rle(region: NDArray[np.uint8]) -> dict[str, Any]:
    """The run lengths of background and region in turns, column by column."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], region.T.ravel(), [2]])))
    return {"size": list(region.shape), "counts": np.diff(changes, prepend=0).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="20000", metavar="N[,N]", help="how many; COCO's split train has 82783")
    parser.add_argument("--steps", type=int, default=500, help="of the warm-up, of 16 images")
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="write drawn photos there, and measure nothing")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(MEASURES[args.measure](args)))
    if args.draw:
        return draw(args.draw, int(args.images))
    rows = [row_of(int(images), args) for images in args.images.split(",")]
    print("opening: seconds, peak MB over the libraries\n")
    print(f"{'images':>7} {'JSON MB':>8} {'cacl':>14} {'json.load':>16}")
    for row in rows:
        cells = "  ".join(f"{row[name]['seconds']:6.1f} {row[name]['MB']:7.0f}" for name in ("cacl", "plain"))
        print(f"{row['images']:7} {row['JSON MB']:8.0f} {cells}")
    steps = ", ".join(map(str, looks_at(args.steps)))
    print(f"\na warm-up, crop {args.crop}: seconds to the first step; MB after {steps} steps\n")
    print(f"{'images':>7} {'list of images':>15} {'first step':>11} {'main':>20} {'own of 2 workers':>20}")
    for row in rows:
        for kind, name in zip(KINDS, ("as it is", "objects"), strict=True):
            main, workers = ("".join(f"{mb:6.0f}" for mb in row[kind][key]) for key in ("main MB", "workers MB"))
            print(f"{row['images']:7} {name:>15} {row[kind]['first step']:11.1f} {main:>20} {workers:>20}")
    if args.json:
        args.json.write_text(json.dumps({"steps": args.steps, "crop": args.crop, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
