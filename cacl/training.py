"""The one training loop, for every stage that trains: schedule, precision, log, checkpoint, resume."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from cacl._support.checkpoint import restore
from cacl._support.clock import timed
from cacl._support.distributed import barrier, gather, rank, rank_zero, world_size
from cacl._support.loaders import naming_dead_loaders
from cacl._support.parallel import distributed
from cacl._support.pending import Pending, short
from cacl._support.progress import watched
from cacl._support.signals import Interrupts
from cacl._support.surroundings import generator_alone, training_alone
from cacl._support.values import check_choice
from cacl._support.waiting import WAITED
from cacl._support.weights import are_finite, check_takes_part, save_state
from cacl.constants import Precision
from cacl.datasets import Dataset
from cacl.errors import InputError, NotFiniteError, expected
from cacl.loading import Batch, load_batches, mixed, order
from cacl.log import Callback, Journal, Log, Record
from cacl.settings import Machine, Schedule, Training
from cacl.transforms import RandomView

logger = logging.getLogger("cacl")

RESERVED = ("stage", "step", "epoch", "lr", "images_per_second", "loss")
"""What every record of the log has; a step's own values have other names, but for ``"loss"``."""


@dataclass(frozen=True)
class Loop:
    """Settings of :func:`train`.

    Args:
        epochs: passes over the images; batches run on over the end of a pass, so that none is smaller.
        batch_size: images a step, of all processes together.
        view: the augmentation.
        schedule: factor of the learning rate by the share p of steps done: ``"cosine"`` (1 + cos πp) / 2,
            ``"poly"`` (1 − p)^0.9, ``"constant"`` 1.
        seed: of everything that is random.
        workers: processes that load images; 0 loads in this one. Changes nothing in the result.
        device: where the modules are.
        precision: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"`` (with gradient scaling).
        checkpoint_seconds: time between checkpoints.
        masks: load masks too.
        progress: show a progress bar where there is a terminal or a notebook.
    """

    epochs: float
    batch_size: int
    view: RandomView
    schedule: Schedule = "cosine"
    seed: int = 0
    workers: int = 0
    device: torch.device | str = "cpu"
    precision: Precision = "fp32"
    checkpoint_seconds: float = 60.0
    masks: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, _SCHEDULES)
        check_choice("precision", self.precision, get_args(Precision))
        if self.epochs < 0 or not math.isfinite(self.epochs):
            raise expected("epochs", "a number of at least 0", self.epochs)
        if self.batch_size < 1:
            raise expected("batch_size", "at least 1", self.batch_size)

    @classmethod
    def of(
        cls,
        settings: Training,
        *,
        seed: int = 0,
        machine: Machine = Machine(),
        masks: bool = False,
        checkpoint_seconds: float = 60.0,
    ) -> Loop:
        """The loop that a stage's table describes."""
        return cls(
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            view=RandomView(settings.crop, scale=settings.scale),
            schedule=settings.schedule,
            seed=seed,
            workers=machine.workers,
            device=machine.device,
            precision=machine.precision,
            checkpoint_seconds=checkpoint_seconds,
            masks=masks,
            progress=machine.progress,
        )

    def steps(self, images: int) -> int:
        return math.ceil(self.epochs * images / self.batch_size)


@training_alone()
def train(
    step: Callable[[Batch], Mapping[str, Tensor]],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    loop: Loop,
    *,
    name: str = "train",
    checkpoint: Path | None = None,
    key: str = "",
    log: Log | None = None,
    callback: Callback | None = None,
) -> None:
    """Train ``modules`` in place.

    A run that was stopped goes on from ``checkpoint`` and ends with the same weights, bit for bit on a CPU, as one
    that was not: what is random about a sample or a step is drawn from (seed, epoch, sample) or (seed, step). SIGINT
    and SIGTERM take effect after the step, when a last checkpoint has been saved; a second one does at once. Gradients
    are on, whatever was switched outside; where another thread trains, this one waits for its end.

    Where ``torch.distributed`` has a default group, all its processes call this, each gets its part of every batch, and
    ``DistributedDataParallel`` takes the mean of the gradients; on GPUs, batch norm that trains sees the whole batch
    (``SyncBatchNorm``). The file system is one that all of them see.

    Args:
        step: batch -> tensors to log, of which ``"loss"`` is minimised. In several processes the mean of each tensor
            over them is what belongs to the whole batch (:attr:`Batch.share`, and ``across`` of the losses, see to
            it); every process runs the same ones of the modules.
        modules: everything with a state that a step changes; saved and restored. Their mode is left as it is.
        optimizer: over their parameters, with the learning rates at the start of the schedule.
        dataset: the training images.
        loop: the settings.
        name: the stage, for log, progress bar and messages.
        checkpoint: file to go on from and to save to; removed by nobody here.
        key: a checkpoint with another key is of another run and is not used.
        log: where records go; written by rank 0.
        callback: gets every record, in every process.

    Raises:
        NotFiniteError: if a loss is not finite; the last good checkpoint stays.
        ValueError: if an image does not decode, a checkpoint does not fit, or there are more processes than images in
            a batch; names the file.
        ChildProcessError: if a process that loads images dies, or all of them do nothing for a long time.
    """
    if loop.batch_size < world_size():
        raise expected("batch_size", f"at least 1 image for each of the {world_size()} processes", loop.batch_size)
    check_takes_part(modules)
    device = torch.device(loop.device)
    steps = loop.steps(len(dataset))
    scaler = torch.amp.GradScaler(device.type, enabled=loop.precision == "fp16")
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    with barrier():
        start = restore(checkpoint, key, modules, optimizer, scaler)
    if len(set(gather(start))) > 1:
        raise InputError(
            f"{checkpoint}: expected a file system that all processes see, but they found other steps in it"
        )
    rank_zero(lambda: log.rewind(name, start) if log is not None else None)
    run = step if world_size() == 1 else distributed(step, modules, device)

    def save(done: int) -> None:
        pending.flush()
        if checkpoint is None or rank() > 0 or pending.failed is not None or not are_finite(modules):
            return  # a finite loss may have had an update that is not
        states = {k: module.state_dict() for k, module in modules.items()}
        state = {"modules": states, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        save_state(checkpoint, {"key": key, "step": done, **state})

    def emit(record: Record) -> None:
        if log is not None and rank() == 0:
            log.write(record)
        if callback is not None:
            callback(record)
        bar.set_postfix(loss=f"{record['loss']:.4g}", refresh=False)

    batches = load_batches(
        dataset, loop.view, batch_size=loop.batch_size, seed=loop.seed, steps=range(start, steps), masks=loop.masks,
        workers=loop.workers, device=device, stop=lambda: interrupts.came_before(WAITED),
    )  # fmt: skip

    def ids(number: int) -> list[str]:
        """What the images of a step are called, those of the other processes included."""
        (keys,) = order(len(dataset), loop.batch_size, loop.seed, range(number, number + 1))
        return [dataset.entries[i].id for _, i in keys]

    done = start
    bar = watched(batches, total=steps, initial=start, desc=name, unit="step", progress=loop.progress)
    pending = Pending(name, emit)
    saved = clock = time.monotonic()
    machine = Machine(device, precision=loop.precision)
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with bar, generators, naming_dead_loaders(), Interrupts() as interrupts:
        for number, batch in enumerate(bar, start=start):
            factor = _SCHEDULES[loop.schedule](number / steps)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            with timed("network"):
                optimizer.zero_grad(set_to_none=True)
                with generator_alone:
                    torch.manual_seed(mixed(loop.seed, "step", number, *([rank()] if rank() else [])))
                    with machine.autocast():
                        terms = run(batch)
                    scaler.scale(terms["loss"]).backward()
                scaler.step(optimizer)
                scaler.update()
            now, done = time.monotonic(), number + 1
            record = {
                "stage": name,
                "step": done,
                "epoch": round(done * loop.batch_size / len(dataset), 4),
                "lr": short(optimizer.param_groups[0]["lr"]),
                "images_per_second": short(loop.batch_size / max(now - clock, 1e-9)),
            }
            clock = now
            pending.add(record, partial(ids, number), terms, interrupts.came)
            stopping = pending.due(pending.stop, done) or (world_size() == 1 and interrupts.came)
            if stopping or now - saved > loop.checkpoint_seconds:
                save(done)
                saved = time.monotonic()
            if pending.due(pending.failed, done):
                raise pending.failure
            if stopping:
                pending.stop = None
                interrupts.take_effect()
        if done < steps:  # a batch did not come
            save(done)
            interrupts.take_effect()
            raise ChildProcessError(f"{name}: stopped at step {done}, as the next images did not come")
        pending.flush()
        if pending.failed is not None:
            raise pending.failure
        if start < steps and not all(gather(are_finite(modules))):  # no loss shows it after the last update
            raise NotFiniteError(
                f"{name}: the weights are not finite after step {steps}; the last good checkpoint is kept. A lower "
                "learning rate may help."
            )
        if start < steps:
            save(steps)
        if any(gather(interrupts.came)):  # in the last steps
            interrupts.take_effect()


_SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "poly": lambda done: (1 - done) ** 0.9,
    "constant": lambda done: 1.0,
}


def fit(
    step: Callable[[Batch], Mapping[str, Tensor]],
    modules: Mapping[str, nn.Module],
    groups: list[dict[str, Any]],
    dataset: Dataset,
    settings: Training,
    *,
    name: str,
    masks: bool = False,
    seed: int = 0,
    machine: Machine = Machine(),
    journal: Journal = Journal(),
) -> None:
    """:func:`train` by SGD with the settings of a stage's table, as every stage of this package that trains does it.

    Args:
        step: as for :func:`train`, like the next one.
        modules: in training mode.
        groups: parameters with their learning rates, as an optimiser takes them.
        dataset: the training images.
        settings: the table.
        name: the stage.
        masks: whether a step needs the masks of ``dataset``.
        seed: of everything that is random.
        machine: where it is computed.
        journal: log and checkpoint.
    """
    # Fused on a GPU: gradient scaling then needs no look at the device.
    optimizer = torch.optim.SGD(
        groups, lr=0.1, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=machine.on_gpu
    )
    loop = Loop.of(settings, seed=seed, machine=machine, masks=masks, checkpoint_seconds=journal.checkpoint_seconds)
    train(
        step, modules, optimizer, dataset, loop, name=journal.name or name,
        checkpoint=journal.checkpoint, key=journal.key, log=journal.log, callback=journal.callback,
    )  # fmt: skip
