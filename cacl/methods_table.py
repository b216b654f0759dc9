"""The table ``methods``: CA-CL and its rivals from one warm-up, on one data set, by one evaluation."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cacl import pipeline
from cacl._support.distributed import barrier, rank_zero
from cacl._support.files import replacing, write_json, write_text
from cacl.config import Config
from cacl.errors import InputError, first_line
from cacl.log import Log
from cacl.paper_tables import Variant
from cacl.runs.folder import RunFolder
from cacl.runs.results import Result
from cacl.runs.session import Session
from cacl.stages import cams
from cacl.stages.chain import needed
from cacl.stages.contrast import backgrounds
from cacl.tables import CACL, METHODS, CAMs

logger = logging.getLogger("cacl")

TITLE = "Methods: from one warm-up, by one evaluation"
LEFT_OUT = {
    "warm-up": "",
    "CLIP-ES": "other names for classes; its CRF and the confidence of 0.95",
    "CLIMS": "half precision; ImageNet's statistics in front of the encoder",
    "QA-CLIMS": "answers about each image: words of the classes in their place; the encoder that is adapted to masks",
    "POLE": "its lists of synonyms: own ones",
    "CA-CL": "",
}
"""Row -> what is not as in the method's own code."""
_MEASURED: Sequence[tuple[str, str, Callable[[Mapping[str, Any]], float | None]]] = (
    ("cam", "CAM mIoU %", lambda metrics: metrics["cams"].get("miou")),
    ("fixed", "at 0.15 %", lambda metrics: _at(metrics["cams"], "fixed")),
    ("oracle", "oracle %", lambda metrics: _at(metrics["cams"], "oracle")),
    ("cam_agreement", "agreement", lambda metrics: metrics["cams"].get("agreement")),
    ("masks", "pseudo masks mIoU %", lambda metrics: metrics["masks"].get("miou")),
    ("masks_agreement", "agreement", lambda metrics: metrics["masks"].get("agreement")),
)
"""Of a trial: name in the CSV, name in the table, where it stands in ``metrics.json``."""

_LOSS = ("alpha", "background_weight", "beta", "gamma")
"""The weights of ``[cacl]`` that mean something else with every method."""


class Trial(NamedTuple):
    """What one row gave with one seed."""

    metrics: Mapping[str, Any]
    """Stage -> what it scores, as in ``metrics.json``."""
    step: float
    """Median seconds a step; NaN where nothing was trained."""


def variants(config: Config, given: Mapping[str, Mapping[str, Any]] | None = None) -> list[Variant]:
    """The rows: warm-up, CLIP-ES, and a training of every method.

    What a configuration says of training (``epochs``, ``lr`` …) holds for all methods; the weights of a loss are those
    of its authors where the configuration has CA-CL's.

    Args:
        config: with ``[cacl] method = "cacl"``.
        given: method -> key of ``[cacl]`` -> value that holds for this method alone.

    Raises:
        ValueError: if ``given`` is of no method.
    """
    given = given or {}
    if unknown := set(given) - set(METHODS):
        raise InputError(f"Expected settings of {', '.join(METHODS)}, but got some of {sorted(unknown)[0]!r}.")
    rows = [
        Variant("warm-up", {"cacl": {"epochs": 0.0}}, None),
        Variant("CLIP-ES", {"cams": {"source": "clip"}}, None),
    ]
    for method in ("clims", "qa-clims", "pole"):
        authors = CACL.model_validate({"method": method}).model_dump()
        own = {"method": method, **{key: authors[key] for key in _LOSS}, **given.get(method, {})}
        rows.append(Variant(METHODS[method], {"cacl": own}, None))
    rows.append(Variant(METHODS["cacl"], {"cacl": given["cacl"]} if given.get("cacl") else {}, None))
    return rows


def run(
    config: Config, seeds: int, given: Mapping[str, Mapping[str, Any]] | None, arguments: Mapping[str, Any]
) -> Path:
    """Train all rows with all seeds and write the table anew after each; what is finished is not done again.

    Args:
        config: what the rows vary; its run folder gets the tables and a folder a seed.
        seeds: how many, from ``[run] seed`` on.
        given: as for :func:`variants`.
        arguments: ``encoder``, ``backbone`` and ``callback`` of :func:`cacl.pipeline.run`.

    Returns:
        The Markdown file.

    Raises:
        ValueError: if the configuration or the data do not allow a row, before anything is trained.
    """
    if (source := config.table(CAMs).source) != "cacl":
        raise InputError(f"[cams] source: expected 'cacl', beside which the table has CLIP-ES, but got {str(source)!r}")
    rows = {v.name: config.changed(v.changes) for v in variants(config, given)}
    with barrier():
        for row in rows.values():
            _ = backgrounds(Session(row), row.table(CACL))  # too few words show now
        problem = _dense_problem(Session(rows["CLIP-ES"], arguments["encoder"]))
    if problem:
        del rows["CLIP-ES"]
    trials: dict[str, list[Trial]] = {name: [] for name in rows}
    path = config.run.out / "table-methods.md"
    for seed in range(config.run.seed, config.run.seed + seeds):
        folder = config.run.out / f"seed-{seed}"
        warmed_up(config, folder / "start", seed, arguments)
        for number, (name, row) in enumerate(rows.items(), start=1):
            logger.info("ablate: seed %d, %s (%d of %d)", seed, name, number, len(rows))
            own = folder / f"methods-{name.lower()}"
            rank_zero(partial(fork, folder / "start", own))
            made = pipeline.run(row.changed({"run": {"out": own, "seed": seed}}), stages=_stages(row), **arguments)
            step = rank_zero(partial(seconds_a_step, own, "cacl", row.table(CACL).batch_size))
            trials[name].append(Trial(made.metrics, step))
            rank_zero(partial(write, path, trials, problem))
    return path


def _stages(config: Config) -> list[str]:
    """What a row is made of, up to the pseudo masks."""
    names = [stage.name for stage in config.chain]
    chain = config.chain[: names.index("masks") + 1]
    return [stage.name for stage in needed(chain, lambda stage: getattr(config, stage.name))]


def warmed_up(config: Config, folder: Path, seed: int, arguments: Mapping[str, Any]) -> Result:
    """The warm-up of a seed, in a run folder of its own."""
    return pipeline.run(config.changed({"run": {"out": folder, "seed": seed}}), stages=["warmup"], **arguments)


def fork(start: Path, folder: Path) -> None:
    """Make a run folder whose warm-up is that of another."""
    own, other = RunFolder(folder), RunFolder(start)
    state = other.state("warmup")
    if own.state("warmup") == state:
        return
    (folder / "warmup").mkdir(parents=True, exist_ok=True)
    for name in ("data.json", "warmup/model.pt"):
        (folder / name).unlink(missing_ok=True)
        try:
            os.link(start / name, folder / name)
        except OSError:  # not every file system has links
            shutil.copyfile(start / name, folder / name)
    write_json(folder / "metrics.json", {"warmup": other.metrics["warmup"]} if "warmup" in other.metrics else {})
    own.mark("warmup", state.key or "", finished=state.finished)


def seconds_a_step(folder: Path, stage: str, batch_size: int) -> float:
    """The median over a training, by its log; NaN where there is none."""
    records = [record for record in Log(folder / "log.jsonl").records() if record.get("stage") == stage]
    seconds = [batch_size / record["images_per_second"] for record in records]
    return statistics.median(seconds) if seconds else math.nan


def _dense_problem(session: Session) -> str:
    """Why CLIP-ES cannot be had with the encoder of a run; empty where it can."""
    try:
        cams.STAGE.check(session, session.table(CAMs))
    except InputError as error:
        return first_line(error)
    finally:
        session.release(set())
    return ""


def write(path: Path, rows: Mapping[str, Sequence[Trial]], problem: str) -> None:
    """The table as Markdown, CSV and, where matplotlib is installed, a picture.

    Args:
        path: of the files, without an ending.
        rows: name -> trials.
        problem: why CLIP-ES is missing, if it is.
    """
    seeds = max(len(trials) for trials in rows.values())
    names = [name for _, name, _ in _MEASURED]
    text = [f"# {TITLE}", "", f"| method | {' | '.join(names)} | ms a step | left out |"]
    text.append(f"|---|{'---|' * (len(names) + 2)}")
    cells = [["method", *(f"{key}_{what}" for key, _, _ in _MEASURED for what in ("mean", "std"))]]
    cells[0] += ["seconds_per_step", "seeds", "left_out"]
    for name, trials in rows.items():
        found = [_values(trials, read) for _, _, read in _MEASURED]
        shown = [
            spread(own, 1 if "agreement" in key else 100) for own, (key, _, _) in zip(found, _MEASURED, strict=True)
        ]
        steps = [trial.step for trial in trials if trial.step == trial.step]
        step = statistics.median(steps) if steps else None
        time = "" if step is None else f"{1000 * step:.0f}"
        text.append(f"| {name} | {' | '.join(shown)} | {time} | {LEFT_OUT[name]} |")
        numbers = [f"{f(own):.4f}" if own else "" for own in found for f in (statistics.fmean, deviation)]
        cells.append([name, *numbers, "" if step is None else f"{step:.4f}", str(len(trials)), LEFT_OUT[name]])
    text += ["", _conditions(next(trials[-1] for trials in rows.values() if trials), seeds)]
    text += ["", f"CLIP-ES is missing: {problem}", ""] if problem else [""]
    write_table(path, text, cells)
    _draw(path.with_suffix(".png"), rows)


def _draw(path: Path, rows: Mapping[str, Sequence[Trial]]) -> None:
    from cacl.figures import method_bars  # what looks: imported when it is called
    from cacl.figures.style import check_report

    try:
        check_report()
    except ImportError as error:
        logger.info("ablate: no picture. %s", error)
        return
    keys = {"CAM": _MEASURED[0][2], "pseudo masks": _MEASURED[4][2]}
    values = {what: {name: _values(trials, read) for name, trials in rows.items()} for what, read in keys.items()}
    if not any(own for each in values.values() for own in each.values()):
        return
    with replacing(path) as file:
        method_bars(values).savefig(file, format="png", dpi=150)


def _conditions(trial: Trial, seeds: int) -> str:
    record = trial.metrics["cams"]
    return (
        f"Split {record['split']}, {record['images']} images with masks; CAMs and pseudo masks at the scores that they "
        f"ask for by their values alone; {seeds} seed{'s' if seeds > 1 else ''}, mean ± standard deviation. The oracle "
        "is the best background score. Agreement needs no mask: see cacl.agreement."
    )


def _values(trials: Iterable[Trial], read: Callable[[Mapping[str, Any]], float | None]) -> list[float]:
    found = [read(trial.metrics) for trial in trials]
    return [value for value in found if value is not None]


def _at(record: Mapping[str, Any], name: str) -> float | None:
    point = record.get(name)
    return point["miou"] if point else None


def write_table(path: Path, lines: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Lines of Markdown and cells of CSV, in files of one name beside each other."""
    write_text(path.with_suffix(".md"), "\n".join(lines))
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(cells)
    write_text(path.with_suffix(".csv"), buffer.getvalue())


def spread(values: Iterable[float], scale: float = 100) -> str:
    """Mean ± standard deviation of several values, one as it is, nothing for none; shares in per cent."""
    known = [scale * value for value in values]
    if not known:
        return ""
    digits = 1 if scale == 100 else 3
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean + (f" ± {deviation(known):.{digits}f}" if len(known) > 1 else "")


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
