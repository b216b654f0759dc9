"""Images a second that one worker decodes and augments, against plain Pillow and numpy.

Both decode the same JPEG files of VOC's size, rescale the longer side to crop · U(0.625, 1.25), mirror, cut a window
and normalise, one image at a time in one thread, in turn.

    python benchmarks/loading.py
    python benchmarks/loading.py --json loading.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from cacl.datasets import CSVDataset
from cacl.images import read_image
from cacl.loading import load_batches
from cacl.transforms import RandomView

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def plain(path: Path, crop: int, rng: random.Random) -> Tensor:
    """The same view in Pillow and numpy, as research code does it."""
    image = Image.open(path).convert("RGB")
    factor = crop * rng.uniform(0.625, 1.25) / max(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)
    pixels = (np.asarray(image, np.float32) / 255 - MEAN) / STD
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    height, width = pixels.shape[:2]
    canvas = np.zeros((crop, crop, 3), np.float32)
    top, left = rng.randint(0, abs(height - crop)), rng.randint(0, abs(width - crop))
    y, x = (top if height > crop else 0), (left if width > crop else 0)
    source = pixels[y : y + crop, x : x + crop]
    row, column = (0 if height > crop else top), (0 if width > crop else left)
    canvas[row : row + source.shape[0], column : column + source.shape[1]] = source
    return torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1)))


def draw_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of 500×375 pixels with about as much detail as a photo (some 70 kB each)."""
    rng = np.random.default_rng(0)
    (folder / "classes.txt").write_text("thing")
    rows, paths = ["image,labels,mask,split"], []
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
        smooth = np.asarray(noise.filter(ImageFilter.GaussianBlur(2)), np.float32)
        pixels = ((smooth - smooth.mean()) * 4 + 128).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{i}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
        rows.append(f"{i}.jpg,thing,,train")
    (folder / "dataset.csv").write_text("\n".join(rows))
    return paths


def seconds(load: Callable[[Path], Tensor], paths: list[Path]) -> float:
    start = time.perf_counter()
    for path in paths:
        load(path)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2, help="for the last row: the loop's own loader")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    view, generator, rng = RandomView(args.crop), torch.Generator().manual_seed(0), random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = draw_photos(folder, args.images)
        loaders: dict[str, Callable[[Path], Tensor]] = {
            "cacl": lambda path: view(read_image(path), generator=generator)[0],
            "plain": lambda path: plain(path, args.crop, rng),
            "decode only": read_image,
        }
        times: dict[str, list[float]] = {key: [] for key in loaders}
        for repeat in range(args.repeats + 1):
            for key, load in loaders.items():
                elapsed = seconds(load, paths)
                if repeat:  # the first round warms up
                    times[key].append(elapsed)
        rates = {key: args.images / median(values) for key, values in times.items()}
        data = CSVDataset(folder, "train")
        batches = load_batches(
            data, view, batch_size=16, seed=0, steps=range(4 * args.images // 16), masks=False, workers=args.workers,
            device=torch.device("cpu"),
        )  # fmt: skip
        next(batches)  # the workers have started
        start = time.perf_counter()
        count = sum(len(batch.ids) for batch in batches)
        rates[f"loader, {args.workers} workers"] = count / (time.perf_counter() - start)
    print(f"{args.images} JPEGs of 500×375, crop {args.crop}, one thread, medians of {args.repeats}\n")
    print(f"{'':22} images/s")
    for key, rate in rates.items():
        print(f"{key:22} {rate:8.1f}")
    ratio = median(b / a for a, b in zip(times["cacl"], times["plain"], strict=True))
    print(f"\ncacl / plain: {ratio:.2f}")
    if args.json:
        args.json.write_text(json.dumps({"images_per_second": rates, "ratio": ratio, "seconds": times}, indent=2))


if __name__ == "__main__":
    main()
