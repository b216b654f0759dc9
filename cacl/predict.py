"""Masks for any photos: files and folders in, palette PNGs and overlays out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import nn

from cacl._support.answers import check_encoder
from cacl._support.cores import threads_of_cores, usable_cores
from cacl._support.distributed import find_device
from cacl._support.files import replacing
from cacl._support.names import without_ending
from cacl._support.values import check_integer, check_span
from cacl.artifacts import save_mask
from cacl.config import Config
from cacl.constants import Backend, Range
from cacl.crf import check_backend
from cacl.encoders import ImageTextEncoder, load_encoder
from cacl.errors import InputError, shown
from cacl.folders import find_photos
from cacl.images import Mask, Pixels
from cacl.photos import Segmenter, load_segmenter, segment_photos
from cacl.pictures import legend, overlay
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
    others: list[Path]
    """Files of the folders that are no photos, such as texts."""


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
) -> Predicted:
    """Write the mask of every photo, a palette PNG of the photo's own size: 0 background, k the k-th class.

    ``a/photo.jpg`` of a folder becomes ``out/a/photo.png``, a file that is named itself ``out/<name>.png``; photos of
    one name but other endings keep them (``photo.jpg.png``). A photo is never written over.

    Args:
        model: a run folder, or the ``segment/model.pt`` of one.
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
        progress: show a progress bar where there is a terminal.

    Returns:
        The masks that were made, and what was wrong with other photos; one bad file does not stop the rest.

    Raises:
        ValueError: if the model cannot be read, there is no photo, or a mask would be written over a photo.
    """
    segmenter, table = open_model(model, backbone=backbone)
    place = find_device(device, "device")
    out = Path(out)
    found, problems, others = _find(photos, out)
    names = _names(found)
    targets = [out / f"{name}.png" for name in names]
    known = {_real(photo): photo for photo, _ in found}
    pictures = [out / "overlays" / f"{name}.jpg" for name in names] if overlays else None
    for target in [*targets, *(pictures or ())]:
        if (photo := known.get(_real(target))) is not None:
            raise InputError(f"{shown(photo)}: expected another folder `out`: this photo would be replaced")
    check_backend(backend)
    if longest is not None:
        check_integer("longest", longest, 1)
    cores = usable_cores()
    machine = Machine(
        device=place, workers=cores if workers is None else min(workers, cores), progress=progress, crf=backend
    )
    span = segmenter.range if range is None else check_span(range, "range: ")
    tagger = None
    if table.tags if tags is None else tags:
        tagger = _tagger(Path(model), encoder, machine)
    seen = [photo for photo, _ in found]
    results = segment_photos(
        segmenter.net.to(place),
        seen,
        _Writing(targets, pictures, segmenter.classes),
        table if longest is None else table.model_copy(update={"longest": longest}),
        crf=crf,
        tags=None if tagger is None else tagger(seen, range=span, machine=machine),
        range=span,
        machine=machine,
    )
    made = []
    with threads_of_cores():
        for index, result in results:
            if isinstance(result, InputError):
                problems.append(str(result))
            else:
                made.append(targets[index])
    return Predicted(segmenter.classes, made, problems, others)


def open_model(path: str | os.PathLike[str], *, backbone: nn.Module | None = None) -> tuple[Segmenter, Predict]:
    """The segmenter of a run folder with the run's settings, or that of a file with the default ones.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if not path.is_dir():
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


def _find(paths: Iterable[str | os.PathLike[str]], out: Path) -> tuple[list[tuple[Path, Path]], list[str], list[Path]]:
    """Photos with their paths below what was named, each once; a line for what is left out; and the other files."""
    found: dict[Path, tuple[Path, Path]] = {}
    problems: list[str] = []
    others: list[Path] = []
    for path in map(Path, paths):
        if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
            there = find_photos(path)
            # What an earlier call made in this very folder is no photo.
            photos = [p for p in there.photos if not _real(p).is_relative_to(_real(out))]
            problems += there.problems
            others += there.others
            if not photos:
                reason = f"besides those in `out`, {out}" if there.photos else "(by the endings that Pillow knows)"
                problems.append(f"{shown(path)}: no photos here {reason}")
            for photo in photos:
                found.setdefault(_real(photo), (photo, photo.relative_to(path)))
        elif os.path.exists(path):
            found.setdefault(_real(path), (path, Path(path.name)))
        else:
            problems.append(f"{shown(path)}: no such file or folder")
    if not found:
        raise InputError("\n".join(problems) or "Expected photos, but none was named.")
    return list(found.values()), problems, others


def _real(path: Path) -> Path:
    """A path without links; a loop of them, at which ``Path.resolve`` raises an error, stays."""
    return Path(os.path.realpath(path))


def _names(found: Sequence[tuple[Path, Path]]) -> list[Path]:
    """What each photo's files are called: without its ending, as long as it is the only one of that name."""
    names = [without_ending(name) for _, name in found]
    times = Counter(names)
    names = [short if times[short] == 1 else name for short, (_, name) in zip(names, found, strict=True)]
    if again := [name for name, count in Counter(names).items() if count > 1]:
        both = [shown(photo) for (photo, _), name in zip(found, names, strict=True) if name == again[0]]
        raise InputError(f"{' and '.join(both)}: expected photos of different names; name a folder that holds both")
    return names


@dataclass(frozen=True)
class _Writing:
    """Writes the mask of a photo, and its overlay."""

    masks: list[Path]
    overlays: list[Path] | None
    classes: tuple[str, ...]

    def __call__(self, index: int, pixels: Pixels, mask: Mask) -> None:
        if self.overlays is not None:
            height, width = pixels.shape[:2]
            seen = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
            picture = legend(overlay(pixels, mask=np.asarray(seen)), mask, self.classes)
            with replacing(self.overlays[index]) as file:
                picture.save(file, "JPEG", quality=90)
        save_mask(self.masks[index], mask)
