"""Masks and their photos, one by one: of a run, or of a folder such as :mod:`cacl.predict` writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from cacl._support.values import check_choice, check_words
from cacl.constants import IGNORE
from cacl.datasets import Dataset
from cacl.datasets.listing import lines_of
from cacl.errors import InputError, expected, shown
from cacl.inputs import Inputs
from cacl.predict import open_model
from cacl.runs.evaluation import least_agreement_first
from cacl.runs.session import Session
from cacl.stages.masks import seeds_of
from cacl.stages.predict import prediction_folder
from cacl.tables import Masks


class Masked(NamedTuple):
    """A photo and its mask."""

    id: str
    photo: Path
    mask: Path
    number: int = -1
    """In the data set of a run."""
    agreement: float | None = None


class Source(NamedTuple):
    """Where masks come from."""

    classes: tuple[str, ...]
    items: Iterable[Masked | None]
    """None for a photo without a mask."""
    total: int
    split: str = "train"
    dataset: Dataset | None = None
    cams: Path | None = None
    """What the masks were made of."""


def of_run(session: Session, stage: str | None, *, worst_first: bool = False, confidence: bool = False) -> Source:
    """The masks of a stage; the arguments are those of :func:`cacl.labels.export_labels`."""

    def finished(name: str) -> bool:
        return session.files.finished(session.stage(name).name)

    if stage is None:
        stage = "predict" if session.segmented is session.train and finished("predict") else "masks"
    check_choice("stage", stage, ("masks", "predict"))
    if not finished(stage):
        raise InputError(f"{shown(session.out)}: expected a run whose stage `{stage}` has finished")
    if confidence and stage != "masks":
        raise InputError(f"{shown(session.out)}: confidence: expected the stage `masks`; `{stage}` keeps no scores")
    if stage == "masks":
        role, masks = "train", session.folder("masks") / "train"
    else:
        role, masks = "segmented", prediction_folder(session)
    dataset = session.datasets[role]
    known: dict[int, float] = {}
    if worst_first:
        known = dict(least_agreement_first(session, session.stage(stage), dataset, masks))

    def items() -> Iterator[Masked]:
        for index in chain(known, (i for i in range(len(dataset)) if i not in known)):
            entry = dataset.entries[index]
            yield Masked(entry.id, entry.image, masks / f"{entry.id}.png", index, known.get(index))

    cams = seeds_of(session, session.table(Masks)) if confidence else None
    return Source(dataset.classes, items(), len(dataset), session.splits[role], dataset, cams)


def of_folder(masks: Path, photos: str | os.PathLike[str] | None, classes: Sequence[str] | None) -> Source:
    """The masks of a folder that have a photo; what the values from 1 on are called."""
    if not masks.is_dir():
        raise InputError(f"{shown(masks)}: expected a run folder, or a folder of masks")
    if photos is None or classes is None:
        raise InputError(
            f"{shown(masks)}: no run folder, and to know what the masks of a folder show, `photos` and `classes` "
            "(--photos, --classes) are needed"
        )
    named = check_words("classes", classes)
    if len(named) >= IGNORE:
        raise expected("classes", f"at most {IGNORE - 1}", len(named))
    inputs = Inputs([photos], masks)

    def items() -> Iterator[Masked | None]:
        for photo in inputs:
            if not isinstance(photo, str):
                mask = masks / f"{photo.name}.png"
                yield Masked(photo.name.as_posix(), photo.path, mask) if mask.is_file() else None

    return Source(named, items(), inputs.survey.photos)


def read_classes(path: Path) -> list[str]:
    """Class names of a text with one a line, or of the run or model that masks were made by.

    Raises:
        ValueError: if it is none of these.
    """
    if path.is_dir() or path.suffix == ".pt":
        return list(open_model(path)[0].classes)
    return lines_of(path)
