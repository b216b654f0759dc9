"""What a run tells its trackers: the records of its trainings, pictures, and what its stages score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cacl._support.distributed import rank, rank_zero
from cacl.images import Pixels
from cacl.log import Callback, Pictures, Record
from cacl.runs.results import Result
from cacl.runs.session import Session
from cacl.trackers import Tracker, tracker


@dataclass
class Tracking:
    """The trackers of a run, and the callback that was given to it, which may be one too."""

    session: Session
    trackers: list[Tracker]
    given: Callback | None
    scores: dict[str, Record]
    """What has been told of the stages."""

    def __call__(self, record: Record) -> None:
        for each in self.trackers:
            each(record)
        if self.given is not None:
            self.given(record)

    @property
    def pictures(self) -> Pictures | None:
        """What gets pictures; None where nobody wants them."""
        return self._picture if self._all else None

    def _picture(self, stage: str, step: int, pixels: Pixels) -> None:
        for each in self._all:
            each.picture(stage, step, pixels)

    def ended(self, stage: str, *, again: bool) -> None:
        """Tell what a stage scores, if that is new, and what pictures the report has, if it was made again."""
        if rank() > 0 or not self._all:
            return
        score = self.session.files.metrics.get(stage)
        if score is not None and score != self.scores.get(stage):
            for each in self._all:
                each.score(stage, score)
        for path in Result(self.session.out, {}).pictures if stage == "report" and again else ():
            pixels = np.asarray(Image.open(path).convert("RGB"))
            for each in self._all:
                each.picture(stage, 1, pixels, path.stem)

    @property
    def _all(self) -> list[Tracker]:
        return [*self.trackers, *([self.given] if isinstance(self.given, Tracker) else [])]


@contextmanager
def tracked(session: Session, callback: Callback | None, again: Callable[[], str | None]) -> Iterator[Tracking]:
    """The trackers of ``[run] track``, open, on rank 0.

    Args:
        session: of the run.
        callback: that was given to it.
        again: the first stage that is done again, on rank 0: nothing stays of it and of those after it.
    """
    opened, scores = list[Tracker](), dict[str, Record]()
    with ExitStack() as stack:

        def begin() -> None:
            first, names = again(), [stage.name for stage in session.chain]
            staying = names[: names.index(first)] if first else names
            scores.update((stage, score) for stage, score in session.files.metrics.items() if stage in staying)
            records = [record for record in session.files.log.records() if record.get("stage") in staying]
            settings = session.config.model_dump(mode="json")
            for name in dict.fromkeys(session.config.run.track):
                made = tracker(name, session.out, records=records, settings=settings, resume=first is None)
                stack.enter_context(made)
                opened.append(made)
                for stage, score in scores.items() if made.new else ():
                    made.score(stage, score)

        if session.config.run.track:
            rank_zero(begin)
        yield Tracking(session, opened, callback, scores)
