"""The CAM stages: warm-up as a classifier, CA-CL training, multi-scale CAMs, and their mean IoU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cacl._support.distributed import all_reduce_counts, barrier, rank_zero, shard
from cacl._support.files import replacing
from cacl._support.pool import leave_signals, loaded, naming_dead_loaders
from cacl._support.progress import watched
from cacl._support.weights import check_inflated
from cacl.camnet import CAMNet
from cacl.criterion import CACLLoss
from cacl.datasets import Dataset
from cacl.errors import InputError, expected, first_line
from cacl.metrics import SCORES, Sweep, count_scores, sweep_of
from cacl.training import Batch, Loop, train
from cacl.transforms import normalize


class ImageCAMs(NamedTuple):
    """CAMs of the classes that one image shows."""

    classes: NDArray[np.int64]
    """``(C,)`` class indices from 0."""
    maps: NDArray[np.float16]
    """``(C, ⌈H/4⌉, ⌈W/4⌉)`` in [0, 1], each with maximum 1, or all 0 where no score was positive."""

    def resized(self, size: tuple[int, int]) -> NDArray[np.float32]:
        """``(C, H, W)`` float32, bilinear."""
        if not len(self.classes):
            return np.zeros((0, *size), dtype=np.float32)
        maps = torch.from_numpy(self.maps).float()[None]
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0].numpy()


def train_classifier(
    net: CAMNet,
    dataset: Dataset,
    loop: Loop,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 1e-4,
    **run: Any,
) -> None:
    """The warm-up: train ``net`` as a multi-label classifier by global average pooling.

    Args:
        net: trained in place.
        dataset: images and labels; masks are not opened.
        loop: the settings of the loop.
        lr: learning rate of the backbone; the classifier's is ten times that.
        momentum: of SGD.
        weight_decay: of SGD.
        run: ``checkpoint``, ``key``, ``log``, ``callback`` of :func:`cacl.training.train`.
    """
    net.train()
    optimizer = sgd(net.parameter_groups(lr), momentum, weight_decay, loop)

    def step(batch: Batch) -> Mapping[str, Tensor]:
        logits = net(batch.images).scores.mean((2, 3)).float()
        labels = batch.labels.to(logits.device, non_blocking=True)
        return {"loss": F.multilabel_soft_margin_loss(logits, labels) * batch.share}

    train(step, {"net": net}, optimizer, dataset, loop, name="warmup", **run)


def train_cacl(
    net: CAMNet,
    criterion: CACLLoss,
    dataset: Dataset,
    loop: Loop,
    *,
    lr: float = 2.5e-4,
    momentum: float = 0.0,
    weight_decay: float = 1e-4,
    threshold_lr: float | None = None,
    **run: Any,
) -> None:
    """CA-CL training (CA-CL, eq. 1-14): ``net`` learns CAMs from the frozen encoder of ``criterion``.

    Args:
        net: trained in place.
        criterion: the loss; its θ and template counts are part of the checkpoint.
        dataset: images and labels; masks are not opened.
        loop: the settings of the loop.
        lr: learning rate of the backbone; the classifier's is ten times that.
        momentum: of SGD.
        weight_decay: of SGD; none for θ.
        threshold_lr: η of eq. 11, for a θ that is a parameter; ``lr`` if None.
        run: ``checkpoint``, ``key``, ``log``, ``callback`` of :func:`cacl.training.train`.
    """
    net.train()
    criterion.train()
    groups = net.parameter_groups(lr)
    if thresholds := list(criterion.parameters()):
        groups.append({"params": thresholds, "lr": lr if threshold_lr is None else threshold_lr, "weight_decay": 0.0})
    optimizer = sgd(groups, momentum, weight_decay, loop)

    def step(batch: Batch) -> Mapping[str, Tensor]:
        terms = criterion(batch.images, net(batch.images).cams, batch.labels)
        counts = criterion.selector.counts.sum(0)
        return {
            "loss": terms.total,
            **{name: value for name, value in terms._asdict().items() if name != "total"},
            "threshold": criterion.bgs.threshold.mean(),
            "template_share": counts / counts.sum().clamp(min=1),
        }

    train(step, {"net": net, "criterion": criterion}, optimizer, dataset, loop, name="cacl", **run)


def make_cams(
    net: CAMNet,
    dataset: Dataset,
    out: Path,
    *,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    device: torch.device | str = "cpu",
    workers: int = 0,
    keep: bool = False,
    progress: bool = True,
) -> None:
    """Write the multi-scale CAMs of every image, one ``<id>.npz`` each; :func:`load_cams` reads them.

    Each file holds ``classes`` (the present classes' indices) and ``maps`` (float16, one a present class, at a
    quarter of the image's size, maximum 1), and is whole or not there. Where ``torch.distributed`` has a default group,
    all its processes call this: each makes its share, and none goes on before all have.

    Args:
        net: the network, on ``device``.
        dataset: the images and their labels.
        out: folder of the files.
        scales: factors of the image's size.
        flip: add the mirror image's maps.
        device: where ``net`` is.
        workers: processes that load images.
        keep: leave out images that have a file already.
        progress: show a progress bar where there is a terminal.
    """
    with barrier(), naming_dead_loaders():
        for index, cams in predict_cams(
            net, dataset, to_make(dataset, out, ".npz", keep=keep),
            scales=scales, flip=flip, device=device, workers=workers, progress=progress,
        ):  # fmt: skip
            save_cams(out / f"{dataset.entries[index].id}.npz", cams)


def to_make(dataset: Dataset, out: Path, ending: str, *, keep: bool) -> list[int]:
    """The indices of this process's share of the images, but for those that have a file in ``out`` which is kept."""

    def missing() -> list[int]:
        return [i for i, entry in enumerate(dataset.entries) if not (out / f"{entry.id}{ending}").is_file()]

    return list(shard(rank_zero(missing) if keep else range(len(dataset))))


def save_cams(path: Path, cams: ImageCAMs) -> None:
    """Write a file that :func:`load_cams` reads."""
    with replacing(path) as file:
        np.savez_compressed(file, classes=cams.classes, maps=cams.maps)


def load_cams(path: Path, num_classes: int) -> ImageCAMs:
    """Read a file of :func:`make_cams`.

    Raises:
        ValueError: if the file is missing or holds something else.
    """
    try:
        check_inflated(path)
        with np.load(path, allow_pickle=False) as arrays:
            classes, maps = np.asarray(arrays["classes"]), np.asarray(arrays["maps"])
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # NumPy raises many kinds; each means that the file is something else
        raise InputError(f"{path}: not a file of CAMs ({first_line(error)})") from None
    if classes.dtype.kind not in "iu" or maps.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(
            f"{path}: expected classes of integers and maps of floats, but got {classes.dtype}, {maps.dtype}"
        )
    if classes.ndim != 1 or maps.ndim != 3 or len(maps) != len(classes):
        raise InputError(f"{path}: expected classes (C,) and maps (C, h, w), but got {classes.shape} and {maps.shape}")
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise InputError(f"{path}: expected classes 0 to {num_classes - 1}, but got {classes.tolist()}")
    if len(classes) and not maps.size:
        raise InputError(f"{path}: expected maps of at least one pixel, but got {maps.shape}")
    if not np.isfinite(maps).all() or (maps.size and maps.min() < 0):
        raise InputError(f"{path}: expected maps that are finite and not negative")
    return ImageCAMs(classes.astype(np.int64), maps)


def evaluate_cams(
    source: CAMNet | Path,
    dataset: Dataset,
    *,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
    scores: Sequence[float] = SCORES,
) -> Sweep:
    """IoU of CAMs, of the image's labels only, at every background score; images without a mask are left out.

    Shared out over the processes of ``torch.distributed``'s default group, as :func:`make_cams` is.

    Args:
        source: a network, or a folder of :func:`make_cams`.
        dataset: images, labels and masks.
        scales: as for :func:`make_cams`; for a network only, like the rest.
        flip: add the mirror image's maps.
        device: where the network is.
        workers: processes that load images.
        progress: show a progress bar where there is a terminal.
        scores: the background scores, ascending.

    Raises:
        ValueError: if no image has a mask.
    """
    masked = dataset.masked
    if not masked:
        raise expected("dataset", "images with masks", "none with one")
    num_classes, mine = len(dataset.classes), shard(masked)
    if isinstance(source, CAMNet):
        predictions = predict_cams(
            source, dataset, mine, scales=scales, flip=flip, device=device, workers=workers, progress=progress,
            desc="evaluate",
        )  # fmt: skip
    else:
        files = ((i, load_cams(source / f"{dataset.entries[i].id}.npz", num_classes)) for i in mine)
        predictions = watched(files, total=len(mine), desc="evaluate", progress=progress)

    def samples() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float32]]]:
        for index, cams in predictions:
            mask = dataset.mask(index).numpy()
            yield mask, cams.classes, cams.resized(mask.shape)

    with barrier(), naming_dead_loaders():
        joint, images = count_scores(samples(), num_classes, scores=scores)
    counts = all_reduce_counts(np.append(joint.reshape(-1), images))
    return sweep_of(counts[:-1].reshape(joint.shape), int(counts[-1]), scores)


def predict_cams(
    net: CAMNet,
    dataset: Dataset,
    indices: Sequence[int],
    *,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
    desc: str = "cams",
) -> Iterator[tuple[int, ImageCAMs]]:
    """(index, CAMs of the image's labels) of some images, one by one; arguments as for :func:`make_cams`."""
    images = load_images(dataset, indices, workers, pinned=torch.device(device).type == "cuda")
    for index, image in watched(images, total=len(indices), desc=desc, progress=progress):
        classes = torch.tensor(dataset.entries[index].labels, dtype=torch.int64)
        size = (-(-image.shape[1] // 4), -(-image.shape[2] // 4))
        photo = image[None].to(device, memory_format=torch.channels_last, non_blocking=True)
        maps = net.predict(photo, scales=scales, flip=flip, size=size, classes=classes)[0]
        yield index, ImageCAMs(classes.numpy(), maps.half().cpu().numpy())


def load_images(
    dataset: Dataset, indices: Sequence[int], workers: int, *, pinned: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(index, normalised ``(3, H, W)``) of some images, loaded by ``workers`` processes, ``pinned`` for a GPU."""
    loader = DataLoader(
        _Images(dataset, indices),
        batch_size=None,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=leave_signals,
        generator=torch.Generator(),
    )
    for index, image in loaded(loader):
        if isinstance(image, InputError):
            raise image
        yield index, image


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


def sgd(groups: list[dict[str, Any]], momentum: float, weight_decay: float, loop: Loop) -> torch.optim.SGD:
    """The optimiser of every stage that trains."""
    # Fused on a GPU: gradient scaling then needs no look at the device.
    fused = torch.device(loop.device).type == "cuda"
    return torch.optim.SGD(groups, lr=0.1, momentum=momentum, weight_decay=weight_decay, fused=fused)
