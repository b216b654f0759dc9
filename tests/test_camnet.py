"""The class activation network (CA-CL, eq. 1) and its multi-scale inference."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from cacl import CAMNet


@pytest.fixture
def net(backbone):
    net = CAMNet(5, backbone=backbone)
    net.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return net


@pytest.fixture
def images(randn):
    return randn(2, 3, 64, 48)


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def resnet(request):
    return CAMNet(3, backbone=request.param, weights=None)


def test_forward_is_eq_1(net, backbone, images):
    net.eval()
    cams, scores = net(images)
    z = backbone(images).detach().numpy()
    w = net.classifier.weight.detach().numpy()[:, :, 0, 0]
    wanted = np.einsum("kc,bchw->bkhw", w, z)
    np.testing.assert_allclose(scores.detach().numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(cams.detach().numpy(), 1 / (1 + np.exp(-wanted)), atol=1e-6)
    assert cams.shape == (2, 5, 4, 3)
    assert net.classifier.bias is None


def test_classify_is_the_mean_of_the_scores(net, images):
    net.eval()
    torch.testing.assert_close(net.classify(images), net(images).scores.mean((2, 3)))


def test_output_stride_is_16(resnet):
    assert resnet.eval()(torch.zeros(1, 3, 64, 64)).cams.shape == (1, 3, 4, 4)
    assert resnet.backbone.out_channels == resnet.classifier.in_channels


def test_the_stem_is_frozen_with_its_statistics(randn):
    resnet = CAMNet(3, backbone="resnet18", weights=None).train()
    assert not resnet.backbone.stem.training
    assert resnet.backbone.layers.training
    before = {key: value.clone() for key, value in resnet.backbone.state_dict().items()}
    resnet.classify(randn(2, 3, 32, 32)).sum().backward()
    after = resnet.backbone.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert not any(key.startswith("stem") for key in moved)
    assert all(parameter.grad is None for parameter in resnet.backbone.stem.parameters())
    assert all(parameter.grad is not None for parameter in resnet.backbone.layers.parameters())


def test_parameter_groups_cover_what_is_trained_once(resnet):
    trunk, head = resnet.parameter_groups(0.1)
    assert trunk["lr"] == 0.1
    assert head["lr"] == 1.0
    assert resnet.parameter_groups(0.1, head_factor=2.0)[1]["lr"] == 0.2
    grouped = [id(parameter) for group in (trunk, head) for parameter in group["params"]]
    trained = [id(parameter) for parameter in resnet.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert [id(parameter) for parameter in head["params"]] == [id(resnet.classifier.weight)]
    torch.optim.SGD([trunk, head], lr=1.0)


def test_state_dict_loads(resnet):
    other = copy.deepcopy(resnet)
    other.classifier.weight.data.zero_()
    other.load_state_dict(resnet.state_dict())
    images = torch.ones(1, 3, 32, 32)
    assert torch.equal(other.eval()(images).scores, resnet.eval()(images).scores)


# Inference


def test_predict_is_one_at_each_map_s_maximum(net, images):
    maps = net.predict(images)
    positive = net.eval()(images).scores.amax((2, 3)) > 0
    assert maps.shape == (2, 5, 64, 48)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert maps.min() >= 0
    assert positive.any()
    torch.testing.assert_close(maps.amax((2, 3))[positive], torch.ones(int(positive.sum())))


def test_predict_sums_scales_and_the_mirror_image(net, images):
    size = (4, 3)
    net.eval()
    maps = torch.zeros(2, 5, *size)
    for scale in (1.0, 2.0):
        scaled = images if scale == 1 else nn.functional.interpolate(images, scale_factor=scale, mode="bilinear")
        for x in (scaled, scaled.flip(-1)):
            scores = net(x).scores.relu()
            scores = scores.flip(-1) if x is not scaled else scores
            maps += nn.functional.interpolate(scores, size, mode="bilinear")
    wanted = (maps / maps.amax((2, 3), keepdim=True)).nan_to_num()
    torch.testing.assert_close(net.predict(images, scales=(1.0, 2.0), size=size), wanted)


def test_predict_with_the_sigmoid(net, images):
    maps = net.predict(images, scales=(1.0,), flip=False, size=(4, 3), activation="sigmoid")
    cams = net.eval()(images).cams
    torch.testing.assert_close(maps, cams / cams.amax((2, 3), keepdim=True))


def test_predict_of_a_class_without_positive_scores_is_zero(net, images):
    net.classifier.weight.data[0] = -1
    assert not net.predict(images)[:, 0].any()


def test_predict_of_the_mirror_image_is_the_mirror(net, images):
    straight, mirrored = net.predict(images), net.predict(images.flip(-1))
    torch.testing.assert_close(mirrored, straight.flip(-1))
    assert not torch.allclose(net.predict(images, flip=False), straight)


def test_predict_size(net, images):
    assert net.predict(images, size=(10, 7), scales=(1.0,)).shape == (2, 5, 10, 7)
    assert net.predict(images[..., :33, :31]).shape == (2, 5, 33, 31)


def test_predict_puts_every_mode_back(net, images):
    net.train()
    net.classifier.eval()
    first = net.predict(images)
    assert net.training
    assert net.backbone.drop.training
    assert not net.classifier.training
    torch.testing.assert_close(net.predict(images), first)  # no dropout


def test_predict_puts_every_mode_back_after_an_error(net):
    net.train()
    with pytest.raises(RuntimeError):
        net.predict(torch.zeros(1, 3, 4, 4), scales=(1.0,))  # smaller than the stride
    assert net.training
    assert net.backbone.drop.training


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0)])
def test_scales_are_checked(net, images, scales):
    text = f"Expected argument `scales` to be positive factors, at least one, but got {scales}."
    with pytest.raises(ValueError, match=re.escape(text)):
        net.predict(images, scales=scales)


def test_predict_checks_its_input(net, images):
    with pytest.raises(ValueError, match=re.escape("`images` to be a tensor (B, 3, H, W), but got shape (3, 64, 48).")):
        net.predict(images[0])
    with pytest.raises(ValueError, match=re.escape('`activation` to be one of "relu", "sigmoid", but got \'gelu\'.')):
        net.predict(images, activation="gelu")


# Errors


class Backbone(nn.Module):
    out_channels = 4

    def forward(self, images):
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"num_classes": 0}, ValueError, "Expected argument `num_classes` to be a positive integer, but got 0."),
        ({"num_classes": 2.0}, ValueError, "Expected argument `num_classes` to be a positive integer, but got 2.0."),
        ({"backbone": "vgg16"}, ValueError, "Expected argument `backbone` to be one of resnet101, resnet152, "),
        ({"backbone": "ResNet50"}, ValueError, "but got 'ResNet50'; did you mean \"resnet50\"?"),
        (
            {"backbone": "resnet18", "weights": "V3"},
            ValueError,
            "Expected argument `weights` to be None, a file, or one of IMAGENET1K_V1, DEFAULT for resnet18, but "
            "got 'V3'.",
        ),
        (
            {"backbone": nn.Identity()},
            TypeError,
            "Expected argument `backbone` to be a ResNet's name or a module with an integer `out_channels`, "
            "but got Identity.",
        ),
        ({"backbone": None}, TypeError, "but got NoneType."),
    ],
)
def test_settings_are_checked(arguments, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        CAMNet(**arguments)


def test_a_backbone_that_gives_no_map(images):
    text = "Expected argument `backbone` to be giving (B, 4, h, w), but got shape (2, 3)."
    with pytest.raises(ValueError, match=re.escape(text)):
        CAMNet(2, backbone=Backbone())(images)


@pytest.mark.parametrize("method", ["forward", "classify"])
def test_inputs_are_checked(net, images, method):
    with pytest.raises(TypeError, match=re.escape("`images` to be of a floating point type, but got torch.uint8.")):
        getattr(net, method)(images.byte())


def test_maps_of_some_classes_are_those_of_all(backbone, randn):
    net = CAMNet(5, backbone=backbone)
    images = randn(2, 3, 48, 40)
    every = net.predict(images, size=(12, 10))
    for classes in ([3, 1], [], [4]):
        some = net.predict(images, size=(12, 10), classes=torch.tensor(classes, dtype=torch.int64))
        assert torch.equal(some, every[:, classes])
