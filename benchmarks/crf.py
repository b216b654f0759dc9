"""Time of the CRF in torch operations against pydensecrf, and how many pixels get the same label.

"One" is one CRF of an image, its filters included. "Two" is what label mining needs, two sets of labels of one image:
pydensecrf builds its filters twice, as code around it does, the torch backend once. Everything runs in this process,
in turn.

    python benchmarks/crf.py
    python benchmarks/crf.py --images photos --threads 1 --json crf.json
    python benchmarks/crf.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from cacl.crf import DenseCRF, check_backend, dense_crf


def draw(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Something like a photo: smooth regions with edges between them, shading, texture and noise."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    coarse, fine = (np.asarray(noise.filter(ImageFilter.GaussianBlur(r)), np.float32) for r in (height / 12, 2))
    levels = np.digitize(coarse.mean(-1), np.quantile(coarse.mean(-1), (0.2, 0.4, 0.6, 0.8)))
    pixels = rng.uniform(30, 220, (5, 3))[levels] + (fine - 128) * 0.8 + rng.normal(0, 2, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def rough_labels(height: int, width: int, labels: int, seed: int) -> NDArray[np.float32]:
    """Blobs of hard labels, each believed with 0.7, as in label mining."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    centres = rng.uniform(0.2, 0.8, (labels - 1, 2)) * (height, width)
    distance = [np.hypot(rows - y, columns - x) / height for y, x in centres]
    hard = np.stack([np.full((height, width), 0.25), *distance]).argmin(0)
    probabilities = np.full((labels, height, width), 0.3 / (labels - 1), np.float32)
    np.put_along_axis(probabilities, hard[None], 0.7, 0)
    return probabilities


def timed(function: Callable[[], NDArray[np.float32]], device: str) -> tuple[float, NDArray[np.float32]]:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()  # ends with a copy to the CPU
    return 1000 * (time.perf_counter() - start), result


def measure(image: NDArray[np.uint8], labels: int, repeats: int, device: str, seed: int) -> dict[str, object]:
    height, width = image.shape[:2]
    sets = np.stack([rough_labels(height, width, labels, 2 * seed + i) for i in range(2)])
    torch_crf = lambda: DenseCRF(image, backend="torch", device=device)  # noqa: E731
    runs: dict[str, Callable[[], NDArray[np.float32]]] = {
        "torch": lambda: torch_crf()(sets[0]),
        "torch, two": lambda: torch_crf()(sets),
    }
    if check_backend("auto") == "pydensecrf":
        runs["pydensecrf"] = lambda: DenseCRF(image, backend="pydensecrf")(sets[0])
        runs["pydensecrf, two"] = lambda: np.stack([dense_crf(image, one, backend="pydensecrf") for one in sets])
    times: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            elapsed, results[name] = timed(run, device)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
    row: dict[str, object] = {"labels": labels, "ms": {name: median(values) for name, values in times.items()}}
    if "pydensecrf" in runs:
        one, two = results["torch, two"], results["pydensecrf, two"]
        row["equal"] = float((one.argmax(1) == two.argmax(1)).mean())
        row["largest difference"] = float(np.abs(one - two).max())
        row["ratios"] = {
            f"torch / {name}": median(
                a / b for a, b in zip(times[name.replace("pydensecrf", "torch")], times[name], strict=True)
            )
            for name in ("pydensecrf", "pydensecrf, two")
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photos; drawn pictures by default")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("H", "W"), help="of drawn pictures")
    parser.add_argument("--count", type=int, default=6, help="how many images")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.images:
        paths = sorted(path for path in args.images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        paths = [paths[i * len(paths) // args.count] for i in range(min(args.count, len(paths)))]
        images = {path.name: np.array(Image.open(path).convert("RGB")) for path in paths}
    else:
        images = {f"drawn {i}": draw(*args.size, i) for i in range(args.count)}
    columns = ("pydensecrf", "torch", "pydensecrf, two", "torch, two")
    print(f"{torch.get_num_threads()} threads, {args.device}, medians of {args.repeats}; ms, build included\n")
    print(f"{'image':20} {'size':>9} labels " + " ".join(f"{name:>16}" for name in columns) + "  equal labels")
    rows = []
    for i, (name, image) in enumerate(images.items()):
        row = measure(image, 2 + i % 3, args.repeats, args.device, i)
        rows.append({"image": name, "size": list(image.shape[:2]), **row})
        ms = row["ms"]
        cells = " ".join(f"{ms[c]:16.0f}" if c in ms else f"{'-':>16}" for c in columns)
        size = "×".join(map(str, image.shape[1::-1]))
        equal = f"{100 * row['equal']:13.3f} %" if "equal" in row else ""
        print(f"{name[:20]:20} {size:>9} {row['labels']:6} {cells} {equal}")
    result: dict[str, object] = {"threads": torch.get_num_threads(), "device": args.device, "images": rows}
    if "ratios" in rows[0]:
        result["ratios"] = {key: median(row["ratios"][key] for row in rows) for key in rows[0]["ratios"]}
        print()
        for key, value in result["ratios"].items():
            print(f"{key}: {value:.2f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
