"""What networks compute in: chosen by the device, written down, and the same masks in all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import write_csv
from PIL import Image

from cacl import CAMNet, pipeline
from cacl._support import precision
from cacl._support.precision import decided, native_precision
from cacl.artifacts import load_cams
from cacl.config import Config
from cacl.datasets import CSVDataset
from cacl.deeplab import DeepLabV2
from cacl.photos import save_segmenter
from cacl.predict import predict
from cacl.settings import Machine
from cacl.stages.cams import make_cams
from cacl.tables import CAMs


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("fpu sse4_2 avx2 fma", "fp32"),
        ("fpu avx512f avx512_bf16", "bf16"),
        ("avx512f amx_bf16 amx_tile", "bf16"),
        ("avx512f avx512_vnni", "fp32"),  # it would emulate bf16
        ("", "fp32"),
    ],
)
def test_a_processor_by_its_flags(tmp_path, monkeypatch, flags, wanted):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: X\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    read = precision._processor
    monkeypatch.setattr(precision, "_processor", lambda: read(tmp_path / "cpuinfo"))
    assert native_precision("cpu") == wanted
    assert read(tmp_path / "none") == set()


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_by_its_capability(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native_precision("cuda:1") == wanted


@pytest.mark.parametrize(
    ("chosen", "device", "native", "warned"),
    [
        ("bf16", "cpu", "fp32", "bf16"),
        ("fp16", "cpu", "fp32", "fp16"),
        ("bf16", "cuda:0", "fp32", "bf16"),
        ("fp16", "cuda:0", "fp32", ""),
        ("fp32", "cpu", "fp32", ""),
        ("bf16", "cpu", "bf16", ""),
        ("auto", "cpu", "bf16", ""),
    ],
)
def test_what_is_emulated_is_said(monkeypatch, caplog, chosen, device, native, warned):
    monkeypatch.setattr(precision, "native_precision", lambda place: native)
    precision.warn_once.cache_clear()
    assert decided(chosen, device) == (native if chosen == "auto" else chosen)
    said = f"{device}: {warned} is emulated here, many times slower than fp32"
    assert caplog.messages == ([said] if warned else [])


def test_what_is_decided_is_written_down_and_stays(tmp_path, monkeypatch):
    write_csv(tmp_path / "photos", train=3, val=1)
    small = [
        f"data.root={tmp_path / 'photos'}", "data.format=csv", "data.train=train", "data.eval=",
        f"run.out={tmp_path / 'run'}",
        "run.workers=0", "run.device=cpu", "camnet.backbone=scenes", "camnet.weights=", "warmup.epochs=1",
        "warmup.batch_size=2", "warmup.crop=32",
    ]  # fmt: skip
    monkeypatch.setattr(precision, "native_precision", lambda device: "bf16")
    pipeline.run(Config.load("voc", small), stages=["warmup"])
    assert Config.of_run(tmp_path / "run").run.precision == "bf16"
    monkeypatch.setattr(precision, "native_precision", lambda device: "fp32")  # another machine goes on
    assert pipeline.plan(Config.load("voc", small))[0] == "warmup: finished"
    pipeline.run(Config.load("voc", small), stages=["warmup"])
    assert Config.of_run(tmp_path / "run").run.precision == "bf16"
    assert pipeline.plan(Config.load("voc", [*small, "run.precision=fp32"]))[0] == "warmup: to be done again"
    assert pipeline.plan(Config.load("voc", [*small, f"run.out={tmp_path / 'other'}"]))[0] == "warmup: new"


@pytest.mark.parametrize("make", [CAMNet, DeepLabV2])
def test_what_decides_between_classes_is_not_rounded(make):
    """In evaluation: the head computes in float32, on features of bf16. A training takes what is faster."""
    net, images = make(3, backbone="scenes").eval(), torch.randn(1, 3, 32, 48)
    scores = net.scores if make is CAMNet else net.logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features, found = net.backbone(images), scores(images)
        trained = [net.train(), scores(images)][1]
    assert features.dtype == trained.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    head = [net.classifier] if make is CAMNet else net.aspp
    torch.testing.assert_close(found, torch.stack([branch(features.float()) for branch in head]).sum(0))


@pytest.mark.parametrize("make", [CAMNet, DeepLabV2])
def test_where_there_is_no_autocast(make):
    net = make(3, backbone="scenes", weights=None).to("meta").eval()
    maps = net.scores if make is CAMNet else net.logits
    assert maps(torch.empty(1, 3, 32, 48, device="meta")).shape == (1, 3, 4, 6)


def test_cams_and_masks_are_those_of_float32(tmp_path):
    """bf16 has 8 bits: at least 99.9 % of the pixels are the same, and no CAM differs by more than some of them."""
    torch.manual_seed(0)
    dataset = CSVDataset(write_csv(tmp_path / "photos", train=4, val=1), "train")
    net = CAMNet(len(dataset.classes), backbone="scenes")
    made = {}
    for kind in ("fp32", "bf16"):
        make_cams(net, dataset, tmp_path / kind, CAMs(scales=(1.0,)), machine=Machine(precision=kind, progress=False))
        made[kind] = [load_cams(tmp_path / kind / f"{entry.id}.npz", 2).maps for entry in dataset.entries]
    differences = np.concatenate([np.abs(a - b).ravel() for a, b in zip(*made.values(), strict=True)])
    assert 0 < differences.max() < 0.05
    assert np.mean((np.concatenate([m.ravel() for m in made["fp32"]]) > 0.3)
                   == (np.concatenate([m.ravel() for m in made["bf16"]]) > 0.3)) > 0.99  # fmt: skip
    segmenter = DeepLabV2(3, backbone="scenes")
    torch.nn.init.normal_(segmenter.aspp[0].weight, std=0.1)
    save_segmenter(tmp_path / "model.pt", segmenter, ("boat", "train"), "scenes")
    pixels = []
    for kind in ("fp32", "bf16"):
        photos = [entry.image for entry in dataset.entries]
        found = predict(tmp_path / "model.pt", photos, tmp_path / f"masks-{kind}", workers=0, precision=kind)
        pixels.append(np.concatenate([np.asarray(Image.open(path)).ravel() for path in found.masks]))
    assert len(np.unique(pixels[0])) > 1
    assert (pixels[0] == pixels[1]).mean() > 0.99
