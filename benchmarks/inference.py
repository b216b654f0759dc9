"""Milliseconds a photo of CAMs and of the segmenter, in float32 and in bf16, and how far their masks agree.

CAMs at three scales with the mirror image, and DeepLabV2's logits, of photos of one size, by networks with random
weights (or the scenes' own, with ``--backbone scenes``), in turn, in one process.

    python benchmarks/inference.py --device cuda --json inference.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cacl import CAMNet
from cacl._support.precision import native_precision
from cacl.deeplab import DeepLabV2
from cacl.settings import Machine

SCALES = (0.5, 1.0, 1.5)


def timed(run: Callable[[Tensor], Tensor], photos: list[Tensor], device: str) -> tuple[list[float], list[Tensor]]:
    """Milliseconds of each photo, and what came out."""
    times, found = [], []
    for photo in photos:
        start = time.perf_counter()
        found.append(run(photo.to(device, memory_format=torch.channels_last)).float().cpu())  # which waits for it
        times.append(1000 * (time.perf_counter() - start))
    return times, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("H", "W"))
    parser.add_argument("--count", type=int, default=12, help="photos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = "DEFAULT" if options.backbone == "scenes" else None
    cams = CAMNet(20, backbone=options.backbone, weights=weights).eval()
    segmenter = DeepLabV2(21, backbone=options.backbone, weights=weights).eval()
    for net in (cams, segmenter):
        net.to(options.device, memory_format=torch.channels_last)
    photos = [torch.randn(1, 3, *options.size) for _ in range(options.count)]
    classes = torch.tensor([3, 7])
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "CAMs": lambda photo: cams.predict(photo, scales=SCALES, classes=classes),
        "segmenter": lambda photo: segmenter.predict(photo),
    }
    result: dict[str, Any] = {"device": options.device, "native": native_precision(options.device)}
    for name, run in runs.items():
        times: dict[str, list[float]] = {"fp32": [], "bf16": []}
        masks: dict[str, list[Tensor]] = {}
        for number in range(options.rounds + 1):
            for precision, known in times.items():
                with torch.no_grad(), Machine(options.device, precision=precision).autocast():  # type: ignore[arg-type]
                    taken, found = timed(run, photos, options.device)
                known += taken if number else []  # the first is not counted
                masks[precision] = [(maps.amax(1) > 0.3) * (1 + maps.argmax(1)) for maps in found]
        same = torch.cat([(a == b).flatten() for a, b in zip(*masks.values(), strict=True)]).double().mean().item()
        fp32, bf16 = (median(known) for known in times.values())
        result[name] = {"fp32_ms": fp32, "bf16_ms": bf16, "ratio": fp32 / bf16, "same_pixels": same}
        print(
            f"{name}: fp32 {fp32:.1f} ms, bf16 {bf16:.1f} ms, {fp32 / bf16:.2f} times; same pixels {100 * same:.2f} %"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
