"""From a configuration to results: wires the stages, skips what is finished, goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from cacl._checks import check_choice
from cacl._files import read_json, save_state
from cacl._log import Callback
from cacl._session import STAGES, Body, Session, describe
from cacl.cams import make_cams, train_cacl, train_classifier
from cacl.config import Config
from cacl.encoders import ImageTextEncoder


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    out: Path
    """The run folder."""
    metrics: dict[str, Any]
    """``metrics.json``: for each evaluation its mIoU with split, background score, CRF, number of images."""

    def summary(self) -> str:
        """A line for each evaluation."""
        return "\n".join(describe(name, metrics) for name, metrics in self.metrics.items())


def run(
    config: Config | str | PathLike[str],
    *,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
    stages: Sequence[str] | None = None,
    resume: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Run the stages of the chain: ``warmup`` → ``cacl`` → ``cams``.

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
    table = session.config.cams
    make_cams(
        session.net("cacl"),
        session.train,
        folder / "train",
        scales=table.scales,
        flip=table.flip,
        device=session.device,
        workers=session.workers,
        keep=True,  # of this very stage from before a stop; those of another were removed
    )


_BODIES: dict[str, Body] = {"warmup": _warmup, "cacl": _cacl, "cams": _cams}
