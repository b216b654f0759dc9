"""Numbers that are the field's or a model's: statistics of images, mask values, the background score of reports."""

from __future__ import annotations

from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IGNORE = 255
"""Mask value of pixels that no loss and no metric looks at."""
BACKGROUND_SCORE = 0.15
"""The fixed background score of the reported numbers."""
Reduction = Literal["mean", "sum", "none"]
"""What becomes of the parts of a loss."""
REDUCTIONS = ("mean", "sum", "none")
