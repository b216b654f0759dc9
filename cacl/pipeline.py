"""From a configuration to results: runs the stages of a chain, skips what is finished, goes on where it was stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from cacl._support.answers import check_callable
from cacl._support.distributed import barrier, local_device, process_group, rank_zero, world_size
from cacl._support.files import locked, write_text
from cacl._support.surroundings import defaults_of, training_alone
from cacl._support.values import check_choice
from cacl.config import Config
from cacl.crf import check_backend
from cacl.encoders import ImageTextEncoder
from cacl.errors import InputError
from cacl.log import Callback, Journal, measured
from cacl.runs.checking import are_known, check_elsewhere, check_files_of, check_lists_of
from cacl.runs.evaluation import SHARED, evaluate
from cacl.runs.folder import State
from cacl.runs.results import Result
from cacl.runs.session import NotDrawnError, Session
from cacl.runs.tracking import Tracking, tracked
from cacl.settings import Training
from cacl.stages.chain import CHAIN, Chain, check_chain, needed
from cacl.stages.contrast import Criterion
from cacl.stages.stage import Context, Stage
from cacl.tables import Report
from cacl.trackers import check_trackers
from cacl.training import Loop

logger = logging.getLogger("cacl")

STAGES = (*(stage.name for stage in CHAIN), "report")
"""The names of CA-CL's stages and of what follows them, in their order."""


@training_alone()
def run(
    config: Config | str | PathLike[str],
    *,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
    criterion: Criterion | None = None,
    chain: Chain = CHAIN,
    stages: Sequence[str] | None = None,
    resume: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Run the stages of the chain: ``warmup`` → ``cacl`` → ``cams`` → ``irn`` → ``masks`` → ``segment`` →
    ``tags`` → ``predict``, and the ``report``.

    A finished stage is skipped when nothing that it depends on has changed; a stopped one goes on from its last
    checkpoint. Under ``torchrun``, or where ``torch.distributed`` has a default group, all processes call this and
    share the work; their number changes nothing. Where another thread of this process is in a run, this one waits for
    its end.

    What is given instead of the configuration's is told apart by its class and all that is in it, or by a text ``key``
    of its own; where neither will do, what follows from it is done again each time.

    Args:
        config: a configuration, or what :meth:`cacl.config.Config.load` takes.
        encoder: instead of the configuration's; put on the run's device while it is needed.
        backbone: instead of the configuration's; copied, so that it stays as it is.
        criterion: instead of CA-CL's loss: ``(images, cams, labels)`` -> a NamedTuple with a ``total`` (see
            :func:`cacl.stages.contrast.train_cacl`). A module's state is as before when it has been trained with.
        chain: the stages, each with its table; :data:`cacl.stages.chain.CHAIN` with some taken out, put in or replaced.
        stages: which stages; those that they need must be finished. By default all but those on demand that no other
            needs, such as ``irn`` where ``[masks] affinity`` is another.
        resume: go on from what the run folder holds; False does the stages again.
        callback: gets every record of ``log.jsonl`` as it is written, in every process; a
            :class:`cacl.trackers.Tracker` gets scores and pictures too.

    Returns:
        The run folder and its metrics.

    Raises:
        ValueError: if the configuration, the data, the chain or a file of the run is wrong: one line a problem; or if
            another run is using the run folder.
        OSError: if a file cannot be written; one line that names it. A process that dies or that does not answer is
            one too.
    """
    if callback is not None:
        check_callable("callback", callback)
    config = _configuration(config, chain)
    session = Session(config, encoder, backbone, criterion, chain=_whole(config), resume=resume)
    wanted = _wanted(session, stages)
    device = local_device(config.run.device, "[run] device")
    with defaults_of(device), process_group(device, config.run.timeout_seconds), locked(config.run.out):
        try:
            _prepare(session, wanted, resume=resume)
            with tracked(session, callback, lambda: _again(session, wanted, resume=resume)) as tracking:
                for number, stage in enumerate(session.chain):
                    if stage in wanted:
                        _do(session, number, resume=resume, tracking=tracking)
        finally:
            session.release(set())
        names = {stage.name for stage in session.chain}
        known = rank_zero(lambda: session.files.metrics)
        return Result(config.run.out, {name: record for name, record in known.items() if name in names})


def plan(
    config: Config | str | PathLike[str],
    stages: Sequence[str] | None = None,
    *,
    resume: bool = True,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
    criterion: Criterion | None = None,
    chain: Chain = CHAIN,
) -> list[str]:
    """What :func:`run` would do with each stage, by what the run folder says, given the same arguments.

    Nothing is written, drawn, loaded or locked.

    Returns:
        A line a stage: ``new``, ``finished``, ``to be continued``, ``to be done again``, or ``needs`` and the stage
        that has to be done before.

    Raises:
        ValueError: if the configuration, the chain or a list of the data is wrong.
    """
    config = _configuration(config, chain)
    session = Session(config, encoder, backbone, criterion, chain=_whole(config), planning=True, resume=resume)
    wanted = _wanted(session, stages)
    lines = []
    for stage, word, missing in _walk(session, wanted, resume=resume):
        lines.append(f"{stage.name}: {f'needs {missing}' if missing else word}")
    return lines


def _walk(session: Session, wanted: Chain, *, resume: bool) -> Iterator[tuple[Stage[Any], str, str]]:
    """Each wanted stage, what becomes of it, and the stage that it lacks: one that is not finished, or will not be."""
    ready: set[str] = set()
    again = False  # from the first stage on that is done anew, nothing of those after it stays
    for stage in _until(session, wanted):
        state = session.files.state(stage.name)
        known = bool(state) and not again and state.key == _planned_key(session, stage)
        if stage not in wanted:
            ready |= {stage.name} if known and state.finished else set()
            continue
        missing = [need.name for need in session.needs(stage) if need.name not in ready]
        word = "to be done again" if state else "new"
        if known and resume:
            word = "finished" if state.finished else "to be continued"
        yield stage, word, missing[-1] if missing else ""
        if not missing:
            again = again or not (known and resume)
            ready.add(stage.name)


def _again(session: Session, wanted: Chain, *, resume: bool) -> str | None:
    """The first stage that is done again."""
    words = _walk(session, wanted, resume=resume)
    return next((stage.name for stage, word, _ in words if word == "to be done again"), None)


def _until(session: Session, wanted: Chain) -> Chain:
    """The stages up to the last wanted one; nothing is asked of those after it."""
    return session.chain[: 1 + max((session.chain.index(stage) for stage in wanted), default=-1)]


def _configuration(config: Config | str | PathLike[str], chain: Chain) -> Config:
    if not isinstance(config, Config):
        return Config.load(config, chain=check_chain(chain))
    if chain is not CHAIN and config.chain != tuple(chain):
        raise InputError("Expected argument `config` to be of the same `chain`: Config.load(…, chain=chain).")
    check_chain(config.chain)
    return config


def _wanted(session: Session, stages: Sequence[str] | None) -> Chain:
    if stages is None:
        return needed(session.chain, session.settings)
    names = [stage.name for stage in session.chain]
    for name in stages:
        check_choice("stages", name, names)
    wanted = {name: stage for stage in session.chain if (name := stage.name) in stages}
    for stage in reversed(session.chain):
        if stage.name in wanted:
            needs = session.needs(stage)
            wanted |= {need.name: need for need in needs if need.brought(session.settings(need))}
    return tuple(stage for stage in session.chain if stage.name in wanted)


def _whole(config: Config) -> Chain:
    """The stages of a configuration, and the report, which shows what all of them have left."""

    def write(run: Context, settings: Report, folder: Path, journal: Journal) -> None:
        from cacl.report import write_report  # what looks: imported when it is called

        assert isinstance(run, Session)
        rank_zero(lambda: write_report(run, folder))

    def depends(run: Context, settings: Report) -> tuple[object, ...]:
        assert isinstance(run, Session)
        return ({role: each.masks for role, each in run.fingerprints.items()},)

    def check_crf(run: Context, settings: Report) -> object:
        return check_backend(run.machine.crf)

    names = tuple(stage.name for stage in needed(config.chain, lambda stage: getattr(config, stage.name)))
    return (*config.chain, Stage("report", Report, run=write, needs=names, depends=depends, check=check_crf))


def _planned_key(session: Session, stage: Stage[Any]) -> str | None:
    """None where the data are not there yet."""
    try:
        return session.key_of(stage)
    except NotDrawnError:
        return None


def _prepare(session: Session, wanted: Chain, *, resume: bool) -> None:
    """Check settings and data before the first step, and write down the configuration."""
    session.precision = rank_zero(lambda: session.precision)  # which may have another processor
    with barrier():
        check_trackers(session.config.run.track)
        _ = session.datasets
    _ = session.fingerprints
    known = rank_zero(lambda: are_known(session))
    with barrier():
        check_elsewhere(session, known=known)
    notes = [] if known else rank_zero(lambda: check_lists_of(session))
    # Of rank 0: a file may have another time on another machine.
    until = _until(session, wanted)
    session.keys.update(rank_zero(lambda: {stage.name: session.key_of(stage) for stage in until}))
    with barrier():
        _check_settings(session, wanted, resume=resume)
    rank_zero(lambda: _check_data(session, notes, known=known))


def _check_settings(session: Session, wanted: Chain, *, resume: bool) -> None:
    """What is wrong with a setting shows now: not after the warm-up, and not when files have been replaced."""
    for _, _, missing in _walk(session, wanted, resume=resume):
        if missing:
            raise InputError(f"{session.out}: the stage {missing!r} has not finished with these settings; run it first")
    for stage in session.config.chain:
        settings = session.settings(stage)
        if isinstance(settings, Training):
            Loop.of(settings)
            if stage in wanted and settings.batch_size < world_size():
                least = f"at least 1 image for each of the {world_size()} processes"
                raise InputError(f"[{stage.name}] batch_size: expected {least}, but got {settings.batch_size}")
    for stage in wanted:
        if not resume or not session.is_finished(stage):
            with session.at(stage):
                stage.check(session, session.settings(stage))


def _check_data(session: Session, notes: Sequence[str], *, known: bool) -> None:
    if not known:
        for note in dict.fromkeys([*notes, *check_files_of(session)]):
            logger.warning("%s", note)
    decided = session.config.changed({"run": {"precision": session.precision}})
    write_text(session.out / "config.toml", decided.to_toml(session.out))
    session.files.keep_data(session.fingerprints)


def _do(session: Session, number: int, *, resume: bool, tracking: Tracking) -> None:
    """One stage, unless it is finished, and its evaluation, unless that is known."""
    stage, files = session.chain[number], session.files
    name, key = stage.name, session.key_of(stage)
    state = rank_zero(lambda: _begin(session, number, resume=resume))
    if not state.finished:
        session.release(
            {*stage.used(session.settings(stage)), *(SHARED if stage.judged else ())}
        )  # what was made to check settings, and what those before it had
        seconds = session.config.run.checkpoint_seconds
        journal = Journal(files.checkpoint(name), key, files.log, tracking, seconds, name, tracking.pictures)
        with session.at(stage), measured(files.costs, name, again=not state) as cost:
            stage.run(session, session.settings(stage), session.out / name, journal)
        rank_zero(lambda: files.end(name, key))
        logger.info("%s: finished in %.0f s", name, cost["seconds"])
    evaluate(session, stage)
    tracking.ended(name, again=not state.finished)


def _begin(session: Session, number: int, *, resume: bool) -> State:
    """What is known of a stage with these settings, in the way of which nothing lies; empty if it begins anew."""
    stage, files = session.chain[number], session.files
    name, key = stage.name, session.key_of(stage)
    state = files.state(name)
    if resume and state.key == key:
        if state.finished:
            logger.info("%s: finished before", name)
            files.forget_checkpoint(name)  # left by a kill just after the stage
        return state
    if state:
        reason = "its settings or data changed" if resume else "that was asked for"
        logger.info("%s: done again, since %s", name, reason)
    files.begin(stage, [each.name for each in session.chain[:number]], key)
    return State()
