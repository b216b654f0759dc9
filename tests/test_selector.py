"""Dynamic context prompt selection against numpy (CA-CL, eq. 3-5)."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cacl import ContextSelector

K, M, N, D = 3, 4, 6, 8
CLASSES = torch.tensor([0, 2, 1, 2, 0, 2])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def prompts(randn):
    return randn(K, M, D)


@pytest.fixture
def foreground(prompts, randn):
    return randn(N, D)


def test_the_most_similar_template_is_chosen(prompts, foreground):
    text, index, similarity = ContextSelector(prompts)(foreground, CLASSES)
    units = unit(prompts.numpy())
    for i, k in enumerate(CLASSES):
        similarities = units[k] @ unit(foreground[i].numpy())
        assert index[i] == similarities.argmax()
        assert similarity[i].item() == pytest.approx(similarities.max(), abs=1e-6)
        np.testing.assert_allclose(text[i].numpy(), units[k, index[i]], atol=1e-6)
    assert len(set(index.tolist())) > 1
    assert index.dtype == torch.int64


def test_fixed_mode_always_takes_its_template(prompts, foreground):
    text, index, similarity = ContextSelector(prompts, mode="fixed", template=2)(foreground, CLASSES)
    assert (index == 2).all()
    wanted = torch.nn.functional.normalize(prompts[CLASSES, 2], dim=-1)
    torch.testing.assert_close(text, wanted)
    torch.testing.assert_close(similarity, torch.cosine_similarity(foreground, wanted))


def test_counts_what_was_chosen_while_training(prompts, foreground):
    select = ContextSelector(prompts)
    assert select.counts.dtype == torch.int64
    wanted = np.zeros((K, M), dtype=int)
    for _ in range(2):
        index = select(foreground, CLASSES).index
        np.add.at(wanted, (CLASSES.numpy(), index.numpy()), 1)
    np.testing.assert_array_equal(select.counts.numpy(), wanted)
    select.eval()(foreground, CLASSES)
    np.testing.assert_array_equal(select.counts.numpy(), wanted)


def test_only_the_counts_are_saved(prompts, foreground):
    select = ContextSelector(prompts)
    select(foreground, CLASSES)
    other = ContextSelector(prompts)
    other.load_state_dict(select.state_dict())
    assert list(select.state_dict()) == ["counts"]
    assert torch.equal(other.counts, select.counts)


def test_the_choice_has_no_gradient_the_similarity_has(prompts, foreground):
    select = ContextSelector(prompts.requires_grad_())
    selection = select(foreground.requires_grad_(), CLASSES)
    assert not selection.text.requires_grad
    assert not list(select.parameters())
    selection.similarity.sum().backward()
    assert foreground.grad.abs().sum() > 0
    assert prompts.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(prompts, foreground, dtype):
    selection = ContextSelector(prompts.to(dtype)).to(dtype)(foreground.to(dtype), CLASSES)
    wanted = ContextSelector(prompts)(foreground, CLASSES)
    assert torch.equal(selection.index, wanted.index)
    torch.testing.assert_close(selection.similarity, wanted.similarity, check_dtype=False, atol=1e-2, rtol=0)


def test_autocast_changes_nothing(prompts, foreground):
    wanted = ContextSelector(prompts)(foreground, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        selection = ContextSelector(prompts)(foreground, CLASSES)
    assert torch.equal(selection.similarity, wanted.similarity)


@pytest.mark.parametrize("mode", ["dynamic", "fixed"])
def test_no_pairs(prompts, foreground, mode):
    select = ContextSelector(prompts, mode=mode)
    text, index, similarity = select(foreground[:0].requires_grad_(), CLASSES[:0])
    assert text.shape == (0, D)
    assert index.shape == similarity.shape == (0,)
    similarity.sum().backward()
    assert not select.counts.any()


def test_int32_classes(prompts, foreground):
    select = ContextSelector(prompts)
    assert torch.equal(select(foreground, CLASSES.int()).index, select(foreground, CLASSES).index)


def test_repr(prompts):
    assert repr(ContextSelector(prompts)) == "ContextSelector(classes=3, templates=4, features=8, mode='dynamic')"


@pytest.mark.parametrize(
    ("prompt_features", "settings", "kind", "text"),
    [
        (
            torch.ones(3, 8),
            {},
            ValueError,
            "Expected argument `prompt_features` to be a tensor (K, m, D), but got shape (3, 8).",
        ),
        (
            torch.ones(3, 4, 8),
            {"mode": "random"},
            ValueError,
            'Expected argument `mode` to be one of "dynamic", "fixed", but got \'random\'.',
        ),
        (torch.ones(3, 4, 8), {"template": 4}, ValueError, "Expected argument `template` to be in [0, 3], but got 4."),
        (torch.ones(3, 4, 8), {"template": "1"}, TypeError, "Expected argument `template` to be"),
    ],
)
def test_settings_are_checked(prompt_features, settings, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        ContextSelector(prompt_features, **settings)


@pytest.mark.parametrize(
    ("foreground", "classes", "kind", "text"),
    [
        (
            torch.ones(2, 3, 8),
            [0, 1],
            ValueError,
            "Expected argument `foreground` to be a tensor (N, D), but got shape (2, 3, 8).",
        ),
        (
            torch.ones(2, 7),
            [0, 1],
            ValueError,
            "Expected argument `foreground` to be a tensor (N, 8), as the prompts, but got shape (2, 7).",
        ),
        (torch.ones(2, 8), [0, 3], ValueError, "Expected argument `classes` to be in [0, 2], but got 3."),
        (torch.ones(2, 8), [-1, 0], ValueError, "Expected argument `classes` to be in [0, 2], but got -1."),
        (
            torch.ones(2, 8),
            [0],
            ValueError,
            "Expected argument `classes` to be a tensor (2,), one class a pair, but got shape (1,).",
        ),
        (
            torch.ones(2, 8),
            [0.0, 1.0],
            TypeError,
            "Expected argument `classes` to be an integer tensor (N,), but got torch.float32.",
        ),
        (
            torch.ones(2, 8),
            [True, False],
            TypeError,
            "Expected argument `classes` to be an integer tensor (N,), but got torch.bool.",
        ),
    ],
)
def test_inputs_are_checked(foreground, classes, kind, text):
    select = ContextSelector(torch.ones(3, 4, 8))
    with pytest.raises(kind, match=re.escape(text)):
        select(foreground, torch.tensor(classes))


def test_classes_that_are_no_tensor():
    text = "Expected argument `classes` to be an integer tensor (N,), but got list."
    with pytest.raises(TypeError, match=re.escape(text)):
        ContextSelector(torch.ones(3, 4, 8))(torch.ones(2, 8), [0, 1])
