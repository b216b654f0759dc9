"""The stage ``cams``: multi-scale CAMs of the training images, and what CAMs score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

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
from cacl.metrics import SCORES, Counts, Sweep, count_scores, sweep_of
from cacl.pictures import threshold
from cacl.settings import Factor, Machine, Mark, Share, Switch, Table
from cacl.stages.score import Point, Score, rounded
from cacl.stages.stage import Context, Judged, Stage
from cacl.thresholds import BINS, Scores, class_levels, count_maxima, split_scores


class CAMs(Table):
    """``[cams]``: CAMs at inference."""

    scales: Annotated[tuple[Factor, ...], Field(min_length=1)] = (0.5, 1.0, 1.5, 2.0)
    """Factors of the image's size."""
    flip: Switch = True
    """Add the mirror image's maps."""
    background_score: Annotated[Share | Literal["auto"], Mark.EVALUATION] = "auto"
    """A pixel whose largest value is not above this is background where CAMs are scored and shown; ``"auto"`` is what
    the CAMs ask for by their values alone (see :func:`cacl.thresholds.split_scores`)."""


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
        own = count_scores(samples(), num_classes, scores=scores)
    counts = all_reduce_counts(np.concatenate((own.maxima, [own.images], own.pixels.reshape(-1))))
    pixels = counts[BINS + 1 :].reshape(own.pixels.shape)
    return sweep_of(Counts(pixels, counts[:BINS], int(counts[BINS])), scores)


def own_scores(dataset: Dataset, cams: Path) -> Scores:
    """The background scores that a folder of CAMs asks for by their values alone: no mask is opened.

    Shared out over processes as :func:`make_cams` is.

    Args:
        dataset: the images.
        cams: folder of :func:`make_cams`, or of :func:`cacl.stages.masks.walk_cams`.

    Raises:
        ValueError: if a file of CAMs is missing or broken.
    """
    return own_levels(dataset, cams)[0]


def own_levels(dataset: Dataset, cams: Path) -> tuple[Scores, NDArray[np.float64]]:
    """:func:`own_scores`, and the levels ``(K,)`` of the classes at which its lowest score suits all of them (see
    :func:`cacl.thresholds.class_levels`); arguments as there."""
    counts = np.zeros((1 + len(dataset.classes), BINS), dtype=np.int64)
    with barrier():
        for index in shard(range(len(dataset))):
            found = cams_of(dataset, cams, index)
            counts[0] += count_maxima(found.maps)
            for k, own in zip(found.classes, found.maps, strict=True):
                counts[1 + k] += count_maxima(own[None])
    counts = all_reduce_counts(counts.reshape(-1)).reshape(counts.shape)
    scores = split_scores(counts[0])
    return scores, class_levels(counts[1:], scores.low)


def camnet(run: Context, stage: str | None = None) -> CAMNet:
    """The CAM network of a run with the weights that it starts from, or with those that a stage left."""
    return run.network(partial(CAMNet, len(run.train.classes)), stage)


def save_model(folder: Path, net: nn.Module) -> None:
    """Write ``model.pt`` of a stage, in one of the processes that have it."""
    if rank() == 0:
        save_state(folder / "model.pt", net.state_dict())


def cam_score(
    run: Context, source: CAMNet | Path, dataset: Dataset, background_score: float | Literal["auto"] | None = None
) -> Score:
    """What CAMs score at a background score, by default that of ``[cams]``; at the field's fixed one; at the best."""
    settings = run.table(CAMs)
    chosen = settings.background_score if background_score is None else background_score
    scores = sorted({*SCORES, BACKGROUND_SCORE, *([] if chosen == "auto" else [chosen])})
    sweep = evaluate_cams(source, dataset, settings, machine=run.machine, scores=scores)
    used, (best, miou) = sweep.auto if chosen == "auto" else chosen, sweep.oracle
    return Score.of(
        "CAM", sweep.iou[sweep.scores.index(used)], dataset.classes, sweep.images, background_score=used,
        auto=chosen == "auto", fixed=Point(BACKGROUND_SCORE, rounded(sweep.miou(BACKGROUND_SCORE))),
        oracle=Point(best, rounded(miou)),
    )  # fmt: skip


def cam_score_depends(run: Context, settings: Table) -> tuple[object, ...]:
    """What :func:`cam_score` of a network follows from."""
    return run.table(CAMs), run.table(CAMs).background_score


def _run(run: Context, settings: CAMs, folder: Path, journal: Journal) -> None:
    # What is there is of this very stage from before a stop; files of another were removed.
    make_cams(camnet(run, "cacl"), run.train, folder / "train", settings, machine=run.machine, keep=True)


def _score(run: Context, settings: CAMs, dataset: Dataset) -> Score:
    return cam_score(run, run.folder("cams") / "train", dataset)


def _judged(run: Context, settings: CAMs, dataset: Dataset, known: float | None) -> Judged:
    folder, chosen = run.folder("cams") / "train", settings.background_score
    if known is None:
        known = own_scores(dataset, folder).middle if chosen == "auto" else chosen

    def mask(index: int) -> Mask:
        cams = cams_of(dataset, folder, index)
        height, width = cams.maps.shape[1:]
        return threshold(cams.classes, cams.resized((4 * height, 4 * width)), known)

    return Judged("CAM", mask, known, auto=chosen == "auto")


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
