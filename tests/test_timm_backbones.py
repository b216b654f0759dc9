"""Backbones of timm: what timm gives by hand, at the strides that are promised; weights and errors as for others."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TinyEncoder
from drawn import write_csv
from torch import nn
from torch.nn import functional as F

from cacl import CAMNet, pipeline
from cacl._support.surroundings import building
from cacl._support.weights import load_weights
from cacl.config import Config
from cacl.deeplab import DeepLabV2, segmentation_loss
from cacl.export import export_segmenter
from cacl.irn import IRNet, affinity_loss
from cacl.photos import Segmenter, load_segmenter, save_segmenter
from cacl.predict import predict
from cacl.settings import Machine
from cacl.timm_backbones import TimmBackbone
from cacl.transforms import normalize

timm = pytest.importorskip("timm")

CONVOLUTIONAL = [
    "resnet18",
    "resnet10t",  # averages where others stride
    "convnext_tiny.dinov3_lvd1689m",
    "mobilenetv3_small_050",
    "tf_mobilenetv3_small_minimal_100",  # pads as TensorFlow does
]
TRANSFORMERS = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_dinov3.lvd1689m",
    pytest.param("vit_small_patch14_dinov2.lvd142m", marks=pytest.mark.slow),
]
TINY = ["test_convnext", "test_resnet", "test_efficientnet", "test_vit"]
"""Made by timm for tests: of 0.1 to 0.4 million parameters."""


def made(name, stride=16, weights=None):
    with building():
        torch.manual_seed(0)
        return TimmBackbone(name, weights, stride=stride).eval()


def named(kind, name, *arguments):
    with building():
        torch.manual_seed(0)
        return kind(*arguments, backbone=f"timm:{name}", weights=None)


def as_timm_wants(photos, model):
    """Photos in [0, 1] by the statistics of a model's own configuration."""
    mean, std = (torch.tensor(model.pretrained_cfg[each]).view(3, 1, 1) for each in ("mean", "std"))
    return (photos - mean) / std


def photos_of(*size):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def normalized(photos):
    return torch.stack([normalize(photo) for photo in photos])


# Features


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_features_are_timm_s(name, stride):
    backbone = made(name, stride)
    by_hand = timm.create_model(name, features_only=True, output_stride=stride).eval()
    by_hand.load_state_dict(backbone.network.state_dict())
    photos = photos_of(2, 3, 64, 96)
    with torch.no_grad():
        wanted = by_hand(as_timm_wants(photos / 255, by_hand))
        found = backbone.levels(normalized(photos))
        assert torch.equal(backbone(normalized(photos)), found[-1])
    assert [each.shape[1] for each in found] == list(backbone.level_channels)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    size = (64 // stride, 96 // stride)
    assert found[-1].shape == (2, backbone.out_channels, *size)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_of_transformers_are_timm_s_tokens_after_the_last_norm(name):
    backbone = made(name)
    by_hand = timm.create_model(name, num_classes=0).eval()
    by_hand.load_state_dict(backbone.network.model.state_dict())
    side = by_hand.pretrained_cfg["input_size"][-1]  # where nobody has to resample what belongs to places
    photos = photos_of(1, 3, side, side)
    with torch.no_grad():
        tokens = by_hand.forward_features(as_timm_wants(photos / 255, by_hand))[:, by_hand.num_prefix_tokens :]
        found = backbone(normalized(photos))
    cells = side // backbone.stride
    wanted = tokens.transpose(1, 2).unflatten(2, (cells, cells))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_levels_of_a_transformer_are_four_depths_of_one_stride():
    backbone = made("vit_tiny_patch16_224")
    by_hand = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    by_hand.load_state_dict(backbone.network.model.state_dict())
    after = []
    for block in by_hand.blocks:
        block.register_forward_hook(lambda module, inputs, output: after.append(output))
    photos = photos_of(1, 3, 48, 80)
    with torch.no_grad():
        by_hand.forward_features(as_timm_wants(photos / 255, by_hand))
        found = backbone.levels(normalized(photos))
        wanted = [by_hand.norm(after[i])[:, 1:].transpose(1, 2).unflatten(2, (3, 5)) for i in (2, 5, 8, 11)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert backbone.level_channels == (192,) * 4


@pytest.mark.parametrize("name", TINY)
def test_photos_of_any_size_are_enlarged_to_whole_cells(name):
    backbone = made(name)
    images = torch.randn(2, 3, 41, 70)
    with torch.no_grad():
        found = backbone(images)
        whole = F.interpolate(images, (48, 80), mode="bilinear")
        assert torch.equal(found, backbone(whole))
        assert found.shape[2:] == (3, 5)
        assert backbone(torch.randn(1, 3, 5, 3)).shape[2:] == (1, 1)


@pytest.mark.parametrize(
    ("name", "strides", "wanted"),
    [
        ("test_resnet", (16, 8), (2, 4, 8, 16, 16)),
        ("test_convnext", (16, 8), (4, 8, 16, 16)),
        ("test_efficientnet", (16, 8), (2, 4, 8, 16, 16)),
        ("test_vit", (16, 16), (16, 16, 16, 16)),
    ],
)
def test_strides_of_the_networks(name, strides, wanted):
    images = torch.randn(1, 3, 64, 96)
    net, segmenter, irnet = named(CAMNet, name, 3), named(DeepLabV2, name, 3), named(IRNet, name)
    with torch.no_grad():
        assert net(images).cams.shape == (1, 3, 64 // strides[0], 96 // strides[0])
        assert segmenter.eval()(images).shape == (1, 3, 64 // strides[1], 96 // strides[1])
        assert irnet(images).edges.shape == (1, 1, 16, 24)
        levels = irnet.backbone.levels(images)
    assert [tuple(each.shape[2:]) for each in levels] == [(64 // stride, 96 // stride) for stride in wanted]
    assert [block[0].in_channels for block in irnet.edge_levels] == list(irnet.backbone.level_channels)


# Training


@pytest.mark.parametrize("name", TINY)
def test_everything_learns(name):
    images = torch.randn(2, 3, 40, 56, requires_grad=True)
    net = named(CAMNet, name, 3).train()
    net(images).cams.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(module.training for module in net.modules())
    assert [key for key, value in net.named_parameters() if value.grad is None] == []
    segmenter = named(DeepLabV2, name, 3).train()
    norms = [m for m in segmenter.modules() if isinstance(m, nn.BatchNorm2d)]
    before = copy.deepcopy([m.state_dict() for m in norms])
    segmentation_loss(segmenter(images), torch.randint(0, 3, (2, 40, 56))).backward()
    frozen = {id(value) for norm in norms for value in norm.parameters()}
    assert bool(norms) == (name in ("test_resnet", "test_efficientnet"))
    assert all((value.grad is None) == (id(value) in frozen) for value in segmenter.parameters())
    for norm, state in zip(norms, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in norm.state_dict().items())
    irnet = named(IRNet, name).train()
    labels = torch.randint(0, 2, (2, 10, 14))
    affinity_loss(*irnet(images), labels, radius=3).total.backward()
    assert all(value.grad is None for value in irnet.backbone.parameters())
    assert all(value.grad is not None for value in irnet.edge_levels.parameters())


@pytest.mark.parametrize("name", TINY)
def test_channels_last_and_bf16(name):
    net, images = named(CAMNet, name, 3).eval(), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        wanted = net.scores(images)
        there = net.to(memory_format=torch.channels_last)
        last = images.to(memory_format=torch.channels_last)
        torch.testing.assert_close(there.scores(last), wanted, rtol=1e-4, atol=1e-4)
        with Machine(precision="bf16").autocast():
            half = there.scores(last)
    error = (half.float() - wanted).norm() / wanted.norm()
    assert 0 < error < 0.05
    with Machine(precision="bf16").autocast():
        net.train()(last).scores.float().square().mean().backward()
    assert all(value.grad.isfinite().all() for value in net.parameters())


# States


@pytest.mark.parametrize("name", TINY)
def test_states_go_round(name, tmp_path):
    segmenter, images = named(DeepLabV2, name, 3).eval(), torch.randn(1, 3, 50, 60)
    for branch in segmenter.aspp:
        nn.init.normal_(branch.weight, std=0.1)
    segmenter.backbone.shift += 0.1  # of another version of timm, say: what it was trained with is what counts
    save_segmenter(tmp_path / "model.pt", segmenter, ("boat", "train"), f"timm:{name}")
    again = load_segmenter(tmp_path / "model.pt").net
    assert torch.equal(again.predict(images), segmenter.predict(images))
    assert torch.equal(pickle.loads(pickle.dumps(segmenter)).predict(images), segmenter.predict(images))
    net = named(CAMNet, name, 3)
    load_weights(segmenter.backbone, net.backbone.state_dict(), "CA-CL's")  # of another output stride
    with pytest.raises(ValueError, match=r"another's: does not fit: \d+ of"):
        load_weights(segmenter, named(DeepLabV2, "test_nfnet", 3).state_dict(), "another's")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["state dict", "of a training", "features", "safetensors"])
def test_weights_from_a_file(name, kind, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model(name)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.0)
    state, path = model.state_dict(), tmp_path / "weights.pth"
    if kind == "safetensors":
        path = tmp_path / "model.safetensors"
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif kind == "features":
        state = made(name).network.state_dict()
        torch.save(state, path)
    elif kind == "of a training":
        torch.save({"epoch": 3, "state_dict": {f"module.encoder.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state, path)
    net = CAMNet(2, backbone=f"timm:{name}", weights=str(path)).backbone.network
    own = dict(net.named_parameters())
    assert len(own) > 10
    by_name = {
        key.removeprefix("model.").replace("_", "."): value for key, value in state.items()
    }  # what a file calls stages.0 is stages_0
    for key, value in own.items():
        assert torch.equal(value, by_name[key.removeprefix("model.").replace("_", ".")]), key


@pytest.mark.parametrize("source", ["hub", "nowhere"])
def test_pretrained_weights_are_those_that_timm_downloads(source, tmp_path, monkeypatch):
    """The hub is a folder here; that timm asks for the model's own file is part of what is tested."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = timm.create_model("test_convnext")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename))
        if source == "nowhere":
            raise ConnectionError("no way to the hub\nand more")
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    backbone = partial(TimmBackbone, "test_convnext.r160_in1k", "DEFAULT")
    if source == "nowhere":
        text = "The weights DEFAULT of timm:test_convnext.r160_in1k could not be downloaded (no way to the hub)."
        with pytest.raises(ValueError, match=re.escape(text) + "$"):
            backbone()
        return
    assert torch.equal(backbone().network["stem_0"].weight, model.stem[0].weight)
    assert torch.equal(
        backbone(stride=8).network.stages_3.blocks[0].mlp.fc1.weight, model.stages[3].blocks[0].mlp.fc1.weight
    )
    assert set(asked) == {("timm/test_convnext.r160_in1k", "model.safetensors")}


# Exports


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "convnext_tiny"])
def test_exports_give_the_same(name, ending, tmp_path):
    net = named(DeepLabV2, name, 3)
    for branch in net.aspp:
        nn.init.normal_(branch.weight, std=0.1)
    out = export_segmenter(Segmenter(net, ("boat", "train")), tmp_path / f"segmenter.{ending}")
    for size in ((97, 131), (150, 64), (224, 224)):
        photo = photos_of(1, 3, *size)
        wanted = net.predict(normalize(photo[0])[None])
        if ending == "pt2":
            with torch.no_grad():
                found = torch.export.load(out).module()(photo)
        else:
            session = pytest.importorskip("onnxruntime").InferenceSession(out)
            found = torch.from_numpy(session.run(None, {"photo": photo.numpy()})[0])
        assert len(wanted.argmax(1).unique()) > 1
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_what_cannot_be_exported_is_one_line(tmp_path):
    segmenter = Segmenter(named(DeepLabV2, "vit_small_patch16_dinov3", 3), ("boat", "train"))
    with pytest.raises(ValueError, match=r"^This segmenter's network cannot be exported by torch [^\n]*$"):
        export_segmenter(segmenter, tmp_path / "segmenter.pt2")
    assert not (tmp_path / "segmenter.pt2").exists()


# Runs

SETTINGS = [
    "data.format=csv", "data.train=train", "data.eval=val", "run.device=cpu", "run.workers=0", "run.precision=fp32",
    *(f"{stage}.{setting}" for stage in ("warmup", "cacl", "irn", "segment")
      for setting in ("epochs=1", "batch_size=3", "crop=32")),
    "cams.scales=[1.0]", "camnet.weights=", "segment.weights=", "masks.affinity=irn", "irn.radius=4",
]  # fmt: skip
STAGES = ["warmup", "cacl", "cams", "irn", "masks", "segment", "predict"]


def configure(tmp_path, out, *more):
    return Config.load("voc", [*SETTINGS, f"data.root={tmp_path / 'data'}", f"run.out={tmp_path / out}", *more])


def run(config, **arguments):
    return pipeline.run(config, encoder=TinyEncoder(), stages=STAGES, **arguments)


def weights_of(out, stage):
    state = torch.load(out / stage / "model.pt", weights_only=True)
    return state.get("weights", state)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "workers"), [("test_convnext", 0), pytest.param("test_vit", 2, marks=pytest.mark.slow)]
)
def test_a_run_with_it_resumes_to_the_same_and_its_segmenter_predicts(name, workers, tmp_path):
    write_csv(tmp_path / "data")
    chosen = [f"camnet.backbone=timm:{name}", f"segment.backbone=timm:{name}"]
    whole = run(configure(tmp_path, "whole", *chosen)).out
    stopped = []

    def stop(record):
        if record["stage"] not in stopped:
            stopped.append(record["stage"])
            raise Stop

    config = configure(tmp_path, "parts", *chosen, "run.checkpoint_seconds=0.0")
    for _ in range(9):
        try:
            parts = run(config, callback=stop).out
            break
        except Stop:
            pass
    assert stopped == ["warmup", "cacl", "irn", "segment"]
    for stage in stopped:
        first, second = weights_of(whole, stage), weights_of(parts, stage)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert load_segmenter(whole / "segment/model.pt").net.backbone.stride == (16 if name == "test_vit" else 8)
    photos = tmp_path / "data/images"
    made = predict(whole, [photos], tmp_path / "masks", device="cpu", workers=workers, progress=False)
    assert {mask.stem for mask in made.masks} == {photo.stem for photo in photos.iterdir()}
    assert not made.problems


def test_segmentation_from_ca_cl_s_weights(tmp_path):
    write_csv(tmp_path / "data")
    chosen = ["camnet.backbone=timm:test_resnet", "segment.backbone=", "segment.weights=cacl", "segment.lr=0.0"]
    out = run(configure(tmp_path, "out", *chosen)).out
    trunk, cams = weights_of(out, "segment"), weights_of(out, "cacl")
    shared = [key for key in cams if key.startswith("backbone.")]
    assert len(shared) > 50
    assert all(torch.equal(trunk[key], cams[key]) for key in shared)
    assert torch.load(out / "segment/model.pt", weights_only=True)["backbone"] == "timm:test_resnet"


@pytest.mark.parametrize("table", ["camnet", "segment"])
def test_a_wrong_name_shows_before_the_first_step(table, tmp_path):
    write_csv(tmp_path / "data")
    config = configure(tmp_path, "out", "camnet.backbone=timm:test_vit", f"{table}.backbone=timm:convnext_tny")
    with pytest.raises(ValueError, match='did you mean "timm:convnext_tiny"'):
        run(config)
    assert not (tmp_path / "out/log.jsonl").exists()


def test_a_backbone_that_is_no_longer_the_same_is_another(tmp_path):
    """What tells one named backbone from another is its name, tag and all."""
    write_csv(tmp_path / "data")
    run(configure(tmp_path, "out", "camnet.backbone=timm:test_vit", "segment.backbone=timm:test_vit"))
    states = pipeline.plan(
        configure(tmp_path, "out", "camnet.backbone=timm:test_vit.r160_in1k", "segment.backbone=timm:test_vit"),
        STAGES, encoder=TinyEncoder(),
    )  # fmt: skip
    assert states == [f"{stage}: to be done again" for stage in STAGES]


# Errors

STRIDES = (
    "Expected argument `backbone` to be a model of timm that can have output stride 16, or a transformer of patches of "
    "at most 16 pixels, for photos of any size, but got "
)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backbone": "timm:convnext_tny"}, "`backbone` to be timm: and a name of timm.list_models(), but got "
         "'timm:convnext_tny'; did you mean \"timm:convnext_tiny\"?"),
        ({"backbone": "timm:resnet18.a1_in2k"}, "did you mean \"timm:resnet18.a1_in1k\"?"),
        ({"backbone": "timm:hf-hub:timm/resnet18.a1_in1k"}, "but got 'timm:hf-hub:timm/resnet18.a1_in1k'"),
        ({"backbone": "timm:"}, "a name of timm.list_models(), but got 'timm:'"),
        ({"backbone": "convnext_tiny"}, "scenes, timm:NAME, but got 'convnext_tiny'"),
        ({"backbone": "timm:swin_tiny_patch4_window7_224"},
         f"{STRIDES}timm:swin_tiny_patch4_window7_224, which has strides 4, 8, 16, 32."),
        ({"backbone": "timm:vit_small_patch32_224"},
         f"{STRIDES}timm:vit_small_patch32_224, which has strides 32."),
        ({"backbone": "timm:vgg11_bn"}, f"{STRIDES}timm:vgg11_bn, which has strides 1, 2, 4, 8, 16, 32."),
        ({"backbone": "timm:beit_base_patch16_224"},
         f"{STRIDES}timm:beit_base_patch16_224, which sees 224 × 224 pixels alone."),
        ({"backbone": "timm:resnet18", "weights": "IMAGENET1K_V1"},
         "Expected argument `weights` to be None, a file, or DEFAULT for timm:resnet18, but got 'IMAGENET1K_V1'."),
        ({"backbone": "timm:test_convnext3", "weights": "missing.pth"}, "or DEFAULT for timm:test_convnext3, but got"),
    ],
)  # fmt: skip
def test_names_are_checked(arguments, text):
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        CAMNet(2, **{"weights": None, **arguments})
    assert "\n" not in str(caught.value)


def test_a_model_without_pretrained_weights():
    name = next(name for name in timm.list_models("convnext*") if not timm.is_model_pretrained(name))
    with pytest.raises(ValueError, match=rf"`weights` to be None or a file for timm:{name}, but got 'DEFAULT'"):
        CAMNet(2, backbone=f"timm:{name}")


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda path: torch.save(timm.create_model("test_resnet").state_dict(), path), "expected weights of the whole "
         "backbone, but 0 of "),
        (lambda path: torch.save({"a": timm.create_model("test_convnext").state_dict(),
                                  "b": timm.create_model("test_convnext").state_dict()}, path),
         "expected the weights of one network, but it has \"['a']\", \"['b']\"; save"),
        (lambda path: path.write_text("no weights"), "not a checkpoint (nothing in it was run)"),
        (lambda path: torch.save({k: v * np.nan for k, v in timm.create_model("test_convnext").state_dict().items()},
                                 path), "expected finite weights, but got NaN"),
    ],
)  # fmt: skip
def test_files_of_something_else(write, text, tmp_path):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as caught:
        CAMNet(2, backbone="timm:test_convnext", weights=str(path))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_larger_model_of_the_kind_says_what_does_not_fit(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_convnext2").state_dict(), path)
    with pytest.raises(ValueError, match=r"parameters match; '\w.*': expected \(.*\), but got \("):
        CAMNet(2, backbone="timm:test_convnext", weights=str(path))


def test_a_broken_file_of_safetensors_is_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a safetensors file: ")):
        CAMNet(2, backbone="timm:test_convnext", weights=str(path))


def test_timm_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=re.escape("Backbones of timm need an extra: pip install 'cacl[timm]' (")):
        CAMNet(2, backbone="timm:resnet18", weights=None)
    CAMNet(2, backbone="resnet18", weights=None)
