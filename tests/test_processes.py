"""Two and three processes against one: gradients, weights, files, and what happens when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn import write_csv
from processes import NAMES
from test_pipeline import files

from cacl.stages.chain import CHAIN

HERE = Path(__file__).parent


def launch(processes: int, *arguments: object):
    """A script or module, run by torchrun, or by itself for one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """9 images in batches of 5, which are no multiple of 2 or 3; four images have no label."""
    root = write_csv(tmp_path_factory.mktemp("processes") / "data", train=9)
    rows = [row.split(",") for row in (root / "dataset.csv").read_text().splitlines()]
    for number in (2, 4, 5, 8):
        rows[number][1] = ""
    (root / "dataset.csv").write_text("\n".join(",".join(row) for row in rows))
    return root


@pytest.fixture(scope="module")
def trained(data):
    """(processes, rank) -> what came of every training."""
    found = {}
    for processes in (1, 2, 3):
        done = launch(processes, HERE / "processes.py", data, data.parent)
        assert done.returncode == 0, done.stderr
        for rank in range(processes):
            found[processes, rank] = torch.load(data.parent / f"{processes}-{rank}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_and_weights_are_those_of_one_process(trained, processes, name):
    one = trained[1, 0][name]
    assert all(gradient.abs().max() > 0 for gradient in one["gradients"][0].values())
    for rank in range(processes):
        own = trained[processes, rank][name]
        # Before the first update all have the same weights; parameters that no step uses have no gradient anywhere.
        torch.testing.assert_close(own["gradients"][0], one["gradients"][0], rtol=0, atol=1e-6)
        assert [set(step) for step in own["gradients"]] == [set(step) for step in one["gradients"]]
        torch.testing.assert_close(own["weights"], one["weights"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("processes", [2, 3])
def test_logs_theta_and_counts_are_the_same_everywhere(trained, processes, name):
    one, first = trained[1, 0][name], trained[processes, 0][name]
    for rank in range(1, processes):
        other = trained[processes, rank][name]
        assert other["records"] == first["records"]
        if name.startswith("cacl"):
            torch.testing.assert_close(other["weights"][1], first["weights"][1], rtol=0, atol=0)
    for record, wanted in zip(first["records"], one["records"], strict=True):
        flat = [x for value in record.values() for x in (value if isinstance(value, list) else [value])]
        flat_wanted = [x for value in wanted.values() for x in (value if isinstance(value, list) else [value])]
        assert flat[1:] == pytest.approx(flat_wanted[1:], rel=1e-4, abs=1e-5)


def test_the_processes_had_unequal_shares(trained):
    """Without this the others would show little."""
    for processes in (2, 3):
        pairs = [trained[processes, rank]["cacl-soft"]["pairs"] for rank in range(processes)]
        assert any(len(set(step)) > 1 for step in zip(*pairs, strict=True))
        assert any(0 in step and any(step) for step in zip(*pairs, strict=True))
    for mode in ("fixed", "soft", "quantile"):
        records = trained[1, 0][f"cacl-{mode}"]["records"]
        assert all(record["bgs"] > 0.01 and 0 < record["pass_rate"] < 1 for record in records)
    assert trained[1, 0]["cacl-soft"]["records"][-1]["threshold"] != pytest.approx(-0.1)
    assert trained[1, 0]["cacl-quantile"]["records"][-1]["threshold"] != pytest.approx(-0.1)


SMALL = [
    "scenes.train=11", "scenes.val=2", "scenes.size=64", "run.workers=0", "run.device=cpu", "warmup.epochs=0",
    "cacl.epochs=0", "irn.epochs=0", "segment.epochs=0", "masks.iterations=2", "report.images=2",
    "masks.affinity=irn",
]  # fmt: skip


def chain(processes: int, root: Path, *settings: str):
    options = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    out = root / f"out{processes}"
    return out, launch(
        processes,
        "-m",
        "cacl",
        "run",
        "scenes",
        "--set",
        f"data.root={root / 'data'}",
        "--set",
        f"run.out={out}",
        *options,
    )


def test_where_nothing_is_trained_every_file_is_the_same_byte_for_byte(tmp_path):
    results = {processes: chain(processes, tmp_path) for processes in (2, 1, 3)}
    wanted = files(results[1][0])
    made = [name for name in wanted if name.endswith((".npz", ".png"))]
    parents = {str(parent) for name in made for parent in Path(name).parents}
    folders = {f"{stage.name}/{folder}" for stage in CHAIN for folder in stage.files}
    assert folders - {"predict/train", "cams/cacl"} <= parents  # there is a split to predict, and nothing to compare
    assert "tags/model.pt" in wanted
    # What judges the masks without masks is the same too, also where a process has no image.
    assert {f"{stage.name}/agreement.json" for stage in CHAIN if stage.judged} <= set(wanted)
    for processes, (out, done) in results.items():
        assert done.returncode == 0, done.stderr
        assert files(out) == wanted
        summary = [line for line in done.stdout.splitlines() if "mIoU" in line]
        assert len(summary) == 7  # of one process only
        assert done.stdout.count("without masks: agreement") == 1
        assert done.stderr.count("masks: finished") == 1, (processes, done.stderr)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("camnet.backbone=resnet51", "cacl: Expected argument `backbone` to be one of"),
        ("data.train=tarin", "cacl: "),
        (
            "warmup.batch_size=1",
            "cacl: [warmup] batch_size: expected at least 1 image for each of the 2 processes, but got 1",
        ),
    ],
)
def test_what_is_wrong_is_said_once(tmp_path, setting, line):
    _, done = chain(2, tmp_path, setting)
    assert done.returncode != 0
    said = [text for text in done.stderr.splitlines() if text.startswith("cacl:")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(line)
    assert "cacl/" not in done.stderr  # no traceback


TWICE = """
import sys
from cacl import settings
from test_pipeline import run
root, out = sys.argv[1:]
for name in ("a", "b"):
    run(root, f"{out}/{name}")
settings._state_of = lambda file: [__import__("os").getpid()]  # files of other times on every machine
for _ in range(2):
    run(root, f"{out}/b", "cacl.epochs=1", stages=["warmup", "cacl"])
"""


def test_a_process_may_take_part_in_several_runs(tmp_path):
    root = write_csv(tmp_path / "data")
    (tmp_path / "twice.py").write_text(TWICE)
    done = launch(2, tmp_path / "twice.py", root, tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (files(tmp_path / name) for name in "ab")
    assert one["masks/train/0.png"] == two["masks/train/0.png"]
    assert one["warmup/model.pt"] == two["warmup/model.pt"]
    assert one["cacl/model.pt"] != two["cacl/model.pt"]


RAISING = """
import os, sys
import torch
from pathlib import Path
from cacl._support.distributed import gather, process_group
for number in range(2):
    try:
        with process_group(torch.device("cpu"), 30):
            assert gather(number) == [number, number]
            raise ValueError("both")
    except ValueError:
        if not torch.distributed.is_initialized():
            Path(sys.argv[1], f"left-{number}-{os.environ['RANK']}").touch()
"""


def test_the_group_is_left_where_the_body_raises(tmp_path):
    (tmp_path / "raising.py").write_text(RAISING)
    done = launch(2, tmp_path / "raising.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("left-*")} == {"left-0-0", "left-0-1", "left-1-0", "left-1-1"}
