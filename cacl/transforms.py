"""Augmentation: random rescale, flip and crop, and what every image goes through before a network (CA-CL, 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from cacl._support.values import check_positive, check_range
from cacl.constants import IGNORE, IMAGENET_MEAN, IMAGENET_STD


def normalize(image: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``(3, H, W)`` uint8 -> float32 normalised with ImageNet's statistics, channels last in memory.

    That is how decoders give images and how networks take them.

    Args:
        image: the image.
        out: where to write, ``(H, W, 3)``; a new tensor if None.
    """
    _, height, width = image.shape
    out = torch.empty(height, width, 3, dtype=torch.float32, device=image.device) if out is None else out
    # A row is treated as a whole: a constant for each of three neighbours is slow.
    statistics = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), dtype=torch.float32, device=image.device)
    mean, std = statistics.repeat(1, width) * 255
    rows = image.as_subclass(Tensor).permute(1, 2, 0).reshape(height, 3 * width)
    torch.sub(rows, mean, out=out.view(height, 3 * width)).div_(std)
    return out.permute(2, 0, 1)


class RandomView:
    """A random view for training: rescale, mirror, crop to a square, normalise.

    The longer side becomes ``crop · U(scale)``, then a random ``crop`` × ``crop`` window is cut out; where the image
    is smaller than the window it lies at a random place, and the rest is the mean colour (0 after normalisation).
    What is random is drawn from the generator that is passed in, and from nothing else.

    Args:
        crop: side of the result in pixels.
        scale: range of the longer side over ``crop``; the default is 320 to 640 pixels at 512.
        flip: chance of the mirror image.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(self, crop: int, *, scale: tuple[float, float] = (0.625, 1.25), flip: float = 0.5) -> None:
        check_positive("crop", crop)
        check_range("scale[0]", scale[0], 0.01, 100)
        check_range("scale[1]", scale[1], scale[0], 100)
        check_range("flip", flip, 0, 1)
        self.crop, self.scale, self.flip = crop, scale, flip

    def __call__(
        self, image: tv_tensors.Image, mask: tv_tensors.Mask | None = None, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """``(3, H, W)`` uint8 and ``(H, W)`` uint8 -> ``(3, crop, crop)`` float32 and ``(crop, crop)`` uint8."""
        factor, mirror, top, left = torch.rand(4, generator=generator, dtype=torch.float32, device="cpu").tolist()
        height, width = image.shape[-2:]
        low, high = self.scale
        longer = self.crop * (low + (high - low) * factor)
        # The window in the rescaled image: where it is larger than the image, `at` is the image's place in it.
        sizes = [max(1, round(side * longer / max(height, width))) for side in (height, width)]
        starts = [int(r * (abs(size - self.crop) + 1)) for r, size in zip((top, left), sizes, strict=True)]
        cut = [start if size > self.crop else 0 for start, size in zip(starts, sizes, strict=True)]
        at = [0 if size > self.crop else start for start, size in zip(starts, sizes, strict=True)]
        kept = [min(size, self.crop) for size in sizes]
        window = (slice(at[0], at[0] + kept[0]), slice(at[1], at[1] + kept[1]))

        def view(x: Tensor) -> Tensor:
            x = F.crop(F.resize(x, sizes, antialias=True), *cut, *kept)
            return F.horizontal_flip(x) if mirror < self.flip else x

        canvas = torch.zeros(self.crop, self.crop, 3, dtype=torch.float32, device=image.device)
        normalize(view(image), out=canvas[window])
        result = canvas.permute(2, 0, 1)
        if mask is None:
            return result, None
        cropped = torch.full((self.crop, self.crop), IGNORE, dtype=torch.uint8, device=mask.device)
        cropped[window] = view(mask)
        return result, cropped
