"""CAMs of some training images, drawn while a network learns them."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice

import numpy as np

from cacl._support.distributed import rank
from cacl.camnet import CAMNet
from cacl.datasets import Dataset
from cacl.errors import first_line
from cacl.images import Pixels
from cacl.log import Journal, Record
from cacl.pictures import heatmap, sheet
from cacl.settings import Machine
from cacl.stages.cams import predict_cams
from cacl.tables import CAMs

logger = logging.getLogger("cacl")

IMAGES = 4
"""How many are shown: the first ones that have a label."""
_AT_ONE_SCALE = CAMs(scales=(1.0,), flip=False)


def showing_cams(journal: Journal, net: CAMNet, dataset: Dataset, batch_size: int, machine: Machine) -> Journal:
    """The journal of a training, whose ``pictures`` get the CAMs of some images after each pass over all of them.

    They are computed between two steps, in evaluation mode and without a random number, so that the training is the
    same with and without them. What goes wrong is a warning, and the last picture.
    """
    pictures = journal.pictures
    if pictures is None or rank() > 0:
        return journal
    indices = list(islice((i for i, entry in enumerate(dataset.entries) if entry.labels), IMAGES))
    own = replace(machine, workers=0, progress=False)
    going_on = bool(indices)

    def callback(record: Record) -> None:
        nonlocal going_on
        if journal.callback is not None:
            journal.callback(record)
        passes, before = (step * batch_size // len(dataset) for step in (record["step"], record["step"] - 1))
        if passes > before and going_on:
            try:
                drawn = cam_sheet(net, dataset, indices, own)
            except Exception as error:  # such as too little memory: hours of training are worth more
                logger.warning("%s: no more pictures of CAMs: %s", record["stage"], first_line(error))
                going_on = False
            else:
                pictures(record["stage"], record["step"], drawn)

    return replace(journal, callback=callback)


def cam_sheet(net: CAMNet, dataset: Dataset, indices: list[int], machine: Machine) -> Pixels:
    """Photos beside the CAMs of their labels at one scale, ``(H, W, 3)``."""
    rows = []
    for index, cams in predict_cams(net, dataset, indices, _AT_ONE_SCALE, machine=machine):
        photo: Pixels = dataset.image(index).permute(1, 2, 0).numpy()
        entry = dataset.entries[index]
        names = ", ".join(dataset.classes[label] for label in entry.labels)
        rows.append((f"{entry.id}: {names}", [photo, heatmap(photo, cams.resized(photo.shape[:2]))]))
    return np.asarray(sheet(["photo", "CAM"], rows))
