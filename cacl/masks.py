"""From CAMs to pseudo masks: labels mined with CRFs, IRNet trained on them, CAMs spread up to its edges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cacl._support.checks import check_range
from cacl._support.distributed import all_reduce_counts, barrier, shard
from cacl._support.files import replacing
from cacl._support.pool import map_processes, naming_dead_loaders
from cacl._support.progress import watched
from cacl.cams import ImageCAMs, load_cams, load_images, save_cams, sgd, to_make
from cacl.datasets import Dataset
from cacl.errors import InputError
from cacl.irn import IRNet, affinity_loss, crf_labels, mine_labels
from cacl.metrics import ConfusionMatrix
from cacl.pictures import palette
from cacl.random_walk import propagate
from cacl.training import Batch, Loop, train


def make_labels(
    dataset: Dataset,
    cams: Path,
    out: Path,
    *,
    foreground_score: float = 0.30,
    background_score: float = 0.10,
    crf: Mapping[str, Any] | None = None,
    workers: int = 0,
    keep: bool = False,
    progress: bool = True,
    title: str = "label mining",
) -> None:
    """Write :func:`cacl.irn.mine_labels` of every image as ``<id>.png``, a palette image with VOC's colours.

    Shared out over processes as :func:`cacl.cams.make_cams` is.

    Args:
        dataset: the images and their labels.
        cams: folder of :func:`cacl.cams.make_cams`.
        out: folder of the files.
        foreground_score: background score of the CRF that decides what is foreground.
        background_score: background score of the CRF that decides what is background.
        crf: ``gaussian``, ``bilateral``, ``iterations``, ``backend``, ``device`` of the CRF where they differ.
        workers: processes, each of which takes one image at a time.
        keep: leave out images that have a file already.
        progress: show a progress bar where there is a terminal.
        title: of the progress bar.

    Raises:
        ValueError: if a file of CAMs is missing or broken, or a setting is wrong.
    """
    wanted = to_make(dataset, out, ".png", keep=keep)
    scores = {"foreground_score": foreground_score, "background_score": background_score}
    task = _Mining(dataset, cams, out, {**scores, **(crf or {})})
    with barrier():
        for _ in _watched(task, wanted, workers, title, progress):
            pass


def train_irnet(
    net: IRNet,
    dataset: Dataset,
    labels: Path,
    loop: Loop,
    *,
    radius: int = 10,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 1e-4,
    **run: Any,
) -> None:
    """Train the branches of ``net`` on mined labels.

    Args:
        net: trained in place; its backbone stays as it is.
        dataset: the images; their masks are not opened.
        labels: folder of :func:`make_labels`.
        loop: the settings of the loop, with ``masks=True``.
        radius: of :func:`cacl.irn.affinity_loss`.
        lr: learning rate of the edge branch; that of the displacement branch is ten times that.
        momentum: of SGD.
        weight_decay: of SGD.
        run: ``checkpoint``, ``key``, ``log``, ``callback`` of :func:`cacl.training.train`.
    """
    net.train()
    optimizer = sgd(net.parameter_groups(lr), momentum, weight_decay, loop)

    def step(batch: Batch) -> Mapping[str, Tensor]:
        assert batch.masks is not None
        edges, displacements = net(batch.images)
        target = batch.masks.to(edges.device, non_blocking=True)
        terms = affinity_loss(edges, displacements, target, radius=radius, across=True)
        return {"loss": terms.total, **{name: value for name, value in terms._asdict().items() if name != "total"}}

    train(step, {"net": net}, optimizer, dataset.with_masks(labels), loop, name="irn", **run)


def walk_cams(
    net: IRNet,
    dataset: Dataset,
    cams: Path,
    out: Path,
    *,
    power: float = 1.0,
    radius: int = 5,
    beta: float = 10.0,
    steps: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    keep: bool = False,
    progress: bool = True,
) -> None:
    """Write the CAMs of every image after a random walk up to the edges (IRNet, Ahn et al. 2019, section 5).

    ``<id>.npz`` has them divided by their largest value, as :func:`cacl.cams.load_cams` reads them. Shared out over
    processes as :func:`cacl.cams.make_cams` is.

    Args:
        net: gives the edges; on ``device``.
        dataset: the images and their labels.
        cams: folder of :func:`cacl.cams.make_cams`.
        out: folder of the files.
        power: the seeds are the CAMs to this power; above 1 for CAMs that reach far beyond the objects.
        radius: of :func:`cacl.random_walk.propagate`, like the next two.
        beta: of the walk.
        steps: of the walk.
        device: where ``net`` is, and the walk takes place.
        workers: processes that load images.
        keep: leave out images that have a file already.
        progress: show a progress bar where there is a terminal.

    Raises:
        ValueError: if a file of CAMs is missing or broken, or a setting is wrong.
    """
    check_range("power", power, 0.01, 100)
    wanted = to_make(dataset, out, ".npz", keep=keep)
    images = load_images(dataset, wanted, workers, pinned=torch.device(device).type == "cuda")
    with barrier(), naming_dead_loaders():
        for index, image in watched(images, total=len(wanted), desc="random walk", progress=progress):
            seeds = _cams(dataset, cams, index)
            photo = image[None].to(device, memory_format=torch.channels_last, non_blocking=True)
            walked = walk(seeds, net.predict(photo)[0], power=power, radius=radius, beta=beta, steps=steps)
            save_cams(out / f"{dataset.entries[index].id}.npz", walked)


def make_masks(
    dataset: Dataset,
    cams: Path,
    out: Path,
    *,
    background_score: float = 0.25,
    unsure: float = 0.05,
    crf: Mapping[str, Any] | None = None,
    workers: int = 0,
    keep: bool = False,
    progress: bool = True,
) -> None:
    """Write the pseudo masks of every image, ``<id>.png``, a palette image with VOC's colours.

    A pixel is what it would be at the background score ``background_score + unsure``, or 255 where it would then be
    background, but not at ``background_score − unsure``.

    Args:
        dataset: the images and their labels.
        cams: folder of :func:`walk_cams`.
        out: folder of the files.
        background_score: a pixel whose largest value is not above this is background.
        unsure: 0 for masks without 255.
        crf: as for :func:`make_labels`; ``iterations=0`` for none.
        workers: processes, each of which takes one image at a time.
        keep: leave out images that have a mask already.
        progress: show a progress bar where there is a terminal.

    Raises:
        ValueError: if a file of CAMs is missing or broken, or a setting is wrong.
    """
    check_range("background_score", background_score, 0, 1)
    check_range("unsure", unsure, 0, 1)
    scores = {
        "foreground_score": min(1.0, background_score + unsure),
        "background_score": max(0.0, background_score - unsure),
    }
    make_labels(dataset, cams, out, crf=crf, workers=workers, keep=keep, progress=progress, title="masks", **scores)


def walk(
    cams: ImageCAMs, edges: Tensor, *, power: float = 1.0, radius: int = 5, beta: float = 10.0, steps: int = 256
) -> ImageCAMs:
    """CAMs after a random walk over ``(h, w)`` edge probabilities, divided by the largest value of all classes."""
    seeds = torch.from_numpy(cams.maps).to(edges.device, torch.float32) ** power
    if len(cams.classes) and seeds.shape[1:] != edges.shape:
        seeds = F.interpolate(seeds[None], size=edges.shape, mode="bilinear", align_corners=False)[0]
    seeds = seeds.reshape(len(cams.classes), *edges.shape)
    result = propagate(seeds, edges, radius=radius, beta=beta, steps=steps)
    if len(result):
        result = result / result.max().clamp(min=1e-5)
    return ImageCAMs(cams.classes, result.half().cpu().numpy())


def refine_cams(
    dataset: Dataset,
    cams: Path,
    indices: Sequence[int],
    *,
    background_score: float,
    crf: Mapping[str, Any] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(index, mask of the CAMs after a CRF) of some images: what IRNet is not needed for.

    Args:
        dataset: the images.
        cams: folder of :func:`cacl.cams.make_cams`, or of :func:`walk_cams`.
        indices: which images.
        background_score: of the CAMs before the CRF.
        crf: as for :func:`make_labels`, like the rest.
        workers: processes.
        progress: show a progress bar where there is a terminal.
    """
    task = _Refining(dataset, cams, background_score, dict(crf or {}))
    return zip(indices, _watched(task, indices, workers, "CRF", progress), strict=True)


def evaluate_refined(dataset: Dataset, cams: Path, **settings: Any) -> tuple[ConfusionMatrix, int]:
    """CAMs after a CRF against the masks: settings as for :func:`refine_cams`; also the number of images.

    Shared out over processes as :func:`cacl.cams.make_cams` is.
    """
    masked = dataset.masked
    matrix = ConfusionMatrix(len(dataset.classes))
    with barrier():
        for index, mask in refine_cams(dataset, cams, shard(masked), **settings):
            matrix.update(dataset.mask(index).numpy(), mask)
    matrix.counts = all_reduce_counts(matrix.counts)
    return matrix, len(masked)


def save_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write ``(H, W)`` as a palette PNG with VOC's colours."""
    image = Image.fromarray(mask)
    image.putpalette(_PALETTE)
    with replacing(path) as file:
        image.save(file, "PNG")


_PALETTE = palette().tobytes()


def _watched(task: Any, indices: Sequence[int], workers: int, title: str, progress: bool) -> Iterator[Any]:
    results = map_processes(task, indices, workers=workers)
    return iter(watched(results, total=len(indices), desc=title, progress=progress))


@dataclass(frozen=True)
class _Mining:
    """index -> nothing; writes the image's mined labels."""

    dataset: Dataset
    cams: Path
    out: Path
    settings: dict[str, Any]

    def __call__(self, index: int) -> None:
        photo, cams = _photo(self.dataset, index), _cams(self.dataset, self.cams, index)
        with _naming(self.dataset, index):
            labels = mine_labels(photo, cams.classes, cams.maps, **self.settings)
        save_mask(self.out / f"{self.dataset.entries[index].id}.png", labels)


@dataclass(frozen=True)
class _Refining:
    """index -> the mask of the image's CAMs after a CRF."""

    dataset: Dataset
    cams: Path
    score: float
    settings: dict[str, Any]

    def __call__(self, index: int) -> NDArray[np.uint8]:
        photo, cams = _photo(self.dataset, index), _cams(self.dataset, self.cams, index)
        with _naming(self.dataset, index):
            mask: NDArray[np.uint8] = crf_labels(photo, cams.classes, cams.maps, [self.score], **self.settings)[0]
        return mask


@contextmanager
def _naming(dataset: Dataset, index: int) -> Iterator[None]:
    """Say which image it was."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{dataset.entries[index].image}: {error}") from None


def _photo(dataset: Dataset, index: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(dataset.image(index).permute(1, 2, 0).numpy())


def _cams(dataset: Dataset, folder: Path, index: int) -> ImageCAMs:
    return load_cams(folder / f"{dataset.entries[index].id}.npz", len(dataset.classes))
