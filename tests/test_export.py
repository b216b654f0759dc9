"""A segmenter in one file gives elsewhere, without this package, what it gives here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cacl.deeplab import DeepLabV2
from cacl.errors import InputError
from cacl.export import export_segmenter
from cacl.photos import Segmenter
from cacl.transforms import normalize

SIZES = ((97, 131), (150, 64), (33, 47))  # odd, portrait, small
CLASSES = ("red disc", "blaues Viereck")

ELSEWHERE = """
import json, sys
import torch

class Refuse:
    def find_spec(self, name, *_):
        assert name.partition(".")[0] != "cacl"

sys.meta_path.insert(0, Refuse())
names = {"classes.json": ""}
net = torch.export.load("segmenter.pt2", extra_files=names).module()
photos = torch.load("photos.pt", weights_only=True)
with torch.no_grad():
    results = [net(photo) for photo in photos]
assert "cacl" not in sys.modules
torch.save([results, json.loads(names["classes.json"])], "results.pt")
"""


def tiny(backbone: str | nn.Module, classes: tuple[str, ...] = CLASSES) -> Segmenter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DeepLabV2(len(classes) + 1, backbone=backbone, weights=None)
        for branch in net.aspp:
            nn.init.normal_(branch.weight, std=0.1)  # type: ignore[arg-type]
    return Segmenter(net, classes)


def some_photos() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=generator) for size in SIZES]


def predicted(net: DeepLabV2, photo: torch.Tensor) -> torch.Tensor:
    return net.predict(normalize(photo[0])[None])


def run_elsewhere(folder: Path) -> tuple[list[torch.Tensor], list[str]]:
    """The exported file in a process that cannot import cacl."""
    torch.save(some_photos(), folder / "photos.pt")
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE], cwd=folder, check=True)
    results, names = torch.load(folder / "results.pt", weights_only=True)
    return results, names


def assert_the_same(net: DeepLabV2, results: list[torch.Tensor], tolerance: float) -> None:
    for photo, result in zip(some_photos(), results, strict=True):
        wanted = predicted(net, photo)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, wanted, atol=tolerance, rtol=0)
        assert len(wanted.argmax(1).unique()) > 1
        assert (result.argmax(1) == wanted.argmax(1)).float().mean() > 1 - tolerance


def test_a_pt2_file_gives_the_same_masks_without_the_package(tmp_path):
    segmenter = tiny("scenes")
    net = segmenter.net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    gradients = [parameter.requires_grad for parameter in net.parameters()]
    assert export_segmenter(segmenter, tmp_path / "segmenter.pt2") == tmp_path / "segmenter.pt2"
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == gradients
    torch.testing.assert_close(net.state_dict(), before, atol=0, rtol=0)

    results, names = run_elsewhere(tmp_path)
    assert names == ["background", *CLASSES]
    assert_the_same(net, results, 1e-5)
    assert str(Path(__file__).parents[1]).encode() not in (tmp_path / "segmenter.pt2").read_bytes()


@pytest.mark.slow
def test_a_resnet_too(tmp_path):
    segmenter = tiny("resnet18")
    export_segmenter(segmenter, tmp_path / "segmenter.pt2")
    assert_the_same(segmenter.net, run_elsewhere(tmp_path)[0], 1e-5)


@pytest.mark.slow
def test_a_larger_stride_needs_larger_photos_and_any_device_will_do(tmp_path, backbone):
    segmenter = tiny(backbone)
    net = torch.export.load(export_segmenter(segmenter, tmp_path / "a.pt2")).module()
    photo = some_photos()[1]
    torch.testing.assert_close(net(photo), predicted(segmenter.net, photo), atol=1e-5, rtol=0)
    with pytest.raises((AssertionError, RuntimeError), match="64"):
        net(photo[:, :, :63])
    assert net.to("meta")(photo.to("meta")).shape == (1, 3, 150, 64)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["scenes", "resnet18"])
def test_an_onnx_file_gives_the_same_masks(tmp_path, backbone):
    pytest.importorskip("torch", minversion="2.7")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    segmenter = tiny(backbone)
    path = export_segmenter(segmenter, tmp_path / "segmenter.onnx")
    assert list(tmp_path.iterdir()) == [path]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["background", *CLASSES]
    assert session.get_inputs()[0].shape == [1, 3, "height", "width"]
    results = [torch.from_numpy(session.run(None, {"photo": photo.numpy()})[0]) for photo in some_photos()]
    assert_the_same(segmenter.net, results, 1e-4)


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch, backbone):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'cacl\[onnx\]'"):
        export_segmenter(tiny(backbone), tmp_path / "a.onnx")


@pytest.mark.parametrize("name", ["segmenter.pth", "segmenter"])
def test_another_ending_is_refused(tmp_path, backbone, name):
    with pytest.raises(InputError, match=rf"`out` to be a file that ends in \.pt2 or \.onnx, but got .*{name}\.$"):
        export_segmenter(tiny(backbone), tmp_path / name)
    assert not list(tmp_path.iterdir())


class Choosing(nn.Module):
    """What it does depends on what is in the image."""

    out_channels = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images if images.mean() > 0 else -images


class Fixed(nn.Module):
    """Takes one size only."""

    out_channels = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, : int(images.shape[2])]


class Outside(nn.Module):
    """Leaves torch."""

    out_channels = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.abs(images.numpy()))


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [(Choosing(), "data-dependent"), (Fixed(), "(height|width)"), (Outside(), "numpy")],
)
def test_what_cannot_be_exported_says_why_and_the_file_stays(tmp_path, backbone, reason):
    out = tmp_path / "segmenter.pt2"
    out.write_text("before")
    with pytest.raises(InputError, match=f"cannot be exported by torch .*: .*{reason}") as caught:
        export_segmenter(tiny(backbone), out)
    assert "\n" not in str(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


class Rare(nn.Module):
    """An operation that ONNX does not have."""

    out_channels = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(images)


@pytest.mark.slow
def test_an_operation_that_onnx_does_not_have_is_named(tmp_path):
    pytest.importorskip("torch", minversion="2.7")
    pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match=r"cannot be exported by torch .* to ONNX: .*bessel_j0") as caught:
        export_segmenter(tiny(Rare()), tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_keeps_the_file(tmp_path, monkeypatch, backbone):
    out = tmp_path / "segmenter.pt2"
    out.write_text("before")

    def fail(program, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_segmenter(tiny(backbone), out)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
