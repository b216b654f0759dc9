"""From a configuration to results: wires the stages, skips what is finished, goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from cacl._scores import describe
from cacl._session import STAGES, Body, Session
from cacl._support.checks import check_choice
from cacl._support.distributed import local_device, process_group, rank, rank_zero
from cacl._support.files import locked, read_json
from cacl.cams import make_cams, train_cacl, train_classifier
from cacl.config import Config
from cacl.encoders import ImageTextEncoder
from cacl.log import Callback
from cacl.masks import make_labels, make_masks, train_irnet, walk_cams
from cacl.report import write_report
from cacl.segment import make_predictions, save_segmenter, train_segmenter


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

    @property
    def report(self) -> Path | None:
        """The report, if it was made."""
        path = self.out / "report" / "index.html"
        return path if path.is_file() else None

    def summary(self) -> str:
        """A line for each evaluation, and where the pictures are."""
        lines = [describe(name, metrics) for name, metrics in self.metrics.items()]
        lines += [f"picture: {path}" for path in self.pictures]
        return "\n".join([*lines, *([f"report: {self.report}"] if self.report else [])])


def run(
    config: Config | str | PathLike[str],
    *,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
    stages: Sequence[str] | None = None,
    resume: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Run the stages of the chain: ``warmup`` → ``cacl`` → ``cams`` → ``irn`` → ``masks`` → ``segment`` →
    ``predict`` → ``report``.

    A finished stage is skipped when nothing that it depends on has changed; a stopped one goes on from its last
    checkpoint. Under ``torchrun``, or where ``torch.distributed`` has a default group, all processes call this and
    share the work; their number changes nothing.

    Args:
        config: a configuration, or what :meth:`cacl.config.Config.load` takes.
        encoder: instead of the configuration's.
        backbone: instead of the configuration's; copied, so that it stays as it is.
        stages: which stages, all by default; those before them must be finished.
        resume: go on from what the run folder holds; False does the stages again.
        callback: gets every record of ``log.jsonl`` as it is written, in every process.

    Returns:
        The run folder and its metrics.

    Raises:
        ValueError: if the configuration, the data or a file of the run is wrong: one line a problem; or if another
            run is using the run folder.
        OSError: if a file cannot be written; one line that names it. A process that dies or that does not answer is
            one too.
    """
    config = config if isinstance(config, Config) else Config.load(config)
    wanted = STAGES if stages is None else tuple(stages)
    for stage in wanted:
        check_choice("stages", stage, STAGES)
    device = local_device(config.run.device, "[run] device")
    with process_group(device, config.run.timeout_seconds), locked(config.run.out):
        session = Session(config, encoder, backbone, callback)
        session.prepare(wanted)
        for name in STAGES:
            if name in wanted:
                session.do(name, _BODIES[name], resume=resume)
        return Result(config.run.out, rank_zero(lambda: session.metrics))


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
    net = session.compiled(session.net())
    rates = {"lr": table.lr, "momentum": table.momentum, "weight_decay": table.weight_decay}
    train_classifier(net, session.train, session.loop(table), checkpoint=folder / "checkpoint.pt", **rates, **run)
    session.save(folder / "model.pt", net.state_dict())


def _cacl(session: Session, folder: Path, run: dict[str, Any]) -> None:
    table = session.config.cacl
    net = session.compiled(session.net("warmup"))
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
    session.save(folder / "model.pt", net.state_dict())


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
    net = session.compiled(session.irnet())
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
    session.save(folder / "model.pt", net.state_dict())


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


def _segment(session: Session, folder: Path, run: dict[str, Any]) -> None:
    table = session.config.segment
    net = session.compiled(session.segmenter())
    train_segmenter(
        net,
        session.train,
        session.out / "masks" / "train",
        session.loop(table, masks=True),
        lr=table.lr,
        head_factor=table.head_factor,
        momentum=table.momentum,
        weight_decay=table.weight_decay,
        checkpoint=folder / "checkpoint.pt",
        **run,
    )
    own = session.config.camnet.backbone if session.given_backbone is None else ""
    if rank() == 0:
        save_segmenter(folder / "model.pt", net, session.train.classes, table.backbone or own)


def _predict(session: Session, folder: Path, run: dict[str, Any]) -> None:
    table = session.config.predict
    if session.segmented is not None:
        net = session.segmenter(trained=True)
        crf = session.crf(table)
        settings = {"crf": crf["crf"] if table.iterations else None, "workers": session.workers}
        make_predictions(
            net,
            session.segmented,
            folder / "eval",
            longest=table.longest,
            device=session.device,
            keep=True,
            **settings,
        )


def _report(session: Session, folder: Path, run: dict[str, Any]) -> None:
    rank_zero(lambda: write_report(session, folder))


_BODIES: dict[str, Body] = {
    "warmup": _warmup,
    "cacl": _cacl,
    "cams": _cams,
    "irn": _irn,
    "masks": _masks,
    "segment": _segment,
    "predict": _predict,
    "report": _report,
}
