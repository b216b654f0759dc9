"""Photos of one size that follow each other, seen by a network together: the same as one by one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinyBackbone
from drawn import CLASSES, picture, write_csv
from torch import nn

from cacl import CAMNet, loading, photos
from cacl.artifacts import load_cams
from cacl.datasets import CSVDataset
from cacl.deeplab import DeepLabV2
from cacl.errors import InputError
from cacl.irn import IRNet
from cacl.loading import alike, at_once
from cacl.settings import Machine
from cacl.stages.cams import make_cams
from cacl.stages.masks import walk_cams


@pytest.fixture
def data(tmp_path):
    """Nine photos of two sizes, of which one has no label."""
    root = write_csv(tmp_path / "data", train=9, val=0)
    for i in (3, 4, 8):
        picture(i, (40, 72))[0].save(root / f"images/{i}.png")
    rows = (root / "dataset.csv").read_text().splitlines()
    rows[2] = "images/1.png,,masks/1.png,train"
    (root / "dataset.csv").write_text("\n".join(rows))
    return CSVDataset(root, "train")


@pytest.fixture
def seen(monkeypatch):
    """The numbers of photos that networks have seen at a time, at most three."""
    counts = []
    monkeypatch.setattr(loading, "at_once", lambda device, size: 3)
    forward = nn.Module.__call__

    def call(module, *arguments, **named):
        if isinstance(module, TinyBackbone):
            counts.append(len(arguments[0]))
        return forward(module, *arguments, **named)

    monkeypatch.setattr(nn.Module, "__call__", call)
    return counts


def test_items_of_one_size_that_follow_each_other():
    sizes = [(1, 1), (1, 1), (1, 1), (2, 1), (1, 1), (1, 2), (1, 2)]
    groups = alike(enumerate(sizes), lambda item: item[1], lambda size: 2 if size == (1, 1) else 9)
    assert [[number for number, _ in group] for group in groups] == [[0, 1], [2], [3], [4], [5, 6]]
    assert list(alike([], lambda item: (1, 1), lambda size: 2)) == []
    taken = []
    groups = alike(map(taken.append, range(9)), lambda item: (1, 1), lambda size: 3)
    next(groups)
    assert taken == [0, 1, 2]  # it asks for no more than it gives


def test_what_fits_into_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    assert at_once("cpu", (512, 512)) == 1
    assert at_once("cuda:0", (512, 512)) == 10
    assert at_once("cuda", (9000, 9000)) == 1
    assert at_once("cuda", (32, 32)) == 32
    assert at_once("cuda", (0, 0)) == 1  # photos that could not be read


def test_cams_are_those_of_photos_one_by_one(data, tmp_path, request):
    torch.manual_seed(0)
    net = CAMNet(len(CLASSES), backbone=TinyBackbone())
    make_cams(net, data, tmp_path / "single")
    counts = request.getfixturevalue("seen")
    make_cams(net, data, tmp_path / "batches")
    assert set(counts) == {6, 4, 2}  # with their mirror images
    for entry in data.entries:
        one, other = (load_cams(tmp_path / kind / f"{entry.id}.npz", 2) for kind in ("single", "batches"))
        assert one.classes.tolist() == other.classes.tolist() == list(entry.labels)
        np.testing.assert_allclose(one.maps.astype(np.float32), other.maps.astype(np.float32), atol=2e-3)


def test_walks_are_those_of_photos_one_by_one(data, tmp_path, request):
    torch.manual_seed(0)
    make_cams(CAMNet(len(CLASSES), backbone=TinyBackbone()), data, tmp_path / "cams")
    net = IRNet(backbone="resnet18", weights=None)
    walk_cams(net, data, tmp_path / "cams", tmp_path / "single")
    request.getfixturevalue("seen")
    walk_cams(net, data, tmp_path / "cams", tmp_path / "batches")
    for entry in data.entries:
        one, other = (load_cams(tmp_path / kind / f"{entry.id}.npz", 2).maps for kind in ("single", "batches"))
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=5e-3)


def test_logits_are_those_of_photos_one_by_one(data, tmp_path):
    (tmp_path / "broken.png").write_text("no photo")
    torch.manual_seed(0)
    net = DeepLabV2(3, backbone=TinyBackbone()).eval()
    reading = photos._Reading(2048, None)
    paths = [*(entry.image for entry in data.entries[:5]), tmp_path / "broken.png", data.entries[5].image]
    read = [reading[photos._Item(number, path, None)] for number, path in enumerate(paths)]
    groups = list(alike(read, photos._size, lambda size: 3))
    assert [len(group) for group in groups] == [3, 2, 1, 1]
    found = [each for group in groups for each in photos._infer(net, group, Machine())]
    assert [key for key, _ in found] == list(range(7))
    assert isinstance(found[5][1], InputError)
    for (_, one), item in zip(found, read, strict=True):
        if not isinstance(one, InputError):
            single = photos._infer(net, [item], Machine())[0][1]
            np.testing.assert_allclose(one.values, single.values, atol=1e-5)
            assert one.photo is item[1][0]
