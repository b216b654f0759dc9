"""Trackers: what a training logs, in TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from cacl._support.distributed import rank
from cacl._support.files import read_json, write_json
from cacl._support.launch import is_first
from cacl._support.tracked import RUNS, TrackedRun
from cacl._support.values import check_choice
from cacl.errors import InputError, first_line
from cacl.images import Pixels
from cacl.log import Record
from cacl.settings import TrackerName

logger = logging.getLogger("cacl")


def tracker(
    name: TrackerName,
    folder: str | PathLike[str],
    *,
    records: Sequence[Record] = (),
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> Tracker:
    """A callback that tells a tracker every record it gets, for :func:`cacl.training.train` and
    :func:`cacl.pipeline.run`.

    The tracker's own environment variables hold, such as ``WANDB_MODE``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``
    and ``MLFLOW_EXPERIMENT_NAME``. Without them the project is ``cacl``, and the run is called as the folder. Which run
    it is stands in ``trackers.json`` of the folder, so that a training that goes on does so there too.

    Args:
        name: ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``.
        folder: of the training; has ``tensorboard/``, a folder a stage, and wandb's files.
        records: what the training has logged up to now (:meth:`cacl.log.Log.records`). What of it the tracker lacks is
            told first, and nothing of it twice where the training goes on from a checkpoint. (For the latter,
            TensorBoard needs no records.)
        settings: what wandb has as ``config`` and MLflow as parameters; tables of values, or values.
        resume: go on in the run that the folder has; False begins another. TensorBoard's files have one a folder, in
            which a step that comes again takes the place of those from there on.

    Raises:
        ImportError: if the tracker is not installed.
        ValueError: if its run cannot be opened.
    """
    check_choice("name", name, RUNS)
    check_trackers([name])
    if rank() > 0 or not is_first():  # there may be no group yet
        return Tracker(name, None)
    place, kind = Path(folder), RUNS[name]
    state = place / "trackers.json"
    known = read_json(state)
    id = str(known[name]) if name in known and (resume or kind.rewinds) else None
    try:
        run = kind(place, id)
    except Exception as error:  # of whatever library and server
        raise InputError(f"{name}: expected a run to write to, but {first_line(error)}") from None
    made = Tracker(name, run, state)
    made.begin(records, settings or {})
    return made


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise an ImportError that names the extra, where a tracker is not installed."""
    for name in names:
        try:
            for module in RUNS[name].modules:
                import_module(module)
        except ImportError as error:
            raise ImportError(f"The tracker {name} needs an extra: pip install 'cacl[{name}]' ({error})") from None


class Tracker:
    """What :func:`tracker` gives: a callback, and a context manager that closes it.

    In several processes, rank 0 tells and the others do nothing. What goes wrong when something is told is one
    warning, after which nothing more is.
    """

    def __init__(self, name: str, run: TrackedRun | None, state: Path | None = None) -> None:
        self.name, self._run, self._state = name, run, state
        self.new = run is not None and run.new
        """Whether its run knew nothing of this training."""
        self._last: dict[str, int] = {}
        """Stage -> its last step that has been told."""
        self._skipped: dict[str, int] = {}
        """Stage -> the last step that is not told again."""

    def begin(self, records: Sequence[Record], settings: Mapping[str, Any]) -> None:
        """Tell the settings, and what of the records the run lacks."""
        if self._run is None:
            return
        logged = {str(record.get("stage")): record.get("step", 0) for record in records}
        with self._guarded():
            self._run.describe(settings)
            held = {} if self.new else self._run.last(logged)
            for record in records:
                if record.get("step", 0) > held.get(str(record.get("stage")), 0):
                    self(record)
            if self._run is not None and self._state is not None:
                write_json(self._state, {**read_json(self._state), self.name: self._run.id})
                self._skipped = {} if self._run.rewinds else {**held, **logged}
        self._last = logged

    def __call__(self, record: Record) -> None:
        """Tell a record of the log: its numbers, by ``stage/name``, at its step."""
        stage, step = str(record.get("stage", "train")), record.get("step", 0)
        if self._run is None or step <= self._skipped.get(stage, 0):
            return
        self._last[stage] = step
        with self._guarded():
            self._run.values(stage, step, numbers({k: v for k, v in record.items() if k not in ("stage", "step")}))

    def score(self, stage: str, record: Record) -> None:
        """Tell what a stage scores, as it stands in ``metrics.json``."""
        with self._guarded():
            if self._run is not None:
                self._run.scores(stage, self._last.get(stage, 0) + 1, numbers(record))

    def picture(self, stage: str, step: int, pixels: Pixels, name: str = "cams") -> None:
        """Tell a picture ``(H, W, 3)`` uint8."""
        with self._guarded():
            if self._run is not None and step > self._skipped.get(stage, 0):
                self._run.picture(stage, step, pixels, name)

    def close(self, *, failed: bool = False) -> None:
        """Write what is left, and end."""
        with self._guarded():
            if self._run is not None:
                self._run.close(failed)
        self._run = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no network, a full disk: hours of training are worth more
            self._run = None
            logger.warning("%s: nothing more is tracked; the training goes on: %s", self.name, first_line(error))
            if self._state is not None:  # so that the next start tells all
                with suppress(OSError, InputError):
                    known = read_json(self._state)
                    known.pop(self.name, None)
                    write_json(self._state, known)


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by their names; those of a list are numbered, those of a table within it follow ``/``."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            found |= numbers({str(i): each for i, each in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found
