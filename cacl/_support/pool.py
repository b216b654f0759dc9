"""Many images on many cores: a lazy, ordered map over processes of one thread each."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import chain, islice
from multiprocessing import current_process, parent_process, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.util import Finalize
from types import ModuleType
from typing import Any, TypeVar

import torch

from cacl._support.clock import add, spent
from cacl._support.signals import Interrupts
from cacl._support.values import check_integer
from cacl._support.waiting import POLL, Patience, warn_once, why_not
from cacl.errors import InputError, first_line

logger = logging.getLogger("cacl")

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # items in flight a worker: one that it works on, one that waits for it
_GRACE = 5.0  # seconds that a worker has for its last item
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def map_processes(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """``function(item)`` of every item, in the order of the items, worked out by several processes.

    The processes are new ones (no fork, which is unsafe once torch's threads have run) with one thread each. Only a few
    items a worker are under way at a time, however many there are. Nothing runs before the first result is asked for;
    closing the iterator early, or an exception, ends the processes.

    Args:
        function: something that can be pickled, as can the items and the results; it is sent once to each worker. What
            no other process can be given (a class that is made in a function, or in a script that cannot be read again)
            is worked out in this one.
        items: what it is called with; what makes them is asked for one as late as possible.
        workers: number of processes; with 0 or 1, or one item, everything happens in this process.

    Raises:
        Exception: whatever the function raises for an item, when that item's turn comes; an :class:`InputError` stays
            the line that it was.
        ChildProcessError: if a worker process dies, or all of them do nothing for a long time.
    """
    check_integer("workers", workers, 0)
    if isinstance(items, Sized):
        workers = min(workers, len(items))
    if current_process().daemon:  # which may have no children
        workers = 0
    return map(function, items) if workers <= 1 else _map(function, items, workers)


def _map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    rest = iter(items)
    first = list(islice(rest, _AHEAD * workers))
    try:
        task, needs_main = _packed(function, first[:1])
        context = _Context(needs_main)
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(task,))
    except _Unsendable as error:
        logger.info("in one process, as others cannot be given the work: %s", error)
        yield from map(function, chain(first, rest))
        return
    except (OSError, NotImplementedError) as error:
        warn_once(f"in one process, as no other can be started: {why_not(error)}")
        yield from map(function, chain(first, rest))
        return

    def submit(item: T) -> Future[tuple[R, dict[str, float]]]:
        with Interrupts():  # a process that is half started would be nobody's
            return pool.submit(_call, item)

    flying: deque[Future[tuple[R, dict[str, float]]]] = deque()
    try:
        flying.extend(map(submit, first))
        while flying:
            result, times = _result(flying.popleft(), context)
            add(times, 1 / workers)
            flying.extend(map(submit, islice(rest, 1)))
            yield result
    except InputError as error:
        raise error from None  # without the worker's traceback
    except BrokenProcessPool:
        raise ChildProcessError(
            "A worker process died: it was killed (out of memory?), or it ran the whole script again, as happens when "
            "a script's work does not stand under `if __name__ == '__main__':`. With 1 worker no process is needed."
        ) from None
    finally:
        _end(pool, context)


def _result(future: Future[T], context: _Context) -> T:
    patience = Patience(process.pid for process in context.started)
    while not wait([future], POLL).done:
        patience.check("work on images")
    return future.result()


def _end(pool: ProcessPoolExecutor, context: _Context) -> None:
    """Let the workers end; those that do not are made to."""

    def kill() -> None:
        for process in context.started:
            if process.pid is not None:
                process.kill()

    late = threading.Timer(_GRACE, kill)
    late.daemon = True
    late.start()
    pool.shutdown(cancel_futures=True)
    late.cancel()


class _Unsendable(Exception):
    """What another process cannot be given."""


def _packed(function: object, first: object) -> tuple[bytes, bool]:
    """The function as it is sent, and whether it or an item needs what the user's script defines."""
    try:
        os.getcwd()  # where the others begin
        task, item = pickle.dumps(function), pickle.dumps(first)
    except Exception as error:  # pickle raises many kinds
        raise _Unsendable(first_line(error)) from None
    needs_main = b"__main__" in task or b"__main__" in item
    if needs_main and not _main_can_be_read_again():
        raise _Unsendable("it needs what is defined in a script that cannot be read again; a module of its own can")
    return task, needs_main


def _main_can_be_read_again() -> bool:
    """Whether a new process finds the script that started this one: not one of standard input, or a notebook."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is None:
        return os.path.isfile(getattr(main, "__file__", None) or "")
    if name == "__main__" or name.endswith(".__main__"):  # of a package or an archive, which no process reads again
        return False
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


class _Process(SpawnProcess):
    """A new interpreter that sees the variables for one thread, and the user's script only if it is needed there.

    A spawned process imports the script that started its parent. Where that is not guarded, it would do its work again;
    but only a function or an item that the script itself defines needs it.
    """

    needs_main = True

    def start(self) -> None:
        main = sys.modules["__main__"] if self.needs_main else _NO_MAIN
        # Variables and modules are the whole process's: threads that change them for a moment take turns.
        with _starting, _environment(_ONE_THREAD), _main_module(main), _without_interrupts():
            super().start()


class _Context(SpawnContext):
    def __init__(self, needs_main: bool) -> None:
        super().__init__()
        self.needs_main = needs_main
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: object) -> SpawnProcess:  # type: ignore[override]
        process = _Process(*args, **kwargs)  # type: ignore[arg-type]
        process.needs_main = self.needs_main
        self.started.append(process)
        return process


_starting = threading.Lock()
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
    if sys.platform == "win32":  # which has no such masks
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
    """The result, and what it took."""
    global _function, _task
    before = spent()
    if _function is None:  # here and not in `_prepare`, so that an error reaches the caller
        assert _task is not None
        _function, _task = pickle.loads(_task), None
    return _function(item), spent(before)


def _end_tracker() -> None:
    """The process in which multiprocessing keeps count of semaphores would else end a moment after this one."""
    if sys.platform == "win32":  # which counts none
        return
    tracker: Any = getattr(resource_tracker, "_resource_tracker", None)
    process, pipe = getattr(tracker, "_pid", None), getattr(tracker, "_fd", None)
    if process is None or pipe is None:
        return
    tracker._pid = tracker._fd = None
    with suppress(OSError):
        os.close(pipe)
        deadline = time.monotonic() + _GRACE
        while os.waitpid(process, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)


Finalize(None, _end_tracker, exitpriority=-100)  # when all that it counts has ended
