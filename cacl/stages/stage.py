"""What a stage is: its settings, what it does and needs, what its result scores. A new one is one file like this:

.. code-block:: python

    class Squares(Table):
        \"\"\"``[squares]``: masks of squares.\"\"\"

        side: Positive = 8
        \"\"\"In pixels.\"\"\"

    def make_squares(dataset, out, settings=Squares(), *, machine=Machine(), keep=False): ...

    def _run(run, settings, folder, journal):
        make_squares(run.train, folder / "train", settings, machine=run.machine, keep=True)

    STAGE = Stage("squares", Squares, run=_run, files=("train",), stands_for=("irn", "masks"))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cacl.datasets import Dataset
from cacl.encoders import ImageTextEncoder
from cacl.log import Journal, Record
from cacl.metrics import mean_iou
from cacl.settings import Machine, Table

S = TypeVar("S", bound=Table)
T = TypeVar("T", bound=Table)
Made = TypeVar("Made")
Network = TypeVar("Network", bound=nn.Module)
Role = Literal["train", "eval", "segmented"]
"""What a split is there for: to be trained on, to score CAMs on, to be segmented."""


class Context(Protocol):
    """What a stage sees of the run that it is a part of."""

    @property
    def machine(self) -> Machine:
        """Where it is computed."""

    @property
    def seed(self) -> int:
        """Of everything that is random."""

    @property
    def train(self) -> Dataset:
        """The images that are trained on."""

    @property
    def eval(self) -> Dataset | None:
        """The images that CAMs are scored on; None where there is no such split, or it has no masks."""

    @property
    def segmented(self) -> Dataset | None:
        """The images that the segmenter makes masks for."""

    @property
    def encoder(self) -> ImageTextEncoder:
        """The image-text encoder, on the device."""

    @property
    def given_criterion(self) -> Callable[..., Any] | None:
        """What was given to :func:`cacl.pipeline.run` instead of CA-CL's loss."""

    def table(self, kind: type[T]) -> T:
        """The settings of a kind: those of the table that has them, or the defaults."""

    def folder(self, stage: str) -> Path:
        """The folder of a stage, or of the one that stands for it."""

    def key(self, stage: str) -> str:
        """The hash of everything that a stage's result follows from."""

    def finished(self, stage: str) -> bool:
        """Whether a stage has finished with these settings."""

    def identity(self, argument: Literal["encoder", "backbone", "criterion"]) -> str:
        """What tells one given object from another; empty where none was given."""

    def network(self, make: Callable[..., Network], stage: str | None = None) -> Network:
        """A network with the backbone of ``[camnet]``, or the one that was given, on the device.

        Args:
            make: takes ``backbone`` and ``weights``, as :class:`cacl.CAMNet` does.
            stage: whose ``model.pt`` it gets; None for the weights that it starts from.
        """

    def own_network(self, make: Callable[..., Network], backbone: str, weights: str) -> Network:
        """As :meth:`network`, with a backbone of its own, and with the weights that it starts from."""

    def own_backbone(self) -> nn.Module | None:
        """A copy of the backbone that was given."""

    def to_train(self, net: Network) -> Network:
        """The network, compiled where ``[run] compile`` says so."""

    def shared(self, name: str, make: Callable[[], Made]) -> Made:
        """What several uses share: made once and put on the device, kept until the last stage that names it in ``uses``
        has ended."""


class Oracle(NamedTuple):
    """The best background score, which nobody knows who has no masks."""

    background_score: float
    miou: float | None


@dataclass(frozen=True)
class Score:
    """What a stage's result scores: a mean IoU with everything that belongs beside it."""

    what: str
    """What was evaluated."""
    miou: float | None
    """Mean IoU in [0, 1]; None where no pixel counts."""
    iou: Mapping[str, float]
    """Class, the background among them -> IoU, of those that occur."""
    images: int
    crf: bool = False
    background_score: float | None = None
    oracle: Oracle | None = None
    walk: Score | None = None
    """What it was before its last step."""
    split: str = ""
    stage: str = ""

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
        oracle: Oracle | None = None,
        walk: Score | None = None,
    ) -> Score:
        """From the IoU of background and classes, NaN for what does not occur."""
        named = zip(("background", *classes), iou.tolist(), strict=True)
        known = {name: round(value, 6) for name, value in named if value == value}
        return cls(what, rounded(mean_iou(iou)), known, images, crf, background_score, oracle, walk)

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
            record.get("background_score"), _oracle(record), split=str(record.get("split", "")),
        )  # fmt: skip
        if walk:
            before = replace(
                score, what="random walk alone", miou=walk["miou"], iou={}, crf=False, oracle=_oracle(walk)
            )
            score = replace(score, walk=before)
        str(score)
        return score

    def record(self) -> Record:
        """As it stands in ``metrics.json``."""
        record: Record = {"what": self.what, "background_score": self.background_score, "crf": self.crf}
        record |= {"images": self.images, "miou": self.miou, "iou": dict(self.iou)}
        if self.walk is not None:
            record["walk"] = {"miou": self.walk.miou, "oracle": self.walk.oracle and self.walk.oracle._asdict()}
        record["oracle"] = self.oracle and self.oracle._asdict()
        record["split"] = self.split
        return {key: value for key, value in record.items() if value is not None or key == "miou"}

    @property
    def settings(self) -> str:
        """How the masks were made."""
        score = "" if self.background_score is None else f"background score {self.background_score:g}, "
        return f"{score}{'CRF' if self.crf else 'no CRF'}"

    @property
    def conditions(self) -> str:
        """What the number needs beside it."""
        return f"{self.split}, {self.images} images, {self.settings}"

    def __str__(self) -> str:
        """In one line."""
        score = "" if self.background_score is None else f", background score {self.background_score}"
        line = f"{self.what} mIoU {_percent(self.miou)} ({self.split}, {self.images} images{score}"
        line += ", CRF" if self.crf else ", no CRF"
        if self.walk:
            line += f"; the {self.walk.what} {_percent(self.walk.miou)}"
        if oracle := self.oracle or (self.walk and self.walk.oracle):
            line += f"; oracle {_percent(oracle.miou)} at {oracle.background_score}"
        return line + ")"


def rounded(miou: float) -> float | None:
    """A mean IoU as it stands in ``metrics.json``; None where no pixel counts, as all of them are ignored."""
    return round(miou, 6) if miou == miou else None


def _percent(miou: float | None) -> str:
    return "of no pixel" if miou is None else f"{100 * miou:.1f} %"


def _oracle(record: Mapping[str, Any]) -> Oracle | None:
    oracle = record.get("oracle")
    return Oracle(oracle["background_score"], oracle["miou"]) if oracle else None


def _nothing(run: Context, settings: Any) -> Sequence[object]:
    return ()


@dataclass(frozen=True)
class Stage(Generic[S]):
    """One stage of a chain; everything that anybody else needs to know of it."""

    name: str
    """Of the stage, its folder and its table."""
    settings: type[S]
    """The class of its table."""
    run: Callable[[Context, S, Path, Journal], None]
    """Does it, on all processes: run, settings, the stage's folder, and what a training leaves of itself."""
    needs: tuple[str, ...] = ()
    """The stages whose results it reads; they come before it in the chain, or others that stand for them."""
    title: str = ""
    """What people call it."""
    files: tuple[str, ...] = ()
    """Folders in its own that hold a file an image; they are removed when it is done anew."""
    stands_for: tuple[str, ...] = ()
    """Stages that it takes the place of, for those that need them."""
    uses: tuple[str, ...] = ()
    """What it takes from :meth:`Context.shared`, and ``"encoder"``: freed when nobody who uses it is left."""
    depends: Callable[[Context, S], Sequence[object]] = _nothing
    """What its result follows from besides its settings and the stages that it needs."""
    version: int = 1
    """Raised when its result changes though its settings do not, or when a default does: what was made before is then
    made again."""
    check: Callable[[Context, S], object] = _nothing
    """Raises for what is wrong with its settings, before the first step of any stage that is to be done."""
    scored_on: Role | None = None
    """The images that its result is scored on, where they have masks; None for no score."""
    score: Callable[[Context, S, Dataset], Score] | None = None
    """What its result scores on them, on all processes."""
    score_depends: Callable[[Context, S], Sequence[object]] = _nothing
    """What the score follows from besides the result, the images and the settings that only an evaluation reads."""
    shown: str = ""
    """What the report calls its score, ``{crf}`` for `` + CRF`` where there is one; the score's own name if empty."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)

    def key(self, run: Context, settings: S, needed: Sequence[str]) -> str:
        """A hash of everything that its result follows from, ``needed`` being the keys of the stages that it needs.

        Settings at their defaults are left out, so that a new one changes no key.
        """
        own = [self.name, self.version, settings.differing(), self.depends(run, settings)]
        return hash_of(*own, run.seed, run.machine.precision, needed)

    def score_key(self, run: Context, settings: S, key: str, *rest: object) -> str:
        """A hash of everything that its score follows from."""
        return hash_of(key, settings.differing(evaluation=True), self.score_depends(run, settings), *rest)


def hash_of(*parts: object) -> str:
    """A short hash of plain values and tables."""

    def plain(value: object) -> object:
        return value.differing() if isinstance(value, Table) else repr(value)

    return hashlib.sha256(json.dumps(parts, default=plain, sort_keys=True).encode()).hexdigest()[:16]
