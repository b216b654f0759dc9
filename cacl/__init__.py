"""Weakly supervised semantic segmentation by class-aware contrastive learning (CA-CL)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from cacl.camnet import CAMNet, CAMOutput
from cacl.criterion import CACLLoss, CACLTerms
from cacl.encoders import ImageTextEncoder, load_encoder
from cacl.losses import (
    BGSuppressionLoss,
    ITCLoss,
    RegionLoss,
    bg_suppression_loss,
    itc_loss,
    region_loss,
)
from cacl.matching import ContrastLoss, MatchingLoss, contrast_loss, matching_loss
from cacl.prompts import DEFAULT_TEMPLATES, BackgroundSet, PromptSet
from cacl.regions import Regions, present_pairs, split_regions
from cacl.selector import ContextSelector, Selection

if TYPE_CHECKING:
    from cacl import pipeline

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_TEMPLATES",
    "BGSuppressionLoss",
    "BackgroundSet",
    "CACLLoss",
    "CACLTerms",
    "CAMNet",
    "CAMOutput",
    "ContextSelector",
    "ContrastLoss",
    "ITCLoss",
    "ImageTextEncoder",
    "MatchingLoss",
    "PromptSet",
    "RegionLoss",
    "Regions",
    "Selection",
    "bg_suppression_loss",
    "contrast_loss",
    "itc_loss",
    "load_encoder",
    "matching_loss",
    "pipeline",
    "present_pairs",
    "region_loss",
    "split_regions",
]


def __getattr__(name: str) -> object:
    # The pipeline brings pydantic and torchvision; whoever only wants a loss does not wait for them.
    if name == "pipeline":
        return importlib.import_module("cacl.pipeline")
    raise AttributeError(f"module 'cacl' has no attribute {name!r}")
