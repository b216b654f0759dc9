"""What each stage's result scores: mean IoU with everything that belongs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cacl._support.distributed import all_reduce_counts, barrier, shard
from cacl.cams import evaluate_cams
from cacl.constants import BACKGROUND_SCORE
from cacl.datasets import Dataset
from cacl.images import read_mask
from cacl.log import Record
from cacl.masks import evaluate_refined
from cacl.metrics import SCORES, ConfusionMatrix, mean_iou
from cacl.segment import evaluate_segmenter

if TYPE_CHECKING:
    from cacl._session import Session

SCORED_ON = {
    "warmup": "eval",
    "cacl": "eval",
    "cams": "train",
    "irn": "train",
    "masks": "train",
    "segment": "segmented",
    "predict": "segmented",
}
"""Stage -> the data set of the session that its result is scored on; other stages have no score."""


def score(session: Session, name: str, dataset: Dataset) -> Record:
    """What is evaluated, its mean IoU and that of every class, and the oracle's where there is a score to sweep."""
    if name == "segment":
        return _segmenter(session, dataset)
    if name == "predict":
        return _predictions(session, dataset)
    config = session.config
    masks = name == "masks"
    background = round(config.masks.background_score, 6) if masks else BACKGROUND_SCORE
    table = config.masks if masks else config.irn
    crf = name in ("irn", "masks") and table.iterations > 0
    what = "pseudo masks" if masks else "CAM + CRF" if crf else "CAM"
    record: Record = {"what": what, "background_score": background, "crf": crf}
    folder = session.out / ("masks/walk" if masks else "cams/train")
    if name == "irn" or masks:
        matrix, images = evaluate_refined(dataset, folder, background_score=background, **session.crf(table))
        record |= {"images": images, **_iou(matrix.iou, dataset.classes)}
        if name == "irn":
            return record
    source = folder if masks or name == "cams" else session.net(name)
    sweep = evaluate_cams(source, dataset, scores=sorted({*SCORES, background}), **session.inference)
    best, miou = sweep.oracle
    oracle = {"background_score": best, "miou": _rounded(miou)}
    alone = _iou(sweep.iou[sweep.scores.index(background)], dataset.classes)
    if masks:
        return {**record, "walk": {"miou": alone["miou"], "oracle": oracle}}
    return {**record, "images": sweep.images, **alone, "oracle": oracle}


def describe(name: str, metrics: Record) -> str:
    """One evaluation in one line, with everything that a mean IoU needs beside it."""
    line = f"{name}: {metrics['what']} mIoU {_percent(metrics['miou'])} ({metrics['split']}, {metrics['images']} images"
    if "background_score" in metrics:
        line += f", background score {metrics['background_score']}"
    line += ", CRF" if metrics["crf"] else ", no CRF"
    walk = metrics.get("walk", {})
    if walk:
        line += f"; the random walk alone {_percent(walk['miou'])}"
    if oracle := metrics.get("oracle", walk.get("oracle")):
        line += f"; oracle {_percent(oracle['miou'])} at {oracle['background_score']}"
    return line + ")"


def _percent(miou: float | None) -> str:
    return "of no pixel" if miou is None else f"{100 * miou:.1f} %"


def is_sound(metrics: object) -> bool:
    """Whether something read from ``metrics.json`` is what :func:`score` made, as far as anybody looks at it."""
    if not isinstance(metrics, dict):
        return False
    try:
        describe("", metrics)
        numbers = [metrics["images"], metrics.get("background_score", 0), *metrics.get("iou", {}).values()]
    except (AttributeError, LookupError, TypeError, ValueError):
        return False
    return all(isinstance(number, int | float) for number in numbers)


def _segmenter(session: Session, dataset: Dataset) -> Record:
    settings = {"longest": session.config.predict.longest, "device": session.device, "workers": session.workers}
    matrix, images = evaluate_segmenter(session.segmenter(trained=True), dataset, crf=None, **settings)
    return {"what": "DeepLabV2", "crf": False, "images": images, **_iou(matrix.iou, dataset.classes)}


def _predictions(session: Session, dataset: Dataset) -> Record:
    masked = dataset.masked
    matrix = ConfusionMatrix(len(dataset.classes))
    with barrier():
        for i in shard(masked):
            made = read_mask(session.out / "predict" / "eval" / f"{dataset.entries[i].id}.png")
            matrix.update(dataset.mask(i).numpy(), made.numpy())
    matrix.counts = all_reduce_counts(matrix.counts)
    crf = session.config.predict.iterations > 0
    return {"what": "DeepLabV2", "crf": crf, "images": len(masked), **_iou(matrix.iou, dataset.classes)}


def _iou(values: NDArray[np.float64], classes: Sequence[str]) -> Record:
    named = zip(("background", *classes), values.tolist(), strict=True)
    return {"miou": _rounded(mean_iou(values)), "iou": {k: round(v, 6) for k, v in named if v == v}}


def _rounded(miou: float) -> float | None:
    """As it stands in ``metrics.json``; None where no pixel counts, since the masks say "ignored" everywhere."""
    return round(miou, 6) if miou == miou else None
