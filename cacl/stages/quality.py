"""How far the masks of a data set agree with an encoder and with the photos' colours, where nobody knows the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cacl._support.distributed import barrier, shard, unshard
from cacl._support.loaders import naming_dead_loaders
from cacl._support.progress import watched
from cacl.agreement import Agreement, MaskJudge
from cacl.artifacts import made_mask
from cacl.datasets import Dataset
from cacl.errors import expected
from cacl.images import Mask
from cacl.loading import load_images
from cacl.settings import Machine

IMAGES = 200
"""So many images are looked at by default, spread evenly over those with labels: more change the figure little."""


class Agreements(NamedTuple):
    """What :func:`evaluate_agreement` found."""

    whole: Agreement
    """Of all images together."""
    photos: Mapping[int, Agreement]
    """Of each image alone, by its index."""


def evaluate_agreement(
    judge: MaskJudge,
    dataset: Dataset,
    masks: Path | Callable[[int], Mask],
    *,
    indices: Sequence[int] | None = None,
    machine: Machine = Machine(),
) -> Agreements:
    """How far masks agree with an encoder; the data set's own masks are not opened.

    Shared out over the processes of ``torch.distributed``'s default group as :func:`cacl.stages.cams.make_cams` is; the
    figures are the same whatever their number.

    Args:
        judge: made of an encoder on the machine's device.
        dataset: the images and their labels.
        masks: a folder of ``<id>.png``, or an image's index -> its mask ``(H, W)``: 0, class + 1, or 255. It may be of
            another size than the image.
        indices: of the images; by default at most :data:`IMAGES` of those that have labels, spread evenly.
        machine: where it is computed.

    Raises:
        ValueError: if no image has a label, a mask is missing or broken, or it has a value that is no class.
    """
    wanted = labelled(dataset, IMAGES) if indices is None else list(indices)
    if not wanted:
        raise expected("dataset", "images with labels", "none with one")
    mine, own = shard(wanted), []
    with barrier(), naming_dead_loaders():
        images = load_images(dataset, mine, machine.workers, pinned=machine.on_gpu)
        for index, image in watched(images, total=len(mine), desc="agreement", progress=machine.progress):
            mask = torch.as_tensor(made_mask(dataset, masks, index), device="cpu")
            # One by one: what is found of an image does not depend on the others, nor on the number of processes.
            photo = image[None].to(machine.device, non_blocking=True)
            own.append(judge(photo, mask[None], dataset.labels(index)[None])[0].double().cpu())
    rows = torch.stack(unshard(own))
    return Agreements(Agreement.of(rows), {i: Agreement.of(row) for i, row in zip(wanted, rows, strict=True)})


def labelled(dataset: Dataset, most: int) -> list[int]:
    """The indices of at most so many images that have labels, spread evenly over all of them."""
    known = [i for i, entry in enumerate(dataset.entries) if entry.labels]
    count = min(most, len(known))
    return [known[i * len(known) // count] for i in range(count)]
