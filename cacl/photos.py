"""Masks of any photos by a trained segmenter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as views

from cacl._support.clock import timed
from cacl._support.loaders import load
from cacl._support.pool import map_processes
from cacl._support.progress import watched
from cacl._support.surroundings import building
from cacl._support.values import check_span
from cacl._support.weights import evaluating, load_state, load_weights, save_state
from cacl.constants import IGNORE, Range
from cacl.crf import CRFArguments, dense_crf
from cacl.deeplab import DeepLabV2, probabilities
from cacl.errors import InputError, expected
from cacl.images import Mask, Pixels, read_image
from cacl.loading import alike, at_once
from cacl.pretrained import CONFIG
from cacl.settings import Machine
from cacl.tables import Photos
from cacl.tagger import weights_of
from cacl.transforms import normalize

K = TypeVar("K")
R = TypeVar("R")

_PRESENT = 0.01
"""A class that is nowhere more probable than this is left out of the CRF, whose cost grows with their number."""


class _Pair(NamedTuple):
    net: DeepLabV2
    classes: tuple[str, ...]
    """Without the background; the first has mask value 1."""


class Segmenter(_Pair):
    """A trained network and what its classes are called, ``net`` and ``classes``."""

    range: Range | None = None  # beside the pair, which scripts unpack
    """What the values of the deep images spanned that it was trained on; by their type if None."""


def save_segmenter(
    path: Path, net: DeepLabV2, classes: Sequence[str], backbone: str, range: Range | None = None
) -> None:
    """Write a file that :func:`load_segmenter` reads; ``backbone`` is its name, or empty for a module of one's own."""
    state = {"classes": list(classes), "backbone": backbone, "weights": net.state_dict()}
    save_state(path, state if range is None else {**state, "range": list(range)})


def load_segmenter(path: Path, *, backbone: nn.Module | None = None) -> Segmenter:
    """Read a trained segmenter, in evaluation mode on the CPU.

    Args:
        path: ``segment/model.pt`` of a run, or a folder of :meth:`cacl.pretrained.Pretrained.save_pretrained`.
        backbone: where it was trained with a backbone that has no name: one such; changed in place.

    Raises:
        ValueError: if the file is missing, is something else, or needs a backbone, or a folder names no classes.
        ImportError: if its backbone is timm's, and timm is missing.
    """
    if path.is_dir():
        saved = DeepLabV2.from_pretrained(path, backbone=backbone)
        named = len(saved.classes)
        if not 0 < named < IGNORE:
            raise InputError(f"{path / CONFIG}: classes: expected 1 to {IGNORE - 1} names, but got {named}")
        segmenter = Segmenter(saved, saved.classes)
        segmenter.range = saved.range
        return segmenter
    state = load_state(path)
    classes, name, weights = (state.get(key) for key in ("classes", "backbone", "weights"))
    named = isinstance(classes, list) and all(isinstance(word, str) for word in (*classes, name))
    if not named or not isinstance(weights, dict) or len(state["classes"]) >= IGNORE:
        raise InputError(f"{path}: expected the model of a stage `segment`, but got a checkpoint of something else")
    classes = tuple(state["classes"])
    if backbone is None and not name:
        raise InputError(
            f"{path}: this segmenter's backbone is a module that was passed in; pass one such to `load_segmenter`"
        )
    with building():
        net = DeepLabV2(len(classes) + 1, backbone=str(name) if name or backbone is None else backbone, weights=None)
    load_weights(net, weights, path)
    segmenter = Segmenter(net.eval(), classes)
    if (span := state.get("range")) is not None:
        segmenter.range = check_span(span, f"{path}: range: ")
    return segmenter


def segment_photos(
    net: DeepLabV2,
    photos: Iterable[Path],
    finish: Callable[[int, Pixels, Mask], R],
    settings: Photos = Photos(),
    *,
    crf: bool = True,
    tags: Iterable[NDArray[np.float32]] | None = None,
    range: Range | None = None,
    machine: Machine = Machine(),
    desc: str = "predict",
) -> Iterator[tuple[int, R | InputError]]:
    """Masks of photos, one by one.

    On a CPU each of the workers, a process of one thread, takes a photo from its file to the end. On a GPU the network
    runs in this process, on photos of one size that follow each other, and others load photos and do CRFs. Only a few
    photos are in memory at a time (on a GPU some 32 more), and only a few more are asked for.

    Args:
        net: on the machine's device; runs in evaluation mode.
        photos: files of any size and mode.
        finish: is called with the photo's index, its pixels ``(h, w, 3)`` as the network sees it, and its mask
            ``(H, W)`` at the photo's own size: 0, or class + 1. It can be pickled, as can what it returns.
        settings: how large photos are seen, and the CRF.
        crf: draw the masks to the edges of the photo.
        tags: of each photo ``(K,)`` in [0, 1], how probable it is that it shows a class at all: what the network says
            of the class is multiplied with it, over the largest of the photo's, before the CRF. A class at 0 is
            nowhere: known tags are zeros and ones. None for nothing known.
        range: what the values of deep photos span (see :func:`cacl.images.read_image`); by their type if None.
        machine: where ``net`` is; with 0 or 1 workers everything happens in this process.
        desc: title of the progress bar.

    Yields:
        The photo's index, and what ``finish`` returned or why the photo could not be read, in the photos' order.
    """
    total = len(photos) if isinstance(photos, Sized) else None
    found = segment_each(net, enumerate(photos), finish, settings, crf=crf, tags=tags, range=range, machine=machine)
    return iter(watched(found, total=total, desc=desc, progress=machine.progress))


def segment_each(
    net: DeepLabV2,
    photos: Iterable[tuple[K, Path]],
    finish: Callable[[K, Pixels, Mask], R],
    settings: Photos = Photos(),
    *,
    crf: bool = True,
    tags: Iterable[NDArray[np.float32]] | None = None,
    range: Range | None = None,
    machine: Machine = Machine(),
) -> Iterator[tuple[K, R | InputError]]:
    """:func:`segment_photos` of photos that have a name of any kind, by which ``finish`` and the caller know them."""
    arguments = settings.arguments(machine) if crf and settings.iterations else None
    items = _items(photos, tags, net.num_classes - 1)
    reading, finishing = _Reading(settings.longest, range), _Finishing(finish, arguments)
    if torch.device(machine.device).type == "cpu":
        return map_processes(_Whole(net, machine, reading, finishing), items, workers=machine.workers)
    read = alike(load(reading, keys=items, workers=machine.workers), _size, partial(at_once, machine.device))
    logits = chain.from_iterable(_infer(net, group, machine) for group in read)
    return map_processes(finishing, logits, workers=machine.crf_workers)


class _Item(NamedTuple):
    key: Any
    path: Path
    tags: NDArray[np.float32] | None


def _items(
    photos: Iterable[tuple[K, Path]], tags: Iterable[NDArray[np.float32]] | None, classes: int
) -> Iterator[_Item]:
    known = None if tags is None else iter(tags)
    try:
        for key, path in photos:
            row = None if known is None else next(known, np.empty(0, dtype=np.float32))
            if row is not None and np.shape(row) != (classes,):
                raise expected("tags", f"({classes},) for each photo", f"{np.shape(row)} for {path}")
            yield _Item(key, path, row)
    finally:
        if isinstance(known, Generator):  # nobody asks for what comes after the last: its processes end now
            known.close()


class _Photo(NamedTuple):
    pixels: Pixels
    """``(h, w, 3)``, at most ``longest`` long."""
    size: tuple[int, int]
    """The photo's own."""


class _Logits(NamedTuple):
    photo: _Photo
    tags: NDArray[np.float32] | None
    values: NDArray[np.float32]
    """``(C, h, w)`` at the trunk's stride: no tensor, which other processes would get through the shared memory."""


@dataclass(frozen=True)
class _Reading:
    """item -> its key, and the photo with its tags, or why it could not be read."""

    longest: int
    range: Range | None

    def __getitem__(self, item: _Item) -> tuple[Any, tuple[_Photo, NDArray[np.float32] | None] | InputError]:
        try:
            image = read_image(item.path, self.range)
        except InputError as error:
            return item.key, error
        height, width = image.shape[-2:]
        if max(height, width) > self.longest:
            scale = self.longest / max(height, width)
            image = views.resize(image, [max(1, round(side * scale)) for side in (height, width)], antialias=True)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        return item.key, (_Photo(pixels, (height, width)), item.tags)


@dataclass(frozen=True)
class _Finishing(Generic[R]):
    """Logits -> what ``finish`` makes of the mask."""

    finish: Callable[[Any, Pixels, Mask], R]
    crf: CRFArguments | None

    def __call__(self, item: tuple[Any, _Logits | InputError]) -> tuple[Any, R | InputError]:
        key, logits = item
        if isinstance(logits, InputError):
            return key, logits
        photo, values = logits.photo, torch.from_numpy(logits.values)
        if logits.tags is None:
            return key, self.finish(key, photo.pixels, mask_of(values, photo.pixels, photo.size, self.crf))
        weights = F.pad(weights_of(torch.from_numpy(logits.tags)), (1, 0), value=1.0)
        known = weights.nonzero()[:, 0]
        values = values[known] + weights[known].log()[:, None, None]
        mask = mask_of(values, photo.pixels, photo.size, self.crf)
        return key, self.finish(key, photo.pixels, known.numpy().astype(np.uint8)[mask])


@dataclass(frozen=True)
class _Whole(Generic[R]):
    """item -> what comes of the photo, on a CPU."""

    net: DeepLabV2
    machine: Machine
    reading: _Reading
    finishing: _Finishing[R]

    def __call__(self, item: _Item) -> tuple[Any, R | InputError]:
        return self.finishing(_infer(self.net, [self.reading[item]], self.machine)[0])


_Read = tuple[Any, tuple[_Photo, NDArray[np.float32] | None] | InputError]


def _size(item: _Read) -> tuple[int, int]:
    """Of a photo as the network sees it; of one that could not be read none."""
    found = item[1]
    return (0, 0) if isinstance(found, InputError) else found[0].pixels.shape[:2]


def _infer(net: DeepLabV2, group: Sequence[_Read], machine: Machine) -> list[tuple[Any, _Logits | InputError]]:
    """The logits of photos of one size."""
    read = [(key, *found) for key, found in group if not isinstance(found, InputError)]
    if not read:
        return [(key, found) for key, found in group if isinstance(found, InputError)]
    images = torch.stack([normalize(torch.from_numpy(photo.pixels).permute(2, 0, 1)) for _, photo, _ in read])
    with timed("network"), torch.no_grad(), evaluating(net), machine.autocast():
        logits = net(images.to(machine.device, memory_format=torch.channels_last))
        assert isinstance(logits, Tensor)
        values = logits.float().cpu().numpy()
    return [(key, _Logits(photo, tags, each)) for (key, photo, tags), each in zip(read, values, strict=True)]


def mask_of(logits: Tensor, pixels: Pixels, size: tuple[int, int], crf: CRFArguments | None = None) -> Mask:
    """Logits ``(C, h, w)`` of a photo ``(h', w', 3)`` -> its mask ``(H, W)`` = ``size``, after a CRF on the photo."""
    values = probabilities(logits[None], pixels.shape[:2])[0]
    labels = torch.arange(len(values), device=values.device)
    if crf is not None:
        labels = labels[values.amax((1, 2)) >= min(_PRESENT, float(values.max()))]
        values = torch.from_numpy(dense_crf(pixels, values[labels].numpy(), **crf))
    best = values.argmax(0)
    if tuple(best.shape) != tuple(size):
        # One class after the other, and only those that are seen: all of them at the size of a large photo are much.
        seen = torch.unique(best)
        larger = torch.full(size, -1.0, device=values.device)
        best = torch.zeros(size, dtype=torch.int64, device=values.device)
        for label in seen:
            map_ = F.interpolate(values[label][None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            best = torch.where(map_ > larger, label, best)
            larger = torch.maximum(map_, larger)
    return labels[best].to(torch.uint8).numpy()
