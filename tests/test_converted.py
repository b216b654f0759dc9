"""Weights from elsewhere: names translated, a network as Caffe has it gives the same features, the rest is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50

from cacl import CAMNet
from cacl._support.weights import load_weights
from cacl.deeplab import DeepLabV2

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def randomised(network):
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.normal_(std=0.05, generator=generator)
            if name.endswith(("running_var", "bn1.weight", "bn.weight")):
                value.abs_().add_(1)
    return network.eval()


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.encoder."])
@pytest.mark.parametrize("nest", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_torchvision_names(tmp_path, prefix, nest):
    network = randomised(resnet18(weights=None))
    state = {prefix + k: v for k, v in network.state_dict().items()}
    torch.save(nest({**state, "classifier.weight": torch.zeros(2, 2)}), tmp_path / "w.pth")
    net = DeepLabV2(3, backbone="resnet18", weights=str(tmp_path / "w.pth"))
    assert torch.equal(net.backbone.layers[3][1].conv2.weight, network.layer4[1].conv2.weight)
    assert torch.equal(net.backbone.stem[1].running_var, network.bn1.running_var)
    images = torch.randn(1, 3, 64, 64)
    features = CAMNet(2, backbone="resnet18", weights=str(tmp_path / "w.pth")).eval().backbone.levels(images)[2]
    with torch.no_grad():
        expected = network.layer2(network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(images))))))
    torch.testing.assert_close(features, expected)


def test_the_trunk_among_other_networks(tmp_path):
    network = randomised(resnet18(weights=None))
    state = {f"backbone.{k}": v for k, v in network.state_dict().items()}
    state |= {"decoder.conv1.weight": torch.zeros(48, 256, 1, 1), "decoder.bn1.weight": torch.zeros(64)}
    torch.save(state, tmp_path / "w.pth")
    net = DeepLabV2(3, backbone="resnet18", weights=str(tmp_path / "w.pth"))
    assert torch.equal(net.backbone.stem[1].weight, network.bn1.weight)
    torch.save(state | {f"momentum.{k}": v for k, v in network.state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"the weights of one ResNet, but it has 'backbone.', 'momentum.'"):
        DeepLabV2(3, backbone="resnet18", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {"epoch": 3, "model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {k.replace("backbone.", "backbone._orig_mod."): v for k, v in state.items()},
    ],
)
def test_weights_as_a_training_leaves_them(wrap):
    net, again = (CAMNet(2, backbone="scenes", weights=weights) for weights in ("DEFAULT", None))
    load_weights(again, wrap(net.state_dict()), "trained.pt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    state = again.state_dict()
    two = {"model": state, "ema": {k: v.clone() for k, v in state.items()}}
    with pytest.raises(
        ValueError, match=r"the weights of one network, but it has \"\['model'\]\", \"\['ema'\]\"; save"
    ):
        load_weights(again, two, "trained.pt")


def test_a_checkpoint_from_before_layouts_were_saved():
    net = DeepLabV2(3, backbone="resnet18", weights=None)
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("_extra_state")}
    again = DeepLabV2(3, backbone="resnet18", weights=None)
    load_weights(again, state, "old.pt")
    assert torch.equal(again.aspp[0].weight, net.aspp[0].weight)


class Unit(nn.Sequential):
    def __init__(self, inputs, outputs, kernel, stride, padding, dilation):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-5)


class Block(nn.Module):
    """A bottleneck as Caffe's ResNets have it: the stride on the first 1×1 convolution."""

    def __init__(self, inputs, outputs, stride, dilation, shortcut):
        super().__init__()
        middle = outputs // 4
        self.reduce = Unit(inputs, middle, 1, stride, 0, 1)
        self.conv3x3 = Unit(middle, middle, 3, 1, dilation, dilation)
        self.increase = Unit(middle, outputs, 1, 1, 0, 1)
        self.shortcut = Unit(inputs, outputs, 1, stride, 0, 1) if shortcut else nn.Identity()

    def forward(self, x):
        return (self.increase(self.conv3x3(self.reduce(x).relu()).relu()) + self.shortcut(x)).relu()


class Caffe(nn.Module):
    """ResNet-50 with the dilations of DeepLabV2, for images in blue, green, red less a mean."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Module()
        self.layer1.conv1 = Unit(3, 64, 7, 2, 0, 1)
        inputs = 64
        for number, (blocks, outputs, stride, dilation) in enumerate(
            ((3, 256, 1, 1), (4, 512, 2, 1), (6, 1024, 1, 2), (3, 2048, 1, 4)), start=2
        ):
            layer = nn.Sequential()
            for b in range(blocks):
                layer.add_module(f"block{b + 1}", Block(inputs, outputs, stride if b == 0 else 1, dilation, b == 0))
                inputs = outputs
            self.add_module(f"layer{number}", layer)

    def forward(self, rgb):
        # Padded with ImageNet's mean colour, as zeros are after normalisation; Caffe's own differs by 1 in 255.
        rgb = F.pad(rgb - MEAN, (3, 3, 3, 3)) + MEAN
        bgr = (rgb * 255).flip(1) - torch.tensor([104.008, 116.669, 122.675]).view(3, 1, 1)
        x = F.max_pool2d(self.layer1.conv1(bgr).relu(), 3, 2, 1, ceil_mode=True)
        return self.layer5(self.layer4(self.layer3(self.layer2(x))))


def test_weights_from_caffe(tmp_path):
    network = randomised(Caffe())
    with torch.no_grad():
        network.layer1.conv1.conv.weight.div_(100)
    torch.save({f"base.{k}": v for k, v in network.state_dict().items()}, tmp_path / "caffe.pth")
    net = DeepLabV2(3, backbone="resnet50", weights=str(tmp_path / "caffe.pth")).eval()
    generator = torch.Generator().manual_seed(1)
    photo = torch.rand(1, 3, 130, 194, generator=generator)
    with torch.no_grad():
        expected, features = network(photo), net.backbone((photo - MEAN) / STD)
    assert features.shape == expected.shape == (1, 2048, 17, 25)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)
    assert features.std() > 0.1

    # The layout travels with the weights.
    again = DeepLabV2(3, backbone="resnet50", weights=None).eval()
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(again((photo - MEAN) / STD), net((photo - MEAN) / STD))


def test_less_than_the_whole_backbone_is_refused(tmp_path):
    state = resnet50(weights=None).state_dict()
    path = tmp_path / "w.pth"
    torch.save({k: v for k, v in state.items() if not k.startswith("layer4.2.conv3")}, path)
    with pytest.raises(ValueError, match=r"264 of 265 parameters match; 'layers.3.2.conv3.weight': expected \(2048"):
        DeepLabV2(3, backbone="resnet50", weights=str(path))
    torch.save(resnet18(weights=None).state_dict(), path)
    with pytest.raises(ValueError, match=r"'layers.0.0.conv1.weight': expected \(64, 64, 1, 1\), but got \(64, 64, 3"):
        DeepLabV2(3, backbone="resnet50", weights=str(path))
    path.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(ValueError, match="not a checkpoint"):
        DeepLabV2(3, backbone="resnet50", weights=str(path))
