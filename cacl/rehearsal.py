"""A rehearsal: all stages on a few photos, for what each will take on this machine with all of them."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from torch import nn

from cacl import pipeline
from cacl._support.distributed import rank_zero
from cacl._support.files import read_json
from cacl.config import Config
from cacl.constants import Precision
from cacl.datasets import Dataset
from cacl.datasets.files import spread
from cacl.encoders import ImageTextEncoder
from cacl.log import Log
from cacl.runs.session import Session
from cacl.settings import Training
from cacl.stages.chain import needed

STEPS = 30
"""Of each training; the median time of the later two thirds counts, as the first ones load libraries and fill
queues."""
IMAGES = {"train": 64, "segmented": 16}
"""Role -> the most photos of it."""


class Speed(NamedTuple):
    """What a stage does in a second on this machine; None for what it does not do."""

    trained: float | None = None
    """Images of a training."""
    files: float | None = None
    """Images that it makes files of; what it takes to begin is in it."""

    def hours(self, settings: object, images: int) -> float:
        """What the stage will take, without its evaluation.

        Args:
            settings: its table.
            images: of the split that it goes through.
        """
        seconds = images / self.files if self.files else 0.0
        if self.trained and isinstance(settings, Training):
            seconds += settings.epochs * images / self.trained
        return seconds / 3600


def images_of(stage: str, counts: Mapping[str, int]) -> int:
    """Role -> images; of the one that a stage goes through."""
    return counts["segmented" if stage == "predict" else "train"]


def stages_of(config: Config) -> list[str]:
    """The stages that a configuration asks for, without the report."""
    return [stage.name for stage in needed(config.chain, lambda stage: getattr(config, stage.name))]


def rehearse(
    config: Config,
    *,
    precision: Precision,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
) -> dict[str, Speed]:
    """Run all stages of a configuration on copies of a few of its photos, in a folder that is then removed.

    What would end the run after hours, such as a setting or too little memory, ends it here. All processes of a run
    call it.

    Args:
        config: the configuration.
        precision: what the run computes in.
        encoder: as of :func:`cacl.pipeline.run`.
        backbone: as there.

    Returns:
        Stage -> speed.
    """
    place = config.run.out / "rehearsal"
    session = Session(config, encoder, backbone, planning=True)
    parts = {"train": session.train, "segmented": session.segmented}
    counts = rank_zero(lambda: _copy(parts, place))
    data = {"format": "csv", "root": place, "train": "train", "eval": "", "range": config.data.range}
    changes: dict[str, dict[str, Any]] = {
        "data": data, "run": {"out": place / "run", "precision": precision}, "predict": {"split": "segmented"},
    }  # fmt: skip
    for name in stages_of(config):
        if isinstance(table := getattr(config, name), Training):
            seen = min(STEPS * table.batch_size, table.epochs * len(session.train))
            changes.setdefault(name, {})["epochs"] = seen / counts["train"]
    short = config.changed(changes)
    pipeline.run(short, encoder=encoder, backbone=backbone, stages=stages_of(config), resume=False)
    found = rank_zero(lambda: speeds_of(short, counts))
    rank_zero(lambda: shutil.rmtree(place))
    return found


def speeds_of(config: Config, counts: Mapping[str, int]) -> dict[str, Speed]:
    """What the stages of a short run, by its ``log.jsonl`` and ``times.json``, do in a second.

    Args:
        config: the run's.
        counts: role -> images of that run.

    Returns:
        Stage -> speed.
    """
    records = Log(config.run.out / "log.jsonl").records()
    costs = read_json(config.run.out / "times.json")
    making = {stage.name for stage in config.chain if stage.files or not issubclass(stage.settings, Training)}
    found = {}
    for name in stages_of(config):
        rates = [record["images_per_second"] for record in records if record["stage"] == name]
        training = sum(getattr(config, name).batch_size / rate for rate in rates)
        making_files = max(costs[name]["seconds"] - training, 1e-9)
        found[name] = Speed(
            median(rates[len(rates) // 3 :]) if rates else None,
            images_of(name, counts) / making_files if name in making else None,
        )
    return found


def _copy(parts: Mapping[str, Dataset], place: Path) -> dict[str, int]:
    """Some photos of each part, evenly spread, and their labels, as a data set of their own; part -> their number."""
    place.mkdir(parents=True, exist_ok=True)
    counts = {}
    rows = [["image", "labels", "mask", "split"]]
    for name, dataset in parts.items():
        some = spread(len(dataset), IMAGES[name])
        counts[name] = len(some)
        for number, index in enumerate(some):
            entry = dataset.entries[index]
            photo = f"{name}-{number}{entry.image.suffix}"
            shutil.copyfile(entry.image, place / photo)
            rows.append([photo, ";".join(dataset.classes[k] for k in entry.labels), "", name])
    (place / "classes.txt").write_text("\n".join(parts["train"].classes), encoding="utf-8")
    with open(place / "dataset.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return counts
