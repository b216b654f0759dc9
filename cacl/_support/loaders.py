"""Images through the processes of a ``DataLoader``: they come, or one line says why not."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import Lock, active_children, get_start_method, set_forkserver_preload
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from cacl._support.clock import timed
from cacl._support.signals import Interrupts
from cacl._support.waiting import POLL, Patience, warn_once, why_not

T = TypeVar("T")


def load(
    dataset: Any,
    *,
    workers: int,
    batches: Iterator[Any] | None = None,
    keys: Iterable[Any] | None = None,
    collate: Callable[[Any], Any] | None = None,
    pinned: bool = False,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Any]:
    """The items of a data set in their order, loaded by ``workers`` processes, which end with this one.

    What the shared memory (``/dev/shm``, 64 MB in a container by default) has no room for comes through a pipe instead;
    where no process can be started, this one does the work.

    Args:
        dataset: with ``[key]``, and with a length unless there are ``batches`` or ``keys``.
        workers: number of processes; 0 loads in this one.
        batches: the keys of each batch; every item alone, without.
        keys: those of the items, where they are not its indices; a few more are asked for than have come.
        collate: makes a batch of a list of items, or something else of an item.
        pinned: for a GPU.
        stop: is asked every few seconds while a batch is waited for, by another thread: whether it no longer is. The
            items then end.

    Raises:
        ChildProcessError: if one of the processes dies, or all of them do nothing for a long time.
    """
    grouping: dict[str, Any] = {"batch_size": None} if batches is None else {"batch_sampler": batches}
    asked = None if keys is None else _Keys(keys, _AHEAD * workers)
    if asked is not None:
        grouping["sampler"] = asked
    loader: DataLoader[Any] = DataLoader(
        dataset,
        **grouping,
        num_workers=workers,
        collate_fn=_Sending(collate or _as_it_is),
        pin_memory=pinned,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    before = set(active_children())
    try:
        # A process that is half started would be waited for at the end. What a loader draws is drawn on the CPU.
        with Interrupts(), torch.device("cpu"):
            if workers:
                _share_imports(dataset)
                Lock()  # the same error as below, where torch leaves something half made
            loaded = iter(loader)
    except OSError as error:
        if asked is not None and asked.error is not None:
            raise
        warn_once(f"images are loaded without other processes, as none can be started: {why_not(error)}")
        yield from load(dataset, workers=0, batches=batches, keys=asked, collate=collate, pinned=pinned)
        return
    processes = [process for process in active_children() if process not in before]
    _loaders.update(processes)
    watch = _Watch(processes, stop, asked)
    _running.add(loaded)
    try:
        while True:
            try:
                with watch, naming_dead_loaders(), timed("photos"):
                    item = _next(loaded, processes)
            except StopIteration:
                return
            except Exception:
                watch.gather()
                if watch.stopped:
                    return
                if watch.error:
                    raise watch.error from None
                raise
            yield _mapped(_Piped, _received, item)
    finally:
        watch.over.set()
        _running.discard(loaded)


_running: set[Iterator[Any]] = set()
"""Those of a ``DataLoader``, which ends its processes only where the garbage collector does not come to it first."""


def _next(loaded: Iterator[Any], processes: Sequence[BaseProcess]) -> Any:
    try:
        return next(loaded)
    except (EOFError, ConnectionError):  # one that died while it handed over an image
        if wait([process.sentinel for process in processes], timeout=1):
            raise RuntimeError("DataLoader worker died") from None
        raise


class _Keys:
    """The keys of items, the first ones asked for here, where this process can be stopped."""

    def __init__(self, keys: Iterable[Any], ahead: int) -> None:
        self._rest = iter(keys)
        self._first = list(islice(self._rest, ahead))
        self.busy = False
        """Whether the next one is being asked for."""
        self.error: Exception | None = None
        """What it has raised."""

    def __iter__(self) -> Iterator[Any]:
        yield from self._first
        while True:
            self.busy = True
            try:
                key = next(self._rest)
            except StopIteration:
                return
            except Exception as error:
                self.error = error
                raise
            finally:
                self.busy = False
            yield key


class _Watch:
    """While it is entered, a thread looks after processes that are waited for, and ends those that do nothing.

    Whoever waits may do so where nothing can be asked of it: for a file that a process offers, which stands still.
    """

    def __init__(self, processes: Sequence[BaseProcess], stop: Callable[[], bool] | None, keys: _Keys | None) -> None:
        self.processes, self.stop, self.keys = processes, stop, keys
        self.over, self.stopped = threading.Event(), False
        self.error: ChildProcessError | None = None
        self._patience: Patience | None = None
        if processes:
            threading.Thread(target=self._look, daemon=True).start()

    def __enter__(self) -> None:
        self._patience = Patience(process.pid for process in self.processes)

    def __exit__(self, *_: object) -> None:
        self._patience = None

    def gather(self) -> None:
        """Those that were ended: torch raises an error for each, whatever this process does just then."""
        for process in self.processes if self.stopped or self.error else ():
            with suppress(RuntimeError):
                process.join()
                time.sleep(0)  # here, at the latest

    def _look(self) -> None:
        while not self.over.wait(POLL):
            if self.keys is not None and self.keys.busy and self._patience is not None:
                self.__enter__()  # they have nothing to do before the next key comes
            patience = self._patience
            if patience is None:
                continue
            self.stopped = self.stop is not None and self.stop()
            try:
                patience.check("load images")
            except ChildProcessError as error:
                self.error = error
            if self.stopped or self.error:
                for process in self.processes:
                    process.kill()
                return


_AHEAD = 2
"""Items that a DataLoader asks for before the first has come, a process."""
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


def _share_imports(dataset: Any) -> None:
    """Where processes are forked from a server, as they are on Linux from Python 3.14 on, it imports once what each of
    them would: some tenths of a second for each loader, not some seconds."""
    if get_start_method() == "forkserver":
        set_forkserver_preload(["__main__", __name__, type(dataset).__module__])


def _begin(worker: int) -> None:
    """In a process of a ``DataLoader``: whoever is asked to stop ends it, and needs its images until then.

    It gives way to a network on the same cores, whose threads wait for each other where one of them is put off: on two
    cores a training step is a tenth faster.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)


@dataclass(frozen=True)
class _Sending:
    """Collates, and puts tensors where the process that waits for them can take them from.

    A ``DataLoader`` would do the latter itself, but where there is no room it says so on stderr and forgets the batch.
    """

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        value = self.collate(samples)
        return value if get_worker_info() is None else _mapped(Tensor, _sent, value)


@dataclass(frozen=True)
class _Piped:
    """A tensor that the shared memory has no room for."""

    values: NDArray[Any]


def _sent(tensor: Tensor) -> Tensor | _Piped:
    try:
        shared: Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
        return shared
    except RuntimeError:  # no room, or not one more file
        return _Piped(tensor.numpy())


def _received(piped: _Piped) -> Tensor:
    warn_once(
        "/dev/shm has no room for the images that are loaded: they come through pipes, which is slower. A container "
        "has more with `docker run --shm-size=1g`; with `[run] workers = 0` none is needed."
    )
    return torch.from_numpy(piped.values)


def _mapped(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """A value with all that is of a kind in it, in tuples and lists, replaced."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(kind, function, each) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(kind, function, each) for each in value)
    return value


def _as_it_is(item: T) -> T:
    return item
