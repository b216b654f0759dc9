"""The stage ``masks``: pseudo masks of what a random walk makes of CAMs, over the photo's colours or IRNet's edges."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cacl._support.clock import timed
from cacl._support.distributed import barrier
from cacl._support.loaders import naming_dead_loaders
from cacl.artifacts import ImageCAMs, cams_of, save_cams, to_make
from cacl.constants import IMAGENET_STD
from cacl.crf import check_backend
from cacl.datasets import Dataset
from cacl.irn import IRNet
from cacl.loading import load_alike
from cacl.log import Journal
from cacl.mining import pseudo_mask
from cacl.random_walk import propagate, spread
from cacl.seeds import check_outside, check_seeds, state_of
from cacl.settings import Machine
from cacl.stages.cams import cam_score
from cacl.stages.irn import irnet
from cacl.stages.levels import own_levels
from cacl.stages.refined import evaluate_refined, write_labels
from cacl.stages.score import Score
from cacl.stages.stage import Context, Judged, Stage
from cacl.tables import Masks, Walk


def walk_cams(
    net: IRNet | None,
    dataset: Dataset,
    cams: Path,
    out: Path,
    settings: Walk = Walk(),
    *,
    machine: Machine = Machine(),
    keep: bool = False,
) -> None:
    """Write the CAMs of every image after a random walk (IRNet, Ahn et al. 2019, section 5).

    ``<id>.npz`` has them divided by their largest value, as :func:`cacl.artifacts.load_cams` reads them. Shared out
    over processes as :func:`cacl.stages.cams.make_cams` is.

    Args:
        net: gives the edges; on the machine's device. With None the walk is over the photo's colours.
        dataset: the images and their labels.
        cams: folder of :func:`cacl.stages.cams.make_cams`.
        out: folder of the files.
        settings: of the walk.
        machine: where it is computed.
        keep: leave out images that have a file already.

    Raises:
        ValueError: if a file of CAMs is missing or broken.
    """
    wanted = to_make(dataset, out, ".npz", keep=keep)
    with barrier(), naming_dead_loaders():
        for some, photos in load_alike(dataset, wanted, machine, desc="random walk"):
            edges = None
            if net is not None:
                with timed("network"), machine.autocast():
                    edges = net.predict(photos)
            for number, index in enumerate(some):
                found = cams_of(dataset, cams, index)
                with timed("walk"):
                    if edges is None:
                        walked = walk_colours(found, photos[number], settings)
                    else:
                        walked = walk(found, edges[number], settings)
                save_cams(out / f"{dataset.entries[index].id}.npz", walked)


def walk(cams: ImageCAMs, edges: Tensor, settings: Walk = Walk()) -> ImageCAMs:
    """CAMs after a random walk over ``(h, w)`` edge probabilities, divided by the largest value of all classes."""
    seeds = _seeds_of(cams, edges.shape, edges.device, settings)
    return _divided(cams, propagate(seeds, edges, radius=settings.radius, beta=settings.beta, steps=settings.steps))


def walk_colours(cams: ImageCAMs, image: Tensor, settings: Walk = Walk()) -> ImageCAMs:
    """CAMs after a random walk over the colours of an image, divided by the largest value of all classes.

    Args:
        cams: ``(C, h, w)``.
        image: ``(3, H, W)``, normalised with ImageNet's statistics; it has the walk's device.
        settings: of the walk.
    """
    seeds = _seeds_of(cams, cams.maps.shape[1:], image.device, settings)
    if not len(seeds):
        return cams
    deviation = 255 * torch.tensor(IMAGENET_STD, device=image.device).view(3, 1, 1)
    photo = F.interpolate(image[None].float(), size=cams.maps.shape[1:], mode="area")[0] * deviation
    return _divided(cams, spread(seeds, photo, radius=settings.radius, colour=settings.colour))


def _seeds_of(cams: ImageCAMs, size: tuple[int, ...], device: torch.device, settings: Walk) -> Tensor:
    seeds = torch.from_numpy(cams.maps).to(device, torch.float32) ** settings.power
    if len(cams.classes) and seeds.shape[1:] != size:
        seeds = F.interpolate(seeds[None], size=size, mode="bilinear", align_corners=False)[0]
    return seeds.reshape(len(cams.classes), *size)


def _divided(cams: ImageCAMs, result: Tensor) -> ImageCAMs:
    if len(result):
        result = result / result.max().clamp(min=1e-5)
    return ImageCAMs(cams.classes, result.half().cpu().numpy())


def make_masks(
    dataset: Dataset,
    cams: Path,
    out: Path,
    settings: Masks = Masks(),
    *,
    machine: Machine = Machine(),
    keep: bool = False,
) -> None:
    """Write :func:`cacl.mining.pseudo_mask` of every image as ``<id>.png``, a palette image with VOC's colours.

    Args:
        dataset: the images and their labels.
        cams: folder of :func:`cacl.stages.cams.make_cams` or :func:`walk_cams`.
        out: folder of the files.
        settings: the score, and the CRF.
        machine: where it is computed; each worker takes one image at a time.
        keep: leave out images that have a mask already.

    Raises:
        ValueError: if a file of CAMs is missing or broken.
    """
    score, levels = _score_of(dataset, cams, settings)
    made = partial(pseudo_mask, background_score=score, unsure=settings.unsure)
    write_labels(
        dataset,
        cams,
        out,
        made,
        settings,
        levels=levels,
        regions=settings.regions,
        machine=machine,
        keep=keep,
        desc="masks",
    )


def _score_of(dataset: Dataset, cams: Path, settings: Masks) -> tuple[float, NDArray[np.float64] | None]:
    """The background score of all classes, and the classes' levels where it is not given."""
    if settings.background_score != "auto":
        return round(settings.background_score, 6), None
    scores, levels = own_levels(dataset, cams)
    return scores.low, levels


def seeds_of(run: Context, settings: Masks) -> Path:
    """The folder of the CAMs that the masks of a run are made of."""
    walked = settings.affinity != "none"
    return run.folder("masks") / "walk" if walked else run.folder("cams") / "train"


def _run(run: Context, settings: Masks, folder: Path, journal: Journal) -> None:
    seeds = seeds_of(run, settings)
    if settings.affinity != "none":
        net = irnet(run, "irn") if settings.affinity == "irn" else None
        walk_cams(net, run.train, run.folder("cams") / "train", seeds, settings, machine=run.machine, keep=True)
    make_masks(run.train, seeds, folder / "train", settings, machine=run.machine, keep=True)


def _score(run: Context, settings: Masks, dataset: Dataset) -> Score:
    seeds = seeds_of(run, settings)
    score, levels = _score_of(dataset, seeds, settings)
    matrix, images = evaluate_refined(
        dataset, seeds, settings, background_score=score, levels=levels, regions=settings.regions, machine=run.machine
    )
    alone = None
    if settings.affinity != "none":
        alone = replace(cam_score(run, seeds, dataset, score), what="random walk alone")
    return Score.of(
        "pseudo masks", matrix.iou, dataset.classes, images, crf=settings.iterations > 0, background_score=score,
        auto=settings.background_score == "auto", walk=alone,
    )  # fmt: skip


def _judged(run: Context, settings: Masks, dataset: Dataset, known: float | None) -> Judged:
    score = _score_of(dataset, seeds_of(run, settings), settings)[0] if known is None else known
    crf, auto = settings.iterations > 0, settings.background_score == "auto"
    return Judged("pseudo masks", run.folder("masks") / "train", score, crf=crf, auto=auto)


def _depends(run: Context, settings: Masks) -> tuple[object, ...]:
    backend, regions = check_backend(run.machine.crf), settings.regions
    return (backend,) if regions is None else (backend, state_of(run.train, regions, (".png",)))


def _check(run: Context, settings: Masks) -> None:
    check_backend(run.machine.crf)
    if settings.regions is not None:
        check_seeds(run.train, settings.regions, "regions", (".png",))
        check_outside(settings.regions, run.folder("masks").parent)


STAGE = Stage(
    "masks",
    Masks,
    run=_run,
    title="pseudo masks",
    needs=("cams",),
    also_needs=lambda settings: ("irn",) if settings.affinity == "irn" else (),
    version=4,
    files=("walk", "train"),
    depends=_depends,
    check=_check,
    scored_on="train",
    score=_score,
    judged=_judged,
)
