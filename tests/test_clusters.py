"""The scripts of the page on clusters, as a machine without Slurm can run them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from drawn import write_csv
from PIL import Image

from cacl.deeplab import DeepLabV2
from cacl.photos import save_segmenter
from cacl.predict import predict

pytestmark = pytest.mark.posix
PAGE = Path(__file__).parents[1] / "docs/how-to/clusters.md"


@pytest.fixture
def place(tmp_path):
    """A folder with the page's scripts, and commands of its own in its PATH."""
    for name, script in re.findall(
        r'^```bash title="([\w.]+)"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL
    ):
        (tmp_path / name).write_text(script)
    commands = {
        "cacl": f'exec "{sys.executable}" -m cacl "$@"',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
        "scontrol": 'echo "$@" >> scontrol.txt',
    }
    (tmp_path / "bin").mkdir()
    for name, line in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def environment(place, **more):
    return {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}


def masks(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.slow
def test_an_array_makes_all_masks_and_goes_on(place):
    torch.manual_seed(0)
    write_csv(place / "photos", train=6, val=2)
    net = DeepLabV2(3, backbone="scenes", weights=None)
    save_segmenter(place / "model.pt", net, ("boat", "train"), "scenes")
    script = (place / "predict.sbatch").read_text().replace("my-run", "model.pt")
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())
    (place / "predict.sbatch").write_text(script.replace("--keep", "--keep --workers 0 --no-crf"))
    for number in (1, 2):  # of two jobs in place of eight
        array = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1"}
        command = ["bash", "predict.sbatch"]
        done = subprocess.run(
            command, cwd=place, env=environment(place, **array), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f"part {number} of 2: " in done.stdout
    assert (first, last) == (1, 8)
    predict(place / "model.pt", [place / "photos/images"], place / "one", crf=False, workers=0)
    assert len(masks(place / "one")) == 8
    assert masks(place / "masks") == masks(place / "one")
    (place / "masks/1.png").unlink()
    again = subprocess.run(
        ["bash", "predict.sbatch"], cwd=place, env=environment(place), capture_output=True, text=True, check=False
    )
    assert "1 mask in masks, 7 kept" in again.stdout


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_is_queued_again_and_goes_on(place):
    write_csv(place / "photos", train=6, val=2)
    (place / "config.toml").write_text(
        'base = "voc"\n[run]\nout = "run"\ndevice = "cpu"\nprecision = "fp32"\nworkers = 0\n'
        '[data]\nformat = "csv"\nroot = "photos"\ntrain = "train"\neval = ""\n'
        '[camnet]\nbackbone = "scenes"\nweights = ""\n[warmup]\nepochs = 4000\nbatch_size = 2\ncrop = 32\n'
    )
    script = (place / "run.sbatch").read_text()
    (place / "run.sbatch").write_text(script.replace("config.toml", "config.toml --stages warmup"))
    log = place / "run/log.jsonl"

    def steps():
        return [int(n) for n in re.findall(r'"step": (\d+)', log.read_text())] if log.is_file() else []

    for before in (0, 1):
        known, deadline = len(steps()), time.monotonic() + 120
        job = subprocess.Popen(
            ["bash", "run.sbatch"], cwd=place, env=environment(place, SLURM_GPUS_ON_NODE="2", SLURM_JOB_ID="77"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while len(steps()) < known + 3:
            assert job.poll() is None, job.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=120) != 0
        assert (place / "scontrol.txt").read_text() == "requeue 77\n" * (before + 1)
    assert steps() == list(range(1, len(steps()) + 1))  # it went on: no step twice, none missing


@pytest.mark.slow
def test_ray_over_the_exported_file(place):
    pytest.importorskip("ray.data")
    torch.manual_seed(0)
    from cacl.export import export_segmenter
    from cacl.photos import load_segmenter

    write_csv(place / "photos", train=3, val=1)
    net = DeepLabV2(3, backbone="scenes", weights=None)
    save_segmenter(place / "model.pt", net, ("boat", "train"), "scenes")
    export_segmenter(load_segmenter(place / "model.pt"), place / "segmenter.pt2")
    script = PAGE.parents[2] / "examples/ray_predict.py"
    command = [sys.executable, str(script), "segmenter.pt2", "photos/images", "--out", "masks", "--workers", "2"]
    done = subprocess.run(command, cwd=place, env=environment(place), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("4 masks\n")
    predict(place / "model.pt", [place / "photos/images"], place / "one", crf=False, workers=0)
    for path in (place / "one").glob("*.png"):
        assert Image.open(place / "masks" / path.name).tobytes() == Image.open(path).tobytes()
