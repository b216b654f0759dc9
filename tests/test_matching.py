"""The losses of CLIMS and QA-CLIMS against plain numpy, value and gradient, and the rules that all losses follow."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from cacl import ContrastLoss, MatchingLoss, contrast_loss, matching_loss

N, Q, D = 5, 6, 8


def cosine(x, y):
    return (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def matching(f, b, t, weights=(10.0, 24.0)):
    s_ff, s_bf = (np.clip(cosine(x, t), 1e-4, 0.9999) for x in (f, b))
    return -weights[0] * np.log(s_ff) - weights[1] * np.log(1 - s_bf)


def contrast(f, b, t, words, weights=(10.0, 8.0), temperature=0.7):
    """One pair after the other, with the words that it has."""
    rows = []
    for i in range(len(f)):
        own = [w for w in words[i] if np.abs(w).max() > 0]
        if not own:
            rows.append(0.0)
            continue
        e = lambda x, y: np.exp(cosine(x, y) / temperature)  # noqa: E731
        first = -np.log(e(f[i], t[i]) / (e(f[i], t[i]) + sum(e(f[i], w) for w in own)))
        m = sum(e(b[i], w) for w in own) / len(own)
        rows.append(weights[0] * first - weights[1] * np.log(m / (m + e(b[i], t[i]))))
    return np.array(rows)


@pytest.fixture
def pairs(randn):
    """Foreground and background near their text, text, and words of which the last pairs have fewer and none."""
    text, words = randn(N, D), randn(N, Q, D)
    words[3, 2:] = 0
    words[4] = 0
    return 0.6 * text + 0.4 * randn(N, D), 0.3 * text + 0.7 * randn(N, D), text, words


CASES = {"matching": (matching_loss, MatchingLoss, matching, 3), "contrast": (contrast_loss, ContrastLoss, contrast, 4)}


@pytest.fixture(params=CASES)
def case(request, pairs):
    function, module, formula, count = CASES[request.param]
    return function, module, formula, pairs[:count]


def numbers(inputs):
    return [x.double().numpy() for x in inputs]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_value_is_the_formula(case, reduction):
    function, module, formula, inputs = case
    rows = formula(*numbers(inputs))
    wanted = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (5 if function is matching_loss else 4)}[reduction]
    for loss in (function(*inputs, reduction=reduction), module(reduction=reduction)(*inputs)):
        np.testing.assert_allclose(loss.numpy(), wanted, rtol=1e-5)


def test_the_gradient_is_that_of_the_formula(case):
    """Central differences of numpy's value, of every number of the regions."""
    function, _, formula, inputs = case
    doubles = [x.double().requires_grad_() for x in inputs]
    function(*doubles, reduction="sum").backward()
    plain = numbers(x.detach() for x in doubles)
    for which in (0, 1):
        wanted = np.zeros((N, D))
        for at in np.ndindex(N, D):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in plain]
                moved[which][at] += step
                sides.append(formula(*moved).sum())
            wanted[at] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(doubles[which].grad.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_gradcheck_of_all_inputs(case):
    function, _, _, inputs = case
    assert gradcheck(function, tuple(x[:3].double().requires_grad_() for x in inputs))


def test_other_constants(pairs):
    pole = matching_loss(*pairs[:3], weights=(10.0, 25.0), reduction="none")
    np.testing.assert_allclose(pole, matching(*numbers(pairs[:3]), weights=(10.0, 25.0)), rtol=1e-5)
    assert torch.equal(MatchingLoss((10.0, 25.0), reduction="none")(*pairs[:3]), pole)
    coco = contrast_loss(*pairs, weights=(30.0, 24.0), temperature=0.1, reduction="none")
    np.testing.assert_allclose(coco, contrast(*numbers(pairs), weights=(30.0, 24.0), temperature=0.1), rtol=1e-4)
    assert torch.equal(ContrastLoss(0.1, weights=(30.0, 24.0), reduction="none")(*pairs), coco)


def test_beyond_the_bounds_of_the_logarithm_nothing_pulls():
    same, other = torch.eye(2)[:1].clone().requires_grad_(), -torch.eye(2)[:1]
    loss = matching_loss(same, same, torch.eye(2)[:1], reduction="sum")
    loss.backward()
    assert loss.item() == pytest.approx(-10 * np.log(0.9999) - 24 * np.log(1 - 0.9999), rel=1e-3)
    assert same.grad.abs().max() == 0
    assert matching_loss(other, other, torch.eye(2)[:1]).item() == pytest.approx(-10 * np.log(1e-4) + 24e-4, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(case, dtype):
    function, _, _, inputs = case
    halves = [x.to(dtype).requires_grad_() for x in inputs]
    loss = function(*halves)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, function(*inputs), rtol=2e-2, atol=2e-2)
    assert all(x.grad.isfinite().all() and x.grad.dtype == dtype for x in halves)


def test_autocast_changes_nothing(case):
    function, _, _, inputs = case
    wanted = function(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(*inputs), wanted)


def test_nothing_gives_zero_with_a_graph(case):
    function, module, _, inputs = case
    for loss_of in (function, module()):
        empty = [x[:0].clone().requires_grad_() for x in inputs]
        loss = loss_of(*empty)
        loss.backward()
        assert loss.item() == 0
        assert all(x.grad.shape == x.shape for x in empty)
    assert function(*(x[:0] for x in inputs), reduction="none").shape == (0,)


def test_a_single_pair_and_features_of_zeros(case):
    function, _, _, inputs = case
    for change in (1, 0):
        single = [(x[:1] * change).clone().requires_grad_() for x in inputs]
        function(*single).backward()
        assert all(x.grad.isfinite().all() for x in single)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_padding_and_pairs_without_words_are_neutral(pairs, reduction):
    foreground, background, text, words = pairs
    results = []
    for count, more in ((5, 0), (5, 3), (4, 0)):
        f = foreground[:count].clone().requires_grad_()
        padded = torch.cat((words[:count], torch.zeros(count, more, D)), 1)
        loss = contrast_loss(f, background[:count], text[:count], padded, reduction=reduction)
        loss.backward()
        results.append((loss, f.grad[:4]))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])
    none = contrast_loss(foreground, background, text, words[:, :0], reduction=reduction)
    assert none.item() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_as_one_graph(case):
    function, _, _, inputs = case
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager_inputs, compiled_inputs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    function(*eager_inputs).backward()
    compiled(*compiled_inputs).backward()
    for x, y in zip(compiled_inputs, eager_inputs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


X, WORDS = torch.ones(2, 4), torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(matching_loss, X, X[:1], X), "`background` to be of the same shape as `foreground` (2, 4)"),
        (partial(matching_loss, X, X, X, weights=(1.0,)), "`weights` to be two numbers, but got (1.0,)"),
        (partial(matching_loss, X, X, X, weights=(1.0, -1.0)), "`weights[1]` to be a number in [0, inf], but got -1.0"),
        (partial(matching_loss, X, X, X, reduction="avg"), '`reduction` to be one of "mean", "sum", "none"'),
        (partial(MatchingLoss, (1.0, 2.0, 3.0)), "`weights` to be two numbers"),
        (partial(contrast_loss, X, X, X, X), "`words` to be a tensor (N, Q, D), but got shape (2, 4)"),
        (partial(contrast_loss, X, X, X, WORDS[:1]), "`words` to be a tensor (2, Q, 4), but got shape (1, 3, 4)"),
        (partial(contrast_loss, X, X, X, WORDS, temperature=0), "`temperature` to be a number in [1e-06, inf]"),
        (partial(ContrastLoss, reduction="avg"), '`reduction` to be one of "mean", "sum", "none"'),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(ValueError, match=f"Expected argument {re.escape(message)}"):
        call()
