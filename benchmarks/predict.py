"""`cacl predict` on a folder of photos against a plain loop that loads, runs and saves one photo at a time.

Both have the same network and the same CRF (pydensecrf, or torch where that is not installed). The plain loop gives the
CRF all classes, as scripts do; `cacl predict` gives it those that may be there. Each run is a command of its own, both
in turns; memory is the sum over all of a run's processes of what they hold (proportional set size, Linux only), less
nothing: the libraries are in it. Without a model, one with random weights is used, with photos of noise.

    python benchmarks/predict.py
    python benchmarks/predict.py --model my-run --images photos --count 120
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from cacl.crf import dense_crf
from cacl.deeplab import DeepLabV2
from cacl.photos import save_segmenter
from cacl.predict import open_model

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def plain(model: str, photos: list[str], out: Path, crf: bool) -> None:
    """The loop of a script."""
    (net, _), settings = open_model(model)
    net.eval()
    out.mkdir()
    for path in photos:
        photo = np.array(Image.open(path).convert("RGB"))
        image = torch.from_numpy(((photo / 255 - MEAN) / STD).astype(np.float32)).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits = F.interpolate(net(image), size=photo.shape[:2], mode="bilinear")
        probabilities = logits.softmax(1)[0].numpy()
        if crf:
            parts = {"gaussian": settings.gaussian, "bilateral": settings.bilateral}
            probabilities = dense_crf(photo, probabilities, iterations=settings.iterations, **parts)
        Image.fromarray(probabilities.argmax(0).astype(np.uint8)).save(out / f"{Path(path).stem}.png")


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MB of a command with all its processes."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, tree_mb(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, peak


def tree_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # has just ended
        return 0.0
    return own + sum(map(tree_mb, children))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="RUN_OR_MODEL")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photos; of noise by default")
    parser.add_argument("--backbone", default="resnet50", help="of the random model")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("H", "W"), help="of the noise")
    parser.add_argument("--count", type=int, default=20, help="photos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-crf", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plain", nargs=2, metavar=("LIST", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        photos, out = args.plain
        return plain(args.model, json.loads(Path(photos).read_text()), Path(out), not args.no_crf)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.images:
            photos = sorted(p for p in args.images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
            photos = photos[: args.count]
        else:
            (folder / "photos").mkdir()
            photos = [folder / f"photos/{i}.jpg" for i in range(args.count)]
            for i, path in enumerate(photos):
                coarse = np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize(args.size[::-1], Image.Resampling.BICUBIC).save(path)
        model = args.model
        if model is None:
            torch.manual_seed(0)
            net = DeepLabV2(21, backbone=args.backbone, weights=None)
            model = str(folder / "model.pt")
            save_segmenter(Path(model), net, [f"class {k}" for k in range(1, 21)], args.backbone)
        listed = folder / "photos.json"
        listed.write_text(json.dumps([str(path) for path in photos]))
        crf = ["--no-crf"] if args.no_crf else []
        found: dict[str, list[tuple[float, float]]] = {"plain loop": [], "cacl predict": []}
        for i in range(args.rounds):
            arguments = ["--plain", str(listed), str(folder / f"plain-{i}"), "--model", model, *crf]
            found["plain loop"].append(measure([sys.executable, __file__, *arguments]))
            arguments = [model, *map(str, photos), "--out", str(folder / f"ours-{i}"), *crf]
            found["cacl predict"].append(measure([sys.executable, "-m", "cacl", "predict", *arguments]))
        same = np.mean([agreement(folder / f"plain-0/{p.stem}.png", folder / f"ours-0/{p.stem}.png") for p in photos])
    rows = {
        name: {"seconds": median(s for s, _ in runs), "MB": median(m for _, m in runs)} for name, runs in found.items()
    }
    print(f"{len(photos)} photos, medians of {args.rounds} rounds, start-up included\n")
    print(f"{'':14} {'seconds':>8} {'photos/s':>9} {'MB':>6}")
    for name, row in rows.items():
        print(f"{name:14} {row['seconds']:8.1f} {len(photos) / row['seconds']:9.2f} {row['MB']:6.0f}")
    ratio = rows["plain loop"]["seconds"] / rows["cacl predict"]["seconds"]
    print(f"\n{ratio:.2f} times as fast; {100 * same:.2f} % of the pixels are the same")
    if args.json:
        args.json.write_text(json.dumps({"photos": len(photos), "same": same, "runs": rows}, indent=2))


def agreement(one: Path, two: Path) -> float:
    with Image.open(one) as first, Image.open(two) as second:
        return float((np.array(first) == np.array(second)).mean())


if __name__ == "__main__":
    main()
