"""Images with image-level labels, from VOC, COCO or a CSV; masks are there for evaluation and never needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cacl._support.lazy import names_of
from cacl.datasets.formats import FORMATS, Format, open_dataset

if TYPE_CHECKING:
    from cacl.datasets.checking import check, check_folder
    from cacl.datasets.dataset import COCO, VOC, CSVDataset, Dataset, Sample
    from cacl.datasets.entries import Entry
else:
    __getattr__, __dir__ = names_of(
        __name__, checking="check check_folder", dataset="COCO VOC CSVDataset Dataset Sample", entries="Entry"
    )

__all__ = [
    "COCO",
    "FORMATS",
    "VOC",
    "CSVDataset",
    "Dataset",
    "Entry",
    "Format",
    "Sample",
    "check",
    "check_folder",
    "open_dataset",
]
