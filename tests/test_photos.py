"""Real photos, where there are some beside the project: both readers of one folder agree."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cacl.datasets import VOC, CSVDataset, check_folder

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "voc_mini"
pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photos beside the project")


@pytest.mark.parametrize("split", ["train", "val"])
def test_voc_and_csv_read_the_same(split):
    voc, csv = VOC(PHOTOS, split), CSVDataset(PHOTOS, split)
    assert [name.replace(" ", "") for name in voc.classes] == list(csv.classes)
    assert [entry.id for entry in voc.entries] == [entry.id for entry in csv.entries]
    assert [entry.labels for entry in voc.entries] == [entry.labels for entry in csv.entries]
    first, same = voc[0], csv[0]
    assert torch.equal(first.image, same.image)
    assert torch.equal(first.mask, same.mask)


def test_labels_are_what_the_masks_show():
    data = CSVDataset(PHOTOS, "val")
    for i, entry in enumerate(data.entries[:40]):
        shown = set(np.unique(data.mask(i))) - {0, 255}
        assert shown <= {k + 1 for k in entry.labels}


def test_the_folder_is_sound():
    assert check_folder(PHOTOS) == []
