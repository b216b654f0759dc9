"""The folder of a run: which stages are finished, and what each of them scored; what a stage begins and leaves."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from cacl._support.files import read_json, write_json
from cacl._support.toml import read_toml
from cacl.constants import Precision
from cacl.datasets.files import Fingerprint
from cacl.errors import InputError
from cacl.log import Log, Record, keep_costs
from cacl.stages.score import Score
from cacl.stages.stage import Stage


@dataclass(frozen=True)
class State:
    """What ``stage.json`` says of a stage."""

    key: str | None = None
    """Of what it was made; None where it has never begun."""
    finished: bool = False

    def __bool__(self) -> bool:
        return self.key is not None


@dataclass(frozen=True)
class RunFolder:
    """A run folder; nothing in it is looked at before it is asked for."""

    path: Path

    @cached_property
    def log(self) -> Log:
        return Log(self.path / "log.jsonl")

    @property
    def costs(self) -> Path:
        """Of the stages: ``times.json``."""
        return self.path / "times.json"

    @property
    def data(self) -> dict[str, Any]:
        """Role -> what the data were when they were last checked, as it is in ``data.json``."""
        return {role: each for role, each in read_json(self.path / "data.json").items() if isinstance(each, dict)}

    def keep_data(self, fingerprints: Mapping[str, Fingerprint]) -> None:
        """Write down what the data are that have been checked."""
        write_json(self.path / "data.json", {role: each._asdict() for role, each in fingerprints.items()})

    @property
    def precision(self) -> Precision | None:
        """What its networks have computed in, by its ``config.toml``; None where that is not there, or says nothing."""
        try:
            known = read_toml(self.path / "config.toml")["run"]["precision"]
        except (InputError, LookupError, TypeError):
            return None
        return known if known in get_args(Precision) else None

    def state(self, stage: str) -> State:
        """How far a stage is."""
        known = read_json(self.path / stage / "stage.json")
        return State(str(known.get("key", "")), known.get("finished") is True) if known else State()

    def finished(self, stage: str, key: str | None = None) -> bool:
        """Whether a stage has finished: with the settings of a key, or with any."""
        state = self.state(stage)
        return state.finished and key in (None, state.key)

    def mark(self, stage: str, key: str, *, finished: bool) -> None:
        """Write down how far a stage is."""
        write_json(self.path / stage / "stage.json", {"key": key, "finished": finished})

    def begin(self, stage: Stage[Any], before: Collection[str], key: str) -> None:
        """Make room for a stage that is done anew: nothing of it stays, nor is any known but those before it."""
        for path in self.path.glob("*/stage.json"):
            if path.parent.name not in before:
                path.unlink()
        known = self.metrics
        if not known.keys() <= set(before):
            self._write({name: record for name, record in known.items() if name in before}, list(known))
        self.log.keep(before)
        keep_costs(self.costs, before)
        self.forget_checkpoint(stage.name)
        for files in (self.path / stage.name / name for name in stage.files):
            if files.is_symlink():
                files.unlink()
            elif files.is_dir():
                shutil.rmtree(files)
        self.mark(stage.name, key, finished=False)

    def end(self, stage: str, key: str) -> None:
        """A stage has finished."""
        self.mark(stage, key, finished=True)
        self.forget_checkpoint(stage)

    def checkpoint(self, stage: str) -> Path:
        return self.path / stage / "checkpoint.pt"

    def forget_checkpoint(self, stage: str) -> None:
        path = self.checkpoint(stage)
        for file in (path, path.with_name(f"{path.name}.tmp")):
            file.unlink(missing_ok=True)

    @property
    def metrics(self) -> dict[str, Record]:
        """``metrics.json``: what is known of each stage, as far as it is sound."""
        return {stage: record for stage, record in read_json(self.path / "metrics.json").items() if _score(record)}

    def scores(self) -> dict[str, Score]:
        """Stage -> score."""
        read = {stage: _score(record) for stage, record in self.metrics.items()}
        return {stage: replace(score, stage=stage) for stage, score in read.items() if score}

    def keep_score(
        self, stage: str, score: Score, key: str, order: Collection[str], photos: Sequence[tuple[str, float]] = ()
    ) -> None:
        """Write down a score, and the key of what it follows from.

        Args:
            stage: whose.
            score: of all images.
            key: of what it follows from.
            order: of the stages.
            photos: images by their ids and their agreement with the encoder, in the order that is kept.
        """
        path = self._photos(stage)
        if photos:
            write_json(path, {"key": key, "photos": [list(photo) for photo in photos]})
        else:
            path.unlink(missing_ok=True)
        self._write({**self.metrics, stage: {**score.record(), "key": key}}, order)

    def photos(self, stage: str) -> list[tuple[str, float]]:
        """Images of a stage by their ids and their agreement with the encoder, the worst first; empty if unknown."""
        known, key = read_json(self._photos(stage)), self.metrics.get(stage, {}).get("key")
        if key is None or known.get("key") != key:  # of other settings, or of another program
            return []
        try:
            return [(str(id), float(agreement)) for id, agreement in known["photos"]]
        except (LookupError, TypeError, ValueError):
            return []

    def _photos(self, stage: str) -> Path:
        return self.path / stage / "agreement.json"

    def _write(self, metrics: dict[str, Record], order: Collection[str]) -> None:
        names = [*order, *(name for name in metrics if name not in order)]
        write_json(self.path / "metrics.json", {name: metrics[name] for name in names if name in metrics})


def _score(record: object) -> Score | None:
    """What a part of ``metrics.json`` says; None where somebody else wrote it."""
    try:
        return Score.read(record)  # type: ignore[arg-type]
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
