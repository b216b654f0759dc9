"""The stage ``predict``: masks of a split by the segmenter, and what segmenters score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cacl._support.distributed import all_reduce_counts, barrier, shard
from cacl._support.loaders import naming_dead_loaders
from cacl.artifacts import save_mask, to_make
from cacl.crf import check_backend
from cacl.datasets import Dataset
from cacl.deeplab import DeepLabV2
from cacl.errors import InputError
from cacl.images import Mask, Pixels, read_mask
from cacl.log import Journal
from cacl.metrics import ConfusionMatrix
from cacl.photos import load_segmenter, segment_photos
from cacl.settings import Machine
from cacl.stages.score import Score
from cacl.stages.stage import Context, Judged, Stage
from cacl.stages.tags import PhotoTagger, load_tagger
from cacl.tables import Photos, Predict


def make_predictions(
    net: DeepLabV2,
    dataset: Dataset,
    out: Path,
    settings: Photos = Photos(),
    *,
    labelled: bool = False,
    tagger: PhotoTagger | None = None,
    machine: Machine = Machine(),
    keep: bool = False,
) -> None:
    """Write the mask of every image of a data set, ``<id>.png``, a palette image with VOC's colours.

    Shared out over processes as :func:`cacl.stages.cams.make_cams` is.

    Args:
        net: the segmenter, on the machine's device.
        dataset: the images; masks are not looked at.
        out: folder of the files.
        settings: the CRF, and how large the network and it see a photo.
        labelled: whether an image's mask holds its own labels and the background only; else no label is looked at.
        tagger: weighs the classes by what it sees in the whole image (see :func:`cacl.photos.segment_photos`); not
            where the labels are known.
        machine: where it is computed.
        keep: leave out images that have a file already.

    Raises:
        ValueError: if an image does not decode.
    """
    wanted = to_make(dataset, out, ".png", keep=keep)
    entries = [dataset.entries[i] for i in wanted]
    photos = [entry.image for entry in entries]
    saving = _Saving([out / f"{entry.id}.png" for entry in entries])
    with barrier(), naming_dead_loaders():
        tags = _tags(dataset, wanted, labelled, tagger, machine)
        results = segment_photos(net, photos, saving, settings, tags=tags, range=dataset.range, machine=machine)
        for _, result in results:
            if isinstance(result, InputError):
                raise result


def evaluate_segmenter(
    net: DeepLabV2,
    dataset: Dataset,
    settings: Photos = Photos(),
    *,
    machine: Machine = Machine(),
    crf: bool = True,
    labelled: bool = False,
    tagger: PhotoTagger | None = None,
) -> tuple[ConfusionMatrix, int]:
    """The segmenter against the masks, ``crf`` or not; also the number of images.

    Shared out over processes as :func:`cacl.stages.cams.make_cams` is; the other arguments are those of
    :func:`make_predictions`.
    """
    masked = dataset.masked
    mine = list(shard(masked))
    matrix = ConfusionMatrix(len(dataset.classes))
    photos, counting = [dataset.entries[i].image for i in mine], _Counting(dataset, mine)
    with barrier(), naming_dead_loaders():
        tags = _tags(dataset, mine, labelled, tagger, machine)
        found = segment_photos(
            net, photos, counting, settings, crf=crf, tags=tags, range=dataset.range, machine=machine, desc="evaluate"
        )
        for _, counts in found:
            if isinstance(counts, InputError):
                raise counts
            matrix.counts += counts
    matrix.counts = all_reduce_counts(matrix.counts)
    return matrix, len(masked)


def trained_segmenter(run: Context) -> DeepLabV2:
    """The network that the stage ``segment`` has left, on the device."""
    net = load_segmenter(run.folder("segment") / "model.pt", backbone=run.own_backbone()).net
    return net.to(run.machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def trained_tagger(run: Context) -> PhotoTagger | None:
    """What the stage ``tags`` has left, with the encoder, where ``[predict]`` weighs by it."""
    if not run.table(Predict).tags:
        return None
    return PhotoTagger(load_tagger(run.folder("tags") / "model.pt").tagger, run.encoder)


def _tags(
    dataset: Dataset, indices: Sequence[int], labelled: bool, tagger: PhotoTagger | None, machine: Machine
) -> Iterable[NDArray[np.float32]] | None:
    """How probable each class is in each image, ``(K,)``: by its labels, by what the tagger sees, or unknown."""
    if labelled:
        known = np.array([dataset.labels(i).numpy() for i in indices], dtype=np.float32)
        return known.reshape(len(indices), len(dataset.classes))
    photos = [dataset.entries[i].image for i in indices]
    return tagger and tagger(photos, range=dataset.range, machine=machine)


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


def prediction_folder(run: Context) -> Path:
    """The folder of the masks that the stage makes."""
    return run.folder("predict") / ("train" if _labelled(run) else "eval")


def _labelled(run: Context) -> bool:
    """Whether the labels of the images are known to the run: those that it is trained on."""
    return run.segmented is run.train


def _run(run: Context, settings: Predict, folder: Path, journal: Journal) -> None:
    net, known = trained_segmenter(run), _labelled(run)
    tagger = None if known else trained_tagger(run)
    make_predictions(
        net, run.segmented, prediction_folder(run), settings, labelled=known, tagger=tagger, machine=run.machine,
        keep=True,
    )  # fmt: skip


def _score(run: Context, settings: Predict, dataset: Dataset) -> Score:
    masked = dataset.masked
    matrix = ConfusionMatrix(len(dataset.classes))
    with barrier():
        for i in shard(masked):
            made = read_mask(prediction_folder(run) / f"{dataset.entries[i].id}.png")
            matrix.update(dataset.mask(i).numpy(), made.numpy())
    matrix.counts = all_reduce_counts(matrix.counts)
    return Score.of(_name(run, settings), matrix.iou, dataset.classes, len(masked), crf=settings.iterations > 0)


def _name(run: Context, settings: Predict) -> str:
    if _labelled(run):
        return "DeepLabV2, labels known"
    return "DeepLabV2 + tags" if settings.tags else "DeepLabV2"


def _depends(run: Context, settings: Predict) -> tuple[object, ...]:
    return (run.fingerprint("segmented"), check_backend(run.machine.crf), *(["labelled"] if _labelled(run) else []))


STAGE = Stage(
    "predict",
    Predict,
    run=_run,
    title="prediction",
    needs=("segment",),
    also_needs=lambda settings: ("tags",) if settings.tags else (),
    files=("eval", "train"),
    depends=_depends,
    check=lambda run, settings: check_backend(run.machine.crf),
    scored_on="segmented",
    score=_score,
    judged=lambda run, settings, dataset, known: Judged(
        _name(run, settings), prediction_folder(run), crf=settings.iterations > 0
    ),
    shown="{what}{crf}",
)
