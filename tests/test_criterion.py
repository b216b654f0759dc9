"""The whole loss against a plain loop over the pairs (CA-CL, eq. 2-14)."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cacl import BackgroundSet, BGSuppressionLoss, CACLLoss, PromptSet

NAMES = ("cat", "dog", "boat")
BACKGROUNDS = BackgroundSet({"cat": ["blanket", "sofa"], "dog": ["lawn", "leash"], "boat": ["water"]})
LABELS = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
THRESHOLD = 0.05


@pytest.fixture
def batch(randn):
    """Images, CAMs with a gradient, and labels: two classes, none, one."""
    return randn(3, 3, 48, 40), randn(3, 3, 3, 5).sigmoid().requires_grad_(), LABELS


@pytest.fixture
def make(encoder):
    def make(**settings):
        settings = {"backgrounds": BACKGROUNDS, "suppression": BGSuppressionLoss(THRESHOLD)} | settings
        return CACLLoss(encoder, NAMES, **settings)

    return make


def cosine(x, y):
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def reference(encoder, images, cams, labels, normalization="encoder", template=None):
    """The means of s_ff and s_bf, and the three losses, a pair at a time."""
    templates = PromptSet()
    s_ff, s_bf, bgs, passing = [], [], 0.0, []
    size = (encoder.image_size,) * 2
    for image, image_cams, image_labels in zip(images, cams.detach(), labels, strict=True):
        pixels = image.double().permute(1, 2, 0).numpy()
        if normalization == "encoder":
            pixels = (pixels * IMAGENET_STD + IMAGENET_MEAN - encoder.mean) / encoder.std
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, size, mode="bilinear")
        for k, name in enumerate(NAMES):
            if not image_labels[k]:
                continue
            mask = F.interpolate(image_cams[None, k : k + 1], size, mode="bilinear")
            with torch.no_grad():
                foreground = encoder.encode_image(pixels * mask)[0].numpy()
                background = encoder.encode_image(pixels * (1 - mask))[0].numpy()
            prompts = encoder.encode_text([t.replace("{}", name) for t in templates]).numpy()
            chosen = max(prompts, key=lambda p: cosine(foreground, p)) if template is None else prompts[template]
            s_ff.append(cosine(foreground, chosen))
            s_bf.append(cosine(background, chosen))
            for word in BACKGROUNDS[name]:
                for text in encoder.encode_text([t.replace("{}", word) for t in templates]).numpy():
                    s = cosine(foreground, text)
                    passing.append(s >= THRESHOLD)
                    bgs -= np.log(1 - s * passing[-1])
    itc = np.mean([max(0, 0.5 - x + y) for x, y in zip(s_ff, s_bf, strict=True)])
    region = cams.detach().double().mean().item()
    total = 40 * itc + bgs + 0.4 * region
    return total, itc, bgs, region, np.mean(s_ff), np.mean(s_bf), np.mean(passing)


@pytest.mark.parametrize("settings", [{}, {"normalization": "imagenet"}, {"template": 1}, {"template": 0}])
def test_equals_a_loop_over_the_pairs(make, encoder, batch, settings):
    terms = make(**settings)(*batch)
    wanted = reference(encoder, *batch, **settings)
    assert 0 < wanted[-1] < 1
    for name, value in zip(terms._fields, wanted, strict=True):
        assert getattr(terms, name).item() == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_weights_are_eq_14(make, batch):
    terms = make(alpha=2.0, beta=3.0, gamma=5.0)(*batch)
    torch.testing.assert_close(terms.total, 2 * terms.itc + 3 * terms.bgs + 5 * terms.region)
    assert make(margin=0.9)(*batch).itc > terms.itc


def test_default_weights_are_the_paper_s(make):
    criterion = make()
    assert (criterion.alpha, criterion.beta, criterion.gamma, criterion.itc.margin) == (40, 1, 0.4, 0.5)


def test_texts_are_encoded_once_and_images_together(make, encoder, batch):
    calls = []
    encode_image, encode_text = encoder.encode_image, encoder.encode_text
    encoder.encode_text = lambda texts: calls.append(("text", list(texts))) or encode_text(texts)
    encoder.encode_image = lambda images: calls.append(("image", tuple(images.shape))) or encode_image(images)
    criterion = make()
    texts = [text for _, list_ in calls for text in list_]
    words = [word for list_ in BACKGROUNDS.values() for word in list_]
    assert sorted(texts) == sorted(text for name in (*NAMES, *words) for text in PromptSet().texts(name))
    calls.clear()
    for _ in range(2):
        criterion(*batch)
    assert calls == [("image", (6, 3, 32, 32))] * 2


def test_gradient_reaches_the_cams_of_present_classes(make, batch):
    make(gamma=0.0)(*batch).total.backward()
    assert torch.equal(batch[1].grad.abs().sum((2, 3)) > 0, LABELS.bool())


def test_only_the_losses_have_a_graph(make, batch):
    terms = make()(*batch)
    graph = [name for name, value in terms._asdict().items() if value.requires_grad]
    assert graph == ["total", "itc", "bgs", "region"]
    assert all(value.shape == () for value in terms)


def test_the_encoder_is_frozen_and_not_part_of_the_module(make, encoder, batch):
    encoder.train()
    criterion = make()
    assert criterion.encoder is encoder
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not list(criterion.parameters())
    assert list(criterion.state_dict()) == ["selector.counts"]
    criterion.train()
    assert not encoder.training
    criterion(*batch).total.backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_encoder_follows_to(make, encoder, batch):
    wanted = make()(*batch)
    criterion = make().to(torch.float64)
    assert next(encoder.parameters()).dtype == torch.float64
    images, cams, labels = batch
    terms = criterion(images.double(), cams.double(), labels)
    assert all(value.dtype == torch.float64 for name, value in terms._asdict().items() if name != "pass_rate")
    torch.testing.assert_close(terms, wanted, check_dtype=False, rtol=1e-4, atol=1e-5)


def test_no_labels_leave_the_region_loss(make, batch):
    images, cams, labels = batch
    terms = make()(images, cams, labels * 0)
    torch.testing.assert_close(terms.total, 0.4 * cams.mean())
    assert terms.itc == terms.bgs == terms.foreground_similarity == terms.background_similarity == terms.pass_rate == 0
    (terms.total + terms.itc + terms.bgs).backward()
    torch.testing.assert_close(cams.grad, torch.full_like(cams, 0.4 / cams.numel()))


@pytest.mark.parametrize("mode", ["soft", "quantile"])
def test_no_labels_leave_the_threshold(make, batch, mode):
    criterion = make(suppression=BGSuppressionLoss(0.2, mode=mode))
    criterion(batch[0], batch[1], LABELS * 0).total.backward()
    assert criterion.bgs.threshold == torch.tensor(0.2)


def test_an_image_without_labels_changes_only_the_region_loss(make, batch):
    images, cams, labels = batch
    with_it = make()(images, cams, labels)
    without = make()(images[[0, 2]], cams[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close((with_it.itc, with_it.bgs), (without.itc, without.bgs))
    assert with_it.region != without.region


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_labels_of_other_types(make, batch, dtype):
    images, cams, labels = batch
    assert torch.equal(make()(images, cams, labels.to(dtype)).total, make()(images, cams, labels).total)


def test_fixed_template(make, batch):
    criterion = make(template=2)
    criterion(*batch)
    assert criterion.selector.counts.sum(0).tolist() == [0, 0, 3, 0]


def test_a_threshold_of_each_class(make, batch):
    criterion = make(suppression=BGSuppressionLoss(mode="quantile", num_classes=3, momentum=0.5))
    images, cams, labels = batch
    criterion(images[2:], cams[2:], labels[2:])
    assert (criterion.bgs.threshold != 0.26).tolist() == [False, False, True]


def test_the_soft_threshold_is_a_parameter(make, batch):
    criterion = make(suppression=BGSuppressionLoss(0.2, mode="soft"))
    criterion(*batch).total.backward()
    assert [name for name, _ in criterion.named_parameters()] == ["bgs.theta"]
    assert criterion.bgs.theta.grad <= 0


def test_without_suppression_no_words_are_needed(encoder, batch):
    terms = CACLLoss(encoder, ("unicorn", "dragon", "phoenix"), beta=0)(*batch)
    assert terms.bgs == terms.pass_rate == 0
    torch.testing.assert_close(terms.total, 40 * terms.itc + 0.4 * terms.region)
    terms.total.backward()


@pytest.mark.parametrize("name", ["diningtable", "dining table", "Dining-Table"])
def test_built_in_words_are_found(encoder, name):
    criterion = CACLLoss(encoder, (name, "tvmonitor"))
    words = BackgroundSet.voc().encode(encoder, ("dining table", "tv monitor"), PromptSet())
    assert torch.equal(criterion._background_text, words)


def test_mixed_precision(make, batch):
    wanted = make()(*batch).total
    with torch.autocast("cpu", torch.bfloat16):
        total = make()(*batch).total
    total.backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, wanted, rtol=0.05, atol=0)
    assert batch[1].grad.isfinite().all()


def test_an_encoder_that_is_no_module(encoder, batch):
    class Plain:
        image_size, mean, std = encoder.image_size, encoder.mean, encoder.std

        def encode_image(self, images):
            return encoder.encode_image(images)

        def encode_text(self, texts):
            return encoder.encode_text(texts)

    plain = CACLLoss(Plain(), NAMES, backgrounds=BACKGROUNDS).to(torch.float32)(*batch).total
    assert torch.equal(plain, CACLLoss(encoder, NAMES, backgrounds=BACKGROUNDS)(*batch).total)
    plain.backward()


# Errors


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"alpha": -1}, ValueError, "Expected argument `alpha` to be a number in [0, inf], but got -1."),
        ({"beta": float("nan")}, ValueError, "Expected argument `beta` to be a number in [0, inf], but got nan."),
        ({"gamma": "1"}, TypeError, "Expected argument `gamma` to be a number, but got str."),
        ({"margin": 3}, ValueError, "Expected argument `margin` to be a number in [0, 2], but got 3."),
        ({"template": 4}, ValueError, "Expected argument `template` to be in [0, 3], but got 4."),
        (
            {"normalization": "clip"},
            ValueError,
            'Expected argument `normalization` to be one of "encoder", "imagenet", but got \'clip\'.',
        ),
        ({"backgrounds": BackgroundSet({"cat": ["lawn"]})}, ValueError, "no background words for class 'dog'"),
        ({"suppression": "soft"}, TypeError, "Expected argument `suppression` to be"),
    ],
)
def test_settings_are_checked(make, settings, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        make(**settings)


def test_names_without_words(encoder):
    text = "There are no built-in background words for 'unicorn': give `backgrounds`"
    with pytest.raises(ValueError, match=re.escape(text)):
        CACLLoss(encoder, ("cat", "unicorn"))


def test_names_that_are_one_string(encoder):
    with pytest.raises(TypeError, match="Expected `names` to be a list of strings, but got 'cat'"):
        CACLLoss(encoder, "cat", beta=0)


def test_an_encoder_that_lacks_a_member():
    text = "Expected argument `encoder` to have `image_size`, but Linear lacks it."
    with pytest.raises(TypeError, match=re.escape(text)):
        CACLLoss(torch.nn.Linear(1, 1), NAMES)


IMAGES, CAMS = torch.ones(3, 3, 48, 48), torch.ones(3, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (
            (IMAGES, CAMS, LABELS[:, :2]),
            ValueError,
            "Expected argument `labels` to be a tensor (B, 3), but got shape (3, 2).",
        ),
        (
            (IMAGES, CAMS, LABELS[0]),
            ValueError,
            "Expected argument `labels` to be a tensor (B, 3), but got shape (3,).",
        ),
        (
            (IMAGES, CAMS[0], LABELS),
            ValueError,
            "Expected argument `cams` to be a tensor (B, K, h, w), but got shape (3, 4, 4).",
        ),
        (
            (IMAGES, CAMS[:, :2], LABELS),
            ValueError,
            "Expected argument `labels` to be of shape (3, 2), as `cams`, but got shape (3, 3).",
        ),
        (
            (IMAGES[:2], CAMS, LABELS),
            ValueError,
            "Expected argument `cams` to be of the same batch size as `images` 2, but got shape (3, 3, 4, 4).",
        ),
        (
            (IMAGES[0], CAMS, LABELS),
            ValueError,
            "Expected argument `images` to be a tensor (B, 3, H, W), but got shape (3, 48, 48).",
        ),
        (
            (IMAGES[:, :1], CAMS, LABELS),
            ValueError,
            "Expected argument `images` to be a tensor (B, 3, H, W), but got shape (3, 1, 48, 48).",
        ),
        (
            (IMAGES.byte(), CAMS, LABELS),
            TypeError,
            "Expected argument `images` to be of a floating point type, but got torch.uint8.",
        ),
        (
            (None, CAMS, LABELS),
            TypeError,
            "Expected argument `images` to be a tensor (B, 3, H, W), but got NoneType.",
        ),
        ((IMAGES, CAMS, [[1]]), TypeError, "Expected argument `labels` to be a tensor (B, 3), but got list."),
    ],
)
def test_inputs_are_checked(make, arguments, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        make()(*arguments)


def test_an_encoder_that_returns_another_shape(make, encoder, batch):
    criterion = make()
    encoder.encode_image = lambda images: images
    text = "Expected argument `encoder.encode_image` to be returning (6, D) features, but got shape (6, 3, 32, 32)."
    with pytest.raises(ValueError, match=re.escape(text)):
        criterion(*batch)
