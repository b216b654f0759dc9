"""CAMs of a data set by CLIP-ES, in the place of those of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.nn import functional as F

from cacl._support.distributed import barrier
from cacl._support.loaders import naming_dead_loaders
from cacl._support.progress import watched
from cacl.artifacts import ImageCAMs, map_size, save_cams, to_make
from cacl.clip_es import CLIPES, SHARED_WORDS
from cacl.datasets import Dataset
from cacl.loading import load_images
from cacl.prompts import PromptSet
from cacl.settings import Machine
from cacl.stages.stage import Context
from cacl.stages.words import known_words


def make_dense_cams(
    seeds: CLIPES, dataset: Dataset, out: Path, *, machine: Machine = Machine(), keep: bool = False
) -> None:
    """As :func:`cacl.stages.cams.make_cams`, by CLIP-ES; ``seeds`` has its encoder on the machine's device."""
    with barrier(), naming_dead_loaders():
        wanted = to_make(dataset, out, ".npz", keep=keep)
        images = load_images(dataset, wanted, machine.workers, pinned=machine.on_gpu)
        for index, image in watched(images, total=len(wanted), desc="CLIP-ES", progress=machine.progress):
            labels = dataset.entries[index].labels
            maps = seeds(image.to(machine.device, non_blocking=True), labels)
            size = map_size(image.shape[1:])
            if len(maps):
                maps = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
            cams = ImageCAMs(np.array(labels, dtype=np.int64), maps.reshape(-1, *size).half().cpu().numpy())
            save_cams(out / f"{dataset.entries[index].id}.npz", cams)


def clip_es_of(run: Context, template: str, backgrounds: Literal["shared", "class"]) -> CLIPES:
    """CLIP-ES with a run's encoder, for its classes."""
    words = known_words(run) if backgrounds == "class" else SHARED_WORDS
    encoder: Any = run.encoder
    return CLIPES(encoder, run.train.classes, prompts=PromptSet([template]), backgrounds=words)
