"""The paper's tables 4 to 8 on any data set, and that of methods: one shared warm-up a seed, a training a variant."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from cacl import methods_table, pipeline
from cacl._support.distributed import barrier, local_device, process_group, rank_zero
from cacl._support.files import locked
from cacl._support.surroundings import training_alone
from cacl._support.values import check_choice, check_positive
from cacl.config import Config
from cacl.encoders import ImageTextEncoder
from cacl.errors import InputError
from cacl.log import Callback
from cacl.methods_table import deviation, fork, seconds_a_step, spread, warmed_up, write_table
from cacl.paper_tables import TABLES, TITLES, Variant, folders, variants
from cacl.runs.folder import RunFolder
from cacl.runs.session import Session
from cacl.stages.contrast import backgrounds
from cacl.tables import CACL, Warmup

logger = logging.getLogger("cacl")


class Trial(NamedTuple):
    """What one training gave."""

    miou: float
    oracle: float
    step: float
    """Median seconds a step."""


@training_alone()
def run(
    config: Config | str | os.PathLike[str],
    *,
    tables: Sequence[str] = TABLES[:5],
    seeds: int = 3,
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
    callback: Callback | None = None,
) -> list[Path]:
    """Train the variants of some tables and write each table as Markdown and as CSV into ``[run] out``.

    The table ``"methods"`` (:mod:`cacl.methods_table`) has CLIMS, QA-CLIMS, POLE and CA-CL beside the warm-up that all
    of them start from and CLIP-ES, which trains nothing, with CAMs and pseudo masks of the training images; it is a
    picture too.

    A variant that stands in several tables is trained once, and every training starts from the warm-up of its seed.
    What is finished is not done again, and the tables are written anew after each training. Several processes share
    the work as they do in :func:`cacl.pipeline.run`.

    Args:
        config: what the variants vary.
        tables: which of :data:`TABLES`.
        seeds: trainings a variant, with the seeds ``[run] seed`` and those after it.
        methods: of the table ``"methods"``: method -> key of ``[cacl]`` -> value that holds for it alone.
        encoder: instead of the configuration's.
        backbone: instead of the configuration's.
        callback: gets every record of every training.

    Returns:
        The Markdown files.

    Raises:
        ValueError: if the configuration or the data do not allow a table, before anything is trained.
    """
    config = config if isinstance(config, Config) else Config.load(config)
    check_positive("seeds", seeds)
    for table in tables:
        check_choice("tables", table, (*TABLES, "methods"))
    if methods and "methods" not in tables:
        raise InputError(f"Expected argument `tables` to have 'methods', as settings of {min(methods)!r} are given.")
    if (method := config.table(CACL).method) != "cacl":
        raise InputError(f"[cacl] method: expected 'cacl', whose parts the tables vary, but got {method!r}")
    with (
        process_group(local_device(config.run.device, "[run] device"), config.run.timeout_seconds),
        locked(config.run.out),
    ):
        config = config.changed({"run": {"precision": rank_zero(partial(_precision, config)), "track": ()}})
        given = {"encoder": encoder, "backbone": backbone, "callback": callback}
        paths = _run(config, [table for table in tables if table != "methods"], seeds, given)
        if "methods" in tables:
            paths.append(methods_table.run(config, seeds, methods, given))
        return paths


def _precision(config: Config) -> str:
    """What all variants compute in: as the first one that was begun does."""
    begun = (RunFolder(path.parent).precision for path in sorted(config.run.out.glob("**/config.toml")))
    first = next((precision for precision in begun if precision), None)
    return (config.run.precision == "auto" and first) or Session(config).precision


def _run(config: Config, tables: Sequence[str], seeds: int, arguments: dict[str, Any]) -> list[Path]:
    if not tables:
        return []
    out = config.run.out
    names = folders(config)
    wanted = {table: [(v, names[repr(v.changes)]) for v in variants(config, table)] for table in tables}
    changed = {name: config.changed(v.changes) for rows in wanted.values() for v, name in rows}
    scores: dict[str, list[Trial]] = {name: [] for name in changed}
    starts: list[Trial] = []
    with barrier():
        if Session(config).eval is None:
            raise InputError(f"[data] eval: expected a split with masks to compare on, but got {config.data.eval!r}")
        for variant in changed.values():
            _ = backgrounds(Session(variant), variant.table(CACL))  # too few words show now
    for i in range(seeds):
        seed = config.run.seed + i
        folder = out / f"seed-{seed}"
        start = folder / "start"
        warmup = warmed_up(config, start, seed, arguments)
        starts.append(
            rank_zero(partial(_trial, warmup.metrics["warmup"], start, "warmup", config.table(Warmup).batch_size))
        )
        for number, (name, variant) in enumerate(changed.items(), start=1):
            logger.info("ablate: seed %d, %s (%d of %d)", seed, name, number, len(changed))
            rank_zero(partial(fork, start, folder / name))
            changed_run = variant.changed({"run": {"out": folder / name, "seed": seed}})
            result = pipeline.run(changed_run, stages=["warmup", "cacl"], **arguments)
            score = partial(_trial, result.metrics["cacl"], folder / name, "cacl", config.table(CACL).batch_size)
            scores[name].append(rank_zero(score))
            for table, rows in wanted.items():
                lines = [(v, scores[own_folder]) for v, own_folder in rows]
                rank_zero(partial(_write, out / f"table-{table}", TITLES[table], lines, starts, result.metrics["cacl"]))
    return [out / f"table-{table}.md" for table in tables]


def _trial(metrics: Mapping[str, Any], folder: Path, stage: str, batch_size: int) -> Trial:
    if metrics["miou"] is None:
        raise InputError(
            f"[data] eval: expected masks to compare on, but those of {metrics['split']!r} have no pixel that counts"
        )
    return Trial(metrics["fixed"]["miou"], metrics["oracle"]["miou"], seconds_a_step(folder, stage, batch_size))


def _write(
    path: Path,
    title: str,
    lines: Sequence[tuple[Variant, Sequence[Trial]]],
    starts: Sequence[Trial],
    metrics: Mapping[str, Any],
) -> None:
    """One table as Markdown and as CSV."""
    seeds = max(len(scores) for _, scores in lines)
    text = [
        f"# {title}",
        "",
        "| variant | CAM mIoU % | oracle % | paper % | ms a step |",
        "|---|---|---|---|---|",
        f"| warm-up | {spread(s.miou for s in starts)} | {spread(s.oracle for s in starts)} | | |",
    ]
    cells = [["variant", "miou_mean", "miou_std", "oracle_mean", "oracle_std", "paper", "seconds_per_step", "seeds"]]
    for variant, scores in [(Variant("warm-up", {}, None), starts), *lines]:
        miou, oracle = [score.miou for score in scores], [score.oracle for score in scores]
        step = statistics.median(score.step for score in scores) if scores else None
        paper = "" if variant.paper is None else f"{variant.paper}"
        if variant.name != "warm-up":
            time = "" if step is None else f"{1000 * step:.0f}"
            text.append(f"| {variant.name} | {spread(miou)} | {spread(oracle)} | {paper} | {time} |")
        numbers = [f"{100 * f(x):.2f}" if x else "" for x in (miou, oracle) for f in (statistics.fmean, deviation)]
        cells.append([variant.name, *numbers, paper, "" if step is None else f"{step:.4f}", str(len(scores))])
    text += [
        "",
        f"Split {metrics['split']}, {metrics['images']} images, background score "
        f"{metrics['fixed']['background_score']}, no CRF; {seeds} seed{'s' if seeds > 1 else ''}, mean ± standard "
        "deviation. The oracle is the best background score. The paper's figures are those of CAMs on the split train "
        "of PASCAL VOC.",
        "",
    ]
    write_table(path, text, cells)
