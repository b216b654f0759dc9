"""Images with image-level labels, from VOC, COCO or a CSV; masks are there for evaluation and never needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors

from cacl.constants import Range
from cacl.datasets.coco import Objects, read_coco
from cacl.datasets.entries import Entries, Entry, Listing, MasksIn, Origin
from cacl.datasets.files import fingerprint_of, missing
from cacl.datasets.listing import read_csv, read_voc
from cacl.errors import InputError, shown
from cacl.images import read_image, read_mask


class Sample(NamedTuple):
    """One image of a data set."""

    id: str
    image: tv_tensors.Image
    """``(3, H, W)`` uint8."""
    labels: Tensor
    """``(K,)`` uint8, 1 for present classes."""
    mask: tv_tensors.Mask | None
    """``(H, W)`` uint8: 0 background, k the k-th class from 1 on, 255 ignored; None where there is none."""


class Dataset(torch.utils.data.Dataset[Sample]):
    """Entries and class names; VOC, COCO and CSV only differ in how they are read.

    Args:
        classes: the K class names; the first has mask value 1.
        entries: the images. They are stored in little memory, so that a worker that loads images adds none of its own.
    """

    origin = Origin()
    """Where it was read from, for messages."""
    range: Range | None = None
    """What the values of deep images span (see :func:`cacl.images.read_image`); by their type if None."""

    def __init__(self, classes: Sequence[str], entries: Iterable[Entry]) -> None:
        self.classes = tuple(classes)
        self.entries: Sequence[Entry] = entries if isinstance(entries, Entries) else Entries(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        mask = None if self.entries[index].mask is None else self.mask(index)
        return Sample(self.entries[index].id, self.image(index), self.labels(index), mask)

    def image(self, index: int) -> tv_tensors.Image:
        """``(3, H, W)`` uint8."""
        return read_image(self.entries[index].image, self.range)

    def labels(self, index: int) -> Tensor:
        """``(K,)`` uint8."""
        labels = torch.zeros(len(self.classes), dtype=torch.uint8, device="cpu")
        labels[list(self.entries[index].labels)] = 1
        return labels

    def mask(self, index: int) -> tv_tensors.Mask:
        """``(H, W)`` uint8.

        Raises:
            ValueError: if the image has no mask, or it does not decode.
        """
        return read_mask(self._mask_path(index))

    def _mask_path(self, index: int) -> Path:
        entry = self.entries[index]
        if entry.mask is None:
            raise InputError(f"{shown(entry.image)}: the image has no mask")
        return entry.mask

    def mask_name(self, index: int) -> str:
        """What messages call a mask."""
        return shown(self.entries[index].mask)

    @property
    def masked(self) -> list[int]:
        """The indices of the images that have a mask."""
        if isinstance(self.entries, Entries):
            return self.entries.masked()
        return [i for i, entry in enumerate(self.entries) if entry.mask is not None]

    def with_masks(self, folder: Path) -> Dataset:
        """The same images with other masks: ``<id>.png`` in a folder."""
        return _WithMasks(self, folder)

    def fingerprint(self, *, masks: bool = False) -> str:
        """A hash of classes, ids, labels, range, and sizes and times of the images (and masks): changes when the data
        does.

        Raises:
            ValueError: if files are missing, one line each.
        """
        return fingerprint_of(self, masks=masks)


class _WithMasks(Dataset):
    """Images and labels as a data set gives them, and the masks of a folder."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.classes, self.entries = dataset.classes, MasksIn(dataset.entries, folder)
        self._dataset, self.range = dataset, dataset.range

    def image(self, index: int) -> tv_tensors.Image:
        return self._dataset.image(index)

    def labels(self, index: int) -> Tensor:
        return self._dataset.labels(index)


class VOC(Dataset):
    """A split of PASCAL VOC 2012.

    Args:
        root: the folder with ``JPEGImages``, ``Annotations`` and ``ImageSets``, such as ``VOCdevkit/VOC2012``.
        split: a list in ``ImageSets/Segmentation`` (``train``, ``val``, ``trainval``, ``test``), or ``train_aug``:
            every id with a mask in ``SegmentationClassAug`` that is not in ``val``. Labels come from the XML files.

    Raises:
        ValueError: with one line a problem, if something is missing or unknown.
    """

    def __init__(self, root: str | PathLike[str], split: str) -> None:
        listing = sound(read_voc(Path(root), split))
        super().__init__(listing.classes, listing.entries)
        self.origin = listing.origin


class InOneFile(Dataset):
    """Images whose masks are drawn from the annotations in a JSON file; it is the mask's path of every image."""

    def __init__(self, listing: Listing, objects: Objects) -> None:
        super().__init__(listing.classes, listing.entries)
        self.origin, self._listed, self._objects = listing.origin, listing.entries, objects

    def mask(self, index: int) -> tv_tensors.Mask:
        self._mask_path(index)
        if self.entries is not self._listed:  # others were given since, such as some of them
            index = self._indices[self.entries[index].id]
        return tv_tensors.Mask(torch.from_numpy(self._objects.mask(index)), device="cpu")

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {entry.id: index for index, entry in enumerate(self._listed)}

    def mask_name(self, index: int) -> str:
        return f"{super().mask_name(index)}: {shown(self.entries[index].id)}"


class COCO(InOneFile):
    """A split of COCO 2014, or of any data set in its format.

    Classes are the categories in the order of their ids; the first has mask value 1. An image's labels are the
    categories of its objects; a crowd gives no label. Its mask is drawn from the annotations when it is asked for, with
    pycocotools, which an extra installs: crowds are 255, and over them the objects, the largest first, so that small
    ones stay visible. An image without annotations has no labels, and a mask that is all background.

    An annotation needs no outline to be a label. Where one has none (no ``segmentation``, an empty one, a box or points
    in its place), nobody knows where its object is: the image has no mask and is not scored. No image has one where no
    annotation of the file has an outline.

    The JSON file is gone through once and never loaded as a whole: opening the 82 783 training images takes some 10
    seconds and 70 MB (``benchmarks/coco.py``).

    Args:
        root: the folder with ``annotations``, ``train2014`` and ``val2014``.
        split: ``train`` or ``val``: photos in ``train2014``, annotations in ``annotations/instances_train2014.json``.
            Where there is none of 2014, ``x`` means photos in ``x`` and ``annotations/instances_x.json``.

    Raises:
        ValueError: with one line a problem, if something is missing or unknown.
    """

    def __init__(self, root: str | PathLike[str], split: str) -> None:
        listing, objects = read_coco(Path(root), split)
        super().__init__(sound(listing), objects)


class CSVDataset(Dataset):
    """Own photos: ``classes.txt`` and ``dataset.csv`` in one folder.

    ``classes.txt`` has a class name a line; the first has mask value 1. ``dataset.csv`` has the header
    ``image,labels,mask,split``: paths relative to the folder, labels separated by ``;``, an empty mask where there is
    none. An image's id is its path without the ending, or its file's name without it where all lie in one folder.

    Args:
        root: the folder.
        split: which rows, by their ``split``; all of them if None.

    Raises:
        ValueError: with one line a problem, if something is missing or unknown.
    """

    def __init__(self, root: str | PathLike[str], split: str | None = None) -> None:
        listing = sound(read_csv(Path(root), split))
        super().__init__(listing.classes, listing.entries)
        self.origin = listing.origin


def sound(listing: Listing, *, look: bool = True) -> Listing:
    """A listing without problems, all of whose files are there (unless nobody is to look); else one line for each."""
    if problems := [*listing.problems, *(missing(listing.entries) if look else ())]:
        raise InputError("\n".join(problems))
    return listing
