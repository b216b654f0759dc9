"""Runs of TensorBoard, Weights & Biases and MLflow, and what is written to them."""

from __future__ import annotations

import io
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class TrackedRun(Protocol):
    """One run of a tracker."""

    modules: ClassVar[tuple[str, ...]]
    """What it needs to be installed."""
    rewinds: ClassVar[bool]
    """Whether a step that comes again takes the place of those from there on."""
    id: str
    """Of the run."""
    new: bool
    """Whether it is another one than was asked for, with nothing in it."""

    def __init__(self, folder: Path, id: str | None) -> None: ...

    def last(self, logged: Mapping[str, int]) -> Mapping[str, int]:
        """Stage -> its last step that the run has, of the stages that are logged up to some step."""

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Say what the training's settings are, table -> key -> value, where the tracker has a place for them."""

    def values(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def scores(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, stage: str, step: int, pixels: NDArray[np.uint8], name: str) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files, a folder a stage, each record written at once."""

    modules: ClassVar[tuple[str, ...]] = ("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer")
    rewinds: ClassVar[bool] = True

    def __init__(self, folder: Path, id: str | None) -> None:
        self.id = "tensorboard"
        self.folder = folder / self.id
        self.new = id is None or not self.folder.is_dir()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, Path] = {}
        self._steps: dict[str, int] = {}

    def last(self, logged: Mapping[str, int]) -> Mapping[str, int]:
        return logged

    def describe(self, settings: Mapping[str, Any]) -> None:
        pass

    def values(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if step <= self._steps.get(stage, step):
            self._take_back(stage, step)
        self._steps[stage] = step
        self._add(stage, step, [{"tag": f"{stage}/{name}", "simple_value": each} for name, each in values.items()])

    def scores(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._take_back(stage, step)  # what was measured with other settings
        self.values(stage, step, values)

    def picture(self, stage: str, step: int, pixels: NDArray[np.uint8], name: str) -> None:
        if stage not in self._files:
            self._take_back(stage, step)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        shape = {"height": pixels.shape[0], "width": pixels.shape[1], "colorspace": 3}
        image = {**shape, "encoded_image_string": file.getvalue()}
        self._add(stage, step, [{"tag": f"{stage}/{name}", "image": image}])

    def close(self, failed: bool) -> None:
        pass

    def _take_back(self, stage: str, step: int) -> None:
        """Make readers leave out what the stage has from a step on."""
        if stage not in self._files:
            # Readers take files in the order of their names.
            name = f"events.out.tfevents.{time.time_ns() / 1e9:020.9f}.{socket.gethostname()}.{os.getpid()}"
            self._files[stage] = self.folder / stage / name
            self._files[stage].parent.mkdir(exist_ok=True)
            self._event(stage, file_version="brain.Event:2")
        self._event(stage, step=step, session_log={"status": 1})  # START

    def _add(self, stage: str, step: int, values: Sequence[Mapping[str, Any]]) -> None:
        self._event(stage, step=step, summary={"value": values})

    def _event(self, stage: str, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self._files[stage], "ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **what).SerializeToString())


class WandB:
    """A run of Weights & Biases; each stage has steps of its own."""

    modules: ClassVar[tuple[str, ...]] = ("wandb",)
    rewinds: ClassVar[bool] = False

    def __init__(self, folder: Path, id: str | None) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        own = {"project": "cacl", "name": folder.absolute().name, "dir": str(folder), "resume": "allow"}
        own["run_id"] = id or secrets.token_hex(4)
        chosen: dict[str, Any] = {key: os.environ.get(f"WANDB_{key.upper()}") or own[key] for key in own}
        # Beside the run that its user may have open.
        self._run = wandb.init(id=chosen.pop("run_id"), reinit="create_new", **chosen)
        self.id = str(self._run.id)
        self.new = self.id != id
        self._stages: set[str] = set()

    def last(self, logged: Mapping[str, int]) -> Mapping[str, int]:
        return logged  # offline there is nobody to ask

    def describe(self, settings: Mapping[str, Any]) -> None:
        config: Any = self._run.config
        config.update(dict(settings), allow_val_change=True)

    def values(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def scores(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._run.summary.update({f"{stage}/{name}": value for name, value in values.items()})

    def picture(self, stage: str, step: int, pixels: NDArray[np.uint8], name: str) -> None:
        import wandb

        self.values(stage, step, {name: wandb.Image(pixels)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, told every some seconds: a server that is asked at each step would be waited for."""

    modules: ClassVar[tuple[str, ...]] = ("mlflow",)
    rewinds: ClassVar[bool] = False
    SECONDS = 5.0
    MOST = 1000
    """Metrics that MLflow takes at once."""
    PARAMS = 100
    """Parameters that it takes at once."""

    def __init__(self, folder: Path, id: str | None) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        given = os.environ.get("MLFLOW_RUN_ID", "")
        self.id = given or (id if id is not None and self._has(id) else self._new_run(folder))
        self.new = self.id != id
        self._client.update_run(self.id, status="RUNNING")
        self._waiting: list[Any] = []
        self._sent = time.monotonic()

    def last(self, logged: Mapping[str, int]) -> Mapping[str, int]:
        steps = {}
        for stage in logged:
            history = self._client.get_metric_history(self.id, f"{stage}/loss")
            steps[stage] = max((metric.step for metric in history), default=0)
        return steps

    def describe(self, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat: dict[str, str] = {}
        for name, table in settings.items():
            for key, value in table.items() if isinstance(table, Mapping) else [("", table)]:
                flat[f"{name}.{key}".strip(".")] = str(value)
        known = self._client.get_run(self.id).data.params  # which cannot be changed
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), self.PARAMS):
            self._client.log_batch(self.id, params=new[start : start + self.PARAMS])

    def values(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 10**6
        named = {re.sub(r"[^\w\-./: ]", "_", f"{stage}/{name}"): value for name, value in values.items()}
        self._waiting += [Metric(name, value, now, step) for name, value in named.items()]
        if len(self._waiting) >= self.MOST or time.monotonic() - self._sent > self.SECONDS:
            self._send()

    def scores(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.values(stage, step, values)
        self._send()

    def picture(self, stage: str, step: int, pixels: NDArray[np.uint8], name: str) -> None:
        self._client.log_image(self.id, pixels, key=f"{stage}/{name}", step=step)

    def close(self, failed: bool) -> None:
        self._send()
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")

    def _has(self, id: str) -> bool:
        """Whether this store has a run: it may be another store now."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(id))
        except MlflowException:
            return False

    def _new_run(self, folder: Path) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if not experiment:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cacl"
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
        return str(self._client.create_run(experiment, run_name=folder.absolute().name).info.run_id)

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self.id, metrics=self._waiting[: self.MOST])
            del self._waiting[: self.MOST]
        self._sent = time.monotonic()


RUNS: Mapping[str, type[TrackedRun]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
