"""Many images on many cores: a lazy, ordered map over processes of one thread each."""

from __future__ import annotations

import atexit
import math
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import chain, islice
from multiprocessing import active_children, current_process, parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader

from cacl._support.checks import check_integer
from cacl._support.signals import Interrupts
from cacl.errors import InputError

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # items in flight a worker: one that it works on, one that waits for it
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def map_processes(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """``function(item)`` of every item, in the order of the items, worked out by several processes.

    The processes are new ones (no fork, which is unsafe once torch's threads have run) with one thread each. Only a few
    items a worker are under way at a time, however many there are. Nothing runs before the first result is asked for;
    closing the iterator early, or an exception, ends the processes.

    Args:
        function: something that can be pickled, as can the items and the results; it is sent once to each worker.
        items: what it is called with; what makes them is asked for one as late as possible.
        workers: number of processes; with 0 or 1, or one item, everything happens in this process.

    Raises:
        Exception: whatever the function raises for an item, when that item's turn comes; an :class:`InputError` stays
            the line that it was.
        ChildProcessError: if a worker process dies.
    """
    check_integer("workers", workers, 0)
    if isinstance(items, Sized):
        workers = min(workers, len(items))
    if current_process().daemon:  # which may have no children
        workers = 0
    return map(function, items) if workers <= 1 else _map(function, items, workers)


def _map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    rest = iter(items)
    first = list(islice(rest, 1))
    task = pickle.dumps(function)
    needs_main = b"__main__" in task or b"__main__" in pickle.dumps(first)
    context = _Context(needs_main)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(task,))
    flying: deque[Future[R]] = deque()
    rest = chain(first, rest)
    try:
        flying.extend(pool.submit(_call, item) for item in islice(rest, _AHEAD * workers))
        while flying:
            result = flying.popleft().result()
            flying.extend(pool.submit(_call, item) for item in islice(rest, 1))
            yield result
    except InputError as error:
        raise error from None  # without the worker's traceback
    except BrokenProcessPool:
        raise ChildProcessError(
            "A worker process died: it was killed (out of memory?), or it ran the whole script again, as happens when "
            "a script's work does not stand under `if __name__ == '__main__':`. With 1 worker no process is needed."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """How many cores this process may keep busy: those of its affinity mask, and no more than its container's quota."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return mask if quota is None else max(1, min(mask, math.ceil(quota)))


def _quota(system: Path = Path("/")) -> float | None:
    """The CPU quota of this process's control group and those around it, in cores; None where there is none."""
    quotas = []
    with suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            if kinds and "cpu" not in kinds.split(","):
                continue
            root = system / "sys/fs/cgroup" / ("" if not kinds else "cpu")
            inner = root / group.lstrip("/")
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):
                    if kinds:  # version 1
                        most, period = (int((folder / f"cpu.cfs_{x}_us").read_text()) for x in ("quota", "period"))
                    else:
                        most, period = map(int, (folder / "cpu.max").read_text().split())  # "max" is no number
                    if most > 0 and period > 0:
                        quotas.append(most / period)
                if folder == root:
                    break
    return min(quotas, default=None)


def loaded(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a ``DataLoader`` gives; its processes end with this one, whatever happens.

    Raises:
        ChildProcessError: if one of them dies.
    """
    before = set(active_children())
    with Interrupts():  # a process that is half started would be waited for at the end
        batches = iter(loader)
    _loaders.update(process for process in active_children() if process not in before)
    with naming_dead_loaders():
        yield from batches


_loaders: WeakSet[Any] = WeakSet()


@atexit.register
def _end_loaders() -> None:
    """Before Python asks the processes to end, which they ignore, and waits for them."""
    for process in list(_loaders):
        with suppress(ValueError):  # it was closed
            process.kill()


@contextmanager
def naming_dead_loaders() -> Iterator[None]:
    """One line for what a ``DataLoader`` raises, wherever this process is, when one of its processes was killed."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ChildProcessError(
            "A process that loads images died: it was killed (out of memory?). With 0 workers no process is needed."
        ) from None


def leave_signals(worker: int) -> None:
    """In a process of a ``DataLoader``: whoever is asked to stop ends it, and needs its images until then."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def can_be_sent(value: object) -> bool:
    """Whether another process can be given ``value``: not if its class is made in a function or in a notebook."""
    try:
        text = pickle.dumps(value)
    except Exception:  # pickle raises many kinds
        return False
    return b"__main__" not in text or hasattr(sys.modules["__main__"], "__file__")


class _Process(SpawnProcess):
    """A new interpreter that sees the variables for one thread, and the user's script only if it is needed there.

    A spawned process imports the script that started its parent. Where that is not guarded, it would do its work again;
    but only a function or an item that the script itself defines needs it.
    """

    needs_main = True

    def start(self) -> None:
        main = sys.modules["__main__"] if self.needs_main else _NO_MAIN
        with _environment(_ONE_THREAD), _main_module(main), _without_interrupts():
            super().start()


class _Context(SpawnContext):
    def __init__(self, needs_main: bool) -> None:
        super().__init__()
        self.needs_main = needs_main

    def Process(self, *args: Any, **kwargs: object) -> SpawnProcess:  # type: ignore[override]
        process = _Process(*args, **kwargs)  # type: ignore[arg-type]
        process.needs_main = self.needs_main
        return process


_NO_MAIN = ModuleType("__main__")


@contextmanager
def _main_module(module: ModuleType) -> Iterator[None]:
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.modules["__main__"] = before


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C, which reaches the parent too, waits; a process that is started here never sees it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_task: bytes | None = None
_function: Callable[[Any], Any] | None = None


def _prepare(task: bytes) -> None:
    """In a new worker."""
    global _task
    _task = task
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be kept away from the start
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the parent was killed: nobody will send another item


def _call(item: Any) -> Any:
    global _function, _task
    if _function is None:  # here and not in `_prepare`, so that an error reaches the caller
        assert _task is not None
        _function, _task = pickle.loads(_task), None
    return _function(item)
