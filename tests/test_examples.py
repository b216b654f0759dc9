"""The examples run as they stand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn import picture, write_voc

ROOT = Path(__file__).parents[1]


def example(name, *arguments, cwd):
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("name", "most"), [("train_voc.py", 100), ("drop_in.py", 60)])
def test_examples_stay_short(name, most):
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= most


def test_drop_in_finds_the_squares(tmp_path):
    lines = example("drop_in.py", cwd=tmp_path).splitlines()
    first, last = (float(line.split()[-1]) for line in (lines[0], lines[-1]))
    assert last > first + 0.3


def test_own_encoder(tmp_path):
    assert "foreground_similarity" in example("own_encoder.py", cwd=tmp_path)


def test_train_voc_and_its_resume(tmp_path, clip_state):
    write_voc(tmp_path / "voc")
    torch.save(clip_state, tmp_path / "clip.pt")
    small = ("--backbone", "resnet18", "--weights", "", "--crop", 32, "--batch-size", 2, "--epochs", 1, "--workers", 0)
    arguments = ("--data-root", "voc", "--out", "out", "--encoder", "clip.pt", "--warmup-epochs", 1, *small)
    out = example("train_voc.py", *arguments, cwd=tmp_path)
    assert re.search(r"CAM mIoU \d+\.\d % \(train, 4 images, background score 0.15, no CRF\)", out)
    assert len(list((tmp_path / "out/cams").iterdir())) == 4
    assert example("train_voc.py", *arguments, cwd=tmp_path) == out


def test_custom_dataset(tmp_path, clip_state):
    torch.save(clip_state, tmp_path / "clip.pt")
    for k, name in enumerate(("boat", "train")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            picture(3 * i + k, (48, 64))[0].save(tmp_path / f"photos/{name}/{i}.jpg")
    (tmp_path / "words.json").write_text('{"boat": ["water"], "train": ["rails", "gravel"]}')
    settings = [
        "encoder.name=clip.pt", "camnet.backbone=resnet18", "camnet.weights=", "run.workers=0", "cams.scales=[1.0]",
        "warmup.epochs=1", "warmup.crop=32", "warmup.batch_size=2", "cacl.epochs=1", "cacl.crop=32",
        "cacl.batch_size=2", "segment.backbone=", "segment.weights=cacl", "segment.epochs=1", "segment.crop=32",
        "segment.batch_size=2",
    ]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    example("custom_dataset.py", "photos", "--words", "words.json", *options, cwd=tmp_path)
    assert len(list((tmp_path / "my-run/cams/train").rglob("*.npz"))) == 4
    (tmp_path / "photos/boat/0.jpg").write_text("broken")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/custom_dataset.py"), "photos", "--words", "words.json"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "boat/0.jpg: not an image that decodes" in done.stderr


def test_no_path_of_a_machine_in_the_project():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run(
        [git, "grep", "-nE", "/(home|Users)/[a-z]", "--", "cacl", "examples", "docs"], cwd=ROOT, check=False
    )
    assert done.returncode == 1
