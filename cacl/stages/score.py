"""What a result scores: a mean IoU, or how far it agrees with the encoder, with everything that belongs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cacl.agreement import Agreement
from cacl.log import Record
from cacl.metrics import mean_iou


class Point(NamedTuple):
    """A background score, and what it gives."""

    background_score: float
    miou: float | None


@dataclass(frozen=True)
class Score:
    """What a stage's result scores: a mean IoU with everything that belongs beside it.

    Where no image has a mask, ``miou`` is None, ``images`` is 0, and ``judged`` says what can be said without.
    """

    what: str
    """What was evaluated."""
    miou: float | None
    """Mean IoU in [0, 1]; None where no pixel counts."""
    iou: Mapping[str, float]
    """Class, the background among them -> IoU, of those that occur."""
    images: int
    """That have a mask."""
    crf: bool = False
    background_score: float | None = None
    auto: bool = False
    """Whether the background score was chosen by the values of the CAMs alone."""
    fixed: Point | None = None
    """At the background score that the field compares at."""
    oracle: Point | None = None
    """At the best background score, which nobody knows who has no masks."""
    walk: Score | None = None
    """What it was before its last step."""
    split: str = ""
    stage: str = ""
    judged: Agreement | None = None
    """How far the masks agree with the encoder and the photos' colours, at the same background score."""

    @classmethod
    def of(
        cls,
        what: str,
        iou: NDArray[np.float64],
        classes: Sequence[str],
        images: int,
        *,
        crf: bool = False,
        background_score: float | None = None,
        auto: bool = False,
        fixed: Point | None = None,
        oracle: Point | None = None,
        walk: Score | None = None,
    ) -> Score:
        """From the IoU of background and classes, NaN for what does not occur."""
        named = zip(("background", *classes), iou.tolist(), strict=True)
        known = {name: round(value, 6) for name, value in named if value == value}
        return cls(what, rounded(mean_iou(iou)), known, images, crf, background_score, auto, fixed, oracle, walk)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Score:
        """What :meth:`record` gave.

        Raises:
            LookupError: if it is something else; as TypeError, ValueError and AttributeError.
        """
        iou, walk = record.get("iou", {}), record.get("walk")
        numbers = [record["images"], record.get("background_score", 0), *iou.values()]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("expected numbers")
        score = cls(
            str(record["what"]), record["miou"], iou, record["images"], bool(record["crf"]),
            record.get("background_score"), record.get("auto") is True, _point(record, "fixed"),
            _point(record, "oracle"), split=str(record.get("split", "")), judged=_judged(record),
        )  # fmt: skip
        if walk:
            before = replace(
                score,
                what="random walk alone",
                miou=walk["miou"],
                iou={},
                crf=False,
                oracle=_point(walk, "oracle"),
                judged=None,
            )
            score = replace(score, walk=before)
        str(score)
        return score

    def record(self) -> Record:
        """As it stands in ``metrics.json``."""
        record: Record = {"what": self.what, "background_score": self.background_score, "auto": self.auto or None}
        record["crf"] = self.crf
        record |= {"images": self.images, "miou": self.miou, "iou": dict(self.iou)}
        if self.walk is not None:
            record["walk"] = {"miou": self.walk.miou, "oracle": self.walk.oracle and self.walk.oracle._asdict()}
        record["fixed"] = self.fixed and self.fixed._asdict()
        record["oracle"] = self.oracle and self.oracle._asdict()
        record["split"] = self.split
        record |= {"agreement": self.agreement, "judged": self.judged and _rounded(self.judged)._asdict()}
        return {key: value for key, value in record.items() if value is not None or key == "miou"}

    @property
    def agreement(self) -> float | None:
        """:attr:`cacl.agreement.Agreement.total` of ``judged``; higher is better."""
        return None if self.judged is None else round(_rounded(self.judged).total, 4)

    @property
    def measured(self) -> bool:
        """Whether there were masks to measure a mean IoU with."""
        return self.images > 0

    @property
    def settings(self) -> str:
        """How the masks were made."""
        by_itself = " (auto)" * self.auto
        score = "" if self.background_score is None else f"background score {self.background_score:g}{by_itself}, "
        return f"{score}{'CRF' if self.crf else 'no CRF'}"

    @property
    def conditions(self) -> str:
        """What the number needs beside it."""
        return f"{self.split}, {self.images} images, {self.settings}"

    def __str__(self) -> str:
        """In one line."""
        by_itself = " (auto)" * self.auto
        score = "" if self.background_score is None else f", background score {self.background_score}{by_itself}"
        known = "" if self.judged is None else f"agreement {self.agreement:.3f}"
        if self.judged is not None and not self.measured:
            return f"{self.what}, without masks: {known} ({self.split}, {self.judged.images} images{score})"
        if self.judged is not None and self.judged.images != self.images:
            known += f" of {self.judged.images} images"
        line = f"{self.what} mIoU {_percent(self.miou)} ({self.split}, {self.images} images{score}"
        line += ", CRF" if self.crf else ", no CRF"
        if self.walk:
            line += f"; the {self.walk.what} {_percent(self.walk.miou)}"
        if self.fixed and self.fixed.background_score != self.background_score:
            line += f"; fixed {_percent(self.fixed.miou)} at {self.fixed.background_score}"
        if oracle := self.oracle or (self.walk and self.walk.oracle):
            line += f"; oracle {_percent(oracle.miou)} at {oracle.background_score}"
        return f"{line})" + (f", {known}" if known else "")


def rounded(miou: float) -> float | None:
    """A mean IoU as it stands in ``metrics.json``; None where no pixel counts, as all of them are ignored."""
    return round(miou, 6) if miou == miou else None


def _percent(miou: float | None) -> str:
    return "of no pixel" if miou is None else f"{100 * miou:.1f} %"


def _rounded(agreement: Agreement) -> Agreement:
    """As it stands in ``metrics.json``."""
    evidence, explained, edges, pairs, images = agreement
    return Agreement(round(evidence, 5), round(explained, 5), round(edges, 5), pairs, images)


def _judged(record: Mapping[str, Any]) -> Agreement | None:
    if (judged := record.get("judged")) is None:
        return None
    agreement = Agreement(**{name: judged[name] for name in Agreement._fields})
    if min(agreement[1:]) < 0:
        raise ValueError("expected numbers of at least 0")
    return agreement


def _point(record: Mapping[str, Any], name: str) -> Point | None:
    point = record.get(name)
    return Point(point["background_score"], point["miou"]) if point else None
