"""The one training loop, for every stage that trains: schedule, precision, log, checkpoint, resume."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cacl._support.checkpoint import restore
from cacl._support.checks import check_choice
from cacl._support.distributed import barrier, gather, rank, rank_zero, world_size
from cacl._support.pending import Pending, short
from cacl._support.pool import leave_signals, loaded, naming_dead_loaders
from cacl._support.progress import watched
from cacl._support.signals import Interrupts
from cacl._support.weights import save_state
from cacl.datasets import Dataset
from cacl.errors import InputError, NotFiniteError, expected
from cacl.log import Callback, Log, Record
from cacl.transforms import RandomView

logger = logging.getLogger("cacl")


class Batch(NamedTuple):
    """A batch as a step gets it."""

    ids: list[str]
    images: Tensor
    """``(B, 3, crop, crop)`` float32, normalised with ImageNet's statistics, on the loop's device."""
    labels: Tensor
    """``(B, K)`` uint8, on the CPU, so that finding the present pairs waits for no device."""
    masks: Tensor | None
    """``(B, crop, crop)`` uint8 on the CPU; None unless the loop was asked for masks."""
    share: float = 1.0
    """What a mean over these images counts for: 1 in one process, and over all processes 1 on average."""


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
        progress: show a progress bar where there is a terminal.
    """

    epochs: float
    batch_size: int
    view: RandomView
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    seed: int = 0
    workers: int = 0
    device: torch.device | str = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpoint_seconds: float = 60.0
    masks: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, _SCHEDULES)
        check_choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        if self.epochs < 0 or not math.isfinite(self.epochs):
            raise expected("epochs", "a number of at least 0", self.epochs)
        if self.batch_size < 1:
            raise expected("batch_size", "at least 1", self.batch_size)

    def steps(self, images: int) -> int:
        return math.ceil(self.epochs * images / self.batch_size)


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
    and SIGTERM take effect after the step, when a last checkpoint has been saved; a second one does at once.

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
        ChildProcessError: if a process that loads images dies.
    """
    if loop.batch_size < world_size():
        raise expected("batch_size", f"at least 1 image for each of the {world_size()} processes", loop.batch_size)
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
    run = step if world_size() == 1 else _distributed(step, modules, device)

    def finite() -> bool:
        values = (value for module in modules.values() for value in module.state_dict().values())
        return all(bool(value.isfinite().all()) for value in values if isinstance(value, Tensor))

    def save(done: int) -> None:
        if checkpoint is None or rank() > 0 or not finite():  # a finite loss may have had an update that is not
            return
        states = {k: module.state_dict() for k, module in modules.items()}
        state = {"modules": states, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        save_state(checkpoint, {"key": key, "step": done, **state})

    def emit(record: Record) -> None:
        if log is not None and rank() == 0:
            log.write(record)
        if callback is not None:
            callback(record)
        bar.set_postfix(loss=f"{record['loss']:.4g}", refresh=False)

    batches = _batches(dataset, loop, start, steps)
    bar = watched(batches, total=steps, initial=start, desc=name, unit="step", progress=loop.progress)
    pending = Pending(name, emit)
    saved = clock = time.monotonic()
    dtype = torch.bfloat16 if loop.precision == "bf16" else torch.float16
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with bar, generators, naming_dead_loaders(), Interrupts() as interrupts:
        for number, batch in enumerate(bar, start=start):
            torch.manual_seed(_mix(loop.seed, "step", number, *([rank()] if rank() else [])))
            factor = _SCHEDULES[loop.schedule](number / steps)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=loop.precision != "fp32"):
                terms = run(batch)
            scaler.scale(terms["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()
            now = time.monotonic()
            record = {
                "stage": name,
                "step": number + 1,
                "epoch": round((number + 1) * loop.batch_size / len(dataset), 4),
                "lr": short(optimizer.param_groups[0]["lr"]),
                "images_per_second": short(loop.batch_size / max(now - clock, 1e-9)),
            }
            clock = now
            pending.add(record, _ids(dataset, loop, number), terms, interrupts.came)
            stopping = pending.due(pending.stop, number + 1) or (world_size() == 1 and interrupts.came)
            if stopping or now - saved > loop.checkpoint_seconds:
                pending.flush()
                if pending.failed is None:
                    save(number + 1)
                saved = time.monotonic()
            if pending.due(pending.failed, number + 1):
                raise pending.failure
            if stopping:
                pending.stop = None
                interrupts.take_effect()
        pending.flush()
        if pending.failed is not None:
            raise pending.failure
        if start < steps and not all(gather(finite())):  # after the last update there is no loss that shows it
            raise NotFiniteError(
                f"{name}: the weights are not finite after step {steps}; the last good checkpoint is kept. A lower "
                "learning rate may help."
            )
        if start < steps:
            save(steps)
        if any(gather(interrupts.came)):  # in the last steps
            interrupts.take_effect()


class _Whole(nn.Module):
    """A step and the parameters that it trains, as :class:`DistributedDataParallel` takes them.

    Buffers are none of its business: they follow from what all processes see, or are those of rank 0 in the end.
    """

    def __init__(self, step: Callable[[Batch], Mapping[str, Tensor]], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.step = step
        self.trained = nn.ParameterList(p for module in modules.values() for p in module.parameters())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return dict(self.step(batch))


def _distributed(
    step: Callable[[Batch], Mapping[str, Tensor]], modules: Mapping[str, nn.Module], device: torch.device
) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    if device.type == "cuda":  # on CPUs there is no batch norm over processes
        for module in modules.values():
            nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    # The same parameters take part in every step, so that those which never do are found in the first one.
    return DistributedDataParallel(_Whole(step, modules), static_graph=True)


class _Views(torch.utils.data.Dataset[Any]):
    """Augmented samples by (epoch, index)."""

    def __init__(self, dataset: Dataset, loop: Loop) -> None:
        self.dataset, self.view, self.seed, self.masks = dataset, loop.view, loop.seed, loop.masks

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch, index))
        try:
            mask = self.dataset.mask(index) if self.masks else None
            image, mask_view = self.view(self.dataset.image(index), mask, generator=generator)
        except InputError as error:
            return error  # raised by the loop: a worker would wrap it in its traceback
        return self.dataset.entries[index].id, image, self.dataset.labels(index), mask_view


def _order(images: int, loop: Loop, start: int, steps: int) -> Iterator[list[tuple[int, int]]]:
    """The (epoch, index) keys of each step's batch: one permutation an epoch, drawn from (seed, epoch)."""
    epoch, order = -1, []
    for number in range(start, steps):
        keys = []
        for position in range(number * loop.batch_size, (number + 1) * loop.batch_size):
            if position // images != epoch:
                epoch = position // images
                generator = torch.Generator().manual_seed(_mix(loop.seed, "order", epoch))
                order = torch.randperm(images, generator=generator).tolist()
            keys.append((epoch, order[position % images]))
        yield keys


def _ids(dataset: Dataset, loop: Loop, number: int) -> Callable[[], list[str]]:
    """What the images of a step are called, those of the other processes included."""
    return lambda: [dataset.entries[i].id for _, i in next(_order(len(dataset), loop, number, number + 1))]


def _batches(dataset: Dataset, loop: Loop, start: int, steps: int) -> Iterator[Batch]:
    device = torch.device(loop.device)
    loader = DataLoader(
        _Views(dataset, loop),
        batch_sampler=(keys[rank() :: world_size()] for keys in _order(len(dataset), loop, start, steps)),
        num_workers=loop.workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    for batch in loaded(loader):
        if isinstance(batch, InputError):
            raise batch
        images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
        yield batch._replace(images=images, share=len(batch.ids) * world_size() / loop.batch_size)


def _collate(samples: Sequence[Any]) -> Batch | InputError:
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    ids, images, labels, masks = zip(*samples, strict=True)
    return Batch(
        list(ids),
        torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2),
        torch.stack(labels),
        torch.stack(masks) if masks[0] is not None else None,
    )


def _mix(*parts: object) -> int:
    """A seed that depends on all the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


_SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "poly": lambda done: (1 - done) ** 0.9,
    "constant": lambda done: 1.0,
}
