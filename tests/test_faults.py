"""Faults in the middle of a run: signals, full disks, a moved folder, what is gone or killed; nothing is lost by them.

`benchmarks/endurance.py` has the long form: many kills, whole chains, other processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from test_pipeline import SETTINGS, files

from cacl import cli, pipeline
from cacl._support.files import locked
from cacl.stages import cams
from cacl.training import Interrupts

resource = pytest.importorskip("resource")  # not on Windows

pytestmark = pytest.mark.posix

STAGES = "warmup,cacl,cams"
on_linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


class Place:
    """A run folder with its data in it, `cacl run` in this process, and what happens to it on its way."""

    def __init__(self, folder: Path, monkeypatch, capsys) -> None:
        self.folder, self.out, self.capsys = folder, folder / "out", capsys
        self.config = folder / "config.toml"
        self.config.write_text('base = "voc"\n[run]\nout = "out"\ncheckpoint_seconds = 0\n[data]\nroot = "out/data"\n')
        self.records: list[dict[str, object]] = []
        self.events = {}
        write_csv(self.out / "data")
        run = pipeline.run

        def tiny(config, **arguments):
            return run(config, encoder=TinyEncoder(), backbone=TinyBackbone(), callback=self.heard, **arguments)

        monkeypatch.setattr(pipeline, "run", tiny)

    def heard(self, record) -> None:
        self.records.append(record)
        event = self.events.pop((record["stage"], record["step"]), None)
        if event is not None:
            event()

    def at(self, stage: str, step: int, event) -> None:
        """Something that happens once, after a step's line was written and before its checkpoint is."""
        self.events[stage, step] = event

    def run(self, *settings: str, config: Path | None = None, stages: str = STAGES) -> tuple[int, list[str]]:
        """Exit code, and the lines that the command line itself said."""
        self.records.clear()
        options = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
        code = cli.main(["run", str(config or self.config), "--stages", stages, *options])
        said = self.capsys.readouterr().err
        assert "Traceback" not in said
        return code, re.findall(r"^cacl: (?!finished|CAM|done again).*$", said, re.MULTILINE)

    def ends_as(self, whole: dict[str, bytes], *settings: str, **arguments) -> None:
        assert self.run(*settings, **arguments) == (0, [])
        assert files(self.out) == whole

    def step_of_checkpoint(self, stage: str) -> int:
        return torch.load(self.out / stage / "checkpoint.pt", weights_only=True)["step"]


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    return Place(tmp_path, monkeypatch, capsys)


@pytest.fixture
def whole(place):
    """The files of an unbroken run; the run folder is as it was before."""
    assert place.run() == (0, [])
    found = files(place.out)
    data = place.out.rename(place.folder / "first") / "data"
    place.out.mkdir()
    data.rename(place.out / "data")
    return found


STOPPED = ["cacl: stopped; the same command goes on from the last checkpoint"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_and_saves_a_last_checkpoint(place, whole, number, code):
    place.at("cacl", 2, lambda: signal.raise_signal(number))
    assert place.run("run.checkpoint_seconds=1000") == (code, STOPPED)
    last = place.records[-1]
    assert (last["stage"], last["step"]) == ("cacl", place.step_of_checkpoint("cacl"))
    assert last["step"] < 4
    assert not list(place.out.rglob("*.tmp"))
    assert not (place.out / ".lock").exists()
    place.ends_as(whole)
    assert place.records[0]["step"] == last["step"] + 1


def test_a_second_signal_takes_effect_at_once(place, whole):
    def twice():
        signal.raise_signal(signal.SIGINT)
        time.sleep(2.1)  # signals that come together are one request
        signal.raise_signal(signal.SIGINT)

    place.at("cacl", 2, twice)
    assert place.run("run.checkpoint_seconds=1000") == (130, STOPPED)
    assert not (place.out / "cacl/checkpoint.pt").exists()
    place.ends_as(whole)


def test_handlers_are_those_from_before():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        assert not interrupts.came
    seen = []

    def interrupted():
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            seen.append(interrupts.came)  # and nothing else happens, until the end

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [True]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_that_is_ignored_stays_ignored(place, whole):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background job
    try:
        place.at("cacl", 2, lambda: signal.raise_signal(signal.SIGINT))
        place.ends_as(whole)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def in_cams(monkeypatch):
    """(n, event): the event happens when the n-th file of CAMs is about to be written."""

    def set(number: int, event) -> None:
        save, count = cams.save_cams, iter(range(1, 100))

        def saving(*arguments):
            if next(count) == number:
                event()
            save(*arguments)

        monkeypatch.setattr(cams, "save_cams", saving)

    return set


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_another_stage_at_once_and_leaves_whole_files(place, whole, in_cams, number, code):
    in_cams(4, lambda: signal.raise_signal(number))
    assert place.run() == (code, STOPPED)
    assert sorted(path.name for path in (place.out / "cams/train").iterdir()) == ["0.npz", "1.npz", "2.npz"]
    assert not (place.out / ".lock").exists()
    place.ends_as(whole)


@pytest.fixture
def room():
    """room(n): from now on no file grows beyond n bytes; room(None): as large as it likes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield set
    set(None)


def test_a_disk_that_is_full_leaves_the_checkpoint_before(place, whole, room):
    place.at("cacl", 3, lambda: room(9000))
    assert place.run() == (2, [f"cacl: {place.out}/cacl/checkpoint.pt: File too large"])
    room(None)
    assert place.step_of_checkpoint("cacl") == 2
    assert not list(place.out.rglob("*.tmp"))
    place.ends_as(whole)
    assert place.records[0]["step"] == 3


def test_a_disk_that_is_full_in_the_middle_of_a_stage_leaves_the_files_before(place, whole, in_cams, room):
    in_cams(4, lambda: room(0))
    file = place.out / "cams/train/3.npz"
    assert place.run() == (2, [f"cacl: {file}: File too large"])  # and not that of a file that comes after it
    room(None)
    assert len(list(file.parent.iterdir())) == 3
    place.ends_as(whole)


def test_a_disk_that_is_full_for_the_log(place, whole, room):
    place.at("cacl", 2, lambda: room(0))
    assert place.run("run.checkpoint_seconds=1000") == (2, [f"cacl: {place.out}/log.jsonl: File too large"])
    room(None)
    place.ends_as(whole)


def test_a_disk_that_is_full_at_the_start_changes_nothing(place, whole, room):
    assert place.run(stages="warmup") == (0, [])
    before = files(place.out)
    room(0)
    code, (line,) = place.run()
    room(None)
    assert code == 2
    assert "File too large" in line
    assert files(place.out) == before
    place.ends_as(whole)


def test_a_log_whose_last_line_is_cut_off(place, whole):
    place.at("cacl", 3, partial(signal.raise_signal, signal.SIGINT))
    place.run()
    with open(place.out / "log.jsonl", "a") as log:
        log.write('{"stage": "cacl", "st')
    place.ends_as(whole)


def test_a_checkpoint_that_a_kill_cut_off_is_removed_with_the_others(place, whole):
    place.at("cacl", 4, partial(signal.raise_signal, signal.SIGTERM))
    assert place.run()[0] == 143
    assert place.step_of_checkpoint("cacl") == 4  # all steps are done, and it is not written again
    (place.out / "cacl/checkpoint.pt.tmp").write_bytes(b"cut off")
    place.ends_as(whole)


HOLD = """
import sys
from pathlib import Path
from cacl._support.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_used_by_one_run_at_a_time(place, whole):
    command = [sys.executable, "-c", HOLD, str(place.out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = files(place.out)
        code, lines = place.run()
        owner = f"process {other.pid} on {os.uname().nodename}"
        assert (code, lines) == (2, [f"cacl: {place.out}: another run is using this folder ({owner})"])
        assert files(place.out) == before
        other.kill()
    place.ends_as(whole)  # the lock has ended with the process; its file is taken over, and removed in the end


def test_a_refused_run_makes_no_folder(tmp_path):
    def refuse():
        with locked(tmp_path / "new"):
            raise ValueError("a setting is wrong")

    with pytest.raises(ValueError, match="a setting is wrong"):
        refuse()
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(ValueError, match="file: expected a folder to write to, but File exists"),
        locked(tmp_path / "file"),
    ):
        pass


def test_a_folder_that_is_moved_goes_on_where_it_is(place, whole):
    place.at("cacl", 2, partial(signal.raise_signal, signal.SIGTERM))
    assert place.run()[0] == 143
    old, place.out = place.out, place.out.rename(place.folder / "moved")
    place.config.unlink()
    place.ends_as(whole, config=place.out / "config.toml")
    assert {record["stage"] for record in place.records} == {"cacl"}
    assert not old.exists()


def test_a_run_goes_on_with_other_settings_from_where_they_count(place):
    assert place.run("cacl.alpha=10", stages="warmup,cacl,cams,irn") == (0, [])
    wanted = files(place.out)
    for path in place.out.iterdir():
        if path.name != "data":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert place.run(stages="warmup,cacl,cams") == (0, [])
    time_of_warmup = (place.out / "warmup/model.pt").stat().st_mtime_ns
    place.ends_as(wanted, "cacl.alpha=10", stages="warmup,cacl,cams,irn")
    assert (place.out / "warmup/model.pt").stat().st_mtime_ns == time_of_warmup


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size // 2)])
def test_a_photo_that_is_gone_or_cut_off_in_the_middle_of_training(place, whole, harm):
    photo, safe = place.out / "data/images/4.png", place.folder / "4.png"
    shutil.copy2(photo, safe)
    place.at("cacl", 1, lambda: harm(photo))
    code, (line,) = place.run()
    assert code == 2
    assert line.startswith(f"cacl: {photo}: ")
    here = files(place.out)
    code, (line,) = place.run()
    assert code == 2
    assert line.startswith(f"cacl: {photo}: ")
    assert files(place.out) == here  # nothing was done with other data
    shutil.copy2(safe, photo)
    place.ends_as(whole)
    assert {record["stage"] for record in place.records} == {"cacl"}


def kill_a_child() -> None:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.3)  # until the system says so


LOADER = [
    "cacl: A process that loads images died: it was killed (out of memory?). With 0 workers no process is needed."
]


def test_a_killed_loader_in_training(place, whole):
    place.at("cacl", 2, kill_a_child)
    assert place.run("run.workers=1", "cacl.epochs=20") == (2, LOADER)
    place.ends_as(whole)


def test_a_killed_loader_in_another_stage(place, whole, in_cams):
    in_cams(2, kill_a_child)
    assert place.run("run.workers=1") == (2, LOADER)
    place.ends_as(whole)


def test_a_loss_that_is_nan_and_then_a_lower_rate(place, whole):
    code, (line,) = place.run("cacl.lr=1e30")
    assert code == 1
    step = int(re.match(r"cacl: cacl: the loss is nan at step (\d+) \(images \d, \d, \d\); the last good", line)[1])
    assert 0 < place.step_of_checkpoint("cacl") < step
    assert place.run("cacl.lr=1e30") == (1, [line])  # the checkpoint that was kept is one that loads
    place.ends_as(whole)
    assert [record["step"] for record in place.records] == [1, 2, 3, 4]  # the stage was done again, and only that


# Several processes: slow, as each of them imports torch.


CHAIN = [
    "run.device=cpu", "run.workers=0", "run.checkpoint_seconds=0", "scenes.train=24", "scenes.val=2", "scenes.size=64",
    "data.eval=", "warmup.crop=32", "cacl.crop=32", "warmup.epochs=2", "cacl.epochs=20", "cacl.batch_size=4",
]  # fmt: skip


class Torchrun:
    """`cacl run scenes` in two processes, the stages of the CAMs."""

    def __init__(self, out: Path, *settings: str, restarts: int = 0) -> None:
        self.out = out
        options = [part for setting in (*CHAIN, f"data.root={out.parent / 'data'}", f"run.out={out}", *settings)
                   for part in ("--set", setting)]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
        command = [sys.executable, *launcher, "-m", "cacl", "run", "scenes", "--stages", STAGES, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment, stdout=subprocess.DEVNULL
        )

    def steps(self) -> int:
        log = self.out / "log.jsonl"
        return log.read_text().count('"stage": "cacl"') if log.is_file() else 0

    def until(self, steps: int) -> None:
        deadline = time.monotonic() + 120
        while self.steps() < steps:
            assert self.popen.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def rank(self, number: int) -> int:
        for path in Path("/proc").glob("[0-9]*/environ"):
            with open(path.with_name("stat")) as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
            if parent == self.popen.pid and f"\0RANK={number}\0" in path.read_text():
                return int(path.parent.name)
        raise AssertionError(f"no rank {number}")

    def end(self) -> str:
        _, said = self.popen.communicate(timeout=240)
        return said


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A folder for runs of two processes, and the files of an unbroken one."""
    folder = tmp_path_factory.mktemp("faults")
    run = Torchrun(folder / "whole")
    said = run.end()
    assert run.popen.returncode == 0, said
    return folder, files(run.out)


@pytest.mark.slow
@on_linux
def test_torchrun_starts_again_when_a_process_was_killed(by_two):
    folder, wanted = by_two
    run = Torchrun(folder / "killed", restarts=1)
    run.until(10)
    os.kill(run.rank(1), signal.SIGKILL)
    said = run.end()
    assert run.popen.returncode == 0, said
    assert "going on from step" in said
    assert files(run.out) == wanted


RESTART = """
import os, time
import torch
from cacl._support.distributed import gather, process_group
again, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0", os.environ["RANK"]
if again and rank == "1":
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "{count}"
    time.sleep(2)
with process_group(torch.device("cpu"), 30):
    gather(rank)
    if not again and rank == "1":
        os.kill(os.getpid(), 9)
    print(gather(rank))
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, pytest.param(0, id="as torchrun counts on another machine")])
def test_processes_that_start_again_find_nothing_from_before(tmp_path, count):
    """The last one is late: what the others find of it in torchrun's store would be from before."""
    script = tmp_path / "restart.py"
    script.write_text(RESTART.format(count=count))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    path = os.pathsep.join([str(Path(pipeline.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *launcher, str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.count("['0', '1']") == 2, done.stderr[-2000:]


@pytest.mark.slow
@on_linux
def test_a_process_that_does_not_answer_is_given_up(by_two):
    folder, wanted = by_two
    run = Torchrun(folder / "silent", "run.timeout_seconds=5.0")
    run.until(10)
    silent = run.rank(1)
    os.kill(silent, signal.SIGSTOP)
    line = run.popen.stderr.readline()
    while line and not line.startswith("cacl: another process of this run died or did not answer in time; the same"):
        line = run.popen.stderr.readline()
    os.kill(silent, signal.SIGCONT)
    rest = run.end()
    assert line
    assert run.popen.returncode == 1, rest
    again = Torchrun(folder / "silent")
    said = again.end()
    assert again.popen.returncode == 0, said
    assert files(again.out) == wanted


@pytest.mark.slow
@on_linux
def test_sigterm_to_torchrun_saves_a_last_checkpoint(by_two):
    folder, wanted = by_two
    run = Torchrun(folder / "terminated", "run.checkpoint_seconds=1000.0")
    run.until(10)
    run.popen.send_signal(signal.SIGTERM)
    said = run.end()
    lines = [line for line in said.splitlines() if line in STOPPED]
    assert (lines, run.popen.returncode != 0) == (STOPPED, True), said
    steps = run.steps()
    again = Torchrun(folder / "terminated")
    said = again.end()
    assert f"going on from step {steps} of" in said
    assert files(again.out) == wanted


@pytest.mark.slow
@on_linux
def test_the_benchmark_of_faults_compares(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks/endurance.py"
    command = [sys.executable, str(script), "--only", "nan", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["fault"] == "loss that becomes NaN"
    assert row["lost"] == "nothing"
    assert "ended equal" in row["went_on"]
