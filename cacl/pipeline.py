"""From a configuration to results: wires the stages, skips what is finished, goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cacl._checks import check_choice
from cacl._files import read_json, replacing, save_state
from cacl._log import Callback
from cacl._session import STAGES, Body, Session, describe
from cacl.cams import make_cams, predict_cams, train_cacl, train_classifier
from cacl.config import Config
from cacl.encoders import ImageTextEncoder
from cacl.metrics import BACKGROUND_SCORE
from cacl.pictures import heatmap, overlay, sheet, threshold


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    out: Path
    """The run folder."""
    metrics: dict[str, Any]
    """``metrics.json``: for each evaluation its mIoU with split, background score, CRF, number of images."""

    @property
    def pictures(self) -> list[Path]:
        """The pictures that the run has made."""
        return sorted((self.out / "report").glob("*.png"))

    def summary(self) -> str:
        """A line for each evaluation, and where the pictures are."""
        lines = [describe(name, metrics) for name, metrics in self.metrics.items()]
        return "\n".join([*lines, *(f"picture: {path}" for path in self.pictures)])


def run(
    config: Config | str | PathLike[str],
    *,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
    stages: Sequence[str] | None = None,
    resume: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Run the stages of the chain: ``warmup`` → ``cacl`` → ``cams`` → ``report``.

    A finished stage is skipped when nothing that it depends on has changed; a stopped one goes on from its last
    checkpoint.

    Args:
        config: a configuration, or what :meth:`cacl.config.Config.load` takes.
        encoder: instead of the configuration's.
        backbone: instead of the configuration's; copied, so that it stays as it is.
        stages: which stages, all by default; those before them must be finished.
        resume: go on from what the run folder holds; False does the stages again.
        callback: gets every record of ``log.jsonl`` as it is written.

    Returns:
        The run folder and its metrics.

    Raises:
        ValueError: if the configuration, the data or a file of the run is wrong: one line a problem.
    """
    config = config if isinstance(config, Config) else Config.load(config)
    wanted = STAGES if stages is None else tuple(stages)
    for stage in wanted:
        check_choice("stages", stage, STAGES)
    session = Session(config, encoder, backbone, callback)
    session.prepare(wanted)
    for name in STAGES:
        if name in wanted:
            session.do(name, _BODIES[name], resume=resume)
    return Result(config.run.out, session.metrics)


def plan(config: Config, stages: Sequence[str] | None = None, *, resume: bool = True) -> list[str]:
    """What :func:`run` would do with each stage, by what the run folder says; nothing is written."""
    session = Session(config, None, None, None)
    lines = []
    for name in STAGES if stages is None else stages:
        check_choice("stages", name, STAGES)
        state = read_json(config.run.out / name / "stage.json")
        if not state:
            word = "new"
        elif not resume or state.get("key") != session.key(name):
            word = "to be done again"
        else:
            word = "finished" if state.get("finished") else "to be continued"
        lines.append(f"{name}: {word}")
    return lines


def _warmup(session: Session, folder: Path, run: dict[str, Any]) -> None:
    table = session.config.warmup
    net = session.net()
    rates = {"lr": table.lr, "momentum": table.momentum, "weight_decay": table.weight_decay}
    train_classifier(net, session.train, session.loop(table), checkpoint=folder / "checkpoint.pt", **rates, **run)
    save_state(folder / "model.pt", net.state_dict())


def _cacl(session: Session, folder: Path, run: dict[str, Any]) -> None:
    table = session.config.cacl
    net = session.net("warmup")
    rates = {"lr": table.lr, "momentum": table.momentum, "weight_decay": table.weight_decay}
    train_cacl(
        net,
        session.criterion,
        session.train,
        session.loop(table),
        threshold_lr=table.threshold_lr,
        checkpoint=folder / "checkpoint.pt",
        **rates,
        **run,
    )
    save_state(folder / "model.pt", net.state_dict())


def _cams(session: Session, folder: Path, run: dict[str, Any]) -> None:
    # What is there is of this very stage from before a stop; files of another were removed.
    make_cams(session.net("cacl"), session.train, folder / "train", keep=True, **session.inference)


def _report(session: Session, folder: Path, run: dict[str, Any]) -> None:
    dataset = session.eval or session.train
    count = min(session.config.report.images, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    stages = {"CAM after the warm-up": "warmup", "CAM after CA-CL": "cacl"}
    cams = [dict(predict_cams(session.net(stage), dataset, chosen, **session.inference)) for stage in stages.values()]
    masked = any(dataset.entries[i].mask is not None for i in chosen)
    rows = []
    for i in chosen:
        entry, photo = dataset.entries[i], dataset.image(i).permute(1, 2, 0).numpy()
        maps = [of[i].resized(photo.shape[:2]) for of in cams]
        pictures = [photo, *(heatmap(photo, each) for each in maps)]
        pictures.append(overlay(photo, threshold(cams[-1][i].classes, maps[-1])))
        if masked:
            pictures.append(overlay(photo, dataset.mask(i).numpy()) if entry.mask else np.zeros_like(photo))
        rows.append((f"{entry.id}: {', '.join(dataset.classes[k] for k in entry.labels)}", pictures))
    titles = ["photo", *stages, f"its mask at {BACKGROUND_SCORE}", *(["ground truth"] if masked else [])]
    with replacing(folder / "cams.png") as file:
        sheet(titles, rows).save(file, "PNG")


_BODIES: dict[str, Body] = {"warmup": _warmup, "cacl": _cacl, "cams": _cams, "report": _report}
