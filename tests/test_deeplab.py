"""DeepLabV2: shapes, parameters, the loss against plain numpy, what is frozen and what learns how fast."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import TinyBackbone
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet101

from cacl.deeplab import RATES, SCALES, DeepLabV2, probabilities, segmentation_loss


@pytest.fixture
def net(backbone):
    torch.manual_seed(0)
    return DeepLabV2(3, backbone=backbone)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (33, 64), (65, 50), (97, 31), (127, 129)])
def test_shapes_at_odd_sizes(height, width):
    net = DeepLabV2(5, backbone="resnet18", weights=None)
    images = torch.randn(2, 3, height, width)

    def grid(side):  # three convolutions or poolings of stride 2
        return math.ceil(side / 8)

    with torch.no_grad():
        assert net.eval()(images).shape == (2, 5, grid(height), grid(width))
        assert net.predict(images).shape == (2, 5, height, width)
        training = net.train()(images)
    scaled = [(max(1, round(100 * s) * height // 100), max(1, round(100 * s) * width // 100)) for s in SCALES]
    assert [tuple(x.shape[2:]) for x in training] == [(grid(h), grid(w)) for h, w in (*scaled, (height, width))]


def test_parameters_of_the_published_network():
    net = DeepLabV2(21, weights=None)
    trunk = sum(p.numel() for p in resnet101(weights=None).parameters()) - (2048 * 1000 + 1000)
    head = 4 * (2048 * 9 * 21 + 21)
    assert sum(p.numel() for p in net.parameters()) == trunk + head == 44_048_532
    # Two thousandths of them are batch norm's, and stay as they are.
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == trunk + head - norms
    assert [(b.dilation, b.padding) for b in net.aspp] == [((r, r), (r, r)) for r in (6, 12, 18, 24)]
    dilations = [
        {m.dilation[0] for m in layer.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
        for layer in net.backbone.layers
    ]
    assert dilations == [{1}, {1}, {2}, {4}]


@pytest.mark.parametrize("size", [(30, 30), (25, 24), (12, 18), (13, 7), (6, 6), (1, 1)])
def test_the_head_is_a_sum_of_dilated_convolutions(net, size):
    """Also where their windows reach beyond the map: of those the middle alone counts, and learns."""
    for branch in net.aspp:
        torch.nn.init.normal_(branch.bias)
    features = torch.randn(1, 8, *size)
    net.backbone = nn.Identity()
    height, width = size
    result = net.logits(features)[0].double()
    padded = torch.zeros(8, height + 48, width + 48, dtype=torch.float64)
    padded[:, 24:-24, 24:-24] = features[0]
    plain = torch.stack([branch(features) for branch in net.aspp]).sum(0)
    weighted = torch.randn_like(plain)
    parameters = list(net.aspp.parameters())
    one, other = (torch.autograd.grad((x * weighted).sum(), parameters) for x in (net.logits(features), plain))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.eval().logits(features), plain)
    for y, x in {(0, 0), (height // 4, width // 2), (height - 1, width - 1)}:
        total = torch.zeros(3, dtype=torch.float64)
        for rate, branch in zip(RATES, net.aspp, strict=True):
            for i in range(3):
                for j in range(3):
                    at = padded[:, 24 + y + (i - 1) * rate, 24 + x + (j - 1) * rate]
                    total += branch.weight[:, :, i, j].double() @ at
            total += branch.bias
        torch.testing.assert_close(result[:, y, x], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda branch: prune.l1_unstructured(branch, "weight", amount=0.2),
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda branch: setattr(branch, "bias", None),
    ],
)
def test_branches_that_somebody_has_changed(net, change):
    """Pruned, with a weight that is made of others, without a bias: two steps, on maps smaller than their windows."""
    for branch in net.aspp:
        change(branch)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    before = [p.detach().clone() for p in net.aspp.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        segmentation_loss(net(torch.randn(2, 3, 64, 64)), torch.zeros(2, 64, 64, dtype=torch.uint8)).backward()
        optimizer.step()
    assert not all(map(torch.equal, net.aspp.parameters(), before))
    assert net.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_the_maximum_is_over_the_scales(net):
    images = torch.randn(1, 3, 64, 96)
    net.eval()
    each = [net.logits(images)]
    for size in ((48, 72), (32, 48)):
        smaller = net.logits(nn.functional.interpolate(images, size=size, mode="bilinear"))
        each.append(nn.functional.interpolate(smaller, size=each[0].shape[2:], mode="bilinear"))
    torch.testing.assert_close(net(images), torch.stack(each).amax(0))
    net.train()
    net.backbone.drop.p = 0.0
    torch.testing.assert_close(net(images)[-1], torch.stack(each).amax(0))


def test_training_at_one_scale_sees_the_images_as_they_are(net):
    images = torch.randn(1, 3, 64, 96)
    net.backbone.drop.p = 0.0
    net.multi_scale = False
    (only,) = net(images)
    torch.testing.assert_close(only, net.logits(images))
    net.multi_scale = True
    assert len(net(images)) == len(SCALES) + 1
    maximum = net.eval()(images)
    net.multi_scale = False
    torch.testing.assert_close(net(images), maximum)


def test_the_loss_against_numpy(randn):
    logits = [randn(2, 4, 6, 5), randn(2, 4, 3, 3)]
    masks = torch.randint(4, (2, 12, 10), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    masks[0, :5] = 255
    total = 0.0
    for values in logits:
        height, width = values.shape[2:]
        terms = []
        for b in range(2):
            for y in range(height):
                for x in range(width):
                    # the pixel in the middle of the cell
                    label = int(masks[b, int((y + 0.5) * 12 / height), int((x + 0.5) * 10 / width)])
                    if label != 255:
                        z = values[b, :, y, x].double().numpy()
                        terms.append(np.log(np.exp(z).sum()) - z[label])
        total += np.mean(terms)
    assert segmentation_loss(logits, masks).item() == pytest.approx(total, rel=1e-5)


def test_a_batch_without_a_valid_pixel_costs_nothing(net):
    loss = segmentation_loss(net(torch.randn(2, 3, 32, 32)), torch.full((2, 32, 32), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert all(b.weight.grad.abs().sum() == 0 for b in net.aspp)


def test_half_precision_and_double(randn):
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    values = randn(1, 2, 4, 4)
    exact = segmentation_loss([values.double()], masks)
    assert exact.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        assert segmentation_loss([values.to(dtype)], masks).dtype == torch.float32
        assert segmentation_loss([values.to(dtype)], masks).item() == pytest.approx(exact.item(), rel=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert segmentation_loss([values], masks).item() == pytest.approx(exact.item(), rel=1e-6)
    assert torch.autograd.gradcheck(lambda x: segmentation_loss([x], masks), values.double().requires_grad_())


def test_batch_norm_stays_as_it_is():
    net = DeepLabV2(3, backbone="resnet18", weights=None).train()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    segmentation_loss(net(torch.randn(2, 3, 64, 64)), torch.ones(2, 64, 64, dtype=torch.uint8)).backward()
    assert all(torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))
    assert all(m.weight.grad is None for m in norms)
    assert net.backbone.stem[0].weight.grad.abs().sum() > 0  # the first convolution learns here
    assert net.training
    assert net.backbone.training


def test_parameter_groups():
    net = DeepLabV2(3, backbone="resnet18", weights=None)
    groups = net.parameter_groups(0.1)
    assert [(group["lr"], group.get("weight_decay")) for group in groups] == [(0.1, None), (1.0, None), (2.0, 0.0)]
    found = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in found}) == len(found) == sum(p.requires_grad for p in net.parameters())
    assert all(p.ndim == 1 for p in groups[2]["params"])


def test_predict_gives_probabilities_and_restores_the_mode(net):
    net.train()
    net.backbone.drop.eval()
    images = torch.randn(2, 3, 40, 56)
    result = net.predict(images, size=(20, 30))
    assert result.shape == (2, 3, 20, 30)
    torch.testing.assert_close(result.sum(1), torch.ones(2, 20, 30))
    assert net.training
    assert not net.backbone.drop.training
    with torch.no_grad():
        torch.testing.assert_close(result, probabilities(net.eval()(images), (20, 30)))


def test_it_learns_two_colours():
    torch.manual_seed(0)
    net = DeepLabV2(2, backbone=TinyBackbone())
    images = torch.zeros(2, 3, 128, 128)
    masks = torch.zeros(2, 128, 128, dtype=torch.uint8)
    for i in range(2):
        images[i, 0, :, 64 * i : 64 * i + 64] = 2.0
        masks[i, :, 64 * i : 64 * i + 64] = 1
    optimizer = torch.optim.SGD(net.parameter_groups(0.002), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        segmentation_loss(net.train()(images), masks).backward()
        optimizer.step()
    assert (net.predict(images).argmax(1) == masks).float().mean() > 0.9


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DeepLabV2(0, weights=None), ValueError, "`num_classes` to be a positive integer"),
        (lambda: DeepLabV2(2, backbone="resnet1", weights=None), ValueError, "but got 'resnet1'"),
        (lambda: DeepLabV2(2, backbone="resnet18", weights="X"), ValueError, "`weights` to be None, a file, or one of"),
        (lambda: DeepLabV2(2, backbone=nn.Identity()), TypeError, "an integer `out_channels`, but got Identity"),
        (lambda: DeepLabV2(2, backbone=TinyBackbone())(torch.zeros(3, 8, 8)), ValueError, r"`images` to be a tensor"),
        (lambda: segmentation_loss([], torch.zeros(1, 2, 2)), ValueError, "`logits` to be at least one tensor"),
        (
            lambda: segmentation_loss([torch.zeros(2, 2, 2, 2)], torch.zeros(1, 2, 2)),
            ValueError,
            r"`masks` to be a tensor \(2, H, W\)",
        ),
    ],
)
def test_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()
