"""The benchmarks run, and measure what they say they measure."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from cacl import BackgroundSet, PromptSet, pipeline
from cacl.config import Config
from cacl.datasets import COCO, check_folder, open_dataset
from cacl.images import read_image
from cacl.transforms import RandomView

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_step_runs_and_writes_its_numbers(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    command = [sys.executable, BENCHMARKS / "step.py", "--model", "tiny", "--repeats", "1", "--threads", "1"]
    done = subprocess.run([*command, "--json", file], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["relative_error"].keys() == {"loss", "gradient"}
    assert max(result["relative_error"].values()) < 1e-4
    assert list(result["steps"]) == ["encoder", "cacl", "naive"]
    for row in result["steps"].values():
        assert row.keys() == {"ms", "max/min", "GFLOP", "GB", "GFLOP/s", "GB/s"}
        assert min(row.values()) > 0
    gflop = {name: row["GFLOP"] for name, row in result["steps"].items()}
    assert gflop["cacl"] == gflop["encoder"]  # two images a pair, no text, no gradient of a weight
    assert gflop["naive"] > 4 * gflop["cacl"]
    assert result["ratios"].keys() == {"cacl/encoder", "naive/cacl"}
    assert [(cell["m"], cell["n"]) for cell in result["grid"]] == [(m, n) for m in (1, 4, 8) for n in (3, 5, 7)]
    for line in ("cacl/encoder", "naive/cacl", "m = 8"):
        assert line in done.stdout


def test_step_naive_equals_cacl_in_float64() -> None:
    step = load("step")
    torch.manual_seed(6)  # both templates get chosen; some background words pass the threshold, some do not
    encoder = step.build_encoder("tiny")
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # CLIP's own computes in float32
    loss = step.build_loss(encoder, m=2, n=3).double()
    images, cams, labels = step.random_batch(3, 5, "cpu")
    images, cams = images.double(), cams.detach().double().requires_grad_()
    terms = loss(images, cams, labels)
    reference = step.naive(encoder.model, images, cams, labels, PromptSet(step.TEMPLATES[:2]), BackgroundSet.voc(3))
    assert 0 < terms.pass_rate < 1
    torch.testing.assert_close(terms.total, reference, rtol=1e-6, atol=0)
    gradient, expected = (torch.autograd.grad(value, cams)[0] for value in (terms.total, reference))
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_step_times_nothing_when_naive_and_cacl_differ() -> None:
    step = load("step")
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    steps = {"encoder": lambda: (one, one), "cacl": lambda: (one, one), "naive": lambda: (one, two)}
    with pytest.raises(SystemExit, match="cacl and naive differ"):
        step.measure(steps, 1, "cpu")


def test_loading_measures_the_same_view(tmp_path: Path) -> None:
    """Pillow and numpy give what ``RandomView`` gives: the benchmark compares like with like."""
    loading = load("loading")
    path = loading.draw_photos(tmp_path, 1)[0]

    class Middle(random.Random):
        def uniform(self, a, b):
            return 1.0

        def random(self):
            return 0.9

        def randint(self, a, b):
            return 0

    ours, _ = RandomView(128, scale=(1, 1), flip=0)(read_image(path), generator=torch.Generator().manual_seed(0))
    theirs = loading.plain(path, 128, Middle())
    rows = (ours != 0).any(0).any(1).nonzero()[:, 0]
    assert len(rows) == 96
    assert (ours[:, rows] - theirs[:, :96]).abs().mean() < 0.02


def test_loading_runs_and_writes_its_numbers(tmp_path: Path) -> None:
    out = tmp_path / "loading.json"
    command = [sys.executable, str(BENCHMARKS / "loading.py"), "--images", "16", "--crop", "64", "--repeats", "1"]
    subprocess.run([*command, "--json", str(out)], check=True, capture_output=True)
    data = json.loads(out.read_text())
    assert set(data) == {"images_per_second", "ratio", "seconds"}
    assert data["ratio"] > 0


def test_stages_runs_and_writes_its_numbers(tmp_path: Path) -> None:
    out = tmp_path / "stages.json"
    command = [sys.executable, str(BENCHMARKS / "stages.py"), "--size", "40", "60", "--count", "1", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    data = json.loads(out.read_text())
    wanted = {"label mining, torch", "IRNet, a training step at 512×512", "random walk", "masks, torch"}
    assert wanted <= set(data["steps"])
    assert all(row["ms"] > 0 and row["MB"] >= 0 for row in data["steps"].values())


@pytest.mark.slow
def test_predict_measures_both_and_they_agree(tmp_path: Path) -> None:
    file = tmp_path / "predict.json"
    command = [sys.executable, BENCHMARKS / "predict.py", "--backbone", "resnet18", "--size", "60", "80"]
    command += ["--count", "3", "--rounds", "1", "--no-crf", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["same"] > 0.999
    assert list(result["runs"]) == ["plain loop", "cacl predict"]
    assert all(row["seconds"] > 0 and row["MB"] > 100 for row in result["runs"].values())
    assert "times as fast" in done.stdout


@pytest.mark.slow
def test_coco_runs_and_writes_its_numbers(tmp_path: Path) -> None:
    file = tmp_path / "coco.json"
    command = [sys.executable, BENCHMARKS / "coco.py", "--images", "60", "--steps", "4", "--crop", "32"]
    done = subprocess.run([*command, "--json", file], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert row["cacl"]["images"] == row["plain"]["images"] == 60
    assert all(row[name]["seconds"] > 0 and row[name]["MB"] > 0 for name in ("cacl", "plain"))
    for kind in ("train", "train, objects"):
        assert row[kind]["first step"] > 0
        assert len(row[kind]["main MB"]) == len(row[kind]["workers MB"]) == 3
        assert min(row[kind]["main MB"] + row[kind]["workers MB"]) > 0
    assert "own of 2 workers" in done.stdout


def test_coco_draws_photos_without_a_problem(tmp_path: Path) -> None:
    coco = load("coco")
    coco.draw(tmp_path, 200)
    assert check_folder(tmp_path, format="coco") == []
    for split, count in (("train", 150), ("val", 50)):
        data = COCO(tmp_path, split)
        assert len(data) == count
        assert data.classes == coco.NAMES
        shown = {k for entry in data.entries for k in entry.labels}
        assert len(shown) == 80
        assert not all(entry.labels for entry in data.entries)
        assert any(255 in data.mask(i) for i in range(8))


def test_coco_plain_has_the_same_labels(tmp_path: Path) -> None:
    coco = load("coco")
    coco.write_like_coco(tmp_path, 30)
    ours, theirs = COCO(tmp_path, "train"), coco.Plain(tmp_path)
    assert [(str(entry.image), list(entry.labels)) for entry in ours.entries] == theirs.samples
    assert all(255 >= ours.mask(i).max() > 0 for i in range(30) if theirs.annotations[i])


@pytest.mark.slow
def test_chain_goes_through_every_stage(tmp_path: Path) -> None:
    file = tmp_path / "chain.json"
    small = ["--images", "6", "--val", "2", "--steps", "3", "--batch-size", "2", "--workers", "0"]
    command = [sys.executable, BENCHMARKS / "chain.py", "--tiny", *small, "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    stages = json.loads(file.read_text())["stages"]
    assert list(stages) == ["warmup", "cacl", "cams", "irn", "masks", "segment", "predict"]
    assert all(value > 0 for row in stages.values() for value in row.values())
    # 20 epochs of 10 582 images at the measured rate
    hours = 20 * 10582 / stages["cacl"]["training images/s"] / 3600
    assert stages["cacl"]["hours of a VOC run"] == pytest.approx(hours)


@pytest.mark.parametrize("split", ["val", "train"])
def test_ceiling_of_masks_that_are_true_is_what_the_run_has(tmp_path: Path, split: str) -> None:
    ceiling = load("ceiling")
    short = [
        "scenes.train=6",
        "scenes.val=3",
        "scenes.size=48",
        "cams.scales=[1.0]",
        "segment.batch_size=2",
        f"predict.split={split}",
    ]
    short += [f"{stage}.epochs={epochs}" for stage, epochs in (("warmup", 1), ("cacl", 0.5), ("segment", 4))]
    config = Config.load("scenes", [f"run.out={tmp_path}", f"data.root={tmp_path / 'data'}", "run.workers=0", *short])
    pipeline.run(config, stages=["warmup", "cacl", "cams", "masks"])
    ceiling.write_truth(open_dataset("scenes", tmp_path / "data", "train"), tmp_path / "masks" / "train")
    pipeline.run(config, stages=["segment", "tags", "predict"])
    found = ceiling.compare(tmp_path)
    assert found["images"] == 6
    assert found["pseudo_masks"] == 1
    for name, stage in (("network", "segment"), ("crf", "predict")):
        known = json.loads((tmp_path / "metrics.json").read_text())[stage]["miou"]
        assert found[name]["pseudo"] == known > 0
        assert found[name]["true"] == pytest.approx(known, abs=1e-6)  # metrics.json has six digits
        assert found[name]["share"] == pytest.approx(1, abs=1e-4)


@pytest.mark.posix
@pytest.mark.slow
def test_what_a_gpu_will_run_runs_through(tmp_path):
    command = ["bash", BENCHMARKS / "on_gpu.sh", tmp_path / "out", "--small"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ("machine", "step", "inference", "walk", "crf", "stages", "chain")
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == set(parts)
    table = (tmp_path / "out/table.md").read_text()
    assert all(f"## {part}\n" in table for part in parts)
    assert "| ratios / cacl/encoder |" in table
    inference = json.loads((tmp_path / "out/inference.json").read_text())
    for name in ("CAMs", "segmenter"):
        assert inference[name]["same_pixels"] > 0.99
        assert inference[name]["fp32_ms"] > 0


@pytest.mark.posix
@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_rest(tmp_path):
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase "$1" in *walk.py) exit 3 ;; esac\nexec "{sys.executable}" "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    command = ["bash", BENCHMARKS / "on_gpu.sh", tmp_path / "out", "--small"]
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "walk: exit code 3" in done.stdout
    assert (tmp_path / "out/chain.json").is_file()


def test_start_begins_a_run_twice(tmp_path: Path) -> None:
    file = tmp_path / "start.json"
    command = [sys.executable, BENCHMARKS / "start.py", "--images", "40", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert rows.pop("images") == 40
    assert list(rows) == ["list", "list, every file looked at", "run, new", "run, again"]
    assert all(row["seconds"] > 0 and row["MB"] > 50 for row in rows.values())
    assert "| run, again |" in done.stdout
