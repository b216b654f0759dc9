"""What a program may have switched in torch before it calls this package, and what is one for all of its threads."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from traceback import clear_frames

import torch

from cacl._support.cores import threads_of_cores
from cacl.errors import InputError

logger = logging.getLogger("cacl")

_turn = threading.RLock()
generator_alone = threading.RLock()
"""Is held while something is drawn from torch's generator after it was seeded."""


@contextmanager
def training_alone() -> Iterator[None]:
    """A training as in a process of its own: gradients on, no autocast of others, and in one thread at a time.

    Torch has one generator for all threads, which a training seeds: a second thread waits until the first has ended.
    Torch takes no more threads than a container's quota has cores. Of one that is stopped, or has not
    enough memory, nothing stays: its networks, batches and processes would as long as a notebook keeps the traceback.
    """
    if not _turn.acquire(blocking=False):
        logger.info("another thread of this process trains; waiting for its end, as both draw from torch's generator")
        _turn.acquire()
    try:
        with threads_of_cores(), ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
        clear_frames(error.__traceback__)
        gc.collect()  # progress bars refer to themselves
        raise
    finally:
        _turn.release()


@contextmanager
def defaults_of(device: torch.device) -> Iterator[None]:
    """Where a program has set a default device, that of new tensors is ``device``: an encoder of its own counts on one.

    This package's own tensors say where they are.
    """
    if torch.get_default_device().type == "cpu":
        yield
        return
    with device:
        yield


@contextmanager
def building() -> Iterator[None]:
    """Networks that are made here are on the CPU, whatever device new tensors go to by default.

    What is drawn for them is taken from nobody: torch's generator is then as it was before.

    Raises:
        ValueError: if they would not be of float32.
    """
    if torch.get_default_dtype() != torch.float32:
        raise InputError(
            f"torch's default dtype: expected torch.float32, but got {torch.get_default_dtype()}; call "
            "torch.set_default_dtype(torch.float32) first"
        )
    with generator_alone, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        yield
