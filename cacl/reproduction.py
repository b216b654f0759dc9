"""``reproduce.json``: what is known of a run of the paper's experiments, for whoever compares it with others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import cacl
from cacl.config import Config
from cacl.datasets.listing import VOC_CLASSES
from cacl.errors import InputError, quoted
from cacl.paper_tables import EXPERIMENTS, Experiment, Figure, experiment
from cacl.prompts import BackgroundSet
from cacl.runs.session import Session
from cacl.stages.score import Score


def what_is_run(name: str, session: Session, any_data: bool) -> dict[str, Any]:
    """What is run, on what; nothing of the machine."""
    changed = changes(name, session.config)
    for part in ("encoder", "backbone"):
        if session.identity(part):
            changed[part] = ["given", None]
    return {
        "experiment": name,
        "cacl": cacl.__version__,
        "settings": _settings(session.config),
        "changed": changed,
        "data": _data(session, name, any_data),
    }


def _data(session: Session, name: str, any_data: bool) -> dict[str, Any]:
    """What the data are, and in what they are not the paper's.

    Raises:
        ValueError: if they are not, unless any will do.
    """
    splits: dict[str, dict[str, Any]] = {}
    for role, split in session.splits.items():
        if split and split not in splits:
            entries = session.open(split).entries
            labels = sum(len(entry.labels) for entry in entries)
            splits[split] = {"images": len(entries), "labels": labels, "hash": session.fingerprints[role].listed}
    counts = {split: each["images"] for split, each in splits.items()}
    problems = [
        f"split {split}: expected {images} images, but got {counts.get(split, 'none')}"
        for split, images in EXPERIMENTS[name].images.items()
        if counts.get(split) != images
    ]
    classes, wanted = session.train.classes, VOC_CLASSES if name == "voc" else tuple(BackgroundSet.coco())
    if other := sorted({*classes} ^ {*wanted}):
        some = ", ".join(map(quoted, other[:3]))
        problems.append(
            f"classes: expected the {len(wanted)} of the paper, but got {len(classes)}; one has not: {some}"
        )
    if problems and not any_data:
        raise InputError("\n".join([*problems[:-1], f"{problems[-1]} (--any-data takes the data as they are)"]))
    return {"classes": len(classes), "splits": splits, "problems": problems}


def _settings(config: Config) -> dict[str, Any]:
    """What the results follow from, without a path."""
    tables = config.model_dump(
        mode="json", exclude={"run": True, "report": True, "scenes": True, "data": {"root", "sample"}}
    )
    named = {name: {key: _nameless(value) for key, value in table.items()} for name, table in tables.items()}
    return {"run": {"seed": config.run.seed, "compile": config.run.compile}, **named}


def _nameless(value: Any) -> Any:
    """Of a file its hash, of a folder that it was one; everything else as it is."""
    if not isinstance(value, str) or not os.path.isabs(value):  # those of a configuration are absolute
        return value
    if not os.path.isfile(value):
        return "a folder"
    with open(value, "rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def changes(name: str, config: Config) -> dict[str, list[Any]]:
    """``table.key`` -> what it is, and what it is in the paper's setting, where these differ."""
    theirs = _settings(experiment(name, config.data.root, chain=config.given_chain))
    return {
        f"{table}.{key}": [value, theirs[table][key]]
        for table, values in _settings(config).items()
        for key, value in values.items()
        if table != "run" and value != theirs[table][key] and f"{table}.{key}" not in EXPERIMENTS[name].open
    }


def summary(record: Mapping[str, Any]) -> str:
    """A line a stage: what was found, the paper's figure, the hours; then whether the setting was the paper's."""
    paper = EXPERIMENTS[record["experiment"]]
    lines = [line(stage, entry) for stage, entry in record["stages"].items()]
    if test := paper.figures.get("test"):
        lines.append(f"test: {expectation(test)}; found by VOC's server only, from what `cacl export-voc` packs")
    return "\n".join([*lines, *remarks(paper, record)])


def expectation(figure: Figure | None) -> str:
    if figure is None:
        return "the paper has no figure"
    crf = "CRF" if figure.crf else "no CRF"
    return f"the paper has {figure.miou} % ({figure.what}, split {figure.split}, {crf}; table {figure.table})"


def line(stage: str, entry: Mapping[str, Any]) -> str:
    """What was found, beside the paper's figure."""
    score = entry["found"] and Score.read(entry["found"])
    found = "not scored"
    if score and score.miou is not None:
        found = f"{score.what} {100 * score.miou:.1f} % ({score.conditions})"
    figure, hours = entry["expected"], f"{entry['hours']:.3g} hours"
    paper = f"the paper {100 * figure['miou']:.1f} % (table {figure['table']}); " if figure else ""
    return f"{stage}: {found}; {paper}{hours}"


def remarks(paper: Experiment, record: Mapping[str, Any]) -> list[str]:
    """Whether setting and data were the paper's, and what nobody can have as in the paper."""
    changed = ", ".join(f"{key} = {own} instead of {theirs}" for key, (own, theirs) in record["changed"].items())
    lines = [f"not the paper's setting: {changed}" if changed else "the paper's setting"]
    if problems := record["data"]["problems"]:
        lines.append(f"not the paper's data: {'; '.join(problems)}")
    for key in paper.open:
        table, _, name = key.partition(".")
        lines.append(f"{key} = {record['settings'][table][name]}: {paper.note}")
    return lines
