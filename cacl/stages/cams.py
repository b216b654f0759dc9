"""The stage ``cams``: multi-scale CAMs of the training images, and what CAMs score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from cacl._support.distributed import all_reduce_counts, barrier, rank, shard
from cacl._support.loaders import naming_dead_loaders
from cacl._support.progress import watched
from cacl._support.weights import save_state
from cacl.artifacts import ImageCAMs, cams_of, save_cams, to_make
from cacl.camnet import CAMNet
from cacl.constants import BACKGROUND_SCORE
from cacl.datasets import Dataset
from cacl.errors import expected
from cacl.images import Mask
from cacl.loading import load_images
from cacl.log import Journal
from cacl.metrics import SCORES, Sweep, count_scores, sweep_of
from cacl.pictures import threshold
from cacl.settings import Factor, Machine, Switch, Table
from cacl.stages.score import Oracle, Score, rounded
from cacl.stages.stage import Context, Judged, Stage


class CAMs(Table):
    """``[cams]``: CAMs at inference."""

    scales: Annotated[tuple[Factor, ...], Field(min_length=1)] = (0.5, 1.0, 1.5, 2.0)
    """Factors of the image's size."""
    flip: Switch = True
    """Add the mirror image's maps."""


def make_cams(
    net: CAMNet,
    dataset: Dataset,
    out: Path,
    settings: CAMs = CAMs(),
    *,
    machine: Machine = Machine(),
    keep: bool = False,
) -> None:
    """Write the multi-scale CAMs of every image, one ``<id>.npz`` each; :func:`cacl.artifacts.load_cams` reads them.

    Each file holds ``classes`` (the present classes' indices) and ``maps`` (float16, one a present class, at a
    quarter of the image's size, maximum 1), and is whole or not there. Where ``torch.distributed`` has a default group,
    all its processes call this: each makes its share, and none goes on before all have.

    Args:
        net: the network, on the machine's device.
        dataset: the images and their labels.
        out: folder of the files.
        settings: scales and mirror image.
        machine: where it is computed.
        keep: leave out images that have a file already.
    """
    with barrier(), naming_dead_loaders():
        wanted = to_make(dataset, out, ".npz", keep=keep)
        for index, cams in predict_cams(net, dataset, wanted, settings, machine=machine):
            save_cams(out / f"{dataset.entries[index].id}.npz", cams)


def predict_cams(
    net: CAMNet,
    dataset: Dataset,
    indices: Sequence[int],
    settings: CAMs = CAMs(),
    *,
    machine: Machine = Machine(),
    desc: str = "cams",
) -> Iterator[tuple[int, ImageCAMs]]:
    """(index, CAMs of the image's labels) of some images, one by one; arguments as for :func:`make_cams`."""
    images = load_images(dataset, indices, machine.workers, pinned=machine.on_gpu)
    for index, image in watched(images, total=len(indices), desc=desc, progress=machine.progress):
        classes = torch.tensor(dataset.entries[index].labels, dtype=torch.int64, device="cpu")
        size = (-(-image.shape[1] // 4), -(-image.shape[2] // 4))
        photo = image[None].to(machine.device, memory_format=torch.channels_last, non_blocking=True)
        maps = net.predict(photo, scales=settings.scales, flip=settings.flip, size=size, classes=classes)[0]
        yield index, ImageCAMs(classes.numpy(), maps.half().cpu().numpy())


def evaluate_cams(
    source: CAMNet | Path,
    dataset: Dataset,
    settings: CAMs = CAMs(),
    *,
    machine: Machine = Machine(),
    scores: Sequence[float] = SCORES,
) -> Sweep:
    """IoU of CAMs, of the image's labels only, at every background score; images without a mask are left out.

    Shared out over the processes of ``torch.distributed``'s default group, as :func:`make_cams` is.

    Args:
        source: a network, or a folder of :func:`make_cams`.
        dataset: images, labels and masks.
        settings: as for :func:`make_cams`; for a network only.
        machine: where it is computed.
        scores: the background scores, ascending.

    Raises:
        ValueError: if no image has a mask.
    """
    masked = dataset.masked
    if not masked:
        raise expected("dataset", "images with masks", "none with one")
    num_classes, mine = len(dataset.classes), shard(masked)
    if isinstance(source, CAMNet):
        predictions = predict_cams(source, dataset, mine, settings, machine=machine, desc="evaluate")
    else:
        files = ((i, cams_of(dataset, source, i)) for i in mine)
        predictions = watched(files, total=len(mine), desc="evaluate", progress=machine.progress)

    def samples() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float32]]]:
        for index, cams in predictions:
            mask = dataset.mask(index).numpy()
            yield mask, cams.classes, cams.resized(mask.shape)

    with barrier(), naming_dead_loaders():
        joint, images = count_scores(samples(), num_classes, scores=scores)
    counts = all_reduce_counts(np.append(joint.reshape(-1), images))
    return sweep_of(counts[:-1].reshape(joint.shape), int(counts[-1]), scores)


def camnet(run: Context, stage: str | None = None) -> CAMNet:
    """The CAM network of a run with the weights that it starts from, or with those that a stage left."""
    return run.network(partial(CAMNet, len(run.train.classes)), stage)


def save_model(folder: Path, net: nn.Module) -> None:
    """Write ``model.pt`` of a stage, in one of the processes that have it."""
    if rank() == 0:
        save_state(folder / "model.pt", net.state_dict())


def cam_score(
    run: Context, source: CAMNet | Path, dataset: Dataset, background_score: float = BACKGROUND_SCORE
) -> Score:
    """What CAMs score at a background score, and at the best one."""
    scores = sorted({*SCORES, background_score})
    sweep = evaluate_cams(source, dataset, run.table(CAMs), machine=run.machine, scores=scores)
    best, miou = sweep.oracle
    iou = sweep.iou[sweep.scores.index(background_score)]
    oracle = Oracle(best, rounded(miou))
    return Score.of("CAM", iou, dataset.classes, sweep.images, background_score=background_score, oracle=oracle)


def _run(run: Context, settings: CAMs, folder: Path, journal: Journal) -> None:
    # What is there is of this very stage from before a stop; files of another were removed.
    make_cams(camnet(run, "cacl"), run.train, folder / "train", settings, machine=run.machine, keep=True)


def _score(run: Context, settings: CAMs, dataset: Dataset) -> Score:
    return cam_score(run, run.folder("cams") / "train", dataset)


def _judged(run: Context, settings: CAMs, dataset: Dataset) -> Judged:
    folder = run.folder("cams") / "train"

    def mask(index: int) -> Mask:
        cams = cams_of(dataset, folder, index)
        height, width = cams.maps.shape[1:]
        return threshold(cams.classes, cams.resized((4 * height, 4 * width)), BACKGROUND_SCORE)

    return Judged("CAM", mask, BACKGROUND_SCORE)


STAGE = Stage(
    "cams",
    CAMs,
    run=_run,
    title="CAMs",
    needs=("cacl",),
    files=("train",),
    scored_on="train",
    score=_score,
    judged=_judged,
    shown="CAM of the training images",
)
