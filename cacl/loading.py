"""Images and batches through processes that load them; what is random about a sample follows from its place alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cacl._support.distributed import rank, world_size
from cacl._support.loaders import load
from cacl._support.progress import watched
from cacl.datasets import Dataset
from cacl.errors import InputError
from cacl.settings import Machine
from cacl.transforms import RandomView, normalize

T = TypeVar("T")


def load_images(
    dataset: Dataset, indices: Sequence[int], workers: int, *, pinned: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(index, normalised ``(3, H, W)``) of some images, loaded by ``workers`` processes, ``pinned`` for a GPU."""
    for index, image in load(_Images(dataset, indices), workers=workers, pinned=pinned):
        if isinstance(image, InputError):
            raise image
        yield index, image


def load_alike(
    dataset: Dataset, indices: Sequence[int], machine: Machine, *, desc: str
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, normalised ``(B, 3, H, W)`` on the device) of some images: as many that follow each other and have one
    size as :func:`at_once` says, with a progress bar."""
    images = load_images(dataset, indices, machine.workers, pinned=machine.on_gpu)
    with closing(watched(None, total=len(indices), desc=desc, progress=machine.progress)) as bar:
        for group in alike(images, _size_of, partial(at_once, machine.device)):
            batch = torch.stack([image for _, image in group])
            yield (
                [index for index, _ in group],
                batch.to(machine.device, memory_format=torch.channels_last, non_blocking=True),
            )
            bar.update(len(group))


def _size_of(item: tuple[int, Tensor]) -> tuple[int, int]:
    height, width = item[1].shape[1:]
    return height, width


def at_once(device: torch.device | str, size: tuple[int, int]) -> int:
    """How many photos ``(H, W)`` a network sees at a time: one on a CPU, which one keeps busy; on a GPU as many as its
    memory has 32 kB a pixel for, and at most 32."""
    device, pixels = torch.device(device), size[0] * size[1]
    if device.type != "cuda" or not pixels:
        return 1
    return max(1, min(32, torch.cuda.get_device_properties(device).total_memory // 32768 // pixels))


def alike(
    items: Iterable[T], size: Callable[[T], tuple[int, int]], most: Callable[[tuple[int, int]], int]
) -> Iterator[list[T]]:
    """Items of one size that follow each other, in groups of at most as many as that size allows."""
    group: list[T] = []
    for item in items:
        if group and size(item) != size(group[0]):
            yield group
            group = []
        group.append(item)
        if len(group) >= most(size(item)):  # at once: the next may take a while to come
            yield group
            group = []
    if group:
        yield group


class _Images(torch.utils.data.Dataset[Any]):
    """(index, normalised image) of some images of a data set."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor | InputError]:
        index = self.indices[position]
        try:
            return index, normalize(self.dataset.image(index))
        except InputError as error:
            return index, error  # raised by the reader: a worker would wrap it in its traceback


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


class _Views(torch.utils.data.Dataset[Any]):
    """Augmented samples by (epoch, index)."""

    def __init__(self, dataset: Dataset, view: RandomView, seed: int, masks: bool) -> None:
        self.dataset, self.view, self.seed, self.masks = dataset, view, seed, masks

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch, index))
        try:
            mask = self.dataset.mask(index) if self.masks else None
            image, mask_view = self.view(self.dataset.image(index), mask, generator=generator)
        except InputError as error:
            return error  # raised by the loop: a worker would wrap it in its traceback
        return self.dataset.entries[index].id, image, self.dataset.labels(index), mask_view


def order(images: int, batch_size: int, seed: int, steps: Iterable[int]) -> Iterator[list[tuple[int, int]]]:
    """The (epoch, index) keys of the batches of some steps: one permutation an epoch, drawn from (seed, epoch)."""
    epoch, permutation = -1, []
    for number in steps:
        keys = []
        for position in range(number * batch_size, (number + 1) * batch_size):
            if position // images != epoch:
                epoch = position // images
                generator = torch.Generator().manual_seed(mixed(seed, "order", epoch))
                permutation = torch.randperm(images, generator=generator, device="cpu").tolist()
            keys.append((epoch, permutation[position % images]))
        yield keys


def load_batches(
    dataset: Dataset,
    view: RandomView,
    *,
    batch_size: int,
    seed: int,
    steps: Iterable[int],
    masks: bool,
    workers: int,
    device: torch.device,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Batch]:
    """This process's part of the batch of each step, on the device, until one that is waited for need not come."""
    batches = load(
        _Views(dataset, view, seed, masks),
        workers=workers,
        batches=(keys[rank() :: world_size()] for keys in order(len(dataset), batch_size, seed, steps)),
        collate=_collate,
        pinned=device.type == "cuda",
        stop=stop,
    )
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
        yield batch._replace(images=images, share=len(batch.ids) * world_size() / batch_size)


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


def mixed(*parts: object) -> int:
    """A seed that depends on all the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
