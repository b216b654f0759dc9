"""IRNet, its loss against a double loop over pixel pairs, and label mining."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from conftest import TinyBackbone
from torch import nn

from cacl.irn import IRNet, affinity_loss
from cacl.mining import crf_labels, mine_labels

IGNORE = 255


def brute_force(edges, displacements, labels, radius):
    """All five terms by a loop over all pairs of pixels, in Python's own floats."""
    sums, counts = [0.0] * 5, [0] * 3
    _, height, width = edges.shape
    pixels = list(product(range(height), range(width)))
    probability = 1 / (1 + np.exp(-edges))
    for b in range(len(edges)):
        for i, (y0, x0) in enumerate(pixels):
            for y1, x1 in pixels[i + 1 :]:
                length = math.hypot(y1 - y0, x1 - x0)
                one, two = int(labels[b, y0, x0]), int(labels[b, y1, x1])
                if length >= radius or IGNORE in (one, two):
                    continue
                between = [
                    probability[b, y, x]
                    for y in range(min(y0, y1), max(y0, y1) + 1)
                    for x in range(min(x0, x1), max(x0, x1) + 1)
                    if abs((y1 - y0) * (x - x0) - (x1 - x0) * (y - y0)) / length < 1
                ]
                affinity = 1 - max(between)
                difference = displacements[b, :, y0, x0] - displacements[b, :, y1, x1]
                offset = np.array((y1 - y0, x1 - x0))
                if one != two:
                    sums[2] -= math.log(1 - affinity)
                    counts[2] += 1
                    continue
                kind = 0 if one == 0 else 1
                counts[kind] += 1
                sums[kind] -= math.log(affinity)
                sums[3 + kind] += np.abs(difference - (offset if kind else 0)).mean()
    return [value / max(counts[kind], 1) for value, kind in zip(sums, (0, 1, 2, 0, 1), strict=True)]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    edges = torch.randn(2, 1, 6, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    displacements = torch.randn(2, 2, 6, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (2, 6, 7), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    return edges, displacements, labels


@pytest.mark.parametrize("radius", [1, 2, 4, 10])
def test_affinity_loss_is_that_of_a_double_loop(inputs, radius):
    edges, displacements, labels = inputs
    terms = affinity_loss(edges, displacements, labels, radius=radius)
    expected = brute_force(edges.detach().numpy()[:, 0], displacements.detach().numpy(), labels.numpy(), radius)
    np.testing.assert_allclose([term.item() for term in terms[1:]], expected, rtol=1e-10, atol=1e-12)
    background, foreground, negative, flat, pointed = expected
    total = (background / 2 + foreground / 2 + negative) / 2 + (flat + pointed) / 2
    assert terms.total.item() == pytest.approx(total, rel=1e-10, abs=1e-12)


def test_affinity_loss_gradcheck(inputs):
    edges, displacements, labels = inputs

    def terms(edges, displacements):
        return tuple(affinity_loss(edges, displacements, labels, radius=4))

    assert torch.autograd.gradcheck(terms, (edges, displacements))


def test_no_affinity_is_stored(randn):
    """Of what the graph keeps nothing but the label map is made from the labels."""
    edges, displacements = (randn(1, channels, 32, 32, requires_grad=True) for channels in (1, 2))
    labels = torch.randint(0, 3, (1, 128, 128), dtype=torch.uint8)
    kept: dict[int, int] = {}

    def keep(tensor):
        if not tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        affinity_loss(edges, displacements, labels).total.backward()
    assert sum(kept.values()) <= 32 * 32 + 64  # the labels at stride 4, and nothing of the size of their pairs


def test_saturated_edges_have_a_finite_loss_and_gradient():
    for value in (-200.0, 200.0):
        edges = torch.full((1, 1, 3, 3), value, requires_grad=True)
        labels = torch.tensor([[[0, 0, 1], [0, 2, 1], [2, 2, 1]]])
        total = affinity_loss(edges, torch.zeros(1, 2, 3, 3), labels).total
        total.backward()
        assert total.isfinite()
        assert edges.grad.isfinite().all()


@pytest.mark.parametrize("size", [(4, 5), (1, 5), (5, 1), (1, 1)])
def test_no_pair_gives_zero_with_a_graph(randn, size):
    edges, displacements = (randn(1, channels, *size, requires_grad=True) for channels in (1, 2))
    terms = affinity_loss(edges, displacements, torch.full((1, *size), IGNORE, dtype=torch.uint8))
    assert [term.item() for term in terms] == [0.0] * 6
    terms.total.backward()
    assert edges.grad.abs().sum() == 0


def test_labels_of_the_image_are_resized_by_the_nearest_pixel(inputs):
    edges, displacements, labels = inputs
    large = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert affinity_loss(edges, displacements, large) == affinity_loss(edges, displacements, labels)
    cut = affinity_loss(edges, displacements, large[:, :-3, :-2])  # a size that is no multiple of 4
    assert cut.total.item() == pytest.approx(affinity_loss(edges, displacements, labels).total.item(), rel=0.5)


def test_low_precision_is_computed_in_float32(randn):
    edges, displacements = randn(1, 1, 8, 8), randn(1, 2, 8, 8)
    labels = torch.randint(0, 2, (1, 8, 8))
    wanted = affinity_loss(edges.bfloat16().float(), displacements.bfloat16().float(), labels).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(affinity_loss(edges.bfloat16(), displacements.bfloat16(), labels).total, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": torch.zeros(2, 2, 6, 7)}, r"`edges` to be a tensor \(B, 1, h, w\), but got shape \(2, 2, 6, 7\)"),
        ({"edges": torch.zeros(6, 7)}, "`edges`"),
        ({"displacements": torch.zeros(2, 2, 6, 8)}, r"`displacements` to be of shape \(2, 2, 6, 7\), as `edges`"),
        ({"labels": torch.zeros(2, 6, 7)}, "`labels` to be an integer tensor"),
        ({"labels": np.zeros((2, 6, 7), np.uint8)}, "`labels` to be an integer tensor .* but got ndarray"),
        ({"labels": torch.zeros(1, 6, 7, dtype=torch.uint8)}, r"`labels` to be a tensor \(2, H, W\)"),
        ({"radius": 0}, "`radius` to be a positive integer"),
    ],
)
def test_affinity_loss_errors(inputs, change, message):
    arguments = dict(zip(("edges", "displacements", "labels"), inputs, strict=True))
    with pytest.raises(ValueError, match=message):
        affinity_loss(**{**arguments, **change})


class Levels(nn.Module):
    """A backbone of strides 2, 4 and 32."""

    level_channels = (3, 4, 5)

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(3, count, 1, stride=stride) for count, stride in zip(self.level_channels, (2, 4, 32), strict=True)
        )

    def levels(self, images):
        return [convolution(images) for convolution in self.convolutions]


BACKBONES = {
    "resnet18": lambda: "resnet18",
    "scenes": lambda: "scenes",
    "levels": Levels,
    "one stride": TinyBackbone,
}


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("size", [(64, 64), (50, 37), (33, 540)])
def test_irnet_gives_stride_4_at_any_size(backbone, size):
    net = IRNet(backbone(), weights=None)
    edges, displacements = net(torch.randn(2, 3, *size))
    grid = (math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    assert edges.shape == (2, 1, *grid)
    assert displacements.shape == (2, 2, *grid)


def test_irnet_trains_its_branches_and_nothing_else():
    net = IRNet("resnet18", weights=None).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    groups = net.parameter_groups(0.1)
    assert [group["lr"] for group in groups] == [0.1, 1.0]
    optimizer = torch.optim.SGD(groups)
    output = net(torch.randn(2, 3, 32, 32))
    affinity_loss(*output, torch.randint(0, 2, (2, 32, 32))).total.backward()
    optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name
    assert all(parameter.grad is None for parameter in net.backbone.parameters())


def test_irnet_predicts_the_mean_with_the_mirror_image(randn):
    net = IRNet("scenes").train()
    images = randn(2, 3, 40, 44)
    edges = net.predict(images)
    assert net.training
    net.eval()
    straight, mirrored = net(images).edges, net(images.flip(-1)).edges.flip(-1)
    torch.testing.assert_close(edges, ((straight + mirrored) / 2).sigmoid()[:, 0])
    torch.testing.assert_close(net.predict(images.flip(-1)), edges.flip(-1))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [("vgg16", "`backbone` to be one of"), (nn.Identity(), "`levels` and `level_channels`"), (None, "NoneType")],
)
def test_irnet_errors(backbone, message):
    with pytest.raises(ValueError, match=message):
        IRNet(backbone, weights=None)


def test_irnet_says_when_levels_are_missing():
    backbone = Levels()
    backbone.level_channels = (3, 4)
    with pytest.raises(ValueError, match="to give 2 levels, but got 3"):
        IRNet(backbone)(torch.zeros(1, 3, 32, 32))


@pytest.fixture
def scene():
    """A red rectangle on grey noise; its CAM is high inside, and goes a little beyond it."""
    rng = np.random.default_rng(0)
    image = rng.integers(90, 120, (48, 64, 3), dtype=np.uint8)
    image[12:36, 16:48] = (230, 20, 20)
    maps = np.zeros((1, 12, 16), dtype=np.float16)
    maps[0, 2:10, 3:13] = 0.2
    maps[0, 4:8, 5:11] = 1.0
    return image, maps


def test_mined_labels_follow_the_image(scene):
    image, maps = scene
    labels = mine_labels(image, np.array([6]), maps)
    assert labels.dtype == np.uint8
    assert labels.shape == (48, 64)
    assert set(np.unique(labels)) <= {0, 7, IGNORE}
    assert (labels[14:34, 18:46] == 7).all()  # up to the rectangle's edge, beyond the sure part of the CAM
    assert (labels[:4] == 0).all()
    assert (labels[12:36, 16:48] == 0).sum() == 0


def test_mined_labels_are_those_of_two_crfs(scene):
    """Against the label mining of IRNet, written with pydensecrf's own unary."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    utils = pytest.importorskip("pydensecrf.utils")
    image, maps = scene
    maps = np.concatenate((maps, np.roll(maps[:, :, ::-1] * 0.6, 3, axis=1)))
    classes = np.array([1, 4])
    large = torch.nn.functional.interpolate(
        torch.from_numpy(maps).float()[None], size=(48, 64), mode="bilinear", align_corners=False
    )[0].numpy()

    def refine(score):
        hard = np.concatenate((np.full((1, 48, 64), score, np.float32), large)).argmax(0)
        present, inverse = np.unique(hard, return_inverse=True)
        crf = densecrf.DenseCRF2D(64, 48, len(present))
        unary = utils.unary_from_labels(inverse.reshape(hard.shape), len(present), gt_prob=0.7, zero_unsure=False)
        crf.setUnaryEnergy(unary.astype(np.float32))
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=image, compat=10)
        return present[np.array(crf.inference(10)).argmax(0)].reshape(48, 64)

    sure, possible = refine(0.3), refine(0.1)
    wanted = np.array([0, 2, 5])[sure]
    wanted[sure == 0] = IGNORE
    wanted[(sure == 0) & (possible == 0)] = 0
    for backend in ("pydensecrf", "torch"):
        labels = mine_labels(image, classes, maps, backend=backend)
        assert (labels == wanted).mean() > 0.999


def test_no_class_is_background_and_a_class_without_activation_is_left_open(scene):
    image, _ = scene
    empty = mine_labels(image, np.zeros(0, np.int64), np.zeros((0, 12, 16), np.float16))
    assert empty.shape == (48, 64)
    assert not empty.any()
    assert (mine_labels(image, np.array([3]), np.zeros((1, 12, 16), np.float16)) == 255).all()


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_mining_takes_small_images(size, backend):
    image = np.zeros((*size, 3), np.uint8)
    labels = mine_labels(image, np.array([0]), np.ones((1, 1, 1), np.float16), backend=backend)
    assert labels.shape == size
    assert (labels == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": np.array([0, 1])}, r"`maps` to be one map a class, \(2, h, w\), but got shape \(1, 12, 16\)"),
        ({"classes": np.array([-1])}, "`classes` to be class indices"),
        ({"classes": np.array([0.5])}, "`classes` to be class indices"),
        ({"maps": np.full((1, 12, 16), np.nan)}, "`maps` to be finite and not negative"),
        ({"maps": np.full((1, 12, 16), -1.0)}, "`maps` to be finite and not negative, but got -1.0 to -1.0"),
        ({"foreground_score": 0.1, "background_score": 0.3}, "`background_score` to be a number in"),
        ({"image": np.zeros((48, 64, 3))}, "`image`"),
        ({"backend": "cuda"}, "`backend`"),
    ],
)
def test_mining_errors(scene, change, message):
    image, maps = scene
    arguments = {"image": image, "classes": np.array([0]), "maps": maps, **change}
    with pytest.raises(ValueError, match=message):
        mine_labels(**arguments)


def test_crf_labels_of_several_scores_are_those_of_each(scene):
    image, maps = scene
    together = crf_labels(image, np.array([2]), maps, [0.1, 0.3, 0.9])
    for score, labels in zip((0.1, 0.3, 0.9), together, strict=True):
        assert (labels == crf_labels(image, np.array([2]), maps, [score])[0]).mean() > 0.999
