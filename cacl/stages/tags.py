"""The stage ``tags``: which classes an image shows, learned from tags on the image-text encoder's features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as views

from cacl._support.answers import check_encoder, check_image_features, side_of, statistics_of
from cacl._support.clock import timed
from cacl._support.distributed import barrier, rank, rank_zero, shard, unshard
from cacl._support.loaders import load, naming_dead_loaders
from cacl._support.progress import watched
from cacl._support.weights import evaluating, load_state, save_state
from cacl.constants import Range
from cacl.datasets import Dataset
from cacl.encoders import ImageTextEncoder
from cacl.errors import InputError
from cacl.images import read_image
from cacl.log import Journal
from cacl.prompts import PromptSet
from cacl.settings import Encoder, Machine, Prompts
from cacl.stages.stage import Context, Stage
from cacl.tables import Tags
from cacl.tagger import Tagger


class PhotoTagger(NamedTuple):
    """A classifier, and the encoder that its features come from."""

    tagger: Tagger
    encoder: ImageTextEncoder

    def __call__(
        self, photos: Iterable[Path], *, range: Range | None = None, machine: Machine = Machine()
    ) -> Iterator[NDArray[np.float32]]:
        """How probable each class is in each photo, ``(K,)``, one by one; 1 for all of a photo that cannot be read.

        Args:
            photos: files of any size and mode.
            range: what the values of deep photos span (see :func:`cacl.images.read_image`); by their type if None.
            machine: where the encoder is.
        """
        classes, width = self.tagger.weight.shape
        for features in encode_photos(self.encoder, photos, width, range=range, machine=machine):
            with torch.no_grad():
                known = None if isinstance(features, InputError) else self.tagger(features.cpu()[None])[0].numpy()
            yield np.ones(classes, dtype=np.float32) if known is None else known


def encode_photos(
    encoder: ImageTextEncoder,
    photos: Iterable[Path],
    width: int,
    *,
    range: Range | None = None,
    machine: Machine = Machine(),
) -> Iterator[Tensor | InputError]:
    """Features of whole photos, one by one in their order: ``(D,)``, or why the photo could not be read.

    Args:
        encoder: on the machine's device.
        photos: files of any size and mode; the encoder sees each scaled to its square.
        width: D, the length of the encoder's texts.
        range: what the values of deep photos span; by their type if None.
        machine: where it is computed.
    """
    squares = load(_Squares(side_of(encoder), range), keys=photos, workers=machine.workers, pinned=machine.on_gpu)
    for square in squares:
        yield square if isinstance(square, InputError) else _encode(encoder, square, width, machine)


def _encode(encoder: ImageTextEncoder, square: Tensor, width: int, machine: Machine) -> Tensor:
    """``(3, side, side)`` uint8 on the CPU -> ``(D,)``."""
    mean, std = (torch.tensor(values, device="cpu").view(3, 1, 1) for values in statistics_of(encoder))
    images = ((square / 255 - mean) / std)[None].to(machine.device, non_blocking=True)
    with timed("network"), torch.no_grad(), evaluating(encoder):
        answer: object = encoder.encode_image(images)
    return check_image_features(answer, images, width)[0]


@dataclass(frozen=True)
class _Squares:
    """A photo's file -> the photo as an encoder's square, or why it could not be read."""

    side: int
    range: Range | None

    def __getitem__(self, photo: Path) -> Tensor | InputError:
        try:
            image = read_image(photo, self.range)
        except InputError as error:
            return error
        square: Tensor = views.resize(image, [self.side, self.side], antialias=True).as_subclass(Tensor)
        return square


def train_tagger(
    encoder: ImageTextEncoder,
    dataset: Dataset,
    settings: Tags = Tags(),
    *,
    prompts: PromptSet | None = None,
    machine: Machine = Machine(),
) -> PhotoTagger:
    """Learn which classes an image shows from the tags of a data set; no mask is opened.

    Shared out over the processes of ``torch.distributed``'s default group, as :func:`cacl.stages.cams.make_cams` is.

    Args:
        encoder: on the machine's device.
        dataset: the images and their labels.
        settings: of the classifier.
        prompts: context templates; the paper's four by default.
        machine: where it is computed.

    Raises:
        ValueError: if an image does not decode.
    """
    check_encoder(encoder)
    texts = (PromptSet() if prompts is None else prompts).encode(encoder, dataset.classes)
    photos = shard([entry.image for entry in dataset.entries])
    own = []
    with barrier(), naming_dead_loaders():
        squares = encode_photos(encoder, photos, texts.shape[2], range=dataset.range, machine=machine)
        for found in watched(squares, total=len(photos), desc="tags", progress=machine.progress):
            if isinstance(found, InputError):
                raise found
            own.append(found.float().cpu())
    features = torch.stack(unshard(own))
    labels = torch.stack([dataset.labels(index) for index, _ in enumerate(dataset.entries)])
    tagger = rank_zero(lambda: Tagger.fit(features, labels, texts, strengths=settings.strengths))
    return PhotoTagger(tagger, encoder)


def save_tagger(path: Path, tagger: Tagger, classes: Sequence[str], encoder: str) -> None:
    """Write a file that :func:`load_tagger` reads; ``encoder`` is its name, or empty for an object of one's own."""
    state = {"classes": list(classes), "encoder": encoder, "weight": tagger.weight, "bias": tagger.bias}
    save_state(path, {"tagger": state})


class SavedTagger(NamedTuple):
    """What :func:`load_tagger` reads."""

    tagger: Tagger
    classes: tuple[str, ...]
    encoder: str
    """Its name for :func:`cacl.load_encoder`; empty for an object that was passed in."""


def load_tagger(path: Path) -> SavedTagger:
    """Read ``tags/model.pt`` of a run.

    Raises:
        ValueError: if the file is missing or is something else.
    """
    state = load_state(path).get("tagger")
    try:
        tagger = Tagger(state["weight"], state["bias"])  # type: ignore[index]
        return SavedTagger(tagger, tuple(state["classes"]), str(state["encoder"]))  # type: ignore[index]
    except (LookupError, TypeError, ValueError):
        raise InputError(
            f"{path}: expected the model of a stage `tags`, but got a checkpoint of something else"
        ) from None


def _run(run: Context, settings: Tags, folder: Path, journal: Journal) -> None:
    prompts = PromptSet(run.table(Prompts).templates)
    found = train_tagger(run.encoder, run.train, settings, prompts=prompts, machine=run.machine)
    name = "" if run.identity("encoder") else run.table(Encoder).name
    if rank() == 0:
        save_tagger(folder / "model.pt", found.tagger, run.train.classes, name)


def _check(run: Context, settings: Tags) -> None:
    """An encoder's first answer comes here, not after all the training."""
    check_encoder(run.encoder)
    texts = PromptSet(run.table(Prompts).templates).encode(run.encoder, run.train.classes)
    side = side_of(run.encoder)
    _encode(run.encoder, torch.zeros(3, side, side, dtype=torch.uint8, device="cpu"), texts.shape[2], run.machine)


STAGE = Stage(
    "tags",
    Tags,
    run=_run,
    title="tags",
    on_demand=True,
    brought=lambda settings: True,
    uses=("encoder",),
    depends=lambda run, settings: (run.table(Encoder), run.identity("encoder"), run.table(Prompts)),
    check=_check,
)
