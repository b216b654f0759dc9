"""The paper's runs, stage by stage: what it reports, what was found, and how long that took, in one JSON file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cacl import pipeline, rehearsal
from cacl._support.distributed import local_device, process_group, rank_zero, world_size
from cacl._support.files import read_json, write_json
from cacl._support.hardware import described
from cacl._support.surroundings import training_alone
from cacl._support.values import check_choice
from cacl.config import Config
from cacl.crf import check_backend
from cacl.encoders import ImageTextEncoder
from cacl.log import Callback
from cacl.paper_tables import EXPERIMENTS, Experiment, Figure
from cacl.reproduction import expectation, line, remarks, what_is_run
from cacl.runs.session import Session
from cacl.stages.score import Score
from cacl.stages.stage import Stage

logger = logging.getLogger("cacl")

FILE = "reproduce.json"
"""In the run folder: what is sent back."""


def plan(name: str, config: Config, *, any_data: bool = False) -> list[str]:
    """What :func:`run` would do, after a look at the data: a line each for the splits, the stages and the setting.

    Nothing is written, loaded or measured.

    Raises:
        ValueError: as of :func:`run`.
    """
    paper = _known(name)
    record = what_is_run(name, Session(config, planning=True), any_data)
    splits = record["data"]["splits"].items()
    return [
        *(f"split {split}: {each['images']} images, {each['labels']} labels" for split, each in splits),
        *(
            f"{stage}: {expectation(paper.figures.get(stage))}; hours unknown until measured"
            for stage in rehearsal.stages_of(config)
        ),
        *remarks(paper, record),
    ]


@training_alone()
def run(
    name: str,
    config: Config,
    *,
    any_data: bool = False,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Run one of :data:`cacl.paper_tables.EXPERIMENTS`, stage by stage, each as :func:`cacl.pipeline.run` does it.

    Before the first stage the data are counted, and all stages are rehearsed on a few photos
    (:func:`cacl.rehearsal.rehearse`). Before each stage a line of the log says what the paper reports of it and the
    hours that it will take, after it what was found. Stopped and started again it goes on; the processes of
    ``torchrun`` share the work.

    Args:
        name: the experiment.
        config: its configuration, as :func:`cacl.paper_tables.experiment` gives it.
        any_data: take other data than the paper's too; the record says so.
        encoder: as of :func:`cacl.pipeline.run`, like the next two; the record says that it was given.
        backbone: the record says that it was given.
        callback: gets nothing of the rehearsal.

    Returns:
        The record: ``reproduce.json`` of the run folder, written anew after each stage. It has no path and no name of
        a machine or a user.

    Raises:
        ValueError: if the data are not the paper's, one line a difference; and as of :func:`cacl.pipeline.run`.
    """
    figures = _known(name).figures
    device = local_device(config.run.device, "[run] device")
    given: dict[str, Any] = {"encoder": encoder, "backbone": backbone}
    with process_group(device, config.run.timeout_seconds):
        session = Session(config, encoder, backbone)
        session.precision = rank_zero(lambda: session.precision)
        machine = _machine(session)
        record = rank_zero(lambda: _begun(name, session, any_data, machine))
        if not record["rehearsal"]:
            logger.info("rehearsal: all stages on a few photos, for the hours that they will take")
            speeds = rehearsal.rehearse(config, precision=session.precision, **given)
            record["rehearsal"] = {stage: speed._asdict() for stage, speed in speeds.items()}
            rank_zero(lambda: write_json(config.run.out / FILE, record))
        hours = _hours(session, record)
        logger.info("some %.3g hours in all on this machine, without evaluations", sum(hours.values()))
        plan = rank_zero(lambda: pipeline.plan(config, list(hours), **given))
        finished = {line.partition(":")[0] for line in plan if line.endswith(": finished")}
        record["stages"] = {stage: entry for stage, entry in record["stages"].items() if stage in finished}
        for stage in hours:
            entry = record["stages"].setdefault(stage, {"expected": None, "hours_expected": round(hours[stage], 4)})
            if figure := figures.get(stage):
                entry["expected"] = figure._asdict() | {"miou": round(figure.miou / 100, 4)}
            if stage not in finished:
                logger.info("%s: %s; some %.3g hours", stage, expectation(figure), hours[stage])
            with _gpu_memory(device, entry):
                pipeline.run(config, stages=[stage], callback=callback, **given)
            if "found" not in entry:
                entry["found"] = _found(session, stage, figure)
            cost = rank_zero(lambda: read_json(session.files.costs))[stage]
            entry |= {"hours": round(cost["seconds"] / 3600, 4), "memory_mb": cost.get("memory_mb")}
            rank_zero(lambda: write_json(config.run.out / FILE, record))
            logger.info("%s", line(stage, entry))
        return record


def _known(name: str) -> Experiment:
    check_choice("name", name, EXPERIMENTS)
    return EXPERIMENTS[name]


def _machine(session: Session) -> dict[str, Any]:
    """What computes; known to a process as one of several."""
    return described() | {
        "processes": world_size(),
        "device": str(session.machine.device).partition(":")[0],
        "workers": session.machine.workers,
        "precision": session.precision,
        "crf": check_backend(session.machine.crf),
    }


def _begun(name: str, session: Session, any_data: bool, machine: dict[str, Any]) -> dict[str, Any]:
    """The record before the first stage, with what an earlier call of the same has left."""
    record = what_is_run(name, session, any_data) | {"machines": [machine], "rehearsal": {}, "stages": {}}
    before = read_json(session.out / FILE)
    if before.keys() == record.keys() and all(before[key] == record[key] for key in _SAME):
        others = [each for each in before["machines"] if each != machine]
        known = before["rehearsal"] if before["machines"][-1:] == [machine] else {}
        record |= {"machines": [*others, machine], "rehearsal": known, "stages": before["stages"]}
    return record


_SAME = ("experiment", "cacl", "settings", "changed", "data")
"""Of two records: where these are the same, one goes on with what the other has found."""


def _hours(session: Session, record: Mapping[str, Any]) -> dict[str, float]:
    """Stage -> what it will take, by its rehearsal."""
    counts = {role: len(dataset) for role, dataset in session.datasets.items()}
    return {
        stage: rehearsal.Speed(**speed).hours(getattr(session.config, stage), rehearsal.images_of(stage, counts))
        for stage, speed in record["rehearsal"].items()
    }


@contextmanager
def _gpu_memory(device: torch.device, entry: dict[str, Any]) -> Iterator[None]:
    """Write down the most memory of this process's GPU that a block has held at once, where it is more than before."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield
    peak = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    entry["gpu_memory_mb"] = max(peak, entry.get("gpu_memory_mb", 0.0))


def _found(session: Session, name: str, figure: Figure | None) -> dict[str, Any] | None:
    """What a finished stage scores, on the split of the paper's figure if there is one."""
    score = rank_zero(lambda: session.files.scores().get(name))
    if score is not None and figure is not None and score.split != figure.split:
        score = _score_on(session, session.stage(name), figure.split)
    if score is None:
        return None
    chosen = None if score.background_score is None else "auto" if score.auto else "fixed"
    return score.record() | {"background_score_chosen": chosen}


def _score_on(session: Session, stage: Stage[Any], split: str) -> Score | None:
    """What files of the training images score on those of a split, if all of these are among them and have masks."""
    dataset = next((session.datasets.get(role) for role, each in session.splits.items() if each == split), None)
    if (
        dataset is None
        or stage.score is None
        or not {entry.id for entry in dataset.entries} <= {entry.id for entry in session.train.entries}
    ):
        return None
    try:
        with session.at(stage):
            return replace(stage.score(session, session.settings(stage), dataset), split=split)
    finally:
        session.release(set())
