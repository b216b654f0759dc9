"""What CA-CL changes on drawn scenes: mean IoU of the CAMs, spill and misses of every class, over several seeds.

    python benchmarks/scenes.py --seeds 5

Spill: share of the pixels of a class's own background words that the CAMs give to the class, in images that show it.
Missed: share of the object's pixels that the CAMs do not give to the class.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cacl import pipeline, scenes
from cacl.ablate import spread
from cacl.config import Config
from cacl.pictures import threshold
from cacl.runs.session import Session
from cacl.stages.cams import camnet, predict_cams
from cacl.tables import CAMs

STAGES = ("warmup", "cacl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the runs, to go on from; a temporary one if not given")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        figures = [measure(out, seed, args.set) for seed in range(args.seeds)]
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    print(f"CAM mIoU %, val, background score 0.15, no CRF, {args.seeds} seeds: mean ± standard deviation")
    for stage in STAGES:
        print(f"  {stage}: {spread([f[stage]['miou'] for f in figures])}")
    print(f"  gain: {spread([f['cacl']['miou'] - f['warmup']['miou'] for f in figures])}")
    print("\n| class | IoU % | | spill % | | missed % | |\n|---|---|---|---|---|---|---|")
    print("| | warm-up | CA-CL | warm-up | CA-CL | warm-up | CA-CL |")
    for name in (*scenes.CLASSES, "mean"):
        cells = [
            f"{100 * statistics.fmean(f[stage][what][name] for f in figures):.1f}"
            for what in ("iou", "spill", "missed")
            for stage in STAGES
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def measure(out: Path, seed: int, settings: list[str]) -> dict[str, dict]:
    """One run and, for both stages, the figures of every class."""
    own = [f"run.out={out / f'seed-{seed}'}", f"run.seed={seed}", f"data.root={out / 'data'}"]
    config = Config.load("scenes", [*own, "cams.background_score=0.15", *settings])
    result = pipeline.run(config, stages=STAGES)
    session = Session(config)
    figures = {}
    for stage in STAGES:
        metrics = result.metrics[stage]
        iou = {**metrics["iou"], "mean": metrics["miou"]}
        figures[stage] = {"miou": metrics["miou"], "iou": iou, **errors(session, stage)}
    return figures


def errors(session: Session, stage: str) -> dict[str, dict[str, float]]:
    """Spill and misses of every class."""
    val = session.eval
    assert val is not None
    spilt, own, missed, shown = (dict.fromkeys(scenes.CLASSES, 0) for _ in range(4))
    net, settings = camnet(session, stage), session.table(CAMs)
    cams = predict_cams(net, val, range(len(val)), settings, machine=session.machine)
    for index, each in cams:
        mask = val.mask(index).numpy()
        words = np.asarray(Image.open(session.config.data.root / "words" / f"{val.entries[index].id}.png"))
        given = threshold(each.classes, each.resized(mask.shape))
        for k in each.classes:
            name = scenes.CLASSES[k]
            surroundings = own_words(name)[words]
            own[name] += int(surroundings.sum())
            spilt[name] += int((given == k + 1)[surroundings].sum())
            shown[name] += int((mask == k + 1).sum())
            missed[name] += int((given != k + 1)[mask == k + 1].sum())
    spill = {name: spilt[name] / own[name] for name in scenes.CLASSES if own[name]}
    misses = {name: missed[name] / shown[name] for name in scenes.CLASSES if shown[name]}
    return {
        "spill": {**spill, "mean": statistics.fmean(spill.values())},
        "missed": {**misses, "mean": statistics.fmean(misses.values())},
    }


def own_words(name: str) -> NDArray[np.bool_]:
    """Value in a map of words -> whether it is one of the class's own."""
    return np.array([False, *(word in scenes.BACKGROUNDS[name] for word in scenes.WORDS)])


if __name__ == "__main__":
    main()
