"""What the segmenter of a run keeps of what the same network learns from true masks: the same settings, seed and steps.

For a run of `cacl run` whose training images and predicted images both have masks. Nothing of the run is changed.

    python benchmarks/ceiling.py cacl-scenes
    python benchmarks/ceiling.py cacl-scenes --json ceiling.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cacl.artifacts import made_mask, save_mask
from cacl.config import Config
from cacl.datasets import Dataset
from cacl.encoders import ImageTextEncoder
from cacl.errors import InputError
from cacl.metrics import ConfusionMatrix
from cacl.runs.session import Session
from cacl.stages.predict import evaluate_segmenter, trained_tagger
from cacl.stages.segment import new_segmenter, train_segmenter
from cacl.tables import Predict, Segment


def write_truth(dataset: Dataset, out: Path) -> None:
    """The data set's own masks, in files as the stage `masks` leaves them."""
    if len(dataset.masked) < len(dataset):
        raise InputError(f"{len(dataset) - len(dataset.masked)} of {len(dataset)} training images have no mask")
    for i, entry in enumerate(dataset.entries):
        save_mask(out / f"{entry.id}.png", np.asarray(dataset.mask(i)))


def quality(dataset: Dataset, masks: Path) -> float:
    """Mean IoU of masks that are files; what they leave open (255) counts as background."""
    matrix = ConfusionMatrix(len(dataset.classes))
    for i in range(len(dataset)):
        mask = made_mask(dataset, masks, i)
        matrix.update(dataset.mask(i).numpy(), np.where(mask == 255, 0, mask).astype(np.uint8))
    return matrix.miou


def compare(
    folder: Path, *, encoder: ImageTextEncoder | None = None, backbone: nn.Module | None = None
) -> dict[str, Any]:
    """Mean IoU by the run's own segmenter and by the same network on true masks.

    Args:
        folder: of a run that has finished `predict`.
        encoder: the one that was passed to the run, if one was.
        backbone: the one that was passed to the run, if one was.
    """
    run = Session(Config.of_run(folder), given_encoder=encoder, given_backbone=backbone)
    seen, settings, shown = run.segmented, run.table(Segment), run.table(Predict)
    if not seen.masked:
        raise InputError(f"{folder}: the images that are predicted have no masks")
    own = run.files.scores()
    net = run.to_train(new_segmenter(run, settings))
    with tempfile.TemporaryDirectory() as truth:
        write_truth(run.train, Path(truth))
        train_segmenter(net, run.train, Path(truth), settings, seed=run.seed, machine=run.machine)
    found: dict[str, Any] = {
        "images": len(run.train),
        "pseudo_masks": quality(run.train, run.folder("masks") / "train"),
    }
    for name, stage, crf in (("network", "segment", False), ("crf", "predict", True)):
        known = own[stage].miou
        labelled = crf and seen is run.train  # as in `predict`
        tagger = trained_tagger(run) if crf and not labelled else None
        true = evaluate_segmenter(
            net, seen, shown, machine=run.machine, crf=crf, labelled=labelled, tagger=tagger
        )[0].miou  # fmt: skip
        found[name] = {"pseudo": known, "true": true, "share": known / true if true else float("nan")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = compare(args.run)
    print(f"{found['images']} training images; their pseudo masks {100 * found['pseudo_masks']:.1f} % mIoU")
    print(f"{'':12s}{'on pseudo masks':>17s}{'on true masks':>16s}{'share':>8s}")
    for name, title in (("network", "no CRF"), ("crf", "with CRF")):
        row = found[name]
        print(f"{title:12s}{100 * row['pseudo']:15.1f} %{100 * row['true']:14.1f} %{100 * row['share']:6.0f} %")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
