"""The losses against plain numpy (CA-CL, eq. 6-13), and the rules that all of them follow."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from cacl import BGSuppressionLoss, ITCLoss, RegionLoss, bg_suppression_loss, itc_loss, region_loss

N, Q, D = 5, 6, 8
THRESHOLD = 0.1


def cosine(x, y):
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


@pytest.fixture
def pairs(randn):
    """Foreground, background, text (N, D) and background text (N, Q, D)."""
    return randn(N, D), randn(N, D), randn(N, D), randn(N, Q, D)


@pytest.fixture(params=["itc", "bgs", "region"])
def case(request, pairs):
    """A functional loss, its module and inputs."""
    foreground, background, text, words = pairs
    return {
        "itc": (itc_loss, ITCLoss(), (foreground, background, text)),
        "bgs": (partial(bg_suppression_loss, threshold=THRESHOLD), BGSuppressionLoss(THRESHOLD), (foreground, words)),
        "region": (region_loss, RegionLoss(), (words[:4].reshape(2, 2, 6, 8).sigmoid(),)),
    }[request.param]


# Equations


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
def test_itc_is_eq_6_and_7(pairs, margin):
    foreground, background, text, _ = pairs
    wanted = np.maximum(0, margin - cosine(foreground, text) + cosine(background, text))
    assert itc_loss(foreground, background, text, margin=margin).item() == pytest.approx(wanted.mean(), rel=1e-5)


@pytest.mark.parametrize("threshold", [-0.5, 0.1, 0.5])
def test_bgs_is_eq_9_10_and_12(pairs, threshold):
    foreground, _, _, words = pairs
    similarity = cosine(foreground[:, None], words)
    passing = similarity >= threshold
    assert 0 < passing.sum() < N * Q
    wanted = -np.log(1 - similarity * passing).sum()
    assert bg_suppression_loss(foreground, words, threshold).item() == pytest.approx(wanted, rel=1e-5)


def test_region_is_eq_13(randn):
    cams = randn(2, 3, 4, 5).sigmoid()
    assert region_loss(cams).item() == pytest.approx(cams.numpy().sum() / (2 * 3 * 4 * 5), rel=1e-6)


def test_itc_by_hand():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    foreground, background, text = torch.stack([x, y, x]), torch.stack([y, x, x]), torch.stack([x, x, x])
    loss = itc_loss(foreground, background, text, margin=0.5, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.5, 0.5]))


def test_bgs_by_hand():
    foreground = torch.tensor([[2.0, 0.0]])
    words = torch.tensor([[[0.6, 0.8], [0.25, 0.96825], [0.5, 0.8660254], [-1.0, 0.0]]])
    loss = bg_suppression_loss(foreground, words, 0.26)
    assert loss.item() == pytest.approx(-np.log(0.4) - np.log(0.5), rel=1e-5)


def test_a_similarity_of_exactly_the_threshold_passes():
    foreground, words = torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 1.0]]])
    similarity = (words / words.norm(dim=-1, keepdim=True))[0, 0, 0]
    assert bg_suppression_loss(foreground, words, similarity) > 0
    assert bg_suppression_loss(foreground, words, similarity + 1e-6) == 0


def test_a_similarity_of_one_stays_finite():
    foreground = torch.eye(3).requires_grad_()
    loss = bg_suppression_loss(foreground, torch.eye(3)[:, None], 0.2)
    loss.backward()
    assert loss.isfinite()
    assert foreground.grad.isfinite().all()


# Rules for all losses


def test_module_equals_function(case):
    function, module, inputs = case
    assert torch.equal(module(*inputs), function(*inputs))


def test_gradcheck_in_float64(case):
    function, _, inputs = case
    assert gradcheck(function, tuple(x.double().requires_grad_() for x in inputs))


def test_float64_stays_float64(case):
    function, module, inputs = case
    doubles = [x.double() for x in inputs]
    assert function(*doubles).dtype == torch.float64
    assert module.to(torch.float64)(*doubles).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-2, 1, 1e3])
def test_half_precision_is_finite_and_close_to_float32(case, dtype, scale):
    function, _, inputs = case
    if function is not region_loss:
        inputs = [x * scale for x in inputs]
    halves = [x.to(dtype).requires_grad_() for x in inputs]
    loss = function(*halves)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, function(*inputs), rtol=2e-2, atol=2e-2)
    assert all(x.grad.isfinite().all() and x.grad.dtype == dtype for x in halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_of_zeros_stay_finite(pairs, dtype):
    foreground, background, text, words = (x.to(dtype) for x in pairs)
    foreground[0] = 0
    foreground.requires_grad_()
    loss = itc_loss(foreground, background, text) + bg_suppression_loss(foreground, words, -0.5)
    loss.backward()
    assert loss.isfinite()
    assert foreground.grad.isfinite().all()


def test_autocast_changes_nothing(case):
    function, module, inputs = case
    wanted = function(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(*inputs), wanted)
        assert torch.equal(module(*inputs), wanted)


def test_nothing_gives_zero_with_a_graph(case):
    function, module, inputs = case
    for loss_of in (function, module):
        empty = [x[:0].clone().requires_grad_() for x in inputs]
        loss = loss_of(*empty)
        loss.backward()
        assert loss.item() == 0
        assert all(x.grad.shape == x.shape for x in empty)


def test_a_single_pair(case):
    function, _, inputs = case
    single = [x[:1].clone().requires_grad_() for x in inputs]
    function(*single).backward()
    assert all(x.grad.isfinite().all() for x in single)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_as_one_graph(case):
    function, _, inputs = case
    # Inductor would spend its time in the C++ compiler; a graph break shows with any backend.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager_inputs, compiled_inputs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    eager, loss = function(*eager_inputs), compiled(*compiled_inputs)
    eager.backward()
    loss.backward()
    torch.testing.assert_close(loss, eager)
    for x, y in zip(compiled_inputs, eager_inputs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_soft_threshold_compiles_too(pairs):
    foreground, _, _, words = pairs
    soft = partial(bg_suppression_loss, temperature=0.05)
    compiled = torch.compile(soft, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (soft, compiled):
        theta = torch.tensor(THRESHOLD, requires_grad=True)
        function(foreground, words, theta).backward()
        gradients.append(theta.grad)
    torch.testing.assert_close(*gradients)


def test_itc_reductions(pairs):
    loss = {r: itc_loss(*pairs[:3], reduction=r) for r in ("none", "sum", "mean")}
    assert loss["none"].shape == (N,)
    torch.testing.assert_close(loss["none"].sum(), loss["sum"])
    torch.testing.assert_close(loss["none"].mean(), loss["mean"])
    assert torch.equal(ITCLoss(reduction="sum")(*pairs[:3]), loss["sum"])


@pytest.mark.parametrize("temperature", [None, 0.01])
def test_bgs_reductions(pairs, temperature):
    foreground, _, _, words = pairs
    words[0, 1:] = 0
    loss = {
        r: bg_suppression_loss(foreground, words, THRESHOLD, temperature=temperature, reduction=r)
        for r in ("none", "sum", "mean")
    }
    assert loss["none"].shape == (N,)
    torch.testing.assert_close(loss["none"].sum(), loss["sum"])
    torch.testing.assert_close(loss["sum"] / (N * Q - Q + 1), loss["mean"])  # padding does not count
    assert torch.equal(BGSuppressionLoss(THRESHOLD, reduction="mean")(foreground, words), loss["mean"])


@pytest.mark.parametrize("function", [itc_loss, bg_suppression_loss])
def test_no_pairs_without_reduction(function, pairs):
    foreground, background, text, words = (x[:0] for x in pairs)
    inputs = (foreground, background, text) if function is itc_loss else (foreground, words)
    assert function(*inputs, reduction="none").shape == (0,)


@pytest.mark.parametrize("mode", ["fixed", "soft", "quantile"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_rows_of_zeros_are_neutral(pairs, mode, reduction):
    foreground, _, _, words = pairs
    padded = torch.cat((words, torch.zeros(N, 3, D)), dim=1)
    results = []
    for text in (words, padded):
        module = BGSuppressionLoss(-0.1, mode=mode, bounds=(-0.2, 0.2), momentum=0.5, reduction=reduction)
        f = foreground.clone().requires_grad_()
        loss = module(f, text)
        loss.sum().backward()
        theta = module.theta.grad if mode == "soft" else module.threshold
        results.append((loss, f.grad, module.pass_rate, theta))
    torch.testing.assert_close(*results)


def test_only_padding(pairs):
    loss = BGSuppressionLoss(-1.0, mode="quantile")
    assert loss(pairs[0], torch.zeros(N, Q, D)) == 0
    assert loss.threshold == -1
    assert loss.pass_rate == 0


# Errors

X, WORDS = torch.ones(2, 4), torch.ones(2, 3, 4)
ERRORS = [
    (lambda: itc_loss(X, X, [1.0]), TypeError, "Expected argument `text` to be a tensor (N, D), but got list."),
    (
        lambda: itc_loss(X.long(), X, X),
        TypeError,
        "Expected argument `foreground` to be of a floating point type, but got torch.int64.",
    ),
    (
        lambda: itc_loss(X[0], X, X),
        ValueError,
        "Expected argument `foreground` to be a tensor (N, D), but got shape (4,).",
    ),
    (
        lambda: itc_loss(X, X[:1], X),
        ValueError,
        "Expected argument `background` to be of the same shape as `foreground` (2, 4), but got shape (1, 4).",
    ),
    (
        lambda: itc_loss(X, X, X, margin=2.5),
        ValueError,
        "Expected argument `margin` to be a number in [0, 2], but got 2.5.",
    ),
    (lambda: ITCLoss(margin=float("nan")), ValueError, "Expected argument `margin` to be a number in [0, 2]"),
    (lambda: ITCLoss(margin="1"), TypeError, "Expected argument `margin` to be a number, but got str."),
    (
        lambda: ITCLoss(reduction="avg"),
        ValueError,
        'Expected argument `reduction` to be one of "mean", "sum", "none", but got \'avg\'.',
    ),
    (lambda: itc_loss(X, X, X, reduction="avg"), ValueError, "Expected argument `reduction` to be one of"),
    (lambda: bg_suppression_loss(X, WORDS, reduction="avg"), ValueError, "Expected argument `reduction` to be one of"),
    (
        lambda: bg_suppression_loss(X, X),
        ValueError,
        "Expected argument `background_text` to be a tensor (N, Q, D), but got shape (2, 4).",
    ),
    (
        lambda: bg_suppression_loss(X, WORDS[:1]),
        ValueError,
        "Expected argument `background_text` to be a tensor (2, Q, 4), but got shape (1, 3, 4).",
    ),
    (
        lambda: bg_suppression_loss(X, WORDS, temperature=0),
        ValueError,
        "Expected argument `temperature` to be a number in [1e-06, inf], but got 0.",
    ),
    (
        lambda: bg_suppression_loss(X, WORDS, torch.zeros(3)),
        ValueError,
        "Expected argument `threshold` to be",
    ),
    (
        lambda: BGSuppressionLoss(mode="hard"),
        ValueError,
        'Expected argument `mode` to be one of "soft", "quantile", "fixed", but got \'hard\'.',
    ),
    (
        lambda: BGSuppressionLoss(1.5),
        ValueError,
        "Expected argument `threshold` to be a number in [-1, 1], but got 1.5.",
    ),
    (
        lambda: BGSuppressionLoss(0.4, mode="soft"),
        ValueError,
        "Expected argument `threshold` to be a number in [0.2, 0.3], but got 0.4.",
    ),
    (
        lambda: BGSuppressionLoss(bounds=(0.3, 0.2)),
        ValueError,
        "Expected argument `bounds[1]` to be a number in [0.3, 1], but got 0.2.",
    ),
    (lambda: BGSuppressionLoss(quantile=80), ValueError, "Expected argument `quantile` to be a number in [0, 1]"),
    (lambda: BGSuppressionLoss(momentum=-1), ValueError, "Expected argument `momentum` to be a number in [0, 1]"),
    (
        lambda: BGSuppressionLoss(num_classes=3),
        ValueError,
        'Expected argument `num_classes` to be None, or a positive integer in mode "quantile", but got 3.',
    ),
    (
        lambda: BGSuppressionLoss(mode="quantile", num_classes=3)(X, WORDS),
        TypeError,
        "Expected argument `classes` to be a tensor (N,), but got None.",
    ),
    (
        lambda: BGSuppressionLoss(mode="quantile", num_classes=3)(X, WORDS, torch.tensor([0.0, 1.0])),
        TypeError,
        "Expected argument `classes` to be an integer tensor (N,), but got torch.float32.",
    ),
    (
        lambda: BGSuppressionLoss(mode="quantile", num_classes=3)(X, WORDS, torch.tensor([0])),
        ValueError,
        "Expected argument `classes` to be a tensor (2,), one class a pair, but got shape (1,).",
    ),
    (
        lambda: BGSuppressionLoss(mode="quantile", num_classes=3)(X, WORDS, torch.tensor([0, 3])),
        ValueError,
        "Expected argument `classes` to be in [0, 2], but got 3.",
    ),
    (
        lambda: region_loss(X),
        ValueError,
        "Expected argument `cams` to be a tensor (B, K, h, w), but got shape (2, 4).",
    ),
    (
        lambda: region_loss(torch.ones(1, 1, 2, 2, dtype=torch.uint8)),
        TypeError,
        "Expected argument `cams` to be of a floating point type, but got torch.uint8.",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS, ids=[text[:60] for *_, text in ERRORS])
def test_errors_say_what_was_expected_and_what_came(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)) as error:
        call()
    assert "\n" not in str(error.value)


# The threshold


def test_default_is_fixed_and_never_moves(pairs):
    foreground, _, _, words = pairs
    loss = BGSuppressionLoss()
    for _ in range(3):
        loss(foreground.requires_grad_(), words).backward()
    assert loss.mode == "fixed"
    assert loss.threshold == torch.tensor(0.26)
    assert not list(loss.parameters())
    assert not loss.state_dict()


@pytest.mark.parametrize("mode", ["fixed", "soft", "quantile"])
def test_pass_rate_is_the_share_at_or_above_the_threshold(pairs, mode):
    foreground, _, _, words = pairs
    words[0, 1:] = 0
    loss = BGSuppressionLoss(0.2, mode=mode)
    loss(foreground, words)
    real = words.numpy().any(-1)
    similarity = cosine(foreground[:, None], words + 1e-30)[real]
    assert loss.pass_rate.item() == pytest.approx((similarity >= loss.threshold.item()).mean())
    assert not loss.pass_rate.requires_grad


def test_soft_gradient_of_the_threshold_is_that_of_the_sigmoid_mask(pairs):
    foreground, _, _, words = (x.double() for x in pairs)
    similarity, temperature, step = cosine(foreground[:, None], words), 0.05, 1e-6

    def soft(theta):
        return -np.log(1 - similarity / (1 + np.exp((theta - similarity) / temperature))).mean()

    theta = torch.tensor(THRESHOLD, dtype=torch.float64, requires_grad=True)
    foreground.requires_grad_()
    bg_suppression_loss(foreground, words, theta, temperature=temperature).backward()
    wanted = (soft(THRESHOLD + step) - soft(THRESHOLD - step)) / (2 * step)
    assert theta.grad.item() == pytest.approx(wanted, rel=1e-6)

    hard = torch.autograd.grad(bg_suppression_loss(foreground, words, THRESHOLD), foreground)[0]
    torch.testing.assert_close(foreground.grad, hard)  # the sigmoid is for θ only


def test_without_a_temperature_the_threshold_has_no_gradient(pairs):
    theta = torch.tensor(THRESHOLD, requires_grad=True)
    loss = bg_suppression_loss(pairs[0].requires_grad_(), pairs[3], theta)
    assert torch.autograd.grad(loss, theta, allow_unused=True) == (None,)


def test_soft_value_is_the_hard_one(pairs):
    foreground, _, _, words = pairs
    hard = bg_suppression_loss(foreground, words, 0.25)
    torch.testing.assert_close(BGSuppressionLoss(0.25, mode="soft")(foreground, words), hard)


def test_soft_threshold_rises_to_its_bound_and_stays(pairs):
    foreground, _, _, words = pairs
    loss = BGSuppressionLoss(0.21, mode="soft", temperature=0.1)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    seen = []
    for _ in range(30):
        optimizer.zero_grad()
        loss(foreground, words).backward()
        assert loss.theta.grad <= 0
        optimizer.step()
        seen.append(loss.threshold.item())
    assert seen == sorted(seen)
    assert 0.21 < seen[0] < seen[-1]
    assert seen[-1] == pytest.approx(0.3)


def test_soft_two_forwards_before_one_backward(pairs):
    foreground, _, _, words = pairs
    loss = BGSuppressionLoss(0.2, mode="soft")
    loss.theta.data.fill_(0.5)  # as after a large step: the first forward clamps it
    first = loss(foreground, words)
    (first + loss(foreground, words)).backward()
    assert loss.theta.grad.isfinite()


def test_quantile_threshold_is_a_running_nanquantile(pairs):
    foreground, _, _, words = pairs
    words[0, 1:] = 0
    loss = BGSuppressionLoss(0.26, mode="quantile", quantile=0.7, momentum=0.9)
    wanted = 0.26
    for text in (words, words.flip(0)):
        similarity = cosine(foreground[:, None], text + 1e-30)
        similarity[~text.numpy().any(-1)] = np.nan
        wanted = 0.9 * wanted + 0.1 * np.nanquantile(similarity, 0.7)
        value = loss(foreground, text)
        assert loss.threshold.item() == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(value, bg_suppression_loss(foreground, text, loss.threshold))
    assert not list(loss.parameters())


def test_quantile_threshold_of_each_class_moves_only_when_it_is_there(pairs):
    foreground, _, _, words = pairs
    classes = torch.tensor([0, 2, 2, 0, 2])
    loss = BGSuppressionLoss(0.26, mode="quantile", quantile=0.5, momentum=0.8, num_classes=4)
    value = loss(foreground, words, classes)
    similarity = cosine(foreground[:, None], words)
    wanted = np.full(4, 0.26)
    for k in (0, 2):
        wanted[k] = 0.8 * 0.26 + 0.2 * np.quantile(similarity[classes.numpy() == k], 0.5)
    np.testing.assert_allclose(loss.threshold.numpy(), wanted, rtol=1e-5)
    torch.testing.assert_close(value, bg_suppression_loss(foreground, words, loss.threshold[classes][:, None]))


@pytest.mark.parametrize("num_classes", [None, 3])
def test_quantile_threshold_stays_in_evaluation_and_without_pairs(pairs, num_classes):
    foreground, _, _, words = pairs
    loss = BGSuppressionLoss(mode="quantile", momentum=0.0, num_classes=num_classes)
    before = loss.threshold.clone()
    classes = torch.zeros(N, dtype=torch.int64)
    loss(foreground[:0], words[:0], classes[:0])
    loss.eval()(foreground, words, classes)
    assert torch.equal(loss.threshold, before)
    loss.train()(foreground, words, classes)
    assert not torch.equal(loss.threshold, before)


@pytest.mark.parametrize("mode", ["soft", "quantile"])
def test_the_threshold_is_saved(pairs, mode):
    foreground, _, _, words = pairs
    loss = BGSuppressionLoss(mode=mode, momentum=0.9)
    loss(foreground, words).backward() if mode == "soft" else loss(foreground, words)
    loss.theta.data.add_(0.01)
    other = BGSuppressionLoss(mode=mode)
    assert list(loss.state_dict()) == ["theta"]
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.threshold, loss.threshold)


@pytest.mark.parametrize("mode", ["fixed", "soft", "quantile"])
def test_modes_in_float64(pairs, mode):
    foreground, _, _, words = (x.double() for x in pairs)
    loss = BGSuppressionLoss(mode=mode).to(torch.float64)
    assert loss(foreground, words).dtype == torch.float64
    assert loss.threshold.dtype == torch.float64
