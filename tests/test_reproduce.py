"""`cacl reproduce` on stand-ins of VOC and COCO: counted, rehearsed, run, resumed, written down without a name."""

from __future__ import annotations

import getpass
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_voc
from PIL import Image
from test_coco import example
from test_coco import write as write_coco
from test_pipeline import files

from cacl import rehearsal, reproduce, reproduction
from cacl.cli import main
from cacl.config import Config
from cacl.datasets import VOC
from cacl.metrics import ConfusionMatrix
from cacl.mining import refine_maps
from cacl.paper_tables import EXPERIMENTS, experiment
from cacl.rehearsal import Speed

ROOT = Path(__file__).parents[1]
SMALL = [
    "run.device=cpu", "run.workers=0", "cams.scales=[1.0]", "cams.flip=false", "irn.radius=4", "segment.backbone=",
    *(f"{stage}.{setting}" for stage in ("warmup", "cacl", "irn", "segment")
      for setting in ("epochs=1", "batch_size=2", "crop=32", "lr=0.01")),
]  # fmt: skip
STAGES = ["warmup", "cacl", "cams", "irn", "masks", "segment", "predict"]


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Six photos to train on, three of which are of the split ``train``, and two others."""
    root = write_voc(tmp_path_factory.mktemp("voc") / "VOC2012", train=6, val=2)
    names = root / "ImageSets/Segmentation/train.txt"
    names.write_text("\n".join(names.read_text().split()[::2]))
    return root


def run(root, out, *more, **arguments):
    given = {"encoder": TinyEncoder(), "backbone": TinyBackbone(), "any_data": True, **arguments}
    return reproduce.run("voc", experiment("voc", root, out, [*SMALL, *more]), **given)


@pytest.fixture(scope="module")
def whole(voc, tmp_path_factory):
    """(run folder, its record) of a run that nobody has stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(voc, out)


def test_every_stage_has_what_the_paper_says_and_what_was_found(whole):
    out, record = whole
    assert json.loads((out / "reproduce.json").read_text()) == json.loads(json.dumps(record))
    assert list(record["stages"]) == STAGES
    assert not (out / "rehearsal").exists()
    expected = {stage: entry["expected"]["miou"] for stage, entry in record["stages"].items() if entry["expected"]}
    assert expected == {"cacl": 0.644, "masks": 0.76, "predict": 0.718}
    metrics, costs = (json.loads((out / name).read_text()) for name in ("metrics.json", "times.json"))
    kinds = {}
    for stage, entry in record["stages"].items():
        score = entry["found"]
        kinds[stage] = (score["split"], score["images"], score["crf"], score["background_score_chosen"])
        assert entry["hours"] == pytest.approx(costs[stage]["seconds"] / 3600, abs=1e-4)
        assert entry["memory_mb"] == costs[stage]["memory_mb"]
        if stage != "masks":
            assert score["miou"] == metrics[stage]["miou"]
    assert kinds == {
        "warmup": ("train", 3, False, "fixed"),
        "cacl": ("train", 3, False, "fixed"),
        "cams": ("train_aug", 6, False, "fixed"),
        "irn": ("train_aug", 6, True, "fixed"),
        "masks": ("train", 3, True, "fixed"),
        "segment": ("val", 2, False, None),
        "predict": ("val", 2, True, None),
    }


def test_pseudo_masks_are_scored_on_the_papers_split(whole, voc):
    """Those of 1 464 images, though the stage makes and scores those of all 10 582: here by hand."""
    out, record = whole
    train = VOC(voc, "train")
    matrix = ConfusionMatrix(20)
    for i, entry in enumerate(train.entries):
        walked, photo = np.load(out / f"masks/walk/{entry.id}.npz"), np.array(Image.open(entry.image))
        matrix.update(train.mask(i).numpy(), refine_maps(photo, walked["classes"], walked["maps"], [0.25])[0])
    assert record["stages"]["masks"]["found"]["miou"] == pytest.approx(np.nanmean(matrix.iou), abs=1e-6)


def test_the_record_has_no_path_no_host_and_no_user(whole, voc, tmp_path):
    weights = tmp_path / "secret-name.pth"
    torch.save(TinyBackbone().state_dict(), weights)
    more = [f"segment.weights={weights}", f"masks.regions={tmp_path}"]
    config = experiment("voc", voc, tmp_path / "out", [*SMALL, *more])
    settings = reproduction.what_is_run("voc", reproduce.Session(config, planning=True), any_data=True)["settings"]
    assert re.fullmatch("sha256 [0-9a-f]{64}", settings["segment"]["weights"])
    assert settings["masks"]["regions"] == "a folder"
    text = (whole[0] / "reproduce.json").read_text() + json.dumps(settings)
    for secret in (str(voc), str(whole[0]), str(Path.home()), str(tmp_path), "secret-name", platform.node()):
        assert secret not in text, secret
    assert not re.search(rf'"[^"]*\b{re.escape(getpass.getuser())}\b[^"]*"', text)
    assert not re.search(r'"(/|[A-Z]:\\)', text)


def test_the_summary_says_what_is_not_the_papers(whole):
    record = whole[1]
    lines = reproduction.summary(record).splitlines()
    miou = 100 * record["stages"]["cacl"]["found"]["miou"]
    wanted = f"cacl: CAM {miou:.1f} % (train, 3 images, background score 0.15, no CRF); the paper 64.4 % (table 1); "
    assert lines[1].startswith(wanted)
    assert any(line.startswith("test: the paper has 71.9 %") for line in lines)
    assert any(
        line.startswith("not the paper's setting: ") and "warmup.epochs = 1.0 instead of 5.0" in line for line in lines
    )
    assert any(line.startswith("not the paper's data: split train_aug: expected 10582 images") for line in lines)
    plain = {**record, "changed": {}, "data": {**record["data"], "problems": []}}
    assert "the paper's setting" in reproduction.summary(plain).splitlines()


def test_only_what_changes_the_result_is_a_change(tmp_path):
    def changed(name, *overrides):
        return list(reproduction.changes(name, experiment(name, tmp_path, tmp_path, overrides)))

    for name in EXPERIMENTS:
        assert changed(name, "run.device=cpu", "run.workers=0", "data.sample=5", "cacl.alpha=40.0") == []
    assert changed("voc", "cacl.alpha=5", "segment.weights=IMAGENET1K_V1") == ["cacl.alpha"]
    assert changed("coco", "segment.weights=IMAGENET1K_V1", "data.eval=train") == ["data.eval", "segment.weights"]


def test_the_settings_are_the_papers(tmp_path):
    """Iterations, batches and rates by section 4.1 of the paper, at the field's numbers of images."""
    for name, iterations, split in (("voc", 40000, "train_aug"), ("coco", 100000, "train")):
        config = experiment(name, tmp_path)
        assert config.segment.lr == 0.005
        assert config.segment.batch_size == 10
        images = EXPERIMENTS[name].images[split]
        assert config.segment.epochs * images / 10 == pytest.approx(iterations, rel=0.005)
        cacl = (config.cacl.epochs, config.cacl.batch_size, config.cacl.lr, config.cacl.weight_decay, config.cacl.crop)
        assert cacl == (20, 16, 2.5e-4, 1e-4, 512)


def test_again_it_does_nothing_again(whole, voc, monkeypatch):
    out, record = whole
    before = files(out)
    monkeypatch.setattr(rehearsal, "rehearse", None)
    seen = []
    assert run(voc, out, callback=seen.append) == json.loads(json.dumps(record))
    assert seen == []
    assert files(out) == before


def test_what_changed_is_recorded_anew(whole, voc, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")
    again = run(voc, out, "predict.iterations=1")
    assert again["changed"]["predict.iterations"] == [1, 10]
    for stage in STAGES[:-1]:
        assert again["stages"][stage]["found"] == whole[1]["stages"][stage]["found"]


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}]
from test_reproduce import run
run({root!r}, {out!r}, *{settings!r})
"""


def found(record):
    return json.loads(json.dumps({stage: entry["found"] for stage, entry in record["stages"].items()}))


@pytest.mark.parametrize("stage", ["rehearsal", "segment"])
def test_stopped_it_goes_on(whole, voc, tmp_path, stage, monkeypatch):
    def stop(record):
        if record["stage"] == stage and record["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stage == "rehearsal":
            patch.setattr(rehearsal, "speeds_of", lambda *_: stop({"stage": "rehearsal", "step": 2}))
        with pytest.raises(KeyboardInterrupt):
            run(voc, tmp_path / "out", callback=stop)
    begun = json.loads((tmp_path / "out/reproduce.json").read_text()) if stage == "segment" else None
    seen = []
    record = run(voc, tmp_path / "out", callback=seen.append)
    assert found(record) == found(whole[1])
    assert not (tmp_path / "out/rehearsal").exists()
    if begun:
        assert list(begun["stages"]) == STAGES[:5]
        assert {each["stage"] for each in seen} == {"segment"}
        assert record["rehearsal"] == begun["rehearsal"]
        assert len(record["machines"]) == 1


@pytest.mark.slow
def test_killed_and_started_again_it_finds_the_same(voc, tmp_path):
    settings = ["run.checkpoint_seconds=0", "cacl.epochs=20"]
    wanted = run(voc, tmp_path / "whole", *settings)
    out = tmp_path / "out"
    script = SCRIPT.format(tests=str(Path(__file__).parent), root=str(voc), out=str(out), settings=settings)
    log = out / "log.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.is_file() and log.read_text().count('"stage": "cacl"') >= 5):
        time.sleep(0.002)
    process.kill()
    assert process.wait() != 0
    assert subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert found(json.loads((out / "reproduce.json").read_text())) == found(wanted)


@pytest.fixture
def small_clip(clip_state, tmp_path):
    """Options of a command, for networks that need no download."""
    torch.save(clip_state, tmp_path / "clip.pt")
    settings = [*SMALL, f"encoder.name={tmp_path / 'clip.pt'}", "camnet.backbone=scenes", "camnet.weights="]
    return [part for setting in settings for part in ("--set", setting)]


def test_the_command(voc, tmp_path, small_clip, capsys):
    arguments = ["reproduce", "voc", "--data-root", str(voc), "--out", str(tmp_path / "out"), "--no-progress"]
    assert main([*arguments, *small_clip]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "cacl: split train_aug: expected 10582 images, but got 6",
        "split train: expected 1464 images, but got 3",
        "split val: expected 1449 images, but got 2 (--any-data takes the data as they are)",
    ]
    assert not (tmp_path / "out").exists()
    assert main([*arguments, *small_clip, "--check", "--any-data"]) == 0
    plan = capsys.readouterr().out
    assert "split train_aug: 6 images, 8 labels\n" in plan
    wanted = "masks: the paper has 76.0 % (pseudo masks, split train, CRF; table 1); hours unknown until measured\n"
    assert wanted in plan
    assert "encoder.name = sha256 " in plan
    assert not (tmp_path / "out").exists()
    assert main([*arguments, *small_clip, "--any-data"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"result: {tmp_path / 'out/reproduce.json'}"
    before, after = (captured.err.index(text) for text in ("masks: the paper has 76.0 %", "masks: pseudo masks "))
    assert re.match(r"masks: .*; table 1\); some [\d.e-]+ hours\n", captured.err[before:])
    assert before < captured.err.index("masks: finished in", before)
    assert after < captured.err.index("segment: the paper has no figure")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["voc", "--data-root", "nowhere"], "nowhere/ImageSets/Segmentation"),
        (["voc", "--data-root", ".", "--set", "cacl.alpa=1"], 'voc: [cacl] alpa: unknown key; did you mean "alpha"?'),
        (["coco", "--data-root", "nowhere"], "nowhere/annotations: expected split 'train'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("cacl: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_coco(tmp_path):
    pytest.importorskip("pycocotools")
    data = example()
    for split in ("train2014", "val2014"):
        for image in data["images"]:
            image["file_name"] = f"{split}-{image['id']}.jpg"
        write_coco(tmp_path / "coco", data, split)
    config = experiment("coco", tmp_path / "coco", tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="split train: expected 82783 images, but got 4") as error:
        reproduce.plan("coco", config)
    lines = str(error.value).splitlines()
    assert lines[1:2] == ["split val: expected 40504 images, but got 4"]
    assert lines[2].startswith("classes: expected the 80 of the paper, but got 3; one has not: ")
    record = reproduce.run("coco", config, any_data=True, encoder=TinyEncoder(), backbone=TinyBackbone())
    assert {stage: entry["expected"] and entry["expected"]["miou"] for stage, entry in record["stages"].items()} == {
        **dict.fromkeys(STAGES), "predict": 0.439
    }  # fmt: skip
    score = record["stages"]["predict"]["found"]
    assert (score["split"], score["images"], score["crf"]) == ("val", 4, True)
    assert "test:" not in reproduction.summary(record)


def test_hours_follow_from_what_was_measured(tmp_path):
    """As by hand: 30 steps of 2 images at 4 images a second, and 9 s for 3 files."""
    config = Config.load("voc", ["data.root=.", f"run.out={tmp_path}", "irn.batch_size=2", "irn.epochs=3"])
    records = [{"stage": "irn", "step": i, "images_per_second": 1.0 if i < 10 else 4.0} for i in range(30)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    seconds = 10 * 2 / 1 + 20 * 2 / 4  # of the steps
    costs = {stage: {"seconds": 9.0} for stage in STAGES} | {"irn": {"seconds": seconds + 9}}
    (tmp_path / "times.json").write_text(json.dumps(costs))
    speeds = rehearsal.speeds_of(config, {"train": 3, "segmented": 9})
    assert speeds["irn"] == Speed(4.0, pytest.approx(1 / 3))
    assert speeds["irn"].hours(config.irn, 7200) == pytest.approx(3 * 7200 / 4 / 3600 + 7200 * 3 / 3600)
    assert speeds["predict"] == Speed(None, 1.0)
    assert speeds["warmup"] == Speed(None, None)


def test_the_rehearsal_is_of_the_runs_own_photos(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "IMAGES", {"train": 4, "segmented": 1})
    seen = []
    config = experiment("voc", voc, tmp_path / "out", SMALL)
    monkeypatch.setattr(rehearsal.shutil, "rmtree", lambda place: seen.append(place))
    speeds = rehearsal.rehearse(config, precision="fp32", encoder=TinyEncoder(), backbone=TinyBackbone())
    assert list(speeds) == STAGES
    (place,) = seen
    photos = {path.read_bytes() for path in place.glob("*.jpg")}
    assert photos < {path.read_bytes() for path in (voc / "JPEGImages").iterdir()}
    assert len(photos) == 5
    rows = (place / "dataset.csv").read_text().splitlines()
    shown = [row.split(",")[1] for row in rows[1:]]
    assert rows[1:5] == [f"train-{i}.jpg,{names},,train" for i, names in enumerate(shown[:4])]
    assert rows[5:] == [f"segmented-0.jpg,{shown[4]},,segmented"]
    assert shown[:2] == ["boat", "train"]  # photos 0 and 1 of six


@pytest.mark.slow
def test_two_processes_write_one_record(voc, tmp_path, small_clip):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cacl"]
    command += ["reproduce", "voc", "--data-root", str(voc), "--out", str(tmp_path / "out"), *small_clip]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert done.stderr.count("cacl: split train_aug: expected 10582 images, but got 6\n") == 1
    done = subprocess.run([*command, "--any-data"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("result: ") == 1
    record = json.loads((tmp_path / "out/reproduce.json").read_text())
    assert record["machines"][0]["processes"] == 2
    assert list(record["stages"]) == STAGES
    assert record["stages"]["masks"]["found"]["images"] == 3


def test_the_page_has_the_figures():
    """Each stands in one place of the code, and in one table of the documentation."""
    page = (ROOT / "docs/how-to/reproduce.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| ([^|]+) \| `(\w+)` \| (yes|no) \| ([\d.]+) \| (\d) \|$", page, re.MULTILINE
    )
    wanted = [
        (name, stage, figure.what, figure.split, "yes" if figure.crf else "no", str(figure.miou), str(figure.table))
        for name, paper in EXPERIMENTS.items()
        for stage, figure in paper.figures.items()
    ]
    assert rows == wanted
