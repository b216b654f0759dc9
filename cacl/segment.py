"""The segmentation stage: DeepLabV2 trained on pseudo masks, and what it makes of photos."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as views

from cacl._support.checks import check_integer
from cacl._support.distributed import all_reduce_counts, barrier, shard
from cacl._support.pool import can_be_sent, leave_signals, loaded, map_processes, naming_dead_loaders
from cacl._support.progress import watched
from cacl._support.weights import evaluating, load_state, load_weights, save_state
from cacl.cams import sgd, to_make
from cacl.constants import IGNORE
from cacl.crf import DenseCRF
from cacl.datasets import Dataset
from cacl.deeplab import DeepLabV2, probabilities, segmentation_loss
from cacl.errors import InputError
from cacl.images import Mask, Pixels, read_image
from cacl.masks import save_mask
from cacl.metrics import ConfusionMatrix
from cacl.training import Batch, Loop, train
from cacl.transforms import normalize

logger = logging.getLogger("cacl")

R = TypeVar("R")
T = TypeVar("T")

LONGEST = 1024
"""Longer side in pixels of what the network and the CRF see by default."""
CRF: Mapping[str, Any] = {"gaussian": (1.0, 3.0), "bilateral": (67.0, 3.0, 4.0), "iterations": 10}
"""The CRF on the output of DeepLabV2, as the public recipe has it."""
_PRESENT = 0.01
"""A class that is nowhere more probable than this is left out of the CRF, whose cost grows with their number."""


class Segmenter(NamedTuple):
    """A trained network and what its classes are called."""

    net: DeepLabV2
    classes: tuple[str, ...]
    """Without the background; the first has mask value 1."""


def train_segmenter(
    net: DeepLabV2,
    dataset: Dataset,
    masks: Path,
    loop: Loop,
    *,
    lr: float = 2.5e-4,
    head_factor: float = 10.0,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    **run: Any,
) -> None:
    """Train DeepLabV2 on pseudo masks.

    Args:
        net: trained in place.
        dataset: the images; their own masks are not opened.
        masks: folder of :func:`cacl.masks.make_masks`, or of other masks ``<id>.png``.
        loop: the settings of the loop, with ``masks=True``.
        lr: learning rate of the trunk.
        head_factor: the head's weights learn at this times ``lr``, its biases at twice that.
        momentum: of SGD.
        weight_decay: of SGD; none for the head's biases.
        run: ``checkpoint``, ``key``, ``log``, ``callback`` of :func:`cacl.training.train`.

    Raises:
        ValueError: if a mask is missing, or has a value that is no class of ``net``.
    """
    net.train()
    optimizer = sgd(net.parameter_groups(lr, head_factor=head_factor), momentum, weight_decay, loop)

    def step(batch: Batch) -> Mapping[str, Tensor]:
        assert batch.masks is not None
        wrong = batch.masks[(batch.masks >= net.num_classes) & (batch.masks != IGNORE)]
        if len(wrong):
            raise InputError(
                f"{masks}: expected values 0 to {net.num_classes - 1} or {IGNORE}, but got {int(wrong[0])} in one of "
                f"{', '.join(batch.ids)}"
            )
        logits = net(batch.images)
        target = batch.masks.to(batch.images.device, non_blocking=True)
        return {"loss": segmentation_loss(logits, target, across=True)}

    train(step, {"net": net}, optimizer, dataset.with_masks(masks), loop, name="segment", **run)


def save_segmenter(path: Path, net: DeepLabV2, classes: Sequence[str], backbone: str) -> None:
    """Write a file that :func:`load_segmenter` reads; ``backbone`` is its name, or empty for a module of one's own."""
    save_state(path, {"classes": list(classes), "backbone": backbone, "weights": net.state_dict()})


def load_segmenter(path: Path, *, backbone: nn.Module | None = None) -> Segmenter:
    """Read a trained segmenter, in evaluation mode on the CPU.

    Args:
        path: ``segment/model.pt`` of a run.
        backbone: where it was trained with a backbone that has no name: one such; changed in place.

    Raises:
        ValueError: if the file is missing, is something else, or needs a backbone.
    """
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
    with torch.random.fork_rng(devices=[]):
        net = DeepLabV2(len(classes) + 1, backbone=backbone or str(name), weights=None)
    load_weights(net, weights, path)
    return Segmenter(net.eval(), classes)


def segment_photos(
    net: DeepLabV2,
    photos: Sequence[Path],
    finish: Callable[[int, Pixels, Mask], R],
    *,
    longest: int = LONGEST,
    crf: Mapping[str, Any] | None = CRF,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
    desc: str = "predict",
) -> Iterator[tuple[int, R | InputError]]:
    """Masks of photos, one by one.

    On a CPU each of ``workers`` processes of one thread takes a photo from its file to the end. On a GPU the network
    runs in this process, and others load photos and do CRFs. Only a few photos are in memory at a time.

    Args:
        net: on ``device``; runs in evaluation mode.
        photos: files of any size and mode.
        finish: is called with the photo's index, its pixels ``(h, w, 3)`` at most ``longest`` long, and its mask
            ``(H, W)`` at the photo's own size: 0, or class + 1. It can be pickled, as can what it returns.
        longest: in pixels; larger photos are scaled down to it for network and CRF.
        crf: ``gaussian``, ``bilateral``, ``iterations``, ``backend``, ``device`` of :class:`cacl.crf.DenseCRF`; None
            for none.
        device: where ``net`` is.
        workers: number of processes; with 0 or 1 everything happens in this one.
        progress: show a progress bar where there is a terminal.
        desc: title of the progress bar.

    Yields:
        The photo's index, and what ``finish`` returned or why the photo could not be read, in the photos' order.
    """
    check_integer("longest", longest, 1)
    reading, finishing = _Reading(photos, longest), _Finishing(finish, dict(crf) if crf is not None else None)
    results: Iterator[tuple[int, R | InputError]]
    if torch.device(device).type == "cpu":
        if workers > 1 and not can_be_sent(net):
            logger.info("%s: in one process, as the network's backbone cannot be sent to others", desc)
            workers = 0
        results = map_processes(_Whole(net, reading, finishing), range(len(photos)), workers=workers)
    else:
        loader = DataLoader(
            reading,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),
        )
        on_gpu = torch.device((crf or {}).get("device", "cpu")).type != "cpu"
        logits = (_infer(net, photo, device) for photo in loaded(loader))
        results = map_processes(finishing, logits, workers=0 if on_gpu else workers)
    return iter(watched(results, total=len(photos), desc=desc, progress=progress))


def make_predictions(net: DeepLabV2, dataset: Dataset, out: Path, *, keep: bool = False, **settings: Any) -> None:
    """Write the mask of every image of a data set, ``<id>.png``, a palette image with VOC's colours.

    Shared out over processes as :func:`cacl.cams.make_cams` is.

    Args:
        net: the segmenter.
        dataset: the images; neither labels nor masks are looked at.
        out: folder of the files.
        keep: leave out images that have a file already.
        settings: as for :func:`segment_photos`.

    Raises:
        ValueError: if an image does not decode.
    """
    wanted = to_make(dataset, out, ".png", keep=keep)
    paths = [out / f"{dataset.entries[i].id}.png" for i in wanted]
    photos = [dataset.entries[i].image for i in wanted]
    with barrier(), naming_dead_loaders():
        for _, result in segment_photos(net, photos, _Saving(paths), **settings):
            if isinstance(result, InputError):
                raise result


def evaluate_segmenter(net: DeepLabV2, dataset: Dataset, **settings: Any) -> tuple[ConfusionMatrix, int]:
    """The segmenter against the masks: settings as for :func:`segment_photos`; also the number of images.

    Shared out over processes as :func:`cacl.cams.make_cams` is.
    """
    masked = dataset.masked
    mine = list(shard(masked))
    matrix = ConfusionMatrix(len(dataset.classes))
    photos = [dataset.entries[i].image for i in mine]
    with barrier(), naming_dead_loaders():
        for _, counts in segment_photos(net, photos, _Counting(dataset, mine), desc="evaluate", **settings):
            if isinstance(counts, InputError):
                raise counts
            matrix.counts += counts
    matrix.counts = all_reduce_counts(matrix.counts)
    return matrix, len(masked)


class _Photo(NamedTuple):
    pixels: Pixels
    """``(h, w, 3)``, at most ``longest`` long."""
    size: tuple[int, int]
    """The photo's own."""


class _Logits(NamedTuple):
    photo: _Photo
    values: Tensor
    """``(C, h, w)`` at the trunk's stride, on the CPU."""


class _Reading(torch.utils.data.Dataset[Any]):
    """index -> photo, or why it could not be read."""

    def __init__(self, photos: Sequence[Path], longest: int) -> None:
        self.photos, self.longest = list(photos), longest

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[int, _Photo | InputError]:
        try:
            image = read_image(self.photos[index])
        except InputError as error:
            return index, error
        height, width = image.shape[-2:]
        if max(height, width) > self.longest:
            scale = self.longest / max(height, width)
            image = views.resize(image, [max(1, round(side * scale)) for side in (height, width)], antialias=True)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        return index, _Photo(pixels, (height, width))


@dataclass(frozen=True)
class _Finishing(Generic[R]):
    """Logits -> what ``finish`` makes of the mask."""

    finish: Callable[[int, Pixels, Mask], R]
    crf: dict[str, Any] | None

    def __call__(self, item: tuple[int, _Logits | InputError]) -> tuple[int, R | InputError]:
        index, logits = item
        if isinstance(logits, InputError):
            return index, logits
        photo = logits.photo
        return index, self.finish(index, photo.pixels, mask_of(logits.values, photo.pixels, photo.size, self.crf))


@dataclass(frozen=True)
class _Whole(Generic[R]):
    """index -> what comes of the photo, on a CPU."""

    net: DeepLabV2
    reading: _Reading
    finishing: _Finishing[R]

    def __call__(self, index: int) -> tuple[int, R | InputError]:
        return self.finishing(_infer(self.net, self.reading[index], "cpu"))


def _infer(
    net: DeepLabV2, item: tuple[int, _Photo | InputError], device: torch.device | str
) -> tuple[int, _Logits | InputError]:
    index, photo = item
    if isinstance(photo, InputError):
        return index, photo
    image = normalize(torch.from_numpy(photo.pixels).permute(2, 0, 1))[None]
    with torch.no_grad(), evaluating(net):
        logits = net(image.to(device, memory_format=torch.channels_last))
    assert isinstance(logits, Tensor)
    return index, _Logits(photo, logits[0].float().cpu())


def _as_it_is(item: T) -> T:
    return item


def mask_of(logits: Tensor, pixels: Pixels, size: tuple[int, int], crf: Mapping[str, Any] | None = None) -> Mask:
    """Logits ``(C, h, w)`` of a photo ``(h', w', 3)`` -> its mask ``(H, W)`` = ``size``, after a CRF on the photo."""
    values = probabilities(logits[None], pixels.shape[:2])[0]
    labels = torch.arange(len(values))
    if crf is not None:
        settings = dict(crf)
        iterations = settings.pop("iterations", 10)
        labels = labels[values.amax((1, 2)) >= min(_PRESENT, float(values.max()))]
        refined = DenseCRF(pixels, **settings)(values[labels].numpy(), iterations=iterations)
        values = torch.from_numpy(refined)
    best = values.argmax(0)
    if tuple(best.shape) != tuple(size):
        # One class after the other, and only those that are seen: all of them at the size of a large photo are much.
        seen = torch.unique(best)
        larger = torch.full(size, -1.0)
        best = torch.zeros(size, dtype=torch.int64)
        for label in seen:
            map_ = F.interpolate(values[label][None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            best = torch.where(map_ > larger, label, best)
            larger = torch.maximum(map_, larger)
    return labels[best].to(torch.uint8).numpy()


@dataclass(frozen=True)
class _Saving:
    paths: list[Path]

    def __call__(self, index: int, pixels: Pixels, mask: Mask) -> None:
        save_mask(self.paths[index], mask)


@dataclass(frozen=True)
class _Counting:
    """index -> pixel counts of (truth, prediction)."""

    dataset: Dataset
    masked: list[int]

    def __call__(self, index: int, pixels: Pixels, mask: Mask) -> NDArray[np.int64]:
        matrix = ConfusionMatrix(len(self.dataset.classes))
        matrix.update(self.dataset.mask(self.masked[index]).numpy(), mask)
        return matrix.counts
