"""What a run over a million photos does before its first step: seconds and memory.

Draws a data set of links: a `dataset.csv` with a row a photo, links to a few small photos in folders of a thousand.
Then, each in a process of its own:

- list: the data set opened by its list, and with a look at every file;
- run: the warm-up begun on it, until its first step is done: new, where what it finds is written down beside the run,
  and again, as after a kill.

    python benchmarks/start.py --images 1000000
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cacl import pipeline
from cacl.config import Config
from cacl.datasets import open_dataset

CLASSES = ("boat", "cat", "dog", "train")


class BegunError(Exception):
    """The first step is done."""


def draw(root: Path, images: int, photos: int = 16) -> None:
    """A folder with `classes.txt`, `dataset.csv` and links to a few photos of 64×48 pixels."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    files = [root / f"photo-{i}.jpg" for i in range(photos)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file)
    with open(root / "dataset.csv", "w") as table:
        table.write("image,labels,mask,split\n")
        for i in range(images):
            folder = root / f"images/{i // 1000:04}"
            if i % 1000 == 0:
                folder.mkdir(parents=True)
            (folder / f"{i:07}.jpg").symlink_to(files[i % photos])
            table.write(f"images/{i // 1000:04}/{i:07}.jpg,{CLASSES[i % 4]};{CLASSES[i // 4 % 4]},,train\n")


def opened(root: Path, *, look: bool) -> None:
    open_dataset("csv", root, "train", look=look)


def begun(root: Path) -> None:
    """A run until its first step is done."""
    settings = [
        f"data.root={root}", f"run.out={root.parent / 'run'}", "data.format=csv", "data.train=train", "data.eval=",
        "camnet.backbone=scenes", "camnet.weights=", "encoder.name=scenes", "segment.backbone=", "run.workers=0",
        "warmup.epochs=1", "warmup.crop=64", "run.progress=false", "run.device=cpu",
    ]  # fmt: skip

    def stop(record: dict[str, Any]) -> None:
        raise BegunError

    try:
        pipeline.run(Config.load("own", settings), stages=["warmup"], callback=stop)
    except BegunError:
        return
    raise SystemExit("expected a step")


MEASURES: dict[str, Callable[[Path], None]] = {
    "list": lambda root: opened(root, look=False),
    "list, every file looked at": lambda root: opened(root, look=True),
    "run, new": begun,
    "run, again": begun,
}


def measure(name: str, root: Path) -> dict[str, float]:
    start = time.perf_counter()
    MEASURES[name](root)
    return {
        "seconds": time.perf_counter() - start,
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="write the numbers to a file")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.root)))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "data")
        draw(root, args.images)
        rows = {}
        print(f"{args.images} photos; imports are not counted\n\n| | seconds | peak MB |\n|---|---|---|")
        for each in MEASURES:
            command = [sys.executable, __file__, "--measure", each, "--root", str(root)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[each] = json.loads(done.stdout.splitlines()[-1])
            print(f"| {each} | {rows[each]['seconds']:.1f} | {rows[each]['MB']:.0f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"images": args.images, **rows}, indent=1))


if __name__ == "__main__":
    main()
