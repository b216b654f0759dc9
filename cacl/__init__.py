"""Weakly supervised semantic segmentation by class-aware contrastive learning (CA-CL)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cacl._support.lazy import names_of

if TYPE_CHECKING:
    from cacl import pipeline
    from cacl.camnet import CAMNet, CAMOutput
    from cacl.criterion import CACLLoss, CACLTerms
    from cacl.encoders import ImageTextEncoder, load_encoder
    from cacl.losses import BGSuppressionLoss, ITCLoss, RegionLoss, bg_suppression_loss, itc_loss, region_loss
    from cacl.matching import ContrastLoss, MatchingLoss, contrast_loss, matching_loss
    from cacl.prompts import DEFAULT_TEMPLATES, BackgroundSet, PromptSet
    from cacl.regions import Regions, present_pairs, split_regions
    from cacl.selector import ContextSelector, Selection
else:  # nothing before somebody asks for it: `cacl --help` does not wait for torch, nor a loss for torchvision
    __getattr__, __dir__ = names_of(
        __name__,
        camnet="CAMNet CAMOutput",
        criterion="CACLLoss CACLTerms",
        encoders="ImageTextEncoder load_encoder",
        losses="BGSuppressionLoss ITCLoss RegionLoss bg_suppression_loss itc_loss region_loss",
        matching="ContrastLoss MatchingLoss contrast_loss matching_loss",
        prompts="DEFAULT_TEMPLATES BackgroundSet PromptSet",
        regions="Regions present_pairs split_regions",
        selector="ContextSelector Selection",
    )

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
