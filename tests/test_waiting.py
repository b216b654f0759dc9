"""Waits on other processes end: with what fits, with one line, or when somebody asks for it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from drawn import write_csv
from torch import nn

from cacl._support import loaders, pool, waiting
from cacl._support.loaders import load
from cacl._support.pool import map_processes
from cacl._support.waiting import Patience
from cacl.datasets import CSVDataset
from cacl.training import Loop, train
from cacl.transforms import RandomView

resource = pytest.importorskip("resource")  # not on Windows

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/dev/shm and /proc")


class Numbers(torch.utils.data.Dataset):
    """Item i is i, and an image full of it; the process that comes to ``stop`` stands still."""

    def __init__(self, size: int = 4, *, stop: int | None = None) -> None:
        self.size, self.stop = size, stop

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        if index == self.stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        return index, torch.full((3, 20, 30), index + 0.5)


PATIENCE = 1.0 if multiprocessing.get_start_method() == "fork" else 8.0  # others begin with their imports


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    for module in (loaders, pool):
        monkeypatch.setattr(module, "POLL", 0.2)
    monkeypatch.setattr(waiting, "PATIENCE", PATIENCE)
    waiting.warn_once.cache_clear()


def check(items) -> None:
    for position, (index, image) in enumerate(items):
        assert index == position
        np.testing.assert_array_equal(image.numpy(), np.full((3, 20, 30), position + 0.5, np.float32))
    assert position == 3


def run_script(script: str, file: Path | None = None) -> list[str]:
    """The lines that a script says, which comes from standard input, or lies in a file, beside modules of its own."""
    path = os.pathsep.join([str(Path(loaders.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    if file is not None:
        file.write_text(script)
        path = f"{file.parent}{os.pathsep}{path}"  # a server that forks does not look beside the script on Python 3.11
    done = subprocess.run(
        [sys.executable, "-" if file is None else str(file)], input=script, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class Limited(Numbers):
    """Whoever loads an item may write no file of its size; one of the shared memory is a file too."""

    def __getitem__(self, index: int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return super().__getitem__(index)


def test_what_the_shared_memory_has_no_room_for_comes_another_way(caplog):
    check(load(Limited(), workers=2))
    check(load(Limited(), workers=1))
    (line,) = warnings_of(caplog)  # and not one a batch, or one a loader
    assert line.startswith("/dev/shm has no room")
    assert "--shm-size" in line
    assert "[run] workers = 0" in line


class Priorities(torch.utils.data.Dataset):
    """How much whoever loads an item gives way to others."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return os.nice(0)


def test_who_loads_gives_way_to_who_computes():
    """But not this process, where it loads itself."""
    own = os.nice(0)
    assert list(load(Priorities(), workers=1)) == [min(19, own + 10)] * 2
    assert list(load(Priorities(), workers=0)) == [own] * 2


def test_where_there_is_room_nothing_is_said(caplog):
    check(load(Numbers(), workers=2))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("name", ["_Sending", "ProcessPoolExecutor"])
def test_where_no_process_can_be_started_this_one_does_the_work(monkeypatch, caplog, name):
    def full(*_: object, **__: object):
        raise OSError(28, "No space left on device")

    if name == "_Sending":
        monkeypatch.setattr(loaders, "Lock", full)  # as torch does with a full /dev/shm, when it makes its queues
        check(load(Numbers(), workers=2))
    else:
        monkeypatch.setattr(pool, "ProcessPoolExecutor", full)
        assert list(map_processes(abs, [-1, -2, -3], workers=2)) == [1, 2, 3]
    (line,) = warnings_of(caplog)
    assert "No space left on device" in line


def test_loaders_that_stand_still_are_given_up():
    """Also where they have something to hand over, which is waited for in another way."""
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"^The processes that load images have done nothing for .*0 workers"):
        list(load(Numbers(stop=2), workers=1))
    assert time.monotonic() - start < 20


def stand_still(item: int, *, at: int) -> int:
    if item == at:
        os.kill(os.getpid(), signal.SIGSTOP)
    return item


def test_workers_that_stand_still_are_given_up_and_end(monkeypatch):
    monkeypatch.setattr(pool, "_GRACE", 0.5)
    made: list[int] = []
    start = pool._Process.start

    def noting(self) -> None:
        start(self)
        made.append(self.pid)

    monkeypatch.setattr(pool._Process, "start", noting)
    results = map_processes(partial(stand_still, at=1), range(3), workers=2)
    with pytest.raises(ChildProcessError, match=r"^The processes that work on images have done nothing for "):
        list(results)
    assert len(made) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in made)


def test_who_computes_is_waited_for(monkeypatch):
    """A process that is slow is told from one that stands still by the time that it has computed."""
    monkeypatch.setattr(waiting, "_WORK", 0.1)
    monkeypatch.setattr(waiting, "PATIENCE", 1.0)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    idle = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.5)
        works, rests = Patience([busy.pid]), Patience([idle.pid])
        for _ in range(30):
            works.check("work")
            time.sleep(0.1)
        with pytest.raises(ChildProcessError, match=r"^The processes that rest have done nothing"):
            rests.check("rest")
    finally:
        for process in (busy, idle):
            process.kill()
            process.wait()


class Stopping(CSVDataset):
    """Stands still at its seventh photo: the first of the third batch, when the others have been taken."""

    def image(self, index: int):
        count = self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        if count > 6:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().image(index)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_acts_while_a_batch_does_not_come(tmp_path, monkeypatch, number):
    """The checkpoint is that of the steps that are done."""
    monkeypatch.setattr("cacl.training.WAITED", 0.3)
    monkeypatch.setattr(waiting, "PATIENCE", 60.0)
    write_csv(tmp_path / "data")
    net = nn.Conv2d(3, 1, 1)
    heard = []
    handler = signal.signal(number, lambda *_: (_ for _ in ()).throw(InterruptedError()))

    def callback(record) -> None:
        heard.append(record["step"])
        if record["step"] == 2:
            threading.Timer(0.5, lambda: os.kill(os.getpid(), number)).start()

    start = time.monotonic()
    try:
        with pytest.raises(InterruptedError):
            train(
                lambda batch: {"loss": net(batch.images).mean()}, {"net": net},
                torch.optim.SGD(net.parameters(), lr=0.1), Stopping(tmp_path / "data", "train"),
                Loop(2, 3, RandomView(32), workers=1), checkpoint=tmp_path / "checkpoint.pt", callback=callback,
            )  # fmt: skip
    finally:
        signal.signal(number, handler)
    assert time.monotonic() - start < 30
    assert heard == [1, 2]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


@pytest.fixture
def script(monkeypatch):
    """script(name=value): an object of the script that started this process, which has these attributes."""

    def set(**attributes: object):
        main = ModuleType("__main__")
        monkeypatch.setitem(sys.modules, "__main__", main)
        text = "import os\nclass Mine:\n    def __call__(self, item):\n        return 2 * item, os.getpid()\n"
        exec(text, vars(main))
        vars(main).update(attributes)
        return main.Mine()

    return set


SCRIPTS = {
    "a notebook": {},
    "standard input": {"__file__": "<stdin>"},
    "a script that is gone": {"__file__": "/nowhere/script.py"},
    "an archive": {"__file__": __file__, "__spec__": ModuleSpec("__main__", None)},
    "a package": {"__file__": __file__, "__spec__": ModuleSpec("app.__main__", None)},
    "a module that is gone": {"__file__": __file__, "__spec__": ModuleSpec("gone_since", None)},
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_work_of_a_script_that_no_process_can_read_is_done_in_this_one(script, caplog, kind):
    caplog.set_level(logging.INFO, "cacl")
    mine = script(**SCRIPTS[kind])
    assert list(map_processes(mine, [1, 2, 3], workers=2)) == [(2 * i, os.getpid()) for i in (1, 2, 3)]
    (record,) = caplog.records
    text = "in one process, as others cannot be given the work: it needs what is defined in a script"
    assert record.getMessage().startswith(text)


def test_work_that_cannot_be_sent_is_done_in_this_process(caplog):
    caplog.set_level(logging.INFO, "cacl")
    assert list(map_processes(lambda item: (item, os.getpid()), [1, 2], workers=2)) == [
        (i, os.getpid()) for i in (1, 2)
    ]
    assert list(map_processes(str, [lambda: 0, lambda: 1], workers=2))
    assert len(caplog.records) == 2


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no server to fork from")
def test_a_server_that_forks_imports_for_all(tmp_path):
    (tmp_path / "counted.py").write_text("""
import os

IMPORTED = os.getpid()

class Data:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return IMPORTED, os.getpid()
""")
    script = """
import multiprocessing
from cacl._support.loaders import load
from counted import Data
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    found = [item for _ in range(2) for item in load(Data(), workers=2)]
    print(len({imported for imported, _ in found}), len({loaded for _, loaded in found}))
"""
    assert run_script(script, tmp_path / "script.py") == ["1 4"]


def test_work_where_the_folder_is_gone_is_done_in_this_process(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert list(map_processes(abs, [-1, -2], workers=2)) == [1, 2]


def test_a_script_from_standard_input_ends(tmp_path):
    """As it comes; and no process is left behind, not the one that counts semaphores either."""
    script = """
        import os
        from cacl._support.pool import map_processes
        class Mine:
            def __call__(self, x):
                return 2 * x
        print(list(map_processes(Mine(), [1, 2], workers=2)), list(map_processes(abs, [-1, -2], workers=2)))
        children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
        print(*children)
    """
    numbers, children = run_script(textwrap.dedent(script))
    assert numbers == "[2, 4] [1, 2]"
    assert children  # the one that counts semaphores
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.split())
