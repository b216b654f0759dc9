"""Numbers that are the field's or a model's: statistics of images, mask values, scores, the CRF."""

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
Backend = Literal["auto", "pydensecrf", "torch"]
"""Who computes a CRF."""
Precision = Literal["fp32", "bf16", "fp16"]
"""What networks compute in."""
GAUSSIAN = (3.0, 3.0)
"""Smoothness in IRNet's label mining: standard deviation in pixels, weight."""
BILATERAL = (50.0, 5.0, 10.0)
"""Appearance in IRNet's label mining: standard deviations in pixels and in colour values, weight."""
ITERATIONS = 10
"""Of the CRF's mean field."""
Range = tuple[float, float]
"""What the values of deep images span, the lower one first."""
STRENGTHS = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
"""The penalties that the classifier of whole images chooses among, the strongest first."""
