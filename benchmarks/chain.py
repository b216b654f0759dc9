"""Photos a second in every stage of the chain, and what a run of the paper's length would take at that.

The preset `voc` (ResNet-50 and ResNet-101, 512 and 321 pixels, CLIP ViT-B/32's shape with random weights) on drawn
JPEGs of VOC's size with 20 classes, through `pipeline.run` as users call it: loading, checkpoints and log are part of
it. Each training stage does some steps, of whose times the median counts; files take the rest of the stage's time.

    python benchmarks/chain.py --device cuda --precision bf16 --workers 8
    python benchmarks/chain.py --tiny --json chain.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from cacl import pipeline
from cacl._support.clip_library import import_clip
from cacl.config import Config
from cacl.datasets.listing import VOC_CLASSES
from cacl.encoders import CLIPEncoder
from cacl.rehearsal import images_of, speeds_of, stages_of

TRAINED = ("warmup", "cacl", "irn", "segment")
IMAGES = {"train": 10582, "segmented": 1449}  # of VOC 2012 with the augmented masks
CLIP = {"ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12), "tiny": (32, 32, 1, 64, 16, 77, 49408, 64, 1, 1)}


def encoder(name: str) -> CLIPEncoder:
    import_clip()
    from clip.model import CLIP as Model

    return CLIPEncoder(Model(*CLIP[name]))


def draw(root: Path, train: int, val: int) -> None:
    """Photos of 500×375 pixels with about as much detail as real ones, each with one or two classes and a mask."""
    rng = np.random.default_rng(0)
    (root / "classes.txt").write_text("\n".join(VOC_CLASSES))
    rows = ["image,labels,mask,split"]
    for i in range(train + val):
        noise = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
        smooth = np.asarray(noise.filter(ImageFilter.GaussianBlur(2)), np.float32)
        Image.fromarray(((smooth - 128) * 4 + 128).clip(0, 255).astype(np.uint8)).save(root / f"{i}.jpg", quality=90)
        mask = np.zeros((375, 500), np.uint8)
        shown = [i % 20, (i + 7) % 20][: 1 + i % 2]
        for place, k in enumerate(shown):
            mask[100:300, 40 + 220 * place : 240 + 220 * place] = k + 1
        Image.fromarray(mask).save(root / f"{i}.png")
        names = ";".join(VOC_CLASSES[k] for k in shown)
        rows.append(f"{i}.jpg,{names},{i}.png,{'train' if i < train else 'val'}")
    (root / "dataset.csv").write_text("\n".join(rows))


def configure(args: argparse.Namespace, root: Path) -> Config:
    settings = [
        f"run.out={root / 'run'}", f"run.device={args.device}", f"run.precision={args.precision}",
        f"run.workers={args.workers}", f"run.compile={str(args.compile).lower()}", "data.format=csv",
        f"data.root={root}", "data.train=train", "data.eval=", "predict.split=val", "camnet.weights=",
        "segment.backbone=resnet101", "segment.weights=",
    ]  # fmt: skip
    if args.tiny:
        settings += ["camnet.backbone=resnet18", "segment.backbone=resnet18", *(f"{s}.crop=32" for s in TRAINED)]
        settings += ["predict.longest=64", "cams.scales=[0.25]", "irn.radius=3"]
    if args.batch_size:
        settings += [f"{stage}.batch_size={args.batch_size}" for stage in TRAINED]
    config = Config.load("voc", settings)
    epochs = {s: {"epochs": args.steps * getattr(config, s).batch_size / args.images} for s in TRAINED}
    return config.changed(epochs)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    paper = Config.load("voc", ["data.root=."])
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        draw(root, args.images, args.val)
        config = configure(args, root)
        on_gpu = torch.device(args.device).type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        pipeline.run(config, encoder=encoder("tiny" if args.tiny else "ViT-B/32"), stages=stages_of(config))
        speeds = speeds_of(config, {"train": args.images, "segmented": args.val})
        memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    stages: dict[str, dict[str, float]] = {}
    for stage, speed in speeds.items():
        row = {"training images/s": speed.trained, "files/s": speed.files}
        row["hours of a VOC run"] = speed.hours(getattr(paper, stage), images_of(stage, IMAGES))
        stages[stage] = {key: value for key, value in row.items() if value is not None}
    settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
    return {"settings": settings, "stages": stages, "GiB of the GPU": memory}


def show(result: dict[str, Any]) -> None:
    columns = ("training images/s", "files/s", "hours of a VOC run")
    print(f"| stage | {' | '.join(columns)} |\n|---|---|---|---|")
    for stage, row in result["stages"].items():
        print(f"| `{stage}` | {' | '.join(f'{row[c]:.3g}' if c in row else '' for c in columns)} |")
    print(
        f"\n{sum(row['hours of a VOC run'] for row in result['stages'].values()):.3g} hours in all, without evaluation"
    )
    if result["GiB of the GPU"] is not None:
        print(f"peak memory of the GPU: {result['GiB of the GPU']:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=64, help="of the split train")
    parser.add_argument("--val", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30, help="in each training stage")
    parser.add_argument("--batch-size", type=int, help="in every training stage; by default the preset's")
    parser.add_argument("--tiny", action="store_true", help="small networks, for a test: its numbers mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
