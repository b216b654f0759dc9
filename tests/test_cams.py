"""CAM files, and their evaluation from files and from a network."""

import numpy as np
import pytest
import torch
from conftest import TinyBackbone
from drawn import write_csv
from torch import nn

from cacl import CAMNet
from cacl.artifacts import load_cams
from cacl.datasets import CSVDataset
from cacl.settings import Machine
from cacl.stages.cams import evaluate_cams, make_cams
from cacl.tables import CAMs
from cacl.transforms import normalize


@pytest.fixture
def data(tmp_path):
    return CSVDataset(write_csv(tmp_path / "data"), "train")


@pytest.fixture
def net():
    net = CAMNet(2, backbone=TinyBackbone())
    net.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return net


def test_files_hold_what_predict_gives(data, net, tmp_path):
    make_cams(net, data, tmp_path / "cams", CAMs(scales=(0.5, 1.0)))
    assert sorted(path.name for path in (tmp_path / "cams").iterdir()) == [f"{i}.npz" for i in range(6)]
    for i in range(6):
        with np.load(tmp_path / "cams" / f"{i}.npz", allow_pickle=False) as arrays:
            classes, maps = arrays["classes"], arrays["maps"]
        assert classes.tolist() == data.labels(i).nonzero()[:, 0].tolist()
        assert maps.dtype == np.float16
        assert maps.shape == (len(classes), 12, 16)
        wanted = net.predict(normalize(data.image(i))[None], scales=(0.5, 1.0), size=(12, 16))[0, classes]
        np.testing.assert_allclose(maps, wanted, atol=1e-3)
        for each in maps:
            assert each.max() in (0, 1)


def test_files_are_the_same_bytes_and_are_kept_if_asked(data, net, tmp_path):
    make_cams(net, data, tmp_path / "a")
    make_cams(net, data, tmp_path / "b", machine=Machine(workers=2))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    (tmp_path / "b" / "0.npz").write_text("kept")
    (tmp_path / "b" / "1.npz").unlink()
    make_cams(net, data, tmp_path / "b", keep=True)
    assert (tmp_path / "b" / "0.npz").read_text() == "kept"
    assert (tmp_path / "b" / "1.npz").read_bytes() == (tmp_path / "a" / "1.npz").read_bytes()


def test_evaluation_from_files_equals_that_of_the_network(data, net, tmp_path):
    make_cams(net, data, tmp_path / "cams")
    files = evaluate_cams(tmp_path / "cams", data)
    direct = evaluate_cams(net, data)
    assert files.images == direct.images == 6
    np.testing.assert_array_equal(files.iou, direct.iou)


def test_a_perfect_network_scores_near_one(tmp_path):
    """Red is boat and green is train: a 1×1 convolution can see that."""

    class Colours(nn.Module):
        out_channels = 3

        def forward(self, images):
            return images

    data = CSVDataset(write_csv(tmp_path, size=(96, 128)), "train")
    net = CAMNet(2, backbone=Colours())
    net.classifier.weight.data[:, :, 0, 0] = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    sweep = evaluate_cams(net, data, CAMs(scales=(1.0,)))
    assert sweep.oracle[1] > 0.93
    assert sweep.miou(0.15) > 0.6


def test_images_without_labels_are_background(data, net, tmp_path):
    data.entries = tuple(entry._replace(labels=()) for entry in data.entries)
    make_cams(net, data, tmp_path / "cams")
    assert load_cams(tmp_path / "cams" / "0.npz", 2).maps.shape == (0, 12, 16)
    sweep = evaluate_cams(tmp_path / "cams", data)
    assert np.all(sweep.iou[:, 1:] == 0)


def test_the_network_keeps_its_mode(data, net):
    net.train()
    evaluate_cams(net, data, CAMs(scales=(1.0,)))
    assert net.training
    assert net.backbone.drop.training


def test_files_of_something_else_are_one_line(tmp_path):
    def refuse(name, message):
        with pytest.raises(ValueError, match=message) as error:
            load_cams(tmp_path / name, 2)
        assert "\n" not in str(error.value)

    refuse("none.npz", "none.npz: no such file")
    (tmp_path / "text.npz").write_text("hello")
    refuse("text.npz", "text.npz: not a file of CAMs")
    np.savez(tmp_path / "pickle.npz", classes=np.array([{}], dtype=object), maps=np.zeros((1, 2, 2)))
    refuse("pickle.npz", "pickle.npz: not a file of CAMs")
    np.savez(tmp_path / "keys.npz", classes=np.zeros(1, int))
    refuse("keys.npz", "keys.npz: not a file of CAMs")
    np.savez(tmp_path / "shape.npz", classes=np.zeros(1, int), maps=np.zeros((2, 2)))
    refuse("shape.npz", r"shape.npz: expected classes \(C,\) and maps \(C, h, w\), but got")
    np.savez(tmp_path / "class.npz", classes=np.array([7]), maps=np.zeros((1, 2, 2)))
    refuse("class.npz", r"class.npz: expected classes 0 to 1, but got \[7\]")


def test_no_masks_is_an_error(data, net):
    data.entries = tuple(entry._replace(mask=None) for entry in data.entries)
    with pytest.raises(ValueError, match="Expected argument `dataset` to be images with masks"):
        evaluate_cams(net, data)
