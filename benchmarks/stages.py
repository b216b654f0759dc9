"""Time and memory of a photo in each step from CAM to pseudo mask.

Each step runs in a process of its own, on one image after the other; memory is what the process grew by at its peak,
after one small image has loaded all libraries. IRNet has a ResNet-50 with random weights. There is no plain reference
here: `crf.py` and `random_walk.py` have those of the two steps that take time.

    python benchmarks/stages.py
    python benchmarks/stages.py --images photos --json stages.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from cacl.artifacts import ImageCAMs
from cacl.irn import IRNet, affinity_loss
from cacl.mining import crf_labels, mine_labels
from cacl.stages.masks import walk
from cacl.transforms import normalize

Photo = NDArray[np.uint8]
CLASSES = np.array([0, 1])


def cams_of(photo: Photo) -> ImageCAMs:
    """Two blobs at a quarter of the photo's size."""
    height, width = (-(-side // 4) for side in photo.shape[:2])
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    blobs = [np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 0.03) for y, x in ((0.3, 0.3), (0.4, 0.7))]
    return ImageCAMs(CLASSES, np.array(blobs, np.float16))


def input_of(photo: Photo) -> torch.Tensor:
    return normalize(torch.from_numpy(photo.copy()).permute(2, 0, 1))[None]


def steps(device: str) -> dict[str, Callable[[], Callable[[Photo], object]]]:
    """Each prepares what it needs and gives what is timed."""

    def labels(backend: str) -> Callable[[Photo], object]:
        return lambda photo: mine_labels(photo, *cams_of(photo), backend=backend)

    def masks(backend: str) -> Callable[[Photo], object]:
        return lambda photo: crf_labels(photo, *cams_of(photo), (0.2, 0.3), backend=backend)

    def training() -> Callable[[Photo], object]:
        net = IRNet(weights=None).to(device).train()

        def step(photo: Photo) -> None:
            side = 512 if max(photo.shape[:2]) > 32 else 32  # not yet for the image that loads the libraries
            edges, displacements = net(F.interpolate(input_of(photo).to(device), (side, side)))
            target = torch.arange(side, device=device).div(200, rounding_mode="floor").expand(1, side, side)
            affinity_loss(edges, displacements, target).total.backward()

        return step

    def edges() -> Callable[[Photo], object]:
        net = IRNet(weights=None).to(device)
        return lambda photo: net.predict(input_of(photo).to(device)).cpu()

    def walking() -> Callable[[Photo], object]:
        def step(photo: Photo) -> object:
            cams = cams_of(photo)
            noise = torch.rand(cams.maps.shape[1:], generator=torch.Generator().manual_seed(0))
            return walk(cams, noise.pow(3).to(device))

        return step

    return {
        "label mining, pydensecrf": partial(labels, "pydensecrf"),
        "label mining, torch": partial(labels, "torch"),
        "IRNet, a training step at 512×512": training,
        "edges, with the mirror image": edges,
        "random walk": walking,
        "masks, pydensecrf": partial(masks, "pydensecrf"),
        "masks, torch": partial(masks, "torch"),
    }


def run(name: str, photos: list[Photo], threads: int, device: str) -> tuple[float, float]:
    """Median ms a photo, and MB; in a new process."""
    torch.set_num_threads(threads)
    step = steps(device)[name]()
    step(photos[0][:32, :32])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for photo in photos:
        start = time.perf_counter()
        step(photo)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * median(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photos; one of noise by default")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("H", "W"), help="of the noise")
    parser.add_argument("--count", type=int, default=6, help="how many images")
    parser.add_argument("--threads", type=int, default=1, help="as in the stages' processes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.images:
        paths = sorted(path for path in args.images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        paths = [paths[i * len(paths) // args.count] for i in range(min(args.count, len(paths)))]
        photos = [np.array(Image.open(path).convert("RGB")) for path in paths]
    else:
        rng = np.random.default_rng(0)
        coarse = [Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)) for _ in range(args.count)]
        photos = [np.array(image.resize(args.size[::-1], Image.Resampling.NEAREST)) for image in coarse]
    print(f"{len(photos)} images, {args.threads} threads, {args.device}, medians\n")
    print(f"{'':36} {'ms':>7} {'MB':>7}")
    rows = {}
    for name in steps(args.device):
        with get_context("spawn").Pool(1) as pool:
            try:
                ms, mb = pool.apply(run, (name, photos, args.threads, args.device))
            except ImportError:  # no pydensecrf here
                continue
        rows[name] = {"ms": ms, "MB": mb}
        print(f"{name:36} {ms:7.0f} {mb:7.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "device": args.device, "steps": rows}, indent=2))


if __name__ == "__main__":
    main()
