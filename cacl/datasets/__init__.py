"""Images with image-level labels, from VOC, COCO or a CSV; masks are there for evaluation and never needed."""

from cacl.datasets.checking import check, check_folder
from cacl.datasets.dataset import COCO, VOC, CSVDataset, Dataset, Sample
from cacl.datasets.entries import Entry
from cacl.datasets.formats import FORMATS, Format, open_dataset

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
