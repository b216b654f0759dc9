"""What a finished stage is worth: its mean IoU where there are masks, its agreement with the encoder without."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacl._support.distributed import rank_zero
from cacl.agreement import MaskJudge
from cacl.datasets import Dataset
from cacl.errors import InputError
from cacl.prompts import BackgroundSet, PromptSet
from cacl.runs.session import Session
from cacl.settings import Encoder, Prompts
from cacl.stages.chain import needed
from cacl.stages.quality import Agreements, evaluate_agreement, labelled
from cacl.stages.score import Score
from cacl.stages.stage import Judged, Stage
from cacl.stages.words import known_words

logger = logging.getLogger("cacl")

SHARED = ("encoder", "judge")
"""What is kept from one stage to the next where both are judged."""
_VERSION = 1
"""Raised when the figure changes though nothing that it follows from does."""


def evaluate(session: Session, stage: Stage[Any]) -> None:
    """Write down what a finished stage gives on the images that it is scored on, unless that is known."""
    role = stage.scored_on or ""
    dataset = session.datasets.get(role)
    if dataset is None:
        return
    scored = stage.score is not None and bool(dataset.masked)
    words = _words(session) if stage.judged is not None and labelled(dataset, 1) else None
    if not scored and words is None:
        return
    name, settings, split = stage.name, session.settings(stage), session.splits[role]
    with session.at(stage):
        judging = () if words is None else (_depends(session, words),)
        key = stage.score_key(
            session, settings, session.key_of(stage), split, session.fingerprints[role].masks, *judging
        )
    if rank_zero(lambda: session.files.metrics.get(name, {}).get("key") == key):
        return
    photos: list[tuple[str, float]] = []
    with session.at(stage):
        score = stage.score(session, settings, dataset) if scored and stage.score is not None else None
        if words is not None and stage.judged is not None:
            known = None if score is None else score.background_score
            given = stage.judged(session, settings, dataset, known)
            found = evaluate_agreement(_judge(session, words), dataset, given.masks, machine=session.machine)
            score = replace(score or _unmeasured(given), judged=found.whole)
            photos = [(dataset.entries[i].id, total) for i, total in _worst_first(found)]
    assert score is not None
    score = replace(score, split=split)
    order = [each.name for each in session.chain]
    rank_zero(lambda: session.files.keep_score(name, score, key, order, photos))
    logger.info("%s: %s", name, score)


def least_agreement_first(
    session: Session, stage: Stage[Any], dataset: Dataset, masks: Path
) -> list[tuple[int, float]]:
    """The indices of all images with labels and how far their masks agree, the least first.

    Raises:
        ValueError: if the run has no encoder or no background words to judge by, or no image has a label.
    """
    wanted = labelled(dataset, len(dataset))
    known = session.files.photos(stage.name)
    if wanted and len(known) == len(wanted):  # the run has looked at all of them
        indices = {dataset.entries[i].id: i for i in wanted}
        if indices.keys() == {id for id, _ in known}:
            return [(indices[id], agreement) for id, agreement in known]
    words = _words(session)
    if words is None:
        raise InputError(
            f"{session.out}: to say which masks agree least with their photos, an encoder and background words are "
            "needed, which this run has not"
        )
    judge = _judge(session, words)
    return _worst_first(evaluate_agreement(judge, dataset, masks, indices=wanted, machine=session.machine))


def _words(session: Session) -> BackgroundSet | None:
    """The background words to judge masks with; None where there are none, or no encoder that the run has anyway."""
    stages = needed(session.chain, session.settings)
    used = session.given_criterion is None and any("encoder" in stage.used(session.settings(stage)) for stage in stages)
    if session.given_encoder is None and not used:
        return None
    try:
        return known_words(session)
    except InputError:  # CA-CL without background suppression, or another criterion, needs none
        return None


def _depends(session: Session, words: BackgroundSet) -> tuple[object, ...]:
    known = {name: words.get(name) for name in session.train.classes}
    return (_VERSION, session.table(Encoder), session.identity("encoder"), session.table(Prompts), known)


def _judge(session: Session, words: BackgroundSet) -> MaskJudge:
    prompts = PromptSet(session.table(Prompts).templates)
    return session.shared(
        "judge", lambda: MaskJudge(session.encoder, session.train.classes, prompts=prompts, backgrounds=words)
    )


def _unmeasured(given: Judged) -> Score:
    return Score(given.what, None, {}, 0, crf=given.crf, background_score=given.background_score, auto=given.auto)


def _worst_first(found: Agreements) -> list[tuple[int, float]]:
    """Image and agreement; of those with none, the one comes first whose regions lie nearer to background words."""
    ranked = sorted(found.photos.items(), key=lambda item: (item[1].total, item[1].evidence, item[0]))
    return [(i, round(agreement.total, 4)) for i, agreement in ranked]
