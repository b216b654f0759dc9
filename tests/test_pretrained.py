"""Networks as folders: the same bits after the way there and back, files for other readers, one line for mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyBackbone
from hub import hub
from PIL import Image
from torch import nn

from cacl import CAMNet, pretrained
from cacl.agreement import Agreement
from cacl.cli import main
from cacl.config import Config
from cacl.deeplab import DeepLabV2
from cacl.errors import InputError
from cacl.photos import load_segmenter, save_segmenter
from cacl.predict import predict
from cacl.runs.folder import RunFolder
from cacl.sharing import about_run, export_pretrained
from cacl.stages.score import Point, Score

safetensors = pytest.importorskip("safetensors.torch")

CLASSES = ("boat", "train")


def made(kind: type, backbone: str | nn.Module = "scenes", **options: object):
    """A network whose every value is drawn, the statistics of batch norm with them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = kind(2 if kind is CAMNet else 3, backbone=backbone, weights=None, **options)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for parameter in net.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    return net


def outputs(net: CAMNet | DeepLabV2, size: tuple[int, int] = (65, 50)) -> torch.Tensor:
    parameter = next(net.parameters())
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(parameter.dtype)
    with torch.no_grad():
        out = net.eval()(images)
    return out.scores if isinstance(net, CAMNet) else out


def assert_same(net: nn.Module, other: nn.Module) -> None:
    own, state = net.state_dict(), other.state_dict()
    assert own.keys() == state.keys()
    for name, value in own.items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("kind", [CAMNet, DeepLabV2])
@pytest.mark.parametrize("backbone", ["scenes", "resnet18"])
def test_a_network_comes_back_bit_by_bit(tmp_path, kind, backbone):
    net = made(kind, backbone)
    before = torch.get_rng_state()
    assert net.save_pretrained(tmp_path / "net", classes=CLASSES) == tmp_path / "net"
    again = kind.from_pretrained(tmp_path / "net")
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (again.classes, again.range, again.backbone_name, again.training) == (CLASSES, None, backbone, False)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in net.parameters()]
    assert_same(net, again)
    assert torch.equal(outputs(net), outputs(again))
    assert outputs(net).unique().numel() > 50


@pytest.mark.parametrize("kind", [CAMNet, DeepLabV2])
def test_other_readers_read_it(tmp_path, kind):
    cards = pytest.importorskip("huggingface_hub")
    net = made(kind)
    net.range = (0, 4095)
    net.save_pretrained(tmp_path, classes=["a <b>`|", "ünï\n"], license="cc-by-4.0", about="## Of *nothing*")
    read = safetensors.load_file(tmp_path / "model.safetensors")
    assert read.keys() == net.state_dict().keys()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in read.items())
    config = json.loads((tmp_path / "config.json").read_text())
    options = {"freeze_batch_norm": True, "multi_scale": True} if kind is DeepLabV2 else {}
    assert config == {
        "format": 1, "network": kind.__name__, "num_classes": net.num_classes, "classes": ["a <b>`|", "ünï\n"],
        "backbone": "scenes", "range": [0, 4095], **options,
    }  # fmt: skip
    card = cards.ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "cacl", "image-segmentation", "cc-by-4.0",
    )  # fmt: skip
    assert card.data.tags == ["weakly-supervised-semantic-segmentation"]
    values = ["0 background"] if kind is DeepLabV2 else []
    values += [f"{len(values)} a <b>`|", f"{len(values) + 1} 'ünï\\n'"]
    assert "```text\n{}\n```".format("\n".join(values)) in card.text
    assert card.text.rstrip().endswith("## Of *nothing*")
    code = re.search("```python\n(.*?)```", card.text, re.DOTALL)[1]
    names: dict[str, object] = {}
    exec(code.replace('"."', repr(str(tmp_path))), names)
    assert torch.equal(outputs(names["net"]), outputs(net))
    assert names["net"].range == (0, 4095)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_types_stay(tmp_path, kind):
    net = made(DeepLabV2, "resnet18").to(kind)
    net.save_pretrained(tmp_path)
    again = DeepLabV2.from_pretrained(tmp_path)
    assert_same(net, again)
    assert torch.equal(outputs(net), outputs(again))
    assert outputs(again).dtype == kind


def test_types_stay_one_by_one(tmp_path):
    """As where batch norm is kept in float32, and with options other than the defaults."""
    net = made(DeepLabV2, freeze_batch_norm=False, multi_scale=False).bfloat16()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    net.save_pretrained(tmp_path)
    again = DeepLabV2.from_pretrained(tmp_path)
    assert len({value.dtype for value in again.state_dict().values()}) == 3
    assert (again.freeze_batch_norm, again.multi_scale) == (False, False)
    assert_same(net, again)


def test_strides_of_caffe_stay(tmp_path):
    net = made(DeepLabV2, "resnet50")
    plain = outputs(net)
    net.backbone.set_extra_state(torch.tensor(True))
    net.save_pretrained(tmp_path)
    again = DeepLabV2.from_pretrained(tmp_path)
    assert again.backbone.caffe
    assert torch.equal(outputs(net), outputs(again))
    assert not torch.equal(outputs(again), plain)


class Tied(nn.Module):
    """Two convolutions of one weight, which is a view besides."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 16, stride=16)
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.first.weight = nn.Parameter(torch.randn(8, 64)[:, ::8][:, :, None, None])
        self.second.weight = self.first.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.stem(images)).relu())


def test_weights_that_are_shared_stay_so(tmp_path):
    net = made(CAMNet, Tied()).bfloat16().to(memory_format=torch.channels_last)
    net.save_pretrained(tmp_path)
    again = CAMNet.from_pretrained(tmp_path, backbone=Tied())
    assert again.backbone.first.weight is again.backbone.second.weight
    assert_same(net, again)
    assert torch.equal(outputs(net), outputs(again))


def test_a_backbone_without_a_name_is_passed_again(tmp_path):
    net = made(DeepLabV2, TinyBackbone())
    net.save_pretrained(tmp_path, classes=CLASSES)
    assert "a module that is passed as `backbone`" in (tmp_path / "README.md").read_text()
    with pytest.raises(
        InputError, match=r"config.json: the backbone of this network is not named in it; .* `backbone`"
    ):
        DeepLabV2.from_pretrained(tmp_path)
    given = TinyBackbone()
    given.conv.weight.data.zero_()
    again = DeepLabV2.from_pretrained(tmp_path, backbone=given)
    assert again.backbone is given
    assert not given.training
    assert torch.equal(outputs(net), outputs(again))
    with pytest.raises(InputError, match=r"model.safetensors: does not fit: \d+ of \d+ parameters match"):
        DeepLabV2.from_pretrained(tmp_path, backbone="scenes")


class Stateful(TinyBackbone):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_what_is_no_tensor_or_not_finite_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"expected a state of tensors alone, but 'backbone._extra_state' is dict"):
        made(CAMNet, Stateful()).save_pretrained(tmp_path / "a")
    net = made(CAMNet)
    net.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"CAMNet: 'classifier.weight': expected finite weights"):
        net.save_pretrained(tmp_path / "a")
    for classes, message in [
        (["boat"], "`classes` to be 2 names, without the background, but got 1"),
        (["boat", "boat"], "no duplicates"),
        ("ab", "a list of strings"),
    ]:
        with pytest.raises(ValueError, match=message):
            made(DeepLabV2).save_pretrained(tmp_path / "a", classes=classes)
    with pytest.raises(InputError, match="`license` to be the name of one on the hub"):
        made(CAMNet).save_pretrained(tmp_path / "a", license="mit\nfoo: bar")
    assert not (tmp_path / "a").exists()


# What was saved before there were folders


@pytest.mark.parametrize("backbone", ["scenes", TinyBackbone()])
def test_files_of_a_stage_are_read(tmp_path, backbone):
    path, net = tmp_path / "model.pt", made(DeepLabV2, backbone)
    name = backbone if isinstance(backbone, str) else ""
    save_segmenter(path, net, CLASSES, name, (0, 4095))
    again = DeepLabV2.from_pretrained(path, backbone=None if name else TinyBackbone())
    assert (again.classes, again.range, again.backbone_name) == (CLASSES, (0, 4095), name)
    assert torch.equal(outputs(net), outputs(again))
    if not name:
        with pytest.raises(InputError, match=r"model\.pt: the backbone of this network is not named in it"):
            DeepLabV2.from_pretrained(path)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda net: net.state_dict(),
        lambda net: {"step": 3, "modules": {"net": net.state_dict(), "criterion": {"threshold": torch.zeros(())}}},
        lambda net: {f"module._orig_mod.{name}": value for name, value in net.state_dict().items()},
    ],
    ids=["state dict", "checkpoint of a training", "DDP and compile"],
)
def test_state_dicts_are_read_with_the_name_of_the_backbone(tmp_path, wrapped):
    net = made(CAMNet).bfloat16()
    torch.save(wrapped(net), tmp_path / "model.pt")
    again = CAMNet.from_pretrained(str(tmp_path / "model.pt"), backbone="scenes")
    assert (again.classes, again.num_classes, again.backbone_name) == ((), 2, "scenes")
    assert_same(net, again)
    again.save_pretrained(tmp_path / "net", classes=CLASSES)
    assert torch.equal(outputs(net), outputs(CAMNet.from_pretrained(tmp_path / "net")))
    with pytest.raises(InputError, match=r"model\.pt: the backbone of this network is not named"):
        CAMNet.from_pretrained(tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: expected weights of DeepLabV2, but got a checkpoint of some"):
        DeepLabV2.from_pretrained(tmp_path / "model.pt", backbone="scenes")
    with pytest.raises(InputError, match='"resnet18"'):
        CAMNet.from_pretrained(tmp_path / "model.pt", backbone="resnet81")


# Mistakes


def changed(**values: object):
    def build(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(values)
        config = {key: value for key, value in config.items() if value is not Ellipsis}
        (folder / "config.json").write_text(json.dumps(config))

    return build


def tensors(change):
    def build(folder: Path) -> None:
        state = safetensors.load_file(folder / "model.safetensors")
        change(state)
        safetensors.save_file(state, folder / "model.safetensors")

    return build


def content(name: str, make):
    def build(folder: Path) -> None:
        path = folder / name
        path.write_bytes(make(path.read_bytes()))

    return build


def without(name: str):
    return lambda folder: (folder / name).unlink()


def pipe(name: str):
    def build(folder: Path) -> None:
        without(name)(folder)
        os.mkfifo(folder / name)

    return build


def header(**entry: object):
    """A safetensors file of one tensor that its header says more of than is there."""
    text = json.dumps({"aspp.0.weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], **entry}}).encode()
    return content("model.safetensors", lambda _: len(text).to_bytes(8, "little") + text)


HEAD = "aspp.0.weight"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (without("config.json"), "net: expected a folder of `save_pretrained`, but it has no config.json"),
        (without("model.safetensors"), "model.safetensors: no such file$"),
        (pipe("model.safetensors"), "model.safetensors: no such file$"),
        (pipe("config.json"), "net: expected a folder of `save_pretrained`, but it has no config.json"),
        (content("config.json", lambda _: b"{"), "config.json: expected a JSON object, but"),
        (content("config.json", lambda _: b"[1]"), "config.json: expected a JSON object, but got list"),
        (content("config.json", lambda text: b"[" * 10**5), "config.json: expected a JSON object, but"),
        (changed(format=2), "config.json: format: expected 1, but got 2; another version of cacl has written it"),
        (changed(format=True), "config.json: format: expected int, but got True"),
        (changed(format=...), "config.json: format: missing"),
        (changed(network="CAMNet"), "config.json: network: expected 'DeepLabV2', but got 'CAMNet'"),
        (changed(num_classes="3"), "config.json: num_classes: expected int, but got '3'"),
        (changed(num_classes=10**12), r"'aspp.0.weight': expected weights of 10+ classes, as config.json says, but"),
        (changed(num_classes=0), "expected weights of 0 classes, as config.json says, but got shape"),
        (changed(classes=["boat"]), "classes: expected 2 names or none, for weights of 3 classes, but got 1"),
        (changed(classes=["boat", 1]), "config.json: classes` to be a list of strings"),
        (changed(classes="boat"), "config.json: classes: expected list, but got 'boat'"),
        (changed(backbone=...), "config.json: backbone: missing"),
        (changed(backbone=1), "config.json: backbone: expected str, but got 1"),
        (changed(backbone="resnet5"), "config.json: Expected argument `backbone` to be one of .* got 'resnet5'"),
        (changed(backbone="resnet18"), r"model.safetensors: does not fit: \d+ of \d+ parameters match"),
        (changed(multi_scale=1), "config.json: multi_scale: expected bool, but got 1"),
        (changed(multiscale=True), 'config.json: multiscale: unknown key; did you mean "multi_scale"?'),
        (changed(range=[1]), "config.json: range: expected two numbers"),
        (content("model.safetensors", lambda all: all[:-1]), "model.safetensors: not a safetensors file: "),
        (content("model.safetensors", lambda all: all[:1000]), "model.safetensors: not a safetensors file: "),
        (content("model.safetensors", lambda _: b""), "not a safetensors file: it is an empty file"),
        (content("model.safetensors", lambda _: b"version https://git-lfs.github.com/spec/v1\n"), "pointer of Git LFS"),
        (content("model.safetensors", lambda _: b"\x80\x04cposix\nsystem\n."), "model.safetensors: not a safetensors"),
        (header(), "model.safetensors: not a safetensors file: "),
        (header(shape=[10**15], data_offsets=[0, 4 * 10**15]), "model.safetensors: not a safetensors file: "),
        (tensors(lambda state: state.pop(HEAD)), "'aspp.0.weight': expected weights of 3 classes, .* but got none"),
        (tensors(lambda state: state.update({HEAD: torch.zeros(())})), r"but got shape \(\)"),
        (tensors(lambda state: state.update({HEAD: torch.zeros(4, 160, 3, 3)})), r"3 classes.* \(4, 160, 3, 3\)"),
        (tensors(lambda state: state.update({HEAD: torch.zeros(3, 8, 3, 3)})), r"t': expected \(3, 160, 3, 3\)"),
        (tensors(lambda state: state.pop("aspp.3.bias")), r"'aspp.3.bias': expected \(3,\), but got nothing"),
        (tensors(lambda state: state.update(other=torch.zeros(1))), "'other': expected nothing, but got"),
        (tensors(lambda state: state[HEAD].fill_(torch.inf)), "'aspp.0.weight': expected finite weights"),
        (tensors(lambda state: state.update({HEAD: state[HEAD].long()})), "a floating point type, but got torch.int64"),
        (tensors(lambda state: state.update({HEAD: state[HEAD].to(torch.float8_e5m2)})), "got torch.float8_e5m2"),
        (tensors(lambda state: state.update({"backbone.1.num_batches_tracked": torch.zeros(())})),
         "expected torch.int64, but got torch.float32"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_that_names_the_file(tmp_path, monkeypatch, build, message):
    made(DeepLabV2).save_pretrained(tmp_path / "net", classes=CLASSES)
    build(tmp_path / "net")
    with pytest.raises(InputError, match=message) as caught:
        DeepLabV2.from_pretrained(tmp_path / "net")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "net") in str(caught.value)


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "net", "a/b/net", "net", Path("a/b")):
        with pytest.raises(InputError, match=r"(net|b): no such file$"):
            CAMNet.from_pretrained(source)


def test_nothing_else_is_written_over(tmp_path):
    net = made(CAMNet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match=r"other/config.json: is there already, and is not of an earlier"):
        net.save_pretrained(tmp_path / "other")
    (tmp_path / "project").mkdir()
    (tmp_path / "project/README.md").write_text("my project")
    with pytest.raises(InputError, match=r"project/README.md: is there already"):
        net.save_pretrained(tmp_path / "project", about="## Data")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: expected a folder, but it is a file"):
        net.save_pretrained(tmp_path / "file")
    kept = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {"other/config.json": '{"model_type": "clip"}', "project/README.md": "my project", "file": ""}
    net.save_pretrained(tmp_path / "project")  # beside a card that somebody has written
    assert (tmp_path / "project/README.md").read_text() == "my project"


def test_an_earlier_save_is_written_over_but_for_its_card(tmp_path):
    made(CAMNet).save_pretrained(tmp_path, classes=CLASSES)
    (tmp_path / "README.md").write_text("changed by hand")
    (tmp_path / ".gitattributes").write_text("*.safetensors filter=lfs")
    net = made(DeepLabV2)
    net.save_pretrained(tmp_path)
    assert torch.equal(outputs(net), outputs(DeepLabV2.from_pretrained(tmp_path)))
    assert (tmp_path / "README.md").read_text() == "changed by hand"
    net.save_pretrained(tmp_path, license="mit")
    assert "license: mit" in (tmp_path / "README.md").read_text()
    assert (tmp_path / ".gitattributes").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_write_that_fails_keeps_the_folder(tmp_path, monkeypatch):
    net = made(CAMNet)
    net.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        made(DeepLabV2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Several processes, and what is installed


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "rank", lambda: 1)
    assert made(CAMNet).save_pretrained(tmp_path / "net") == tmp_path / "net"
    assert made(CAMNet).push_to_hub("me/net") == ""
    assert not (tmp_path / "net").exists()


TOGETHER = """
import sys, torch, torch.distributed as dist
from cacl import CAMNet
dist.init_process_group("gloo")
net = torch.nn.parallel.DistributedDataParallel(CAMNet(2, backbone="scenes", weights=None))
net.module.save_pretrained("all")
if dist.get_rank() == 0:
    net.module.save_pretrained("first")
dist.barrier()
assert torch.equal(CAMNet.from_pretrained("all").classifier.weight, net.module.classifier.weight)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    (tmp_path / "script.py").write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "all/model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    net = made(CAMNet)
    net.save_pretrained(tmp_path / "net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    net.save_pretrained(tmp_path / "again")
    assert_same(CAMNet.from_pretrained(tmp_path / "again"), net)
    with pytest.raises(ImportError, match=r"^me/net: models of the hub need an extra: pip install 'cacl\[hub\]' \("):
        net.push_to_hub("me/net")
    with pytest.raises(ImportError, match=r"me/net: .* 'cacl\[hub\]' \(.*\), and there is no such file or folder$"):
        CAMNet.from_pretrained("me/net")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"^Files of safetensors need an extra: pip install 'cacl\[hub\]' \("):
        net.save_pretrained(tmp_path / "third")
    with pytest.raises(ImportError, match=r"pip install 'cacl\[hub\]'"):
        CAMNet.from_pretrained(tmp_path / "net")
    assert not (tmp_path / "third").exists()


def test_neither_library_is_imported_before_it_is_needed():
    code = "import sys, cacl.sharing; print([x for x in ('safetensors', 'huggingface_hub') if x in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# The hub, by huggingface_hub's own client

UP = """
import torch
from cacl.deeplab import DeepLabV2

net = DeepLabV2(3, backbone="scenes").bfloat16()
print(net.push_to_hub("me/boats", classes=["boat", "train"], license="mit", message="First"))
again = DeepLabV2.from_pretrained("me/boats")
assert again.classes == ("boat", "train")
assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
again.push_to_hub("me/boats", classes=["boat", "ferry"], license="cc0-1.0")
"""
DOWN = """
from cacl.deeplab import DeepLabV2

print(*DeepLabV2.from_pretrained("me/boats").classes)
try:
    DeepLabV2.from_pretrained("me/cats")
except ValueError as error:
    print(error)
"""


def test_there_and_back_by_the_hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    with hub() as (place, models):
        known = {"HF_ENDPOINT": place, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_TELEMETRY": "1"}

        def say(code: str) -> list[str]:
            command, env = [sys.executable, "-c", code], {**os.environ, **known}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout.splitlines()

        (address,) = say(UP)
        assert address.startswith(f"{place}/me/boats/commit/")
        classes, error = say(DOWN)
        assert classes == "boat ferry"
        assert error.startswith(
            "me/cats: no such file or folder, and none of the hub: 404 Client Error. Repository Not"
        )
        files = models["me/boats"]
        assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
        assert b"license: mit" in files["README.md"]  # of the first time: who knows who has changed it since
        assert safetensors.load(files["model.safetensors"])["aspp.0.weight"].dtype == torch.bfloat16
    classes, error = say(DOWN)  # the hub is gone, what was downloaded is there
    assert classes == "boat ferry"
    assert error.startswith("me/cats: no such file or folder, and none of the hub: ")


# Runs and commands


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as `cacl run` leaves it, with made-up figures."""
    out = tmp_path / "secret-place/my-run"
    photos = out.parent / "photos"
    overrides = [f"run.out={out}", f"data.root={photos}", "segment.freeze_batch_norm=false", "cacl.method=clims"]
    config = Config.load("scenes", overrides)
    out.mkdir(parents=True)
    (out / "config.toml").write_text(config.to_toml(out))
    (out / "data.json").write_text(json.dumps({"train": {"listed": "0123456789abcdef0123"}}))
    save_segmenter(out / "segment/model.pt", made(DeepLabV2), CLASSES, "scenes", (0, 4095))
    folder = RunFolder(out)
    folder.mark("segment", "key", finished=True)
    cams = Score(
        "CAM", 0.4321, {}, 100, background_score=0.21, auto=True, fixed=Point(0.15, 0.4), oracle=Point(0.26, 0.45),
        split="train", judged=Agreement(0.4, 0.1, 1.5, 9, 7),
    )  # fmt: skip
    names = ["cams", "segment", "predict"]
    folder.keep_score("cams", cams, "key", names)
    folder.keep_score("segment", Score("DeepLabV2", 0.5, {}, 50, split="val"), "key", names)
    folder.keep_score("predict", Score("DeepLabV2 + tags", 0.6, {}, 50, crf=True, split="val"), "key", names)
    return out


def test_a_run_is_exported_with_what_is_known_of_it(run, tmp_path, capsys):
    cards = pytest.importorskip("huggingface_hub")
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--license", "mit"]) == 0
    assert capsys.readouterr().out == f"segmenter: {tmp_path / 'out'}\n"
    net = DeepLabV2.from_pretrained(tmp_path / "out")
    assert (net.classes, net.range, net.freeze_batch_norm, net.multi_scale) == (CLASSES, (0, 4095), False, True)
    assert torch.equal(outputs(net), outputs(load_segmenter(run / "segment/model.pt").net))
    card = cards.ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "mit"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.text.splitlines() if line[:1] == "|"]
    assert rows[0] == ["what", "split", "images", "mIoU %", "CRF", "tags of the image", "background score", "agreement"]
    agreement = f"{Agreement(0.4, 0.1, 1.5, 9, 7).total:.3f}"
    assert rows[2:] == [
        ["cams: CAM", "`train` (trained on)", "100", "43.2", "no", "known", "0.21, auto", agreement],
        ["cams: CAM", "`train` (trained on)", "100", "40.0", "no", "known", "0.15, fixed", "–"],
        ["cams: CAM", "`train` (trained on)", "100", "45.0", "no", "known", "0.26, oracle", "–"],
        ["segment: DeepLabV2", "`val`", "50", "50.0", "no", "unknown", "–", "–"],
        ["predict: DeepLabV2 + tags", "`val`", "50", "60.0", "yes", "by the encoder", "–", "–"],
    ]
    assert "split `train` of `photos` (format `scenes`, its list's fingerprint `0123456789abcdef`)" in card.text
    assert "image-level tags, by CLIMS with the encoder `scenes`" in card.text
    assert "secret-place" not in card.text
    settings = re.search("```toml\n(.*?)```", card.text, re.DOTALL)[1]
    (tmp_path / "settings.toml").write_text(settings)
    known = Config.load(tmp_path / "settings.toml")
    assert known.table(type(known.segment)) == Config.of_run(run).segment
    assert known.data.root.name == "photos"


def test_seeds_of_others_and_labels_that_are_known_are_said(run):
    text = (run / "config.toml").read_text().replace('source = "cacl"', 'source = "/secret-place/sam-masks"')
    (run / "config.toml").write_text(text)
    score = Score(
        "DeepLabV2, labels known", None, {}, 0, crf=True, split="train", judged=Agreement(0.4, 0.1, 1.5, 9, 7)
    )
    RunFolder(run).keep_score("predict", score, "key", ["predict"])
    about = about_run(run)
    assert "image-level tags, and seeds from elsewhere (`sam-masks`), held to the tags; what these were made" in about
    assert "no mask of these images was opened" not in about
    assert re.search(
        r"\| predict: DeepLabV2, labels known \| `train` \(trained on\) \| 0 \| – \| yes \| known \|", about
    )
    (run / "metrics.json").unlink()
    assert "nothing has been scored" in about_run(run)


def test_masks_by_a_folder_are_those_of_the_run(run, tmp_path):
    export_pretrained(run, tmp_path / "out")
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((60, 50))
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos/a.png")
    arguments = [str(tmp_path / "photos"), "--workers", "0", "--no-crf", "--no-tags"]
    assert main(["predict", str(run), *arguments, "--out", str(tmp_path / "by-run")]) == 0
    assert main(["predict", str(tmp_path / "out"), *arguments, "--out", str(tmp_path / "by-folder")]) == 0
    masks = [np.array(Image.open(tmp_path / f"{name}/a.png")) for name in ("by-run", "by-folder")]
    assert np.array_equal(*masks)
    assert len(np.unique(masks[0])) > 1
    assert load_segmenter(tmp_path / "out").range == (0, 4095)
    again = export_pretrained(tmp_path / "out", tmp_path / "second")
    assert_same(DeepLabV2.from_pretrained(again), DeepLabV2.from_pretrained(tmp_path / "out"))
    made(DeepLabV2).save_pretrained(tmp_path / "unnamed")
    with pytest.raises(InputError, match=r"config.json: classes: expected 1 to 254 names, but got 0"):
        predict(tmp_path / "unnamed", [tmp_path / "photos"], tmp_path / "masks")


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("full", (), "full: expected a new or an empty folder"),
        ("net.zip", (), "a file that ends in .pt2 or .onnx, but got"),
        ("net.pt2", ("--license", "mit"), "--license: expected a folder as --out"),
        ("new", ("--license", "MIT License"), "`license` to be the name of one on the hub"),
    ],
)
def test_mistakes_of_the_command_are_one_line(run, tmp_path, capsys, out, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/README.md").write_text("mine")
    assert main(["export", str(run), "--out", str(tmp_path / out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_may_have_a_dot(run, tmp_path):
    assert main(["export", str(run), "--out", f"{tmp_path}/boats-1.0/"]) == 0
    assert DeepLabV2.from_pretrained(tmp_path / "boats-1.0").classes == CLASSES
