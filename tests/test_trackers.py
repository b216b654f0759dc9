"""Trackers hold what the log holds, each step once, and a training is the same with and without them."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from PIL import Image
from test_pipeline import STAGES, configure, files, run
from test_processes import chain

from cacl import CAMNet, ablate, cli
from cacl._support.tracked import RUNS
from cacl.config import Config
from cacl.datasets import CSVDataset
from cacl.log import Log
from cacl.pictures import heatmap, sheet
from cacl.trackers import numbers, tracker
from cacl.training import Loop, train
from cacl.transforms import RandomView, normalize

TRAINED = ["warmup", "cacl"]
RECORDS = [{"stage": "cacl", "step": step, "loss": 1 / step, "share": [0.25, step]} for step in range(1, 9)]
SCORE = {"what": "CAM", "miou": 0.5, "iou": {"boat": 0.25, "train (old)": 0.75}, "crf": False, "split": "val"}


@pytest.fixture
def root(tmp_path):
    return write_csv(tmp_path / "data")


def logged(out: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value), by the log."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in Log(out / "log.jsonl").records():
        if record["stage"] == stage:
            for name, value in numbers(record).items():
                if name != "step":
                    found.setdefault(f"{stage}/{name}", []).append((record["step"], value))
    return found


def close(found: Mapping[str, list[tuple[int, float]]], wanted: Mapping[str, list[tuple[int, float]]]) -> bool:
    """Whether the same steps have the same values, as float32."""
    return found.keys() == wanted.keys() and all(
        [step for step, _ in found[name]] == [step for step, _ in wanted[name]]
        and np.allclose([v for _, v in found[name]], [v for _, v in wanted[name]], rtol=1e-6)
        for name in wanted
    )


def events(out: Path, stage: str):
    """What TensorBoard reads of a stage: scalars and pictures, (step, value) by tag."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard" / stage), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    scalars = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    pictures = {tag: [(e.step, e.encoded_image_string) for e in read.Images(tag)] for tag in read.Tags()["images"]}
    return scalars, {tag: [(s, np.asarray(Image.open(io.BytesIO(p)))) for s, p in x] for tag, x in pictures.items()}


def scores(out: Path, stage: str) -> dict[str, float]:
    return {f"{stage}/{k}": v for k, v in numbers(json.loads((out / "metrics.json").read_text())[stage]).items()}


def test_numbers():
    record = {"loss": 1, "list": [0.5, [2, "x"]], "table": {"a": None, "b": 3.0}, "flag": True, "name": "x"}
    assert numbers(record) == {"loss": 1.0, "list/0": 0.5, "list/1/0": 2.0, "table/b": 3.0}


# TensorBoard, and what a run tells


def test_event_files_hold_the_log_the_scores_and_cams(root, tmp_path):
    pytest.importorskip("tensorboard")
    out = run(root, tmp_path / "out", 'run.track=["tensorboard"]').out
    for stage in STAGES:
        trained, measured = logged(out, stage), scores(out, stage) if stage != "tags" else {}
        if not (trained or measured):
            continue
        found, pictures = events(out, stage)
        last = max((step for values in trained.values() for step, _ in values), default=0)
        assert close(found, {**trained, **{name: [(last + 1, value)] for name, value in measured.items()}})
        assert {tag: [step for step, _ in shown] for tag, shown in pictures.items()} == (
            {f"{stage}/cams": [2, 4]} if stage in TRAINED else {}
        )
    # The last picture is of the network as the stage has left it; here by hand.
    _, pictures = events(out, "warmup")
    net = CAMNet(2, backbone=TinyBackbone())
    net.load_state_dict(torch.load(out / "warmup/model.pt", weights_only=True))
    data, rows = CSVDataset(root, "train"), []
    for i, names in enumerate(("boat", "train", "boat, train", "boat")):
        photo, labels = data.image(i), list(data.entries[i].labels)
        maps = net.predict(normalize(photo)[None], scales=[1.0], flip=False, size=(12, 16))[0, labels].half().float()
        pixels = photo.permute(1, 2, 0).numpy()
        whole = torch.nn.functional.interpolate(maps[None], size=(48, 64), mode="bilinear")[0].numpy()
        rows.append((f"{i}: {names}", [pixels, heatmap(pixels, whole)]))
    wanted = np.asarray(sheet(["photo", "CAM"], rows)).astype(int)
    assert np.abs(pictures["warmup/cams"][-1][1] - wanted).max() <= 4


@pytest.mark.slow
def test_pictures_of_the_report_are_told(root, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    out = run(root, tmp_path / "out", 'run.track=["tensorboard"]', "report.images=2", stages=None).out
    _, pictures = events(out, "report")
    assert pictures.keys() == {f"report/{name}" for name in ("cams", "masks", "segmentation")}
    for tag, ((_, pixels),) in pictures.items():
        assert np.array_equal(pixels, np.asarray(Image.open(out / f"{tag}.png").convert("RGB")))


class Killed(Exception):
    """As a kill does it: nothing is saved."""


def untracked(out: Path) -> dict[str, bytes]:
    """What a run made, without what only tells trackers."""
    told = ("tensorboard", "trackers", "wandb")
    made = {name: data for name, data in files(out).items() if not name.startswith(told)}
    made["config.toml"] = b"\n".join(x for x in made["config.toml"].splitlines() if not x.startswith(b"track"))
    return made


def killed(root: Path, out: Path, *settings: str, step: int, stage: str = "cacl") -> None:
    """A run that is killed at a step: it goes on from step 2 of that stage, whose last checkpoint is there."""

    def stop(record):
        if record["stage"] == stage and record["step"] == stop.at:
            raise stop.how

    for at, how, seconds in ((2, KeyboardInterrupt, 0), (step, Killed, 10**6)):
        stop.at, stop.how = at, how
        with pytest.raises(how):
            run(root, out, *settings, f"run.checkpoint_seconds={seconds}", callback=stop, stages=TRAINED)


def test_a_killed_run_has_every_step_once_and_the_same_bits(root, tmp_path):
    pytest.importorskip("tensorboard")
    plain = run(root, tmp_path / "plain", "cacl.epochs=4", stages=TRAINED).out
    settings, out = ("cacl.epochs=4", 'run.track=["tensorboard"]'), tmp_path / "out"
    killed(root, out, *settings, step=5)
    assert [step for step, _ in events(out, "cacl")[0]["cacl/loss"]] == [1, 2, 3, 4, 5]
    newest = max((out / "tensorboard/cacl").iterdir())
    newest.write_bytes(newest.read_bytes()[:-5])  # cut off as by a kill
    with open(out / "log.jsonl", "a") as file:
        file.write('{"stage": "cacl", "st')
    run(root, out, *settings, stages=TRAINED)
    for stage in TRAINED:
        found, pictures = events(out, stage)
        assert close({name: values for name, values in found.items() if name in logged(out, stage)}, logged(out, stage))
        assert {name: [v for _, v in found[name]] for name in scores(out, stage)} == {
            name: [pytest.approx(value)] for name, value in scores(out, stage).items()
        }
        assert [step for step, _ in pictures[f"{stage}/cams"]] == ([2, 4] if stage == "warmup" else [2, 4, 6, 8])
    assert len(list((out / "tensorboard/cacl").iterdir())) == 3
    assert untracked(out) == untracked(plain)


def test_what_is_done_again_takes_the_place_of_what_was_before(root, tmp_path):
    pytest.importorskip("tensorboard")
    settings, out = ['run.track=["tensorboard"]'], tmp_path / "out"
    run(root, out, *settings, "cacl.epochs=3", stages=TRAINED)
    run(root, out, *settings, "cacl.epochs=2", "cams.background_score=0.3", stages=TRAINED)
    for stage in TRAINED:
        measured = {name: [(5, value)] for name, value in scores(out, stage).items()}
        assert close(events(out, stage)[0], {**logged(out, stage), **measured})
        assert measured[f"{stage}/background_score"] == [(5, 0.3)]


def test_a_run_that_was_not_tracked_is_told_later(root, tmp_path):
    pytest.importorskip("tensorboard")
    out = run(root, tmp_path / "out", stages=TRAINED).out
    assert not (out / "tensorboard").exists()
    for _ in range(2):  # and only once
        run(root, out, 'run.track=["tensorboard"]', stages=TRAINED)
        for stage in TRAINED:
            measured = {name: [(5, value)] for name, value in scores(out, stage).items()}
            assert close(events(out, stage)[0], {**logged(out, stage), **measured})
    assert len(list((out / "tensorboard/cacl").iterdir())) == 1


def test_a_loop_of_ones_own(root, tmp_path):
    pytest.importorskip("tensorboard")
    net = torch.nn.Conv2d(3, 2, 8, stride=8)

    def step(batch):
        return {"loss": torch.nn.functional.multilabel_soft_margin_loss(net(batch.images).mean((2, 3)), batch.labels)}

    loop = Loop(epochs=2, batch_size=3, view=RandomView(32), progress=False)
    for rate in (0.1, 0.01):  # from the beginning, in the same folder
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        with tracker("tensorboard", tmp_path) as callback:
            train(step, {"net": net}, optimizer, CSVDataset(root, "train"), loop, log=Log(tmp_path / "log.jsonl"),
                  callback=callback)  # fmt: skip
        assert close(events(tmp_path, "train")[0], logged(tmp_path, "train"))


def test_a_tracker_that_is_given_gets_scores_and_pictures_too(root, tmp_path):
    pytest.importorskip("tensorboard")
    with tracker("tensorboard", tmp_path / "own") as callback:
        out = run(root, tmp_path / "out", callback=callback, stages=["warmup"]).out
    found, pictures = events(tmp_path / "own", "warmup")
    measured = {name: [(5, value)] for name, value in scores(out, "warmup").items()}
    assert close(found, {**logged(out, "warmup"), **measured})
    assert [step for step, _ in pictures["warmup/cams"]] == [2, 4]
    assert not (out / "tensorboard").exists()


def test_a_tracker_that_fails_is_one_warning_and_told_all_later(root, tmp_path, caplog):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"

    def lose(record):
        if (record["stage"], record["step"]) == ("cacl", 2):
            shutil.rmtree(out / "tensorboard")

    plain = run(root, tmp_path / "plain", stages=TRAINED).out
    run(root, out, 'run.track=["tensorboard"]', callback=lose, stages=TRAINED)
    said = [record.message for record in caplog.records if "tracked" in record.message]
    assert len(said) == 1
    assert said[0].startswith("tensorboard: nothing more is tracked; the training goes on: [Errno 2]")
    assert untracked(out) == untracked(plain)
    run(root, out, 'run.track=["tensorboard"]', stages=TRAINED)
    assert close({k: v for k, v in events(out, "cacl")[0].items() if k in logged(out, "cacl")}, logged(out, "cacl"))


def test_pictures_that_cannot_be_made_are_one_warning(root, tmp_path, caplog, monkeypatch):
    pytest.importorskip("tensorboard")

    def none(*arguments):
        raise RuntimeError("CUDA out of memory. Tried")

    monkeypatch.setattr("cacl.stages.shown.cam_sheet", none)
    out = run(root, tmp_path / "out", 'run.track=["tensorboard"]', stages=["warmup"]).out
    said = [record.message for record in caplog.records if "pictures" in record.message]
    assert said == ["warmup: no more pictures of CAMs: CUDA out of memory. Tried"]
    found, pictures = events(out, "warmup")
    assert [step for step, _ in found["warmup/loss"]] == [1, 2, 3, 4]
    assert not pictures


class Noted:
    """A tracker that cannot take back, as far as a run sees it."""

    modules, rewinds = (), False
    runs: list[Noted] = []  # noqa: RUF012

    def __init__(self, folder, id):
        self.id, self.new = id or f"run-{len(self.runs)}", id is None
        self.steps, self.scored, self.ended, self.settings = [], [], None, {}
        self.runs.append(self)

    def last(self, logged):
        return logged

    def describe(self, settings):
        self.settings = settings

    def values(self, stage, step, values):
        self.steps.append((stage, step))

    def scores(self, stage, step, values):
        self.scored.append(stage)

    def picture(self, stage, step, pixels, name):
        pass

    def close(self, failed):
        self.ended = failed


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setattr(Noted, "runs", [])
    monkeypatch.setitem(RUNS, "wandb", Noted)
    return Noted.runs


def steps(stage, last):
    return [(stage, step) for step in range(1, last + 1)]


def test_runs_that_cannot_take_back_go_on_or_begin_anew(root, tmp_path, noted):
    out, settings = tmp_path / "out", ('run.track=["wandb", "wandb"]', "cacl.epochs=3")
    killed(root, out, *settings, step=4)
    run(root, out, *settings, stages=TRAINED)
    assert {each.id for each in noted} == {"run-0"}
    assert [step for each in noted for step in each.steps] == steps("warmup", 4) + steps("cacl", 6)
    assert [stage for each in noted for stage in each.scored] == TRAINED
    assert [each.ended for each in noted] == [True, True, False]
    assert noted[0].settings["cacl"]["epochs"] == 3
    # Done again: what stays is told to a new run first, and what takes the place of the rest is not left out.
    run(root, out, *settings, "cacl.alpha=10", stages=TRAINED)
    assert json.loads((out / "trackers.json").read_text()) == {"wandb": "run-3"}
    assert noted[-1].steps == steps("warmup", 4) + steps("cacl", 6)
    assert noted[-1].scored == TRAINED
    run(root, out, *settings, "cacl.alpha=10", stages=TRAINED, resume=False)
    assert (noted[-1].id, noted[-1].steps) == ("run-4", steps("warmup", 4) + steps("cacl", 6))


def test_ablations_are_not_tracked(root, tmp_path, noted):
    config = configure(root, tmp_path / "out", 'run.track=["wandb"]', "warmup.epochs=1", "cacl.epochs=1")
    assert ablate.run(config, tables=["8"], seeds=1, encoder=TinyEncoder(), backbone=TinyBackbone())
    assert not noted


def test_a_run_folder_may_be_tracked_by_its_own_configuration(root, tmp_path):
    out = run(root, tmp_path / "out", "run.progress=false", stages=["warmup"]).out
    assert Config.load(out / "config.toml").run.track == ()
    assert Config.load(out / "config.toml", ['run.track=["tensorboard"]']).run.track == ("tensorboard",)


# What is wrong


def test_an_unknown_tracker_is_one_line_with_the_choices(root, tmp_path):
    with pytest.raises(
        ValueError, match=r"\[run\] track.0: input should be 'tensorboard', 'wandb' or 'mlflow', but got"
    ):
        configure(root, tmp_path, 'run.track=["tensorbord"]')
    with pytest.raises(ValueError, match='`name` to be one of "tensorboard", "wandb", "mlflow"'):
        tracker("tensorbord", tmp_path)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboard.compat.proto.event_pb2"), ("wandb", "wandb"),
                                              ("mlflow", "mlflow")])  # fmt: skip
def test_a_tracker_that_is_missing_is_one_line_at_the_start(name, module, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    settings = [f"data.root={root}", "data.format=csv", "data.train=train", "run.device=cpu", "camnet.weights="]
    settings += [f'run.track=["{name}"]', f"run.out={tmp_path / 'out'}"]
    assert cli.main(["run", "voc", *(word for setting in settings for word in ("--set", setting))]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"cacl: The tracker {name} needs an extra: pip install 'cacl[{name}]' (")
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(ValueError, match=r"^tensorboard: expected a run to write to, but \[Errno 17\]"):
        tracker("tensorboard", tmp_path)


def test_nothing_is_imported_that_was_not_asked_for(root, tmp_path):
    pytest.importorskip("tensorboard")
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import cacl.trackers
from test_pipeline import run
from pathlib import Path
names = ("tensorboard", "tensorflow", "wandb", "mlflow")
for track in ("[]", '["tensorboard"]'):
    run(Path({str(root)!r}), Path({str(tmp_path / "out")!r}), f"run.track={{track}}", stages=["warmup"])
    print([name for name in names if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[]", "['tensorboard']"], done.stderr


# Weights & Biases, offline


def wandb_rows(folder: Path) -> list[dict[str, object]]:
    """The rows of all offline runs that have ended, by the order of their starts."""
    deadline = time.monotonic() + 30
    while True:  # the last ones are written by a process of its own
        runs = [wandb_run(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
        if all(rows and rows[-1]["kind"] == "exit" for rows in runs) or time.monotonic() > deadline:
            return [row for rows in runs for row in rows]
        time.sleep(0.05)


def wandb_run(path: Path) -> list[dict[str, object]]:
    """The rows of one; the frames are those of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows: list[dict[str, object]] = []
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if part not in (1, 4):  # whole, or the last part
            continue
        record, whole = Record.FromString(whole), b""
        kind = str(record.WhichOneof("record_type"))
        items = {"history": record.history.item, "summary": record.summary.update, "config": record.config.update}
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items.get(kind, ())}
        if kind == "run":
            row = {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
        rows.append({**row, "kind": kind})
    return rows


def test_wandb_goes_on_in_one_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    folder, log = tmp_path / "my-run", Log(tmp_path / "my-run/log.jsonl")
    with tracker("wandb", folder, settings={"cacl": {"epochs": 3}}) as callback:
        for record in RECORDS[:5]:
            log.write(record)
            callback(record)
        callback.picture("cacl", 5, np.full((8, 8, 3), 7, np.uint8))
    time.sleep(1.1)  # wandb's folders are called by the second
    with tracker("wandb", folder, records=log.records()) as callback:
        for record in RECORDS[3:]:  # from the checkpoint of step 3 on
            callback(record)
        callback.score("cacl", SCORE)
    monkeypatch.setenv("WANDB_PROJECT", "other")
    time.sleep(1.1)
    with tracker("wandb", folder, records=RECORDS, resume=False):
        pass
    rows = wandb_rows(folder)
    runs = [row for row in rows if row["kind"] == "run"]
    assert [row["project"] for row in runs] == ["cacl", "cacl", "other"]
    assert {row["name"] for row in runs} == {"my-run"}
    assert runs[0]["id"] == runs[1]["id"] != runs[2]["id"]
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": runs[2]["id"]}
    again = rows.index(runs[2])
    for some in (rows[:again], rows[again:]):
        history = [row for row in some if row["kind"] == "history" and "cacl/loss" in row]
        assert [(row["cacl/step"], row["cacl/loss"], row["cacl/share/1"]) for row in history] == [
            (record["step"], pytest.approx(record["loss"]), record["step"]) for record in RECORDS
        ]
    (picture,) = (row for row in rows if row["kind"] == "history" and "cacl/cams/path" in row)
    (file,) = folder.glob(f"wandb/offline-run-*/files/{picture['cacl/cams/path']}")
    assert np.array_equal(np.asarray(Image.open(file)), np.full((8, 8, 3), 7))
    (config,) = (row for row in rows if row["kind"] == "config" and "cacl" in row)
    assert config["cacl"] == {"epochs": 3}
    summary = {name: value for row in rows[:again] if row["kind"] == "summary" for name, value in row.items()}
    assert (summary["cacl/miou"], summary["cacl/iou/boat"]) == (0.5, 0.25)


# MLflow, in a local store


def test_mlflow_goes_on_in_one_run_of_a_local_store(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    from mlflow import MlflowClient

    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "my-run"
    callback = tracker("mlflow", folder, settings={"cacl": {"epochs": 3}, "a": "b"})
    for record in RECORDS[:2]:
        callback(record)
    callback.picture("cacl", 2, np.full((8, 8, 3), 7, np.uint8))
    callback.score("warmup", SCORE)  # what waits is sent with it
    callback(RECORDS[2])  # is lost: a kill
    with tracker("mlflow", folder, records=RECORDS[:5], settings={"cacl": {"epochs": 4, "lr": 0.1}}) as callback:
        for record in RECORDS[3:]:  # from the checkpoint of step 3 on
            callback(record)
        callback.score("cacl", SCORE)
    client, id = MlflowClient(), json.loads((folder / "trackers.json").read_text())["mlflow"]
    experiment = client.get_experiment_by_name("cacl")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.run_name, found.info.status) == (id, "my-run", "FINISHED")
    assert found.data.params == {"cacl.epochs": "3", "a": "b", "cacl.lr": "0.1"}
    for name, value in (("loss", lambda step: 1 / step), ("share/1", lambda step: step)):
        history = sorted((metric.step, metric.value) for metric in client.get_metric_history(id, f"cacl/{name}"))
        assert history == [(record["step"], pytest.approx(value(record["step"]))) for record in RECORDS]
    assert found.data.metrics["cacl/miou"] == 0.5
    assert found.data.metrics["warmup/iou/train _old_"] == 0.75
    (picture,) = (file.path for file in client.list_artifacts(id, "images") if file.path.endswith(".png"))
    shown = np.asarray(Image.open(client.download_artifacts(id, picture, str(tmp_path))))
    assert np.array_equal(shown, np.full((8, 8, 3), 7))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    with pytest.raises(Killed), tracker("mlflow", folder, resume=False):
        raise Killed
    (other,) = client.search_runs([client.get_experiment_by_name("other").experiment_id])
    assert (other.info.run_id != id, other.info.status) == (True, "FAILED")


# All of them, and several processes


@pytest.mark.slow
def test_all_trackers_of_a_run_that_was_killed(root, tmp_path, monkeypatch):
    for name in ("tensorboard", "wandb", "mlflow", "alembic"):
        pytest.importorskip(name)
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    plain = run(root, tmp_path / "plain", "cacl.epochs=4", stages=TRAINED).out
    out, settings = tmp_path / "out", ('run.track=["tensorboard", "wandb", "mlflow"]', "cacl.epochs=4")
    killed(root, out, *settings, step=5)
    run(root, out, *settings, stages=TRAINED)
    assert untracked(out) == untracked(plain)
    client, id = MlflowClient(), json.loads((out / "trackers.json").read_text())["mlflow"]
    rows = wandb_rows(out)
    for stage in TRAINED:
        for name, wanted in logged(out, stage).items():
            if name.endswith("images_per_second"):
                continue  # of a step that was done again, it is the first one's
            assert sorted((m.step, m.value) for m in client.get_metric_history(id, name)) == wanted, name
            history = [row for row in rows if row["kind"] == "history" and name in row]
            assert [(row[f"{stage}/step"], row[name]) for row in history] == wanted, name
        assert close({k: v for k, v in events(out, stage)[0].items() if k in logged(out, stage)}, logged(out, stage))
    assert len({row["id"] for row in rows if row["kind"] == "run"}) == 1


@pytest.mark.slow
def test_of_several_processes_one_tracks(tmp_path):
    pytest.importorskip("tensorboard")
    out, done = chain(2, tmp_path, 'run.track=["tensorboard"]', "cacl.epochs=2", "warmup.epochs=2")
    assert done.returncode == 0, done.stderr
    for stage in TRAINED:
        found, pictures = events(out, stage)
        assert close({k: v for k, v in found.items() if k in logged(out, stage)}, logged(out, stage))
        assert len(list((out / "tensorboard" / stage).iterdir())) == 1
        assert len(pictures[f"{stage}/cams"]) == 2
