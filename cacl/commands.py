"""What each command of :mod:`cacl.cli` does; what a command needs is imported when it has come that far."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cacl._support.launch import is_first, launched
from cacl._support.values import check_choice
from cacl.errors import ElsewhereError, InputError, shown

if TYPE_CHECKING:
    from cacl.config import Config

_SAID = 20
"""Problems that are printed; all are in a file."""


def _config(options: argparse.Namespace, source: str) -> Config:
    from cacl.config import Config

    with _said_once():
        return Config.load(source, _overrides(options), chain=options.chain)


def _overrides(options: argparse.Namespace) -> list[str]:
    return [*options.set, *([] if options.progress else ["run.progress=false"])]


@contextmanager
def _said_once() -> Iterator[None]:
    """What all processes read, and one complains about."""
    try:
        yield
    except InputError as error:
        raise error if is_first() else ElsewhereError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    config = _config(options, options.config)
    stages = [name.strip() for name in options.stages.split(",")] if options.stages else None
    for name in stages or ():
        check_choice("stages", name, config.stages)
    from cacl import pipeline

    if options.dry_run:
        print(config.to_toml())
        print("\n".join(pipeline.plan(config, stages, resume=not options.restart)))
        return 0
    result = pipeline.run(config, stages=stages, resume=not options.restart)
    if is_first():
        print(result.summary())
        print(f"run folder: {result.out}")
    return 0


def reproduce(options: argparse.Namespace) -> int:
    from cacl.paper_tables import experiment

    name = options.experiment
    with _said_once():
        config = experiment(name, options.data_root, options.out, _overrides(options), chain=options.chain)
    from cacl import reproduce, reproduction

    if options.check:
        print("\n".join(reproduce.plan(name, config, any_data=options.any_data)))
        return 0
    record = reproduce.run(name, config, any_data=options.any_data)
    if is_first():
        print(reproduction.summary(record))
        print(f"result: {config.run.out / reproduce.FILE}")
    return 0


def predict(options: argparse.Namespace) -> int:
    from cacl.inputs import Shard
    from cacl.predict import predict_each

    part = Shard.parse(options.shard) if options.shard else Shard.of_process()
    file = Path(options.out) / ("failures.txt" if part.of == 1 else f"failures-{part.number}-of-{part.of}.txt")
    if options.list and os.path.realpath(options.list) == os.path.realpath(file):
        raise InputError(f"{shown(file)}: expected a list with another name: the new failures are written there")
    made = predict_each(
        options.model,
        options.photos,
        options.out,
        listed=sys.stdin.buffer if options.list == "-" else options.list,
        shard=part,
        keep=options.keep,
        overlays=options.overlay,
        crf=not options.no_crf,
        longest=options.longest,
        tags=options.tags,
        range=options.range,
        device=options.device,
        workers=options.workers,
        precision=options.precision,
        progress=options.progress,
    )
    file.unlink(missing_ok=True)
    count = problems = 0
    for outcome in made:
        count += not outcome.problem
        if outcome.problem:
            problems += 1
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8", errors="surrogateescape") as failures:
                failures.write(f"{outcome.problem}\n")
            if problems <= _SAID:
                print(f"cacl: {outcome.problem}", file=sys.stderr)
    if problems > _SAID:
        print(f"cacl: {problems - _SAID} more are in {shown(file)}", file=sys.stderr)
    named = ", ".join(f"{k} {shown(name)}" for k, name in enumerate(made.classes, start=1))
    others = made.survey.others if part.number == 1 else 0
    files = f"other file{'' if others == 1 else 's'}"
    no_photos = f"; {others} {files}, such as {shown(made.survey.other.name)}" if others and made.survey.other else ""
    kept = f", {made.kept} kept" if options.keep else ""
    which = f"part {part.number} of {part.of}: " if part.of > 1 else ""
    print(f"mask values: 0 background, {named}")
    print(f"{which}{count} mask{'' if count == 1 else 's'} in {options.out}{kept}, {problems} left out{no_photos}")
    return 2 if problems and not launched() else 0  # torchrun would end the other parts


def report(options: argparse.Namespace) -> int:
    from cacl.report import report

    path = report(
        options.run, options.out, ablation=options.ablation, device=options.device, progress=options.progress,
        chain=options.chain,
    )  # fmt: skip
    print(f"report: {path}")
    return 0


def export(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if options.out.endswith(("/", os.sep)) or not out.suffix or out.is_dir():
        from cacl.sharing import export_pretrained

        path = export_pretrained(options.model, out, license=options.license, chain=options.chain)
    else:
        from cacl.export import export_segmenter
        from cacl.predict import open_model

        if options.license:
            raise InputError(f"--license: expected a folder as --out, which has a model card, but got {shown(out)}")
        path = export_segmenter(open_model(options.model)[0], out)
    print(f"segmenter: {path}")
    return 0


def export_voc(options: argparse.Namespace) -> int:
    from cacl.voc_archive import export_voc

    root, out = Path(options.root), Path(options.out)
    path = export_voc(
        Path(options.masks), root, out, split=options.split, competition=options.competition, progress=options.progress
    )
    print(f"archive: {path}")
    return 0


def labels(options: argparse.Namespace) -> int:
    if not is_first():  # others have nothing to do
        return 0
    from cacl.label_sources import read_classes
    from cacl.labels import export_labels

    made = export_labels(
        options.source,
        options.out,
        options.format,
        stage=options.stage,
        photos=options.photos,
        classes=None if options.classes is None else read_classes(Path(options.classes)),
        shape=options.shape,
        tolerance=options.tolerance,
        parts=options.parts,
        min_area=options.min_area,
        worst_first=options.worst_first,
        confidence=options.confidence,
        copy=options.copy,
        device=options.device,
        workers=options.workers,
        progress=options.progress,
        chain=options.chain,
    )
    left_out = f"; {made.left_out} without a mask left out" * bool(made.left_out)
    print(f"{made.labels} labels of {made.photos} photos in {options.out}{left_out}")
    if made.open:
        lost = ", which YOLO takes for background" if options.format == "yolo" else ""
        print(f"{made.open} photo{'s have' if made.open > 1 else ' has'} pixels that are left open (255){lost}")
    return 0


def ablate(options: argparse.Namespace) -> int:
    from cacl.config import split_overrides

    options.set, methods = split_overrides(options.set)
    config = _config(options, options.config)
    from cacl import ablate

    config = config.changed({"run": {"out": config.run.out.with_name(f"{config.run.out.name}-ablation")}})
    paths = ablate.run(
        config, tables=[name.strip() for name in options.tables.split(",")], seeds=options.seeds, methods=methods
    )
    for path in paths if is_first() else ():
        print(path.read_text(encoding="utf-8"))
        print(f"table: {path}, {path.with_suffix('.csv')}")
    return 0


def check(options: argparse.Namespace) -> int:
    path = Path(options.path)
    config = None if path.is_dir() else _config(options, options.path)
    if options.sample is not None and options.sample < 1:
        raise InputError(f"--sample: expected at least 1 image, but got {options.sample}")
    from cacl.datasets.checking import NOTE, check_folder
    from cacl.runs.checking import check_config

    if config is None:
        lines = check_folder(path, range=options.range, sample=options.sample, progress=options.progress)
    else:
        if options.range:
            config = config.changed({"data": {"range": options.range}})
        lines = check_config(config, sample=options.sample, progress=options.progress)
    for line in lines:
        print(line)
    count = sum(not line.startswith(NOTE) for line in lines)
    print(f"{count} problem{'' if count == 1 else 's'}" if count else "no problems")
    return 2 if count else 0
