"""What a run survives: kills, a full disk, a moved folder, a photo or a process that is gone, signals, NaN.

    python benchmarks/endurance.py
    python benchmarks/endurance.py --only disk,moved --json endurance.json

Each fault happens to `cacl run` in a process of its own, on a small drawn world, and is a row of the table: what came
of it, whether a finished file was lost or damaged (each is compared with an unbroken run's right after the fault), and
whether the run then ended with all files as in an unbroken one, byte for byte. A row in which something else happened
says FAILED, and the exit code is 1. Linux only; some rows need root, to mount a small disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cacl._support.files import read_json
from cacl._support.weights import load_state
from cacl.pipeline import STAGES
from cacl.runs.folder import RunFolder

CONFIG = """
base = "scenes"
run = {{out = "{out}", device = "cpu", workers = 0, checkpoint_seconds = 0}}
data = {{format = "scenes", root = "{out}/data", train = "train", eval = "val"}}
scenes = {{train = 24, val = 8, size = 96}}
warmup = {{epochs = 4, batch_size = 8, crop = 64}}
cacl = {{epochs = 8, batch_size = 8, crop = 64}}
irn = {{epochs = 4, batch_size = 8, crop = 64}}
masks = {{affinity = "irn"}}
segment = {{epochs = 8, crop = 64}}
report = {{images = 2}}
"""  # some 20 s on a core
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}
PATIENCE = 300  # seconds, for whatever takes a fraction of that


class Row(NamedTuple):
    happened: str
    lost: str = ""
    went_on: str = ""
    fault: str = ""


class Unexpected(Exception):
    """What happened is not what a row is there to show."""


class Skipped(Exception):
    """This machine cannot do it."""


def expect(condition: object, text: str) -> None:
    if not condition:
        raise Unexpected(text)


class Process:
    """`cacl run`, under way."""

    def __init__(self, command: list[str], said: Path) -> None:
        self.said = said
        with open(said, "wb") as file:
            self.popen = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=said.parent, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something to be seen in the run folder."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            expect(self.popen.poll() is None, f"it ended before {what}: {self.text[-300:]!r}")
            expect(time.monotonic() < deadline, f"{what}: not in {PATIENCE} s")
            time.sleep(0.002)

    def send(self, number: int, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.popen.pid, number)

    def end(self) -> int:
        try:
            return self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Unexpected(f"it did not end in {PATIENCE} s") from None

    def ends(self, code: int, *parts: str, quiet: bool = False) -> str:
        """Wait for its end: exit code and line, which are checked."""
        got = self.end()
        lines = self.lines()
        expect(got == code, f"exit code {got} instead of {code}: {lines or self.text[-300:]!r}")
        if quiet:
            return f"exit code {code}"
        expect(len(lines) == 1, f"{len(lines)} lines instead of 1: {lines}")
        expect("Traceback" not in self.text, f"a traceback: {self.text[-600:]!r}")
        expect(all(part in lines[0] for part in parts), f"{lines[0]!r} instead of {parts}")
        return f"exit code {code}, `{lines[0].replace(f'{self.said.parent}/', '')}`"

    def lines(self) -> list[str]:
        """What the command line says at its end; `cacl` is also the name of a stage, which says other things."""
        return re.findall(r"^cacl: (?!finished|CAM|done again).*$", self.text, re.MULTILINE)

    def family(self) -> list[int]:
        """This process and all that descend from it."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(
                    int(path.parent.name)
                )
        found = [self.popen.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def workers(self) -> list[int]:
        """Those that load images or work on them."""
        others = (b"resource_tracker", b"forkserver")
        return [pid for pid in self.family()[1:] if not any(word in read(pid, "cmdline") for word in others)]

    def rank(self, number: int) -> int:
        """The process of a rank, under torchrun."""
        for pid in self.family()[1:]:
            parent = read(pid, "stat").rpartition(b")")[2].split()[1:2]
            if parent == [b"%d" % self.popen.pid] and b"\0RANK=%d\0" % number in read(pid, "environ"):
                return pid
        raise Unexpected(f"no process of rank {number}")


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it is gone
        return b""


def alive(pid: int) -> bool:
    return read(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"])


class Run:
    """A run folder, with data of its own in it, and the command that fills it."""

    def __init__(self, place: Place, name: str, *settings: str, processes: int = 1, restarts: int = 0) -> None:
        self.folder, self.settings = place.root / name, settings
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        self.launcher = [*torchrun, f"--max-restarts={restarts}"] if processes > 1 else []
        self.config = self.folder.with_suffix(".toml")
        self.config.write_text(CONFIG.format(out=name))
        self.starts = 0
        if place.data.is_dir():
            shutil.copytree(place.data, self.folder / "data", dirs_exist_ok=True)

    def start(self, *settings: str, stages: str = "") -> Process:
        self.starts += 1
        options = [part for setting in (*self.settings, *settings) for part in ("--set", setting)]
        options += ["--stages", stages] if stages else []
        command = [sys.executable, *self.launcher, "-m", "cacl", "run", str(self.config), *options]
        return Process(command, self.folder.with_name(f"{self.folder.name}-{self.starts}.txt"))

    def state(self, stage: str) -> bool | None:
        """Whether a stage is finished; None if it has not begun."""
        state = RunFolder(self.folder).state(stage)
        return state.finished if state else None

    def at(self, stage: str) -> bool:
        return self.state(stage) is False

    def steps(self, stage: str) -> int:
        """How many steps the log has."""
        path = self.folder / "log.jsonl"
        return path.read_text(errors="replace").count(f'"stage": "{stage}", "step"') if path.is_file() else 0

    def made(self, pattern: str) -> int:
        return len(list(self.folder.glob(pattern)))

    def step_of_checkpoint(self, stage: str) -> int:
        return int(load_state(self.folder / stage / "checkpoint.pt")["step"])

    def keeps(self, whole: Mapping[str, bytes]) -> str:
        """Check that nothing of what was finished is lost, and that no file under its own name is damaged."""
        here = files(self.folder)
        done = ["data", *(stage for stage in STAGES if self.state(stage))]
        lost = [name for name in whole if name.split("/")[0] in done and here.get(name) != whole[name]]
        expect(not lost, f"lost: {lost[:3]}")
        made = [name for name in here if name.endswith((".npz", ".png", "model.pt"))]
        damaged = [name for name in made if here[name] != whole.get(name)]
        expect(not damaged, f"damaged: {damaged[:3]}")
        for path in self.folder.glob("*/checkpoint.pt"):
            load_state(path)
        return "nothing"

    def equals(self, whole: Mapping[str, bytes]) -> None:
        here = files(self.folder)
        different = [name for name in {**whole, **here} if here.get(name) != whole.get(name)]
        expect(not different, f"another end than the unbroken run's: {different[:3]}")

    def goes_on(self, whole: Mapping[str, bytes], *settings: str) -> str:
        """Start again, and check that it ends as the unbroken run did."""
        process = self.start(*settings)
        process.ends(0, quiet=True)
        self.equals(whole)
        step = re.search(r"going on from step (\d+) of .*/(\w+)/checkpoint.pt", process.text)
        return f"ended equal, from step {step[1]} of `{step[2]}` on" if step else "ended equal"


class Place:
    """Where the runs lie, and what unbroken ones gave."""

    def __init__(self, root: Path, kills: int) -> None:
        self.root, self.kills = root, kills
        self.data = root / "first/data"
        self.known: dict[tuple[Any, ...], tuple[dict[str, bytes], dict[str, Any]]] = {}

    def unbroken(self, *settings: str, processes: int = 1) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The files of an unbroken run, and the seconds that its stages took."""
        key = (*settings, processes)
        if key not in self.known:
            run = Run(self, f"whole-{len(self.known)}" if self.known else "first", *settings, processes=processes)
            run.start().ends(0, quiet=True)
            self.known[key] = files(run.folder), read_json(run.folder / "times.json")
        return self.known[key]

    def whole(self, *settings: str, processes: int = 1) -> dict[str, bytes]:
        return self.unbroken(*settings, processes=processes)[0]


def files(folder: Path) -> dict[str, bytes]:
    """What a run made, without what tells times, its folder, and how it was run."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        if path.name in ("times.json", "index.html"):
            content = b""  # it has to be there
        elif name == "log.jsonl":
            records = [json.loads(line) for line in content.splitlines() if line.endswith(b"}")]
            content = json.dumps([{**record, "images_per_second": 0} for record in records]).encode()
        elif name == "config.toml":
            content = re.sub(rb"(?m)^(out|workers|checkpoint_seconds|timeout_seconds) = .*$", b"", content)
        found[name] = content
    return found


@contextmanager
def disk(folder: Path, megabytes: int = 64) -> Iterator[None]:
    """A small disk of its own, mounted as a folder."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        raise Skipped("needs root, to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes of a disk."""
    ballast, free = folder / "ballast", os.statvfs(folder)
    with open(ballast, "wb", buffering=0) as file:
        for _ in range((free.f_bavail * free.f_frsize - leave) // 4096):
            file.write(b"\0" * 4096)
    return ballast


# The rows. Each function makes one fault happen, and says what came of it.


def kills(place: Place) -> Iterator[Row]:
    rng = random.Random(0)
    hits: list[Hit] = []
    for turn in range(3 * place.kills):
        before = len(hits)
        if before >= place.kills:
            break
        run = Run(place, f"kills-{turn}", f"run.workers={(0, 2)[turn % 2]}")
        try:
            for stage in STAGES:
                if run.state(stage) is None and len(hits) < place.kills:
                    hits += kill(place, run, stage, rng)
            run.goes_on(place.whole())
        except Unexpected as error:
            hits[before:] = [hit._replace(failure=str(error)) for hit in hits[before:]] or [Hit("", failure=str(error))]
        shutil.rmtree(run.folder)
    for stage in (*STAGES, ""):
        mine = [hit for hit in hits if hit.stage == stage]
        if stage or mine:
            group, equal = sum(hit.group for hit in mine), sum(not hit.failure for hit in mine)
            left = max((hit.left for hit in mine), default=0)
            happened = f"{len(mine)} kills: {group} of all processes, {len(mine) - group} of the first only; "
            failures = [f"FAILED: {hit.failure}" for hit in mine if hit.failure]
            yield Row(
                f"{happened}the others had ended {left:.1f} s later",
                "nothing",
                " ".join([f"{equal} of {len(mine)} ended equal", *failures[:1]]),
                f"kill -9 in `{stage}`",
            )


class Hit(NamedTuple):
    """One kill."""

    stage: str
    group: bool = False
    """All processes were killed, not only the first."""
    left: float = 0.0
    """Seconds after which the last one had ended."""
    failure: str = ""


def kill(place: Place, run: Run, stage: str, rng: random.Random) -> list[Hit]:
    """Start a run, and kill it at a random moment after a stage has begun; nothing if it has ended before."""
    share, group = rng.random(), rng.random() < 0.5
    process = run.start()
    process.until(lambda: run.state(stage) is not None, f"{stage} begins")
    time.sleep(share * place.unbroken(*run.settings)[1][stage]["seconds"])
    family = process.family()
    if process.popen.poll() is not None:
        return []
    stage = [name for name in STAGES if run.state(name) is not None][-1]
    process.send(signal.SIGKILL, group=group)
    clock = time.monotonic()
    process.end()
    while any(map(alive, family)):
        expect(time.monotonic() < clock + 30, f"{stage}: processes are left after 30 s")
        time.sleep(0.05)
    left = time.monotonic() - clock
    run.keeps(place.whole())
    if run.at(stage) and (logged := run.steps(stage)):
        step = run.step_of_checkpoint(stage) if run.made(f"{stage}/checkpoint.pt") else 0
        expect(step >= logged - 1, f"{stage}: {logged} steps were logged, and the checkpoint is that of step {step}")
    return [Hit(stage, group, left)]


def full_in_checkpoint(place: Place) -> Row:
    whole = place.whole()
    with disk(place.root / "full-checkpoint"):
        run = Run(place, "full-checkpoint")
        process = run.start()
        process.until(lambda: run.steps("cacl") >= 3 and run.made("cacl/checkpoint.pt"), "step 3 of cacl")
        process.send(signal.SIGSTOP, group=True)
        while run.made("*/*.tmp"):  # in the middle of one, which would make room for the next when it is done
            process.send(signal.SIGCONT, group=True)
            time.sleep(0.005)
            process.send(signal.SIGSTOP, group=True)
        ballast = fill(run.folder, 2**18)
        process.send(signal.SIGCONT, group=True)
        happened = process.ends(2, "cacl/checkpoint.pt", "No space left on device")
        lost, step = run.keeps(whole), run.step_of_checkpoint("cacl")
        expect(step >= 2 and not run.made("*/*.tmp"), f"a checkpoint of step {step}, and {run.made('*/*.tmp')} .tmp")
        ballast.unlink()
        return Row(happened, lost, run.goes_on(whole))


def full_in_cams(place: Place) -> Row:
    whole = place.whole()
    with disk(place.root / "full-cams"):
        run = Run(place, "full-cams")
        run.start(stages="warmup,cacl").ends(0, quiet=True)
        ballast = fill(run.folder, 2**16)
        happened = run.start().ends(2, "cams/train/", ".npz", "No space left on device")
        expect(0 < run.made("cams/train/*") < 24, f"{run.made('cams/train/*')} CAM files")
        lost = run.keeps(whole)
        ballast.unlink()
        return Row(happened, lost, run.goes_on(whole))


def full_in_log(place: Place) -> Row:
    whole = place.whole()
    with disk(place.root / "full-log"):
        run = Run(place, "full-log", "run.checkpoint_seconds=1000")
        process = run.start()
        process.until(lambda: run.steps("cacl") >= 3, "step 3 of cacl")
        process.send(signal.SIGSTOP, group=True)
        ballast = fill(run.folder, 0)
        process.send(signal.SIGCONT, group=True)
        happened = process.ends(2, "log.jsonl", "No space left on device")
        lost = run.keeps(whole)
        ballast.unlink()
        return Row(happened, lost, run.goes_on(whole))


def full_at_start(place: Place) -> Row:
    whole = place.whole()
    with disk(place.root / "full-start"):
        run = Run(place, "full-start")
        run.start(stages="warmup").ends(0, quiet=True)
        before = files(run.folder)
        ballast = fill(run.folder, 0)
        happened = run.start().ends(2, "full-start", "No space left on device")
        ballast.unlink()
        expect(files(run.folder) == before, "the run folder has changed")
        return Row(happened, "nothing", run.goes_on(whole))


def read_only(place: Place) -> Row:
    whole = place.whole()
    with disk(place.root / "read-only"):
        run = Run(place, "read-only")
        run.start(stages="warmup,cacl").ends(0, quiet=True)
        before = files(run.folder)
        subprocess.run(["mount", "-o", "remount,ro", run.folder], check=True)
        happened = run.start().ends(2, "read-only: ", "Read-only file system")
        expect(files(run.folder) == before, "the run folder has changed")
        subprocess.run(["mount", "-o", "remount,rw", run.folder], check=True)
        return Row(happened, "nothing", run.goes_on(whole))


def twice(place: Place) -> Row:
    run = Run(place, "twice")
    first = run.start()
    first.until(lambda: run.steps("warmup") >= 1, "step 1 of warmup")
    clock = time.monotonic()
    owner = f"(process {first.popen.pid} on {platform.node()})"
    happened = run.start().ends(2, "another run is using this folder", owner).replace(owner, "(process … on …)")
    seconds = time.monotonic() - clock
    expect(first.popen.poll() is None, "the first run ended too")
    first.ends(0, quiet=True)
    expect(files(run.folder) == place.whole(), "the first run was disturbed")
    return Row(f"the second: {happened}, after {seconds:.0f} s", "nothing", "the first ended equal")


def killed_and_at_once(place: Place) -> Row:
    run = Run(place, "at-once")
    first = run.start()
    first.until(lambda: run.steps("cacl") >= 2, "step 2 of cacl")
    first.send(signal.SIGKILL)
    return Row("the lock ended with the first", run.keeps(place.whole()), run.goes_on(place.whole()))


def moved(place: Place) -> Row:
    run = Run(place, "old-place")
    process = run.start()
    process.until(lambda: run.steps("irn") >= 3, "step 3 of irn")
    process.send(signal.SIGTERM)
    process.ends(143)
    lost = run.keeps(place.whole())
    run.config.unlink()
    old, run.folder = run.folder, run.folder.rename(place.root / "new-place")
    run.config = run.folder / "config.toml"
    report = Process([sys.executable, "-m", "cacl", "report", str(run.folder)], place.root / "report.txt")
    report.ends(0, quiet=True)
    went_on = run.goes_on(place.whole())
    expect(not old.exists(), "something was made at the old place")
    return Row(
        "`cacl report NEW`, `cacl run NEW/config.toml`: exit code 0, nothing made at the old place", lost, went_on
    )


def changed(place: Place) -> Row:
    whole = place.whole("cacl.alpha=10.0")
    run = Run(place, "changed")
    run.start(stages="warmup,cacl,cams,irn").ends(0, quiet=True)
    time_of_warmup = (run.folder / "warmup/model.pt").stat().st_mtime_ns
    went_on = run.goes_on(whole, "cacl.alpha=10.0").replace("equal", "equal to a run that had it from the start")
    expect((run.folder / "warmup/model.pt").stat().st_mtime_ns == time_of_warmup, "warmup was done again")
    return Row("`warmup` is kept, `cacl`, `cams` and `irn` are done again", "nothing", went_on)


def photo(place: Place, name: str, harm: Callable[[Path], object]) -> Row:
    run = Run(place, f"photo-{name}")
    path, safe = run.folder / "data/images/train_00003.jpg", place.root / f"{name}.jpg"
    shutil.copy2(path, safe)
    process = run.start()
    process.until(lambda: run.steps("cacl") >= 2, "step 2 of cacl")
    harm(path)
    happened = process.ends(2, "train_00003.jpg")
    here = files(run.folder)
    run.start().ends(2, "train_00003.jpg")
    expect(files(run.folder) == here, "starting once more has changed the run folder")
    shutil.copy2(safe, path)
    return Row(f"{happened}; the same when started once more", run.keeps(place.whole()), run.goes_on(place.whole()))


def worker(place: Place, stage: str, begun: Callable[[Run], object], line: str) -> Row:
    run = Run(place, f"worker-{stage}", "run.workers=2")
    process = run.start()
    process.until(lambda: begun(run), f"{stage} is under way")
    workers = process.workers()
    expect(len(workers) == 2, f"{len(workers)} workers")
    os.kill(workers[0], signal.SIGKILL)
    happened = process.ends(2, line)
    return Row(happened, run.keeps(place.whole()), run.goes_on(place.whole()))


STOPPED = "stopped; the same command goes on from the last checkpoint"


def stopped_training(place: Place, number: signal.Signals, *, group: bool = False, times: int = 1) -> Row:
    workers = f"run.workers={2 * group}"
    run = Run(place, f"{number.name}-{group}-{times}", "run.checkpoint_seconds=1000", workers)
    process = run.start()
    process.until(lambda: run.steps("cacl") >= 4, "step 4 of cacl")
    for _ in range(times):
        process.send(number, group=group)
    happened = process.ends(128 + number, STOPPED)
    lost, logged = run.keeps(place.whole()), run.steps("cacl")
    went_on = run.goes_on(place.whole())
    if times == 1:  # the checkpoint is that of the last step, and there was none before
        expect(went_on.endswith(f"from step {logged} of `cacl` on"), f"{went_on}, and {logged} steps were logged")
    return Row(happened, lost, went_on)


def stopped_stage(place: Place, number: signal.Signals, pattern: str, *, group: bool = False) -> Row:
    stage, kind = pattern.split("/")[:2]
    run = Run(place, f"{number.name}-{kind}", "run.workers=2")
    process = run.start()
    process.until(lambda: run.made(pattern) >= 2, f"2 files of {stage}")
    family = process.family()
    process.send(number, group=group)
    happened = process.ends(128 + number, STOPPED)
    expect(run.at(stage), f"{stage} had finished")
    expect(not any(map(alive, family)), "processes are left")
    return Row(happened, run.keeps(place.whole()), run.goes_on(place.whole()))


def not_finite(place: Place) -> Row:
    run = Run(place, "nan")
    happened = run.start("cacl.lr=1e30").ends(1, "cacl: the loss is", "at step", "(images ")
    step, logged = run.step_of_checkpoint("cacl"), run.steps("cacl")
    expect(0 < step <= logged, f"{logged} steps were good, and the checkpoint is that of step {step}")
    expect(run.state("warmup"), "warmup is not finished")
    happened = re.sub(r"\(images .*?\)", "(images …)", happened)
    return Row(happened, "nothing", f"with a lower rate `cacl` was done again, and it {run.goes_on(place.whole())}")


AGAIN = "ended equal to an unbroken run of 2 processes"
LOST = "another process of this run died or did not answer in time"


def rank_killed(place: Place, rank: int, stage: str, begun: Callable[[Run], object]) -> Row:
    whole = place.whole(processes=2)
    run = Run(place, f"rank-{stage}", processes=2, restarts=2)
    process = run.start()
    process.until(lambda: begun(run), f"{stage} is under way")
    os.kill(process.rank(rank), signal.SIGKILL)
    process.ends(0, quiet=True)
    restarts = process.text.count("warmup: finished before")
    expect(restarts == 1, f"{restarts} restarts")
    run.equals(whole)
    lines = sorted({line.partition(" (")[0] for line in process.lines()})
    said = "; ".join(f"`{line}`" for line in lines) or "no line"
    return Row(f"{said}; torchrun started both again", run.keeps(whole), AGAIN)


def rank_silent(place: Place) -> Row:
    whole = place.whole(processes=2)
    run = Run(place, "silent", "run.timeout_seconds=20.0", processes=2, restarts=1)
    process = run.start()
    process.until(lambda: run.steps("cacl") >= 4, "step 4 of cacl")
    os.kill(process.rank(1), signal.SIGSTOP)
    clock = time.monotonic()
    process.until(lambda: LOST in process.text, "the first process gives up")
    seconds = time.monotonic() - clock
    process.ends(0, quiet=True)
    expect(process.text.count(LOST) == 1, f"{process.text.count(LOST)} lines")
    run.equals(whole)
    said = f"after {seconds:.0f} s (`run.timeout_seconds = 20`) `cacl: {LOST}; …`; torchrun started both again"
    return Row(said, run.keeps(whole), AGAIN)


def torchrun_stopped(place: Place) -> Row:
    whole = place.whole(processes=2)
    run = Run(place, "torchrun", "run.checkpoint_seconds=1000", processes=2)
    process = run.start()
    process.until(lambda: run.steps("cacl") >= 4, "step 4 of cacl")
    family = process.family()
    process.send(signal.SIGTERM)
    code, lines = process.end(), process.lines()
    expect(lines == [f"cacl: {STOPPED}"], f"{lines}")
    expect(not any(map(alive, family)), "processes are left")
    lost, logged = run.keeps(whole), run.steps("cacl")
    went_on = run.goes_on(whole)
    expect(went_on.endswith(f"from step {logged} of `cacl` on"), f"{went_on}, and {logged} steps were logged")
    return Row(f"exit code {code} of torchrun, `{lines[0]}`", lost, went_on)


LOADER, WORKER = "A process that loads images died", "A worker process died"
TERM, INT = signal.SIGTERM, signal.SIGINT

ROWS: dict[str, dict[str, Callable[[Place], Row | Iterator[Row]]]] = {
    "kills": {"kill -9": kills},
    "disk": {
        "disk full in the middle of a checkpoint": full_in_checkpoint,
        "disk full in the middle of the CAM files": full_in_cams,
        "disk full to the last byte, in training": full_in_log,
        "disk full to the last byte, at the start": full_at_start,
        "run folder on a read-only disk": read_only,
    },
    "twice": {
        "two runs in one folder": twice,
        "kill -9 of a run, and the next start at once": killed_and_at_once,
    },
    "moved": {"half-finished run moved, with its data": moved},
    "changed": {"`cacl.alpha` changed after four of eight stages": changed},
    "photo": {
        "photo deleted in training": partial(photo, name="deleted", harm=Path.unlink),
        "photo cut off in the middle, in training": partial(
            photo, name="truncated", harm=lambda path: os.truncate(path, path.stat().st_size // 2)
        ),
    },
    "worker": {
        "kill -9 of a process that loads images, in training": partial(
            worker, stage="cacl", begun=lambda run: run.steps("cacl") >= 3, line=LOADER
        ),
        "the same, in the CAM stage": partial(
            worker, stage="cams", begun=lambda run: run.made("cams/train/*.npz") >= 2, line=LOADER
        ),
        "kill -9 of a process that does CRFs, in label mining": partial(
            worker, stage="irn", begun=lambda run: run.made("irn/labels/*.png") >= 2, line=WORKER
        ),
        "the same, for pseudo masks": partial(
            worker, stage="masks", begun=lambda run: run.made("masks/train/*.png") >= 2, line=WORKER
        ),
    },
    "sigterm": {
        "SIGTERM in training": partial(stopped_training, number=TERM),
        "SIGTERM to all processes, in training": partial(stopped_training, number=TERM, group=True),
        "SIGTERM in the random walk": partial(stopped_stage, number=TERM, pattern="masks/walk/*.npz"),
        "SIGTERM to all processes, in label mining": partial(
            stopped_stage, number=TERM, pattern="irn/labels/*.png", group=True
        ),
    },
    "sigint": {
        "SIGINT to all processes (Ctrl-C), in training": partial(stopped_training, number=INT, group=True),
        "SIGINT twice at once": partial(stopped_training, number=INT, group=True, times=2),
        "SIGINT to all processes, in label mining": partial(
            stopped_stage, number=INT, pattern="irn/labels/*.png", group=True
        ),
    },
    "nan": {"loss that becomes NaN": not_finite},
    "processes": {
        "2 processes: kill -9 of the second, in training": partial(
            rank_killed, rank=1, stage="cacl", begun=lambda run: run.steps("cacl") >= 4
        ),
        "2 processes: kill -9 of the first, in the CAM stage": partial(
            rank_killed, rank=0, stage="cams", begun=lambda run: run.made("cams/train/*.npz") >= 3
        ),
        "2 processes: the second does not answer (SIGSTOP)": rank_silent,
        "2 processes: SIGTERM to torchrun": torchrun_stopped,
    },
}


def attempted(fault: str, attempt: Callable[[Place], Row | Iterator[Row]], place: Place) -> list[Row]:
    try:
        done = attempt(place)
        rows = [done] if isinstance(done, Row) else list(done)
    except Skipped as reason:
        rows = [Row(f"skipped: {reason}")]
    except Unexpected as error:
        rows = [Row(f"FAILED: {error}")]
    return [row._replace(fault=row.fault or fault) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kill -9, over all stages (default: 50)")
    parser.add_argument("--only", metavar="A,B", help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would hand down that it is ignored
    rows: list[Row] = []
    print("| fault | what happened | lost | then |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = Place(Path(temporary), args.kills)
        place.whole()
        for name in args.only.split(",") if args.only else ROWS:
            for fault, attempt in ROWS[name].items():
                for row in attempted(fault, attempt, place):
                    rows.append(row)
                    print(f"| {row.fault} | {row.happened} | {row.lost} | {row.went_on} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=2))
    return int(any("FAILED" in cell for row in rows for cell in row))


if __name__ == "__main__":
    sys.exit(main())
