"""Several processes of one run, as torchrun starts them: who they are, and what they tell each other.

Everything here is true of a single process too, which is its own rank 0 of 1 and has nobody to talk to.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacl._support.launch import launched
from cacl.errors import ElsewhereError, InputError, LostProcessError, first_line

T = TypeVar("T")

_alone = False
"""Whether rank 0 does something for all, in which it is the only one: :func:`rank_zero`."""
_patient: Any = None
"""For those who wait while others work."""
_PATIENCE = 48


def world_size() -> int:
    """Number of processes of ``torch.distributed``'s default group; 1 without one."""
    dist = _grouped()
    return int(dist.get_world_size()) if dist and not _alone else 1


def rank() -> int:
    """This process's number among them, from 0."""
    dist = _grouped()
    return int(dist.get_rank()) if dist else 0


def local_device(name: str, setting: str) -> torch.device:
    """:func:`cacl._support.distributed.find_device`, where each process of a machine takes a GPU of its own."""
    if launched() and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and name.startswith("cuda:"):
        raise InputError(f'{setting}: expected "auto" or "cuda", a GPU for each process, but got {name!r}')
    if name in ("auto", "cuda") and torch.cuda.is_available() and launched():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return find_device(name, setting)


def local_world_size() -> int:
    """Number of this run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """Take part in the group that torchrun has started this process for; nothing without torchrun, or in a group.

    Args:
        device: of this process.
        timeout: seconds after which a process that does not answer in a training step is given up; where some wait for
            the work of others, 48 times that. One that dies is noticed at once.

    Raises:
        LostProcessError: if another process dies or does not answer in time.
    """
    if not launched() or _grouped():
        with _reported():
            yield
            gather(None)  # nobody leaves while another still listens
        return
    try:
        _begin(device, timeout)
        with _reported():
            yield
            gather(None)
    finally:  # also where the body raises: whoever waits for this process then learns that it is gone
        _end()


def _begin(device: torch.device, timeout: float) -> None:
    """Make the group that torchrun has started this process for."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    global _patient
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Both: what is on the CPU is told without waiting for a GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    with _reported():
        store, number, size = next(rendezvous("env://", timeout=limit))
        own = _unused(store, number, size, timeout)
        dist.init_process_group(backend, store=own, rank=number, world_size=size, timeout=limit)
        _patient = dist.new_group(backend="gloo", timeout=_PATIENCE * limit)


def _end() -> None:
    global _patient
    _patient = None
    if dist := _grouped():
        dist.destroy_process_group()


def _unused(store: Any, number: int, size: int, timeout: float) -> Any:
    """A part of torchrun's store that nobody has used: what was said in other runs, or before a restart, stays in it.

    Each writes a name that is new, and which names it sees. When all see the same, these are of this start. (The number
    of restarts that torchrun tells its processes may differ from machine to machine.)
    """
    import torch.distributed as dist

    store.set(f"cacl/name/{number}", uuid4().hex)
    deadline = time.monotonic() + timeout
    while True:
        names = b"-".join(store.get(f"cacl/name/{each}") for each in range(size))
        store.set(f"cacl/seen/{number}", names)
        if all(store.get(f"cacl/seen/{each}") == names for each in range(size)):
            return dist.PrefixStore(hashlib.sha256(names).hexdigest(), store)  # type: ignore[attr-defined]
        if time.monotonic() > deadline:
            raise dist.DistError("not all processes have started")
        time.sleep(0.05)


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's part: every :func:`world_size`-th item."""
    return items[rank() :: world_size()]


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes, without a gradient."""
    if world_size() == 1:
        return values
    place = values.device
    if place.type == "cpu" and not _speaks_cpu():
        place = torch.device("cuda", torch.cuda.current_device())
    summed = values.detach().to(place, copy=True)
    _grouped().all_reduce(summed)
    return summed.to(values.device)


def all_reduce_counts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """:func:`all_reduce_sum` of an array."""
    return all_reduce_sum(torch.from_numpy(counts)).numpy()


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    _grouped().all_gather_object(values, value, group=_patient)
    return values  # type: ignore[return-value]


def unshard(own: Sequence[T]) -> list[T]:
    """What came of each process's :func:`shard` -> what came of all items, in their order."""
    parts = gather(list(own))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def rank_zero(function: Callable[[], T]) -> T:
    """What ``function`` gives on rank 0, or what it raises there as in :func:`barrier`, on every process.

    Nobody goes on before it is done. In it, this is the only process there is.
    """
    global _alone
    if world_size() == 1:
        return function()
    result: T | None = None
    with barrier():
        if rank() == 0:
            _alone = True
            try:
                result = function()
            finally:
                _alone = False
    return gather(result)[0]  # type: ignore[return-value]


@contextmanager
def barrier() -> Iterator[None]:
    """A block that every process runs: what one raises in it of the errors that are one line, all raise at its end."""
    if world_size() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except (InputError, OSError, ImportError) as error:
        own = error
    messages = gather(None if own is None else str(own))
    for number, message in enumerate(messages):
        if message is not None:
            raise own if own is not None and number == rank() else ElsewhereError(message)


def first_here() -> bool:
    """Whether this process is the first one of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def local_rank_zero_first(function: Callable[[], T]) -> T:
    """What ``function`` gives, first on one process of each machine: what it downloads, the others find there."""
    if world_size() == 1:
        return function()
    results: list[T] = []
    for turn in (True, False):
        with barrier():
            if first_here() == turn:
                results.append(function())
    return results[0]


def gather_rows(values: Tensor) -> Tensor:
    """``(N, …)`` of every process, N its own -> all rows, in the order of the ranks; without a gradient."""
    if world_size() == 1:
        return values
    lengths = gather(len(values))
    padded = values.new_zeros(max(lengths), *values.shape[1:])
    padded[: len(values)] = values.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    _grouped().all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


@contextmanager
def _reported() -> Iterator[None]:
    """What a broken connection raises, in one line."""
    try:
        yield
    except RuntimeError as error:
        dist = sys.modules.get("torch.distributed")
        if (dist is not None and isinstance(error, dist.DistError)) or "gloo" in str(error):
            raise LostProcessError(
                "another process of this run died or did not answer in time; the same command goes on from the last "
                f"checkpoint ({first_line(error)})"
            ) from error
        raise


def _grouped() -> Any:
    """``torch.distributed`` where it has a default group, else None; torch may be built without it."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _speaks_cpu() -> bool:
    return "cpu" in str(_grouped().get_backend_config())


def find_device(name: str, setting: str) -> torch.device:
    """A device that is there; ``"auto"`` is a GPU if there is one.

    Args:
        name: torch's, or ``"auto"``.
        setting: what a user calls it, for the message.

    Raises:
        ValueError: if this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"{setting}: expected a device of this machine, but got {name!r}: {first_line(error)}"
        ) from None
    return device
