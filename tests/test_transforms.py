"""Augmentation: image and mask move together, and nothing but the generator decides."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from cacl.transforms import IGNORE, RandomView, normalize


def make(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = (pixels[..., 0] > 127).astype(np.uint8)
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(mask))


def draw(seed):
    return torch.Generator().manual_seed(seed)


def test_normalize_is_the_imagenet_formula():
    image, _ = make(4, 5)
    wanted = (image.numpy() / 255 - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[
        :, None, None
    ]
    np.testing.assert_allclose(normalize(image).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (7, 200), (1, 1), (300, 500)])
def test_shapes_at_any_size(size):
    image, mask = RandomView(48)(*make(*size), generator=draw(1))
    assert image.shape == (3, 48, 48)
    assert image.dtype == torch.float32
    assert mask.shape == (48, 48)
    assert mask.dtype == torch.uint8
    assert type(image) is torch.Tensor


def test_a_small_image_lies_whole_on_the_mean_colour():
    view = RandomView(64, scale=(0.5, 0.5), flip=0)
    image, mask = view(*make(32, 24), generator=draw(3))
    inside = mask != IGNORE
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    assert (len(rows), len(columns)) == (32, 24)
    assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert (image[:, ~inside] == 0).all()
    # At scale 0.5 of 64 the longer side stays 32: the pixels are the original ones.
    original, labels = make(32, 24)
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    torch.testing.assert_close(image[:, *window], normalize(original))
    assert torch.equal(mask[window], labels.as_subclass(torch.Tensor))


def test_a_large_image_is_resized_as_pillow_does_and_cut():
    view = RandomView(32, scale=(1.25, 1.25), flip=0)
    original, _ = make(80, 80)
    image, _ = view(original, generator=draw(5))
    resized = Image.fromarray(original.permute(1, 2, 0).numpy()).resize((40, 40), Image.Resampling.BILINEAR)
    whole = normalize(tv_tensors.Image(torch.from_numpy(np.array(resized)).permute(2, 0, 1)))
    gaps = [(whole[:, i : i + 32, j : j + 32] - image).abs().mean().item() for i in range(9) for j in range(9)]
    assert min(gaps) < 0.01 < sorted(gaps)[1]


def test_mirror_is_the_mirror():
    straight, _ = RandomView(40, scale=(1, 1), flip=0)(*make(40, 40), generator=draw(2))
    mirrored, _ = RandomView(40, scale=(1, 1), flip=1)(*make(40, 40), generator=draw(2))
    assert torch.equal(mirrored.flip(-1), straight)


def test_only_the_generator_decides():
    state = torch.get_rng_state()
    first = RandomView(48)(*make(50, 70), generator=draw(7))[0]
    torch.manual_seed(123)
    assert torch.equal(RandomView(48)(*make(50, 70), generator=draw(7))[0], first)
    assert not torch.equal(RandomView(48)(*make(50, 70), generator=draw(8))[0], first)
    torch.set_rng_state(state)
    RandomView(48)(*make(50, 70), generator=draw(7))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 0}, "Expected argument `crop` to be a positive integer, but got 0."),
        (
            {"crop": 8, "scale": (2.0, 1.0)},
            r"Expected argument `scale\[1\]` to be a number in \[2, 100\], but got 1.0.",
        ),
        ({"crop": 8, "flip": 2.0}, r"Expected argument `flip` to be a number in \[0, 1\], but got 2.0."),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomView(**arguments)
