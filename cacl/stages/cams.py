"""The stage ``cams``: multi-scale CAMs of the training images, and what CAMs score."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cacl._support.clock import timed
from cacl._support.distributed import all_reduce_counts, barrier, rank, shard
from cacl._support.files import write_json
from cacl._support.loaders import naming_dead_loaders
from cacl._support.progress import watched
from cacl._support.weights import save_state
from cacl.artifacts import ImageCAMs, cams_of, map_size, save_cams, to_make
from cacl.camnet import CAMNet
from cacl.constants import BACKGROUND_SCORE
from cacl.datasets import Dataset
from cacl.errors import expected
from cacl.images import Mask
from cacl.loading import load_alike
from cacl.log import Journal
from cacl.metrics import SCORES, Counts, Sweep, count_scores, sweep_of
from cacl.pictures import threshold
from cacl.seeds import SEEDS, check_outside, check_seeds, hold_to_tags, state_of
from cacl.settings import Encoder, Machine, Table
from cacl.stages.dense import clip_es_of, make_dense_cams
from cacl.stages.differences import differences
from cacl.stages.levels import own_scores
from cacl.stages.score import Point, Score, rounded
from cacl.stages.stage import Context, Judged, Stage
from cacl.stages.words import known_words
from cacl.tables import CAMs
from cacl.thresholds import BINS

logger = logging.getLogger("cacl")


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
    for some, photos in load_alike(dataset, indices, machine, desc=desc):
        labels = [np.array(dataset.entries[index].labels, dtype=np.int64) for index in some]
        classes = np.unique(np.concatenate(labels))
        size = map_size(photos.shape[2:])
        with timed("network"), machine.autocast():
            maps = net.predict(
                photos, scales=settings.scales, flip=settings.flip, size=size, classes=torch.from_numpy(classes)
            )
            made = maps.half().cpu().numpy()
        for index, own, found in zip(some, labels, made, strict=True):
            yield index, ImageCAMs(own, found[np.searchsorted(classes, own)])


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
    made, own, record = folder / "train", folder / "cacl", {}
    if settings.source == "cacl":
        make_cams(camnet(run, "cacl"), run.train, made, settings, machine=run.machine, keep=True)
        if rank() == 0:
            (folder / SEEDS).unlink(missing_ok=True)
        return
    if settings.source == "clip":
        make_dense_cams(
            clip_es_of(run, settings.template, settings.words), run.train, made, machine=run.machine, keep=True
        )
    else:
        held = hold_to_tags(run.train, settings.source, made, machine=run.machine)
        record = held._asdict()
        if rank() == 0 and (held.empty or held.dropped):
            logger.warning("%s: %s", settings.source, held)
    if settings.compare:
        make_cams(camnet(run, "cacl"), run.train, own, settings, machine=run.machine, keep=True)
        known = settings.background_score
        scores = [own_scores(run.train, each).middle if known == "auto" else known for each in (made, own)]
        record |= differences(run.train, made, own, scores[0], scores[1], machine=run.machine)
    if rank() == 0:
        write_json(folder / SEEDS, record)


def _needs(settings: CAMs) -> Sequence[str]:
    return ("cacl",) if settings.source == "cacl" or settings.compare else ()


def _depends(run: Context, settings: CAMs) -> tuple[object, ...]:
    if settings.source == "cacl":
        return ()
    if settings.source == "clip":
        words = known_words(run) if settings.words == "class" else None
        known = words and {name: words.get(name) for name in run.train.classes}
        return ("clip", run.table(Encoder), run.identity("encoder"), settings.template, known)
    return ("given", state_of(run.train, settings.source))


def _check(run: Context, settings: CAMs) -> None:
    """An encoder's first answer comes here, not after a training; so does a folder without seeds."""
    if settings.source == "clip":
        clip_es_of(run, settings.template, settings.words)(torch.zeros(3, 32, 32, device=run.machine.device), [0])
    elif settings.source != "cacl":
        check_seeds(run.train, settings.source)
        check_outside(settings.source, run.folder("cams").parent)


NAMES = {"cacl": "CAM", "clip": "CLIP-ES"}
"""What the CAMs of a source are called; those of a folder are "given seeds"."""


def _name(settings: CAMs) -> str:
    return NAMES.get(str(settings.source), "given seeds")


def _score(run: Context, settings: CAMs, dataset: Dataset) -> Score:
    return replace(cam_score(run, run.folder("cams") / "train", dataset), what=_name(settings))


def _judged(run: Context, settings: CAMs, dataset: Dataset, known: float | None) -> Judged:
    folder, chosen = run.folder("cams") / "train", settings.background_score
    if known is None:
        known = own_scores(dataset, folder).middle if chosen == "auto" else chosen

    def mask(index: int) -> Mask:
        cams = cams_of(dataset, folder, index)
        height, width = cams.maps.shape[1:]
        return threshold(cams.classes, cams.resized((4 * height, 4 * width)), known)

    return Judged(_name(settings), mask, known, auto=chosen == "auto")


STAGE = Stage(
    "cams",
    CAMs,
    run=_run,
    title=lambda settings: "CAMs" if settings.source == "cacl" else _name(settings),
    also_needs=_needs,
    spares=lambda settings: () if settings.source == "cacl" else ("warmup", "cacl"),
    brought=lambda settings: settings.source not in ("cacl", "clip") and not settings.compare,
    files=("train", "cacl"),
    also_uses=lambda settings: ("encoder",) if settings.source == "clip" else (),
    depends=_depends,
    check=_check,
    scored_on="train",
    score=_score,
    judged=_judged,
    shown="{what} of the training images",
)
