"""Masks for any photos: files and folders in, palette PNGs and overlays out."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import nn

from cacl._support.answers import check_encoder
from cacl._support.cores import threads_of_cores, usable_cores
from cacl._support.distributed import local_device
from cacl._support.files import replacing, require_no_file
from cacl._support.precision import decided
from cacl._support.progress import watched
from cacl._support.values import check_integer, check_span
from cacl.artifacts import save_mask
from cacl.config import Config
from cacl.constants import Backend, Precision, Range
from cacl.crf import check_backend
from cacl.encoders import ImageTextEncoder, load_encoder
from cacl.errors import InputError, shown
from cacl.images import Mask, Pixels
from cacl.inputs import OVERLAYS, Inputs, Photo, Shard, Survey
from cacl.photos import Segmenter, load_segmenter, segment_each
from cacl.pictures import legend, overlay
from cacl.pretrained import CONFIG
from cacl.runs.folder import RunFolder
from cacl.settings import Machine
from cacl.stages.tags import PhotoTagger, load_tagger
from cacl.tables import Predict


class Predicted(NamedTuple):
    """What :func:`predict` made."""

    classes: tuple[str, ...]
    """What the mask values from 1 on mean."""
    masks: list[Path]
    problems: list[str]
    """A line for each photo that could not be read, and each image that was left out."""
    others: int
    """Files of the folders that are no photos, such as texts."""
    kept: int = 0
    """Masks that were there already and were left as they are."""


class Outcome(NamedTuple):
    """What became of a photo, or of a file that is none."""

    mask: Path | None
    """Where its mask is; None if there is none."""
    problem: str = ""
    """Why not, in one line."""


class Predicting:
    """Masks in the making: iterate over it, once, for the :class:`Outcome` of each that is not kept."""

    def __init__(self, classes: tuple[str, ...], survey: Survey) -> None:
        self.classes, self.survey = classes, survey
        self.kept = 0
        """Masks that were there already, as far as it has come."""
        self._outcomes: Iterator[Outcome] = iter(())

    def __iter__(self) -> Iterator[Outcome]:
        return self._outcomes


def predict(
    model: str | os.PathLike[str],
    photos: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overlays: bool = False,
    crf: bool = True,
    longest: int | None = None,
    tags: bool | None = None,
    range: Range | None = None,
    device: str = "auto",
    workers: int | None = None,
    backend: Backend = "auto",
    backbone: nn.Module | None = None,
    encoder: ImageTextEncoder | None = None,
    progress: bool = True,
    keep: bool = False,
    precision: Precision | Literal["auto"] = "auto",
) -> Predicted:
    """Write the mask of every photo, a palette PNG of the photo's own size: 0 background, k the k-th class.

    ``a/photo.jpg`` of a folder becomes ``out/a/photo.png``, a file that is named itself ``out/<name>.png``; photos of
    one name but other endings keep them (``photo.jpg.png``). A photo is never written over.

    Args:
        model: a run folder, the ``segment/model.pt`` of one, or a folder of ``save_pretrained``.
        photos: files of any size and mode, and folders, which are searched for photos, see
            :func:`cacl.folders.find_photos`; a file that is named itself may end in anything.
        out: folder of the masks.
        overlays: write ``out/overlays/<name>.jpg`` too: the mask over the photo, with a legend.
        crf: draw the masks to the edges of the photo, with the settings of ``[predict]`` of a run, or its defaults.
        longest: in pixels; larger photos are scaled down to it for network and CRF; None for that of ``[predict]``.
        tags: weigh the classes by what the run's encoder sees in the whole photo, which needs the run folder; None for
            what ``[predict] tags`` of the run says.
        range: what the values of deep photos span (see :func:`cacl.images.read_image`); None for that of the images
            that the segmenter was trained on.
        device: a torch device; ``"auto"`` takes a GPU if there is one.
        workers: number of processes, at most one a core; one a core if None.
        backend: of the CRF.
        backbone: where the segmenter was trained with a backbone that has no name: one such; changed in place.
        encoder: where ``tags`` were learned with an encoder that has no name: that one; put on the device.
        progress: show a progress bar where there is a terminal or a notebook.
        keep: leave photos out whose mask is there already, whoever made it.
        precision: what the network computes in; ``"auto"`` is bf16 where the device has it natively, and else fp32.

    Returns:
        The masks, and what was wrong with other photos; one bad file does not stop the rest.

    Raises:
        ValueError: if the model cannot be read, there is no photo, or a mask would be written over a photo.
    """
    made = predict_each(
        model, photos, out, overlays=overlays, crf=crf, longest=longest, tags=tags, range=range, device=device,
        workers=workers, backend=backend, backbone=backbone, encoder=encoder, progress=progress, keep=keep,
        precision=precision, shard=Shard(),
    )  # fmt: skip
    outcomes = list(made)
    masks = [outcome.mask for outcome in outcomes if outcome.mask is not None]
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    return Predicted(made.classes, masks, problems, made.survey.others, made.kept)


def predict_each(
    model: str | os.PathLike[str],
    photos: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    listed: str | os.PathLike[str] | IO[bytes] | None = None,
    shard: Shard | None = None,
    overlays: bool = False,
    crf: bool = True,
    longest: int | None = None,
    tags: bool | None = None,
    range: Range | None = None,
    device: str = "auto",
    workers: int | None = None,
    backend: Backend = "auto",
    backbone: nn.Module | None = None,
    encoder: ImageTextEncoder | None = None,
    progress: bool = True,
    keep: bool = False,
    precision: Precision | Literal["auto"] = "auto",
) -> Predicting:
    """:func:`predict` for any number of photos: what becomes of each comes one by one, and little is in memory.

    Args:
        listed: a file with the path of a photo a line, as seen from the current folder, or an open one; ``a/photo.jpg``
            becomes ``out/a/photo.png``, and so does ``/a/photo.jpg``.
        shard: the part of the photos that this process takes; that of :meth:`cacl.inputs.Shard.of_process` if None.

    The other arguments and the errors are those of :func:`predict`. Nothing is made before it is asked for.
    """
    segmenter, table = open_model(model, backbone=backbone)
    place = local_device(device, "device")
    out, part = Path(out), Shard.of_process() if shard is None else shard
    require_no_file(out)
    check_backend(backend)
    if longest is not None:
        check_integer("longest", longest, 1)
    span = segmenter.range if range is None else check_span(range, "range: ")
    inputs = Inputs(photos, out, listed=listed, shard=part)
    survey = inputs.survey
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    machine = Machine(
        device=place, workers=min(cores if workers is None else workers, cores, survey.photos), progress=progress,
        crf=backend, precision=decided(precision, place),
    )  # fmt: skip
    tagger = _tagger(Path(model), encoder, machine) if (table.tags if tags is None else tags) else None
    writing = _Writing(out, overlays, segmenter.classes)

    made = Predicting(segmenter.classes, survey)
    bar = watched(None, total=survey.photos, desc="predict", progress=progress)
    left_out: deque[Outcome] = deque()

    def wanted() -> Iterator[Photo]:
        for photo in inputs:
            if isinstance(photo, str):
                left_out.append(Outcome(None, photo))
            elif keep and writing.is_there(photo):
                made.kept += 1
                bar.update()
            else:
                yield photo

    def outcomes() -> Iterator[Outcome]:
        photos, known = wanted(), None
        if tagger is not None:
            photos, same = tee(photos)
            known = tagger((photo.path for photo in same), range=span, machine=machine)
        found = segment_each(
            segmenter.net.to(place), ((photo, photo.path) for photo in photos), writing,
            table if longest is None else table.model_copy(update={"longest": longest}),
            crf=crf, tags=known, range=span, machine=machine,
        )  # fmt: skip
        with threads_of_cores(), closing(bar):
            for photo, result in found:
                yield from left_out
                left_out.clear()
                bar.update()
                failed = isinstance(result, InputError)
                yield Outcome(None, str(result)) if failed else Outcome(writing.mask(photo))
            yield from left_out

    made._outcomes = outcomes()
    return made


def open_model(path: str | os.PathLike[str], *, backbone: nn.Module | None = None) -> tuple[Segmenter, Predict]:
    """The segmenter of a run folder with the run's settings, or that of a file or a folder of
    :meth:`cacl.pretrained.Pretrained.save_pretrained` with the default ones.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if not path.is_dir() or (path / CONFIG).is_file():
        return load_segmenter(path, backbone=backbone), Predict()
    stage = path / "segment"
    if not (path / "config.toml").is_file() or not RunFolder(path).finished("segment"):
        raise InputError(
            f"{path}: expected a run folder whose stage `segment` has finished, as {stage}/stage.json says"
        )
    return load_segmenter(stage / "model.pt", backbone=backbone), Config.table_of_run(path, "predict", Predict)


def _tagger(run: Path, encoder: ImageTextEncoder | None, machine: Machine) -> PhotoTagger:
    """The classifier of whole photos that a run folder has, and its encoder on the device."""
    model = run / "tags" / "model.pt"
    if not run.is_dir() or not RunFolder(run).finished("tags"):
        raise InputError(
            f"{run}: expected a run folder whose stage `tags` has finished, to weigh classes by tags; `tags=False` "
            "(--no-tags) goes without"
        )
    known = load_tagger(model)
    if encoder is None and not known.encoder:
        raise InputError(
            f"{model}: its encoder is an object that was passed in; pass it as `encoder`, or `tags=False` (--no-tags)"
        )
    try:
        used = load_encoder(known.encoder) if encoder is None else encoder
    except (InputError, ImportError, OSError) as error:
        raise type(error)(f"{error}; `tags=False` (--no-tags) goes without an encoder") from None
    check_encoder(used)
    if isinstance(used, nn.Module):
        used.to(machine.device)
    return PhotoTagger(known.tagger, used)


@dataclass(frozen=True)
class _Writing:
    """Writes the mask of a photo, and its overlay."""

    out: Path
    overlays: bool
    classes: tuple[str, ...]

    def mask(self, photo: Photo) -> Path:
        return self.out / f"{photo.name}.png"

    def overlay(self, photo: Photo) -> Path:
        return self.out / OVERLAYS / f"{photo.name}.jpg"

    def is_there(self, photo: Photo) -> bool:
        return os.path.isfile(self.mask(photo)) and (not self.overlays or os.path.isfile(self.overlay(photo)))

    def __call__(self, photo: Photo, pixels: Pixels, mask: Mask) -> InputError | None:
        try:
            self.write(photo, pixels, mask)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return InputError(f"{shown(photo.path)}: the name of its mask would be too long")
        return None

    def write(self, photo: Photo, pixels: Pixels, mask: Mask) -> None:
        if self.overlays:
            height, width = pixels.shape[:2]
            seen = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
            picture = legend(overlay(pixels, mask=np.asarray(seen)), mask, self.classes)
            with replacing(self.overlay(photo)) as file:
                picture.save(file, "JPEG", quality=90)
        save_mask(self.mask(photo), mask)
