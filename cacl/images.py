"""Decode photos and masks: every mode, every orientation, and one line for what does not decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors

from cacl._checks import InputError


def read_image(path: Path) -> tv_tensors.Image:
    """Decode an image of any mode and orientation to ``(3, H, W)`` uint8 RGB.

    Raises:
        ValueError: if the file is missing or does not decode.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("I", "F") or image.mode.startswith("I;"):  # 16 bits: Pillow would clip instead of scale
                values = np.asarray(image, dtype=np.float32)
                image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds; each means that the file is broken
        raise InputError(f"{path}: not an image that decodes ({error})") from None
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))


def read_mask(path: Path) -> tv_tensors.Mask:
    """Decode a palette or grey mask to ``(H, W)`` uint8.

    Raises:
        ValueError: if the file is missing, does not decode, or is a colour image.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in ("P", "L", "1"):
                raise InputError(f"{path}: expected a palette or grey mask, but got mode {file.mode}")
            return tv_tensors.Mask(torch.from_numpy(np.array(file, dtype=np.uint8)))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        raise InputError(f"{path}: not a mask that decodes ({error})") from None
