"""Processes: order, errors, laziness, one thread, and none left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from cacl._support import cores as _cores
from cacl._support.pool import map_processes
from cacl.errors import InputError


def slow_start(item: int) -> tuple[int, int]:
    time.sleep(0.3 if item == 0 else 0)
    return item, os.getpid()


def threads(item: int) -> tuple[int, str, int]:
    matrix = torch.ones(500, 500)
    for _ in range(5):
        matrix @ matrix
    tasks = Path("/proc/self/task")
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], len(list(tasks.iterdir())) if tasks.is_dir() else 0


def both(item: int) -> tuple[tuple[int, int], tuple[int, str, int]]:
    return slow_start(item), threads(item)


def fail(item: int, *, at: int, error: Exception) -> int:
    if item == at:
        raise error
    return item


def die(item: int) -> int:
    os._exit(3)


def touch(item: int, *, folder: Path) -> int:
    (folder / str(item)).touch()
    return item


def run(script: str, folder: Path, **kwargs: object) -> subprocess.Popen[str]:
    file = folder / "script.py"
    file.write_text(textwrap.dedent(script))
    path = os.pathsep.join(str(Path(__file__).parents[i]) for i in (0, 1))
    environment = os.environ | {"PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(file)], env=environment, **pipes, **kwargs)


def test_results_come_in_order_from_processes_of_one_thread():
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    results = list(map_processes(both, range(9), workers=2))
    assert [item for (item, _), _ in results] == list(range(9))
    processes = {process for (_, process), _ in results}
    assert os.getpid() not in processes
    assert len(processes) <= 2  # beside a load one may have done all
    for _, (count, omp, tasks) in results:
        assert (count, omp) == (1, "1")
        assert tasks <= 4  # this one, the one that watches the parent, and those of the queues
    assert torch.get_num_threads() == before
    assert os.environ.get("OMP_NUM_THREADS") == variable
    assert not [
        each for each in multiprocessing.active_children() if not each.daemon
    ]  # a loader of another test is one


@pytest.mark.parametrize(("items", "workers"), [(range(3), 0), (range(3), 1), ([7], 4), ([], 4)])
def test_little_work_stays_in_this_process(items, workers):
    results = list(map_processes(slow_start, items, workers=workers))
    assert results == [(item, os.getpid()) for item in items]


def test_an_input_error_stays_one_line():
    results = map_processes(partial(fail, at=3, error=InputError("a.png: not an image")), range(40), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"^a.png: not an image$") as caught:
        next(results)
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None
    assert not [
        each for each in multiprocessing.active_children() if not each.daemon
    ]  # a loader of another test is one


@pytest.mark.slow
def test_another_error_keeps_the_traceback_of_its_worker():
    with pytest.raises(KeyError, match="x") as caught:
        list(map_processes(partial(fail, at=1, error=KeyError("x")), range(2), workers=2))
    assert "in fail" in str(caught.value.__cause__)


def test_few_items_are_under_way_and_an_early_end_leaves_nothing(tmp_path):
    results = map_processes(partial(touch, folder=tmp_path), range(1000), workers=2)
    assert not list(tmp_path.iterdir())  # nothing is done before it is asked for
    assert next(results) == 0
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) <= 5
    results.close()
    assert not [
        each for each in multiprocessing.active_children() if not each.daemon
    ]  # a loader of another test is one


def test_a_dead_worker_is_one_line():
    with pytest.raises(ChildProcessError, match=r"A worker process died: .*__main__") as caught:
        list(map_processes(die, range(4), workers=2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [-1, 1.5, True])
def test_bad_workers(workers):
    with pytest.raises(InputError, match="Expected argument `workers` to be an integer of at least 0"):
        map_processes(slow_start, range(3), workers=workers)


@pytest.mark.slow
def test_a_script_without_guard_works(tmp_path):
    script = """
        from cacl._support.pool import map_processes
        print("once")
        print(list(map_processes(abs, [-1, 2], workers=2)))
    """
    out, err = run(script, tmp_path).communicate(timeout=60)
    assert (out, err) == ("once\n[1, 2]\n", "")


@pytest.mark.slow
def test_a_function_of_the_script_works_where_guarded_and_is_one_line_where_not(tmp_path):
    script = """
        from cacl._support.pool import map_processes
        def double(x):
            return 2 * x
        {guard}
            print(list(map_processes(double, [1, 2], workers=2)))
    """
    out, err = run(script.format(guard="if __name__ == '__main__':"), tmp_path).communicate(timeout=60)
    assert (out, err) == ("[2, 4]\n", "")
    out, err = run(script.format(guard="if True:"), tmp_path).communicate(timeout=60)
    assert out == ""
    assert "ChildProcessError: A worker process died" in err.splitlines()[-1]


@pytest.mark.posix
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind(tmp_path, kill):
    script = """
        import sys
        from cacl._support.pool import map_processes
        from test_pool import slow_start
        for _, process in map_processes(slow_start, range(10**6), workers=2):
            print(process, flush=True)
    """
    process = run(script, tmp_path, start_new_session=True)
    workers = {int(process.stdout.readline()) for _ in range(4)}
    if kill == signal.SIGINT:
        os.killpg(process.pid, kill)  # as a terminal does: to everyone
    else:
        process.kill()
    _, err = process.communicate(timeout=60)
    assert err.count("Traceback") <= 1  # the parent's KeyboardInterrupt, nothing from the workers
    deadline = time.monotonic() + 10
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/status")
    return not (status.exists() and "\tZ" in status.read_text())  # a zombie waits for a parent that does not look


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
          "sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/not/seen/here\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": "3:memory:/\n2:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000",
          "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"}, 4),
        ({"proc/self/cgroup": "2:cpu,cpuacct:/\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"}, 1.5),
        ({"proc/self/cgroup": "2:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "what\n"}, None),
    ],
)  # fmt: skip
def test_the_quota_of_a_container(tmp_path, monkeypatch, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _cores._quota(tmp_path) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)), raising=False)
    monkeypatch.setattr(_cores, "_quota", lambda: cores)
    assert _cores.usable_cores() == {None: 3, 1.5: 2, 2: 2, 0.5: 1, 4: 3}[cores]
