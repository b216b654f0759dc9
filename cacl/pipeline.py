"""From a configuration to results: wires the stages, skips what is finished, goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from cacl._checks import check_choice
from cacl._files import read_json, replacing, save_state
from cacl._log import Callback
from cacl._session import STAGES, Body, Session, describe
from cacl.cams import load_cams, make_cams, predict_cams, train_cacl, train_classifier
from cacl.config import Config
from cacl.datasets import Dataset
from cacl.encoders import ImageTextEncoder
from cacl.images import read_mask
from cacl.masks import make_labels, make_masks, refine_cams, train_irnet, walk_cams
from cacl.metrics import BACKGROUND_SCORE
from cacl.pictures import Pixels, heatmap, overlay, sheet, threshold


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
    """Run the stages of the chain: ``warmup`` → ``cacl`` → ``cams`` → ``irn`` → ``masks`` → ``report``.

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


def _irn(session: Session, folder: Path, run: dict[str, Any]) -> None:
    table, cams = session.config.irn, session.out / "cams" / "train"
    make_labels(
        session.train,
        cams,
        folder / "labels",
        foreground_score=table.foreground_score,
        background_score=table.background_score,
        keep=True,
        **session.crf(table),
    )
    net = session.irnet()
    rates = {"lr": table.lr, "momentum": table.momentum, "weight_decay": table.weight_decay}
    train_irnet(
        net,
        session.train,
        folder / "labels",
        session.loop(table, masks=True),
        radius=table.radius,
        checkpoint=folder / "checkpoint.pt",
        **rates,
        **run,
    )
    save_state(folder / "model.pt", net.state_dict())


def _masks(session: Session, folder: Path, run: dict[str, Any]) -> None:
    table, cams = session.config.masks, session.out / "cams" / "train"
    walk_cams(
        session.irnet("irn"),
        session.train,
        cams,
        folder / "walk",
        power=table.power,
        radius=table.radius,
        beta=table.beta,
        steps=table.steps,
        device=session.device,
        workers=session.workers,
        keep=True,
    )
    make_masks(
        session.train,
        folder / "walk",
        folder / "train",
        background_score=table.background_score,
        unsure=table.unsure,
        keep=True,
        **session.crf(table),
    )


def _report(session: Session, folder: Path, run: dict[str, Any]) -> None:
    for name, table in {"cams": _cam_pictures(session), "masks": _mask_pictures(session)}.items():
        with replacing(folder / f"{name}.png") as file:
            table.save(file, "PNG")


def _cam_pictures(session: Session) -> Image.Image:
    """CAMs before and after CA-CL, of images that were not trained on if there are any."""
    dataset = session.eval or session.train
    chosen = _chosen(session, dataset)
    stages = {"CAM after the warm-up": "warmup", "CAM after CA-CL": "cacl"}
    cams = [dict(predict_cams(session.net(stage), dataset, chosen, **session.inference)) for stage in stages.values()]
    rows = {}
    for i in chosen:
        photo = dataset.image(i).permute(1, 2, 0).numpy()
        maps = [of[i].resized(photo.shape[:2]) for of in cams]
        mask = overlay(photo, threshold(cams[-1][i].classes, maps[-1]))
        rows[i] = [photo, *(heatmap(photo, each) for each in maps), mask]
    return _table(dataset, ["photo", *stages, f"its mask at {BACKGROUND_SCORE}"], rows)


def _mask_pictures(session: Session) -> Image.Image:
    """The steps from CAM to pseudo mask, of training images."""
    dataset, cams, chosen = session.train, session.out / "cams" / "train", _chosen(session, session.train)
    rows = {}
    for i, refined in refine_cams(
        dataset, cams, chosen, background_score=BACKGROUND_SCORE, **session.crf(session.config.irn)
    ):
        photo, file = dataset.image(i).permute(1, 2, 0).numpy(), f"{dataset.entries[i].id}.png"
        found = load_cams((cams / file).with_suffix(".npz"), len(dataset.classes))
        maps = found.resized(photo.shape[:2])
        kept = (read_mask(session.out / folder / file).numpy() for folder in ("irn/labels", "masks/train"))
        masks = (threshold(found.classes, maps), refined, *kept)
        rows[i] = [photo, heatmap(photo, maps), *(overlay(photo, mask) for mask in masks)]
    titles = ["photo", "CAM", f"CAM at {BACKGROUND_SCORE}", "CAM + CRF", "mined labels", "pseudo mask"]
    return _table(dataset, titles, rows)


def _chosen(session: Session, dataset: Dataset) -> list[int]:
    count = min(session.config.report.images, len(dataset))
    return [i * len(dataset) // count for i in range(count)]


def _table(dataset: Dataset, titles: list[str], rows: dict[int, list[Pixels]]) -> Image.Image:
    """Pictures of some images, with their ids and labels, and the ground truth where there is one."""
    entries = {i: dataset.entries[i] for i in rows}
    if any(entry.mask for entry in entries.values()):
        titles = [*titles, "ground truth"]
        for i, entry in entries.items():
            photo = rows[i][0]
            rows[i].append(overlay(photo, dataset.mask(i).numpy()) if entry.mask else np.zeros_like(photo))
    names = {i: ", ".join(dataset.classes[k] for k in entry.labels) for i, entry in entries.items()}
    return sheet(titles, [(f"{entries[i].id}: {names[i]}", pictures) for i, pictures in rows.items()])


_BODIES: dict[str, Body] = {
    "warmup": _warmup,
    "cacl": _cacl,
    "cams": _cams,
    "irn": _irn,
    "masks": _masks,
    "report": _report,
}
