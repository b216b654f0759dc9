"""CLIP-ES: dense features of transformers, and CAMs without training, against a plain way to the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cacl import BackgroundSet, PromptSet, load_encoder
from cacl.clip_es import CLIPES, SHARED_WORDS, affinity, boxes
from cacl.constants import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from cacl.dense import DenseFeatures, dense_features
from cacl.encoders import CLIPEncoder, DenseEncoder, OpenCLIPEncoder

NAMES = ("cat", "dog", "person")
BLOCKS, HEADS, WIDTH, PATCH, GRID, SPACE = 3, 2, 128, 16, 2, 24


@pytest.fixture(scope="module")
def clip_model():
    from cacl._support.clip_library import import_clip

    import_clip()
    from clip.model import CLIP

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = CLIP(SPACE, GRID * PATCH, BLOCKS, WIDTH, PATCH, 77, 49408, 64, 1, 1).float()
        for block in model.visual.transformer.resblocks:  # at CLIP's own start places hardly look at each other
            nn.init.normal_(block.attn.in_proj_weight, std=0.3)
        nn.init.normal_(model.visual.positional_embedding, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # CLIP's own computes in float32, whatever comes
    return model


@pytest.fixture
def encoder(clip_model):
    """In float64, so that nothing but the formula decides."""
    encoder = CLIPEncoder(clip_model)
    clip_model.double()
    return encoder


class Plain:
    """The image tower written out: no module is called, attention is a softmax of products."""

    def __init__(self, model):
        self.w = {name: value.detach() for name, value in model.visual.state_dict().items()}

    def norm(self, x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attend(self, x, block):
        q, k, v = (
            x @ self.w[f"{block}.attn.in_proj_weight"].T + self.w[f"{block}.attn.in_proj_bias"]
        ).chunk(3, -1)  # fmt: skip
        heads, weights, size = [], [], WIDTH // HEADS
        for i in range(HEADS):
            own = slice(i * size, (i + 1) * size)
            weights.append((q[:, own] @ k[:, own].T / size**0.5).softmax(-1))
            heads.append(weights[-1] @ v[:, own])
        out = torch.cat(heads, 1) @ self.w[f"{block}.attn.out_proj.weight"].T + self.w[f"{block}.attn.out_proj.bias"]
        return out, sum(weights) / HEADS

    def rest(self, x, seen, block):
        out, weights = self.attend(seen, block)
        x = x + out
        y = self.norm(x, f"{block}.ln_2") @ self.w[f"{block}.mlp.c_fc.weight"].T + self.w[f"{block}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        return x + y @ self.w[f"{block}.mlp.c_proj.weight"].T + self.w[f"{block}.mlp.c_proj.bias"], weights

    def look(self, image, layers):
        """Features and activations of the places ``(T, ·)``, and the attention ``(T, T)``."""
        height, width = (-(-side // PATCH) for side in image.shape[1:])
        size = (height * PATCH, width * PATCH)
        if image.shape[1:] != size:
            image = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]
        patches = [
            (image[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH] * self.w["conv1.weight"]).sum((1, 2, 3))
            for i in range(height)
            for j in range(width)
        ]
        x = torch.stack([self.w["class_embedding"], *patches])
        old = self.w["positional_embedding"]
        grid = old[1:].view(GRID, GRID, WIDTH).permute(2, 0, 1)[None]
        new = F.interpolate(grid, size=(height, width), mode="bilinear")[0].flatten(1).T
        x = self.norm(x + torch.cat((old[:1], new)), "ln_pre")
        attention = []
        for number in range(BLOCKS):
            block = f"transformer.resblocks.{number}"
            seen = self.norm(x, f"{block}.ln_1")
            if number == BLOCKS - 1:
                places = seen[1:].clone().requires_grad_()
                seen = torch.cat((seen[:1], places))
            x, weights = self.rest(x, seen, block)
            attention.append(weights)
        features = self.norm(x[1:], "ln_post") @ self.w["proj"]
        return features, places, (sum(attention[-layers:]) / len(attention[-layers:]))[1:, 1:].detach()


def stretched(cam):
    cam = cam - cam.min()
    return cam / cam.max() if cam.max() > 0 else cam


def plain_boxes(cam, score):
    """Flood fill from each place above the score, and the box of what was reached."""
    above, inside = cam > score * cam.max(), np.zeros(cam.shape, bool)
    left = set(zip(*np.nonzero(above), strict=True))
    while left:
        part, todo = set(), [left.pop()]
        while todo:
            i, j = todo.pop()
            part.add((i, j))
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            todo += near
        rows, columns = zip(*part, strict=True)
        inside[min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
    return inside


def plain_cams(model, encoder, image, classes, words, layers=8, score=0.4):
    """CLIP-ES of one photo, with the texts in the one template."""
    scale = torch.tensor(IMAGENET_STD).view(3, 1, 1), torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    photo = (image * scale[0] + scale[1] - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    features, places, attention = Plain(model).look(photo, layers)
    names = [NAMES[k] for k in classes]
    text = encoder.encode_text([f"a clean origami {word}." for word in [*names, *words]])
    text = text.float().double() / text.norm(dim=1, keepdim=True)
    seen = features.mean(0)
    probabilities = (100 * text @ (seen / seen.norm())).softmax(0)
    grid = [-(-side // PATCH) for side in image.shape[1:]]
    way = attention.numpy().astype(np.float64)
    for _ in range(3):
        way = way / way.sum(0)
        way = way / way.sum(1)[:, None]
    way = (way + way.T) / 2
    way = way @ way
    found = []
    for c in range(len(classes)):
        (gradient,) = torch.autograd.grad(probabilities[c], places, retain_graph=True)
        cam = stretched(np.maximum((gradient.mean(0) * places.detach()).sum(1).numpy(), 0).reshape(grid))
        kept = way * plain_boxes(cam, score).reshape(1, -1)
        found.append(stretched((kept @ cam.reshape(-1)).reshape(grid)))
    return np.stack(found)


@pytest.mark.parametrize("size", [(50, 70), (33, 97), (64, 17)])
def test_cams_are_those_of_a_plain_reference(clip_model, encoder, randn, size):
    image = randn(3, *size).double()
    maps = CLIPES(encoder, NAMES)(image, [0, 2])
    expected = plain_cams(clip_model, encoder, image, [0, 2], SHARED_WORDS)
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)
    assert maps.min() == 0
    assert maps.amax((1, 2)).tolist() == [1, 1]
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # a class is another


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_dense_features_are_those_of_a_plain_reference(clip_model, encoder, randn, layers):
    images = randn(2, 3, 50, 70).double()
    seen = dense_features(encoder.model.visual, images, layers=layers)
    for n in range(2):
        features, places, attention = Plain(clip_model).look(images[n], layers)
        torch.testing.assert_close(seen.features[n].flatten(1).T, features.detach(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(seen.activations[n].flatten(1).T, places, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(seen.attention[n], attention, atol=1e-9, rtol=1e-9)


def test_a_look_leaves_no_trace(encoder, randn):
    image = randn(1, 3, 32, 32).double()
    before = encoder.encode_image(image)
    with torch.no_grad():
        assert encoder.encode_dense(randn(1, 3, 40, 90).double()).features.requires_grad
    torch.testing.assert_close(encoder.encode_image(image), before, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
    with pytest.raises(RuntimeError):
        encoder.encode_dense(randn(1, 5, 40, 90).double())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


def test_words_of_a_class_are_its_own(clip_model, encoder, randn):
    image, words = randn(3, 40, 60).double(), {"cat": ["sofa"], "dog": ["grass", "lead"], "person": ["grass", "street"]}
    maps = CLIPES(encoder, NAMES, backgrounds=BackgroundSet(words))(image, [1, 2])
    expected = plain_cams(clip_model, encoder, image, [1, 2], ["grass", "lead", "street"])
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)


def test_shared_words_that_are_classes_are_left_out(clip_model, encoder, randn):
    image = randn(3, 40, 60).double()
    maps = CLIPES(encoder, NAMES, backgrounds=["Dog", "grass"])(image, [0])
    np.testing.assert_allclose(maps.numpy(), plain_cams(clip_model, encoder, image, [0], ["grass"]), atol=1e-5)
    with pytest.raises(ValueError, match="Expected argument `backgrounds` to be words that are no classes, but got no"):
        CLIPES(encoder, NAMES, backgrounds=["dog"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(encoder, randn, dtype):
    image = randn(3, 40, 60)
    encoder.model.float()
    seeds = CLIPES(encoder, NAMES)
    expected = seeds(image, [0, 1])
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(seeds(image, [0, 1]), expected)
    with torch.inference_mode():
        torch.testing.assert_close(seeds(image, [0, 1]), expected)

    class Half(NoTransformer):
        mean, std = CLIP_MEAN, CLIP_STD

        def encode_dense(self, images):
            seen = encoder.encode_dense(images)
            with torch.enable_grad():
                features = seen.features.to(dtype)
            return DenseFeatures(features, seen.activations, seen.attention.to(dtype))

        def encode_text(self, texts):
            return encoder.encode_text(texts).to(dtype)

    maps = CLIPES(Half(), NAMES)(image, [0, 1])
    assert maps.dtype == torch.float32
    assert maps.amax((1, 2)).tolist() == [1, 1]


def test_an_encoder_in_training_mode_is_looked_at_in_evaluation_mode(randn):
    class Own(nn.Module):
        image_size, mean, std = 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        encode_image, encode_text = NoTransformer.encode_image, NoTransformer.encode_text

        def __init__(self):
            super().__init__()
            self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(3)

        def encode_dense(self, images):
            activations = self.norm(images).detach().requires_grad_()
            with torch.enable_grad():
                return DenseFeatures(self.drop(activations) * 2, activations)

    own = Own()
    seeds, image = CLIPES(own, NAMES), randn(3, 12, 16)
    own.train()
    first = seeds(image, [0])
    torch.testing.assert_close(seeds(image, [0]), first)
    assert own.training
    assert own.norm.num_batches_tracked == 0


def test_large_photos_are_scaled_down(encoder, randn):
    assert CLIPES(encoder, NAMES, longest=64)(randn(3, 300, 200).double(), [0]).shape == (1, 4, 3)


def test_photo_without_a_class(encoder, randn):
    assert CLIPES(encoder, NAMES)(randn(3, 40, 60).double(), []).shape == (0, 3, 4)


def test_affinity_by_hand():
    ways = affinity(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(ways, torch.full((2, 2), 0.5))
    ways = affinity(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))  # both sums are 1 already
    torch.testing.assert_close(ways, torch.tensor([[0.82, 0.18], [0.18, 0.82]]))


def test_boxes_by_hand():
    cam = torch.zeros(1, 4, 6)
    cam[0, 0, 0], cam[0, 1, 1], cam[0, 3, 5] = 1, 0.5, 0.41
    expected = torch.zeros(1, 4, 6, dtype=torch.bool)
    expected[0, :2, :2] = expected[0, 3, 5] = True
    assert boxes(cam, 0.4).equal(expected)
    assert not boxes(torch.zeros(1, 4, 6), 0.4).any()


def test_encoder_without_attention(randn):
    encoder = load_encoder("scenes")
    assert isinstance(encoder, DenseEncoder)
    images = randn(2, 3, 40, 56)
    seen = encoder.encode_dense(images)
    torch.testing.assert_close(seen.features.mean((2, 3)), encoder.encode_image(images))
    assert seen.attention is None
    names, words = ("boat", "sheep"), BackgroundSet({"boat": ["water"], "sheep": ["grass"]})
    prompts = PromptSet(["a photo of {}."])
    cam = CLIPES(encoder, names, prompts=prompts, backgrounds=words)(images[0], [0])[0]
    assert cam.min() == 0
    assert cam.max() == 1


class BatchFirst(nn.Module):
    """CLIP's image tower as open_clip has it: the same parts, the batch before the places."""

    def __init__(self, visual):
        super().__init__()
        for name, part in copy.deepcopy(visual).named_children():
            setattr(self, name, part)
        for name, parameter in visual.named_parameters(recurse=False):
            setattr(self, name, nn.Parameter(parameter.detach()))
        for block in self.transformer.resblocks:
            block.attn.batch_first = True
        self.image_size, self.attn_pool = 32, None

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1) + self.positional_embedding
        for block in (self.ln_pre, *self.transformer.resblocks):
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


def test_open_clip(encoder, randn):
    model = nn.Module()
    model.visual = BatchFirst(encoder.model.visual)
    images, wrapped = randn(2, 3, 32, 32).double(), OpenCLIPEncoder(model, None)
    model.double()
    torch.testing.assert_close(wrapped.model.visual(images), encoder.encode_image(images))
    for mine, theirs in zip(wrapped.encode_dense(images), encoder.encode_dense(images), strict=True):
        torch.testing.assert_close(mine, theirs)


class NoTransformer:
    image_size, mean, std = 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def encode_image(self, images):
        return images.mean((2, 3))

    def encode_text(self, texts):
        return torch.eye(3)[[len(text) % 3 for text in texts]]


def test_encoder_that_is_not_dense(encoder):
    with pytest.raises(TypeError, match="Expected argument `encoder` to have `encode_dense`, but NoTransformer lacks"):
        CLIPES(NoTransformer(), NAMES)
    with pytest.raises(ValueError, match="its image tower, ModifiedResNet, is no vision transformer of CLIP's kind"):
        dense_features(type("ModifiedResNet", (), {})(), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(1, 3, 2, 2), "to be returning cacl.dense.DenseFeatures, but got Tensor"),
        (
            DenseFeatures(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 2, 2)),
            r"features \(1, 3, h, w\), but got sha",
        ),
        (DenseFeatures(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 3)), r"activations \(1, C, 2, 2\), but got"),
        (
            DenseFeatures(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 4)),
            r"attention \(1, 4, 4\), but got",
        ),
        (DenseFeatures(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)), "differentiable with respect to its activ"),
        (
            DenseFeatures(torch.ones(1, 3, 2, 2).requires_grad_(), torch.zeros(1, 3, 2, 2).requires_grad_()),
            "features that follow from its activations",
        ),
    ],
)
def test_answers_that_do_not_go_together(answer, message):
    class Dense(NoTransformer):
        def encode_dense(self, images):
            return answer

    with pytest.raises((TypeError, ValueError), match=message):
        CLIPES(Dense(), NAMES)(torch.zeros(3, 32, 32), [0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "`temperature` to be a positive number"),
        ({"box_score": 1.5}, "`box_score` to be"),
        ({"longest": 0}, "`longest` to be"),
        ({"backgrounds": {"cat": ["sofa"]}}, "`backgrounds` to have words for 'dog', but it has none"),
    ],
)
def test_bad_arguments(encoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        CLIPES(encoder, NAMES, **arguments)
    seeds = CLIPES(encoder, NAMES)
    with pytest.raises(ValueError, match=r"`image` to be a tensor \(3, H, W\)"):
        seeds(torch.zeros(4, 32, 32), [0])
    with pytest.raises(ValueError, match="`classes` to be indices of at most 2, but got 3"):
        seeds(torch.zeros(3, 32, 32), [3])
