"""The tables of the chain's stages, and of the report: every setting once, with its type, range and default.

They stand apart from the stages, which bring torch: what is wrong with a configuration is said at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from cacl.constants import STRENGTHS
from cacl.errors import quoted
from cacl.prompts import ORIGAMI, PromptSet
from cacl.settings import (
    CRF,
    BatchSize,
    Cosine,
    Count,
    Epochs,
    Factor,
    FileOrName,
    Mark,
    Positive,
    Radius,
    Schedule,
    Share,
    Side,
    Sigma,
    Switch,
    Table,
    Training,
    Weight,
)


class Warmup(Training):
    """``[warmup]``: the multi-label classifier; 0 epochs start CA-CL from the backbone's own weights."""

    epochs: Epochs = 5
    lr: Weight = 0.1
    """Of the backbone; the classifier's is ten times that."""
    schedule: Schedule = "poly"


METHODS = {"cacl": "CA-CL", "clims": "CLIMS", "qa-clims": "QA-CLIMS", "pole": "POLE"}
"""The values of ``method``, and what people call them."""


class CACL(Training):
    """``[cacl]``: CA-CL training, under the paper's names, or that of another method in its place.

    ``method`` gives the values of the keys that are not given themselves: its authors' for VOC.
    """

    chosen_by: ClassVar[str] = "method"
    choices: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cacl": {},
        "clims": {"epochs": 15, "schedule": "poly", "alpha": 10.0, "gamma": 0.2},
        "qa-clims": {
            "epochs": 15, "batch_size": 8, "lr": 3.5e-4, "schedule": "poly", "alpha": 10.0, "background_weight": 8.0,
            "gamma": 0.2,
        },
        "pole": {"epochs": 15, "schedule": "poly", "alpha": 10.0, "background_weight": 25.0},
    }  # fmt: skip

    method: Literal["cacl", "clims", "qa-clims", "pole"] = "cacl"
    """Whose loss: CA-CL's, or one of :mod:`cacl.methods`."""
    epochs: Epochs = 20
    lr: Weight = 2.5e-4
    """Of the backbone; the classifier's is ten times that."""
    schedule: Schedule = "cosine"
    margin: Annotated[float, Field(ge=0, le=2, strict=True)] = 0.5
    """Of the contrastive loss (eq. 6)."""
    alpha: Weight = 40.0
    """Weight of the image-text contrastive loss (eq. 14); of the other methods, that of the foreground's part."""
    background_weight: Weight = 24.0
    """Weight of the background's part, of the other methods."""
    beta: Weight = 1.0
    """Weight of the background suppression (eq. 14); ``"qa-clims"`` has none."""
    gamma: Weight = 0.4
    """Weight of the region loss (eq. 14); ``"pole"`` has none."""
    threshold: Cosine = 0.26
    """θ of eq. 10, or what it starts from."""
    threshold_mode: Literal["soft", "quantile", "fixed"] = "fixed"
    """How θ changes (see :class:`cacl.BGSuppressionLoss`)."""
    threshold_bounds: tuple[Cosine, Cosine] = (0.2, 0.3)
    """Of θ, in the mode ``"soft"``."""
    threshold_lr: Weight | None = None
    """η of eq. 11, in the mode ``"soft"``; ``lr`` if it is not given."""
    threshold_quantile: Share = 0.8
    """Of the similarities, in the mode ``"quantile"``."""
    threshold_momentum: Share = 0.99
    """Of the running quantile."""
    template: Count | None = None
    """Always this template instead of DCPS."""
    contrast_temperature: Factor = 0.7
    """Of the contrast of ``"qa-clims"``."""
    words: tuple[str, ...] | None = None
    """The background words of all classes, of ``"clims"`` and ``"pole"``; by default their ten for VOC."""
    synonyms: FileOrName = "voc"
    """Other words for classes, of ``"pole"``: those of VOC that come with the package, a JSON file class -> words, or
    empty for none."""


class CAMs(Table):
    """``[cams]``: CAMs at inference, or seeds in their place."""

    source: Annotated[Literal["cacl", "clip"] | Path, Mark.EVALUATION] = "cacl"
    """Where the CAMs of the training images come from: ``"cacl"`` is the network of the stage of this name, ``"clip"``
    CLIP-ES, which trains nothing and needs an encoder that knows what it sees where (:class:`cacl.clip_es.CLIPES`),
    a path a folder with masks ``<id>.png`` or soft maps ``<id>.npz`` of others (:func:`cacl.seeds.read_seeds`). But
    for the first, the stages before it are left out where nothing else needs them."""
    compare: Switch = False
    """Of seeds in their place: train CA-CL all the same, and say where the two disagree."""
    template: Annotated[str, Mark.EVALUATION, AfterValidator(lambda template: PromptSet([template])[0])] = ORIGAMI
    """Of CLIP-ES's texts."""
    words: Annotated[Literal["shared", "class"], Mark.EVALUATION] = "shared"
    """CLIP-ES's background words: the same for all classes, or each class's own of ``[backgrounds]``."""
    scales: Annotated[tuple[Factor, ...], Field(min_length=1)] = (0.5, 1.0, 1.5, 2.0)
    """Factors of the image's size."""
    flip: Switch = True
    """Add the mirror image's maps."""
    background_score: Annotated[Share | Literal["auto"], Mark.EVALUATION] = "auto"
    """A pixel whose largest value is not above this is background where CAMs are scored and shown; ``"auto"`` is what
    the CAMs ask for by their values alone (see :func:`cacl.thresholds.split_scores`)."""

    @field_validator("source", mode="before")
    @classmethod
    def _is_a_name_or_a_folder(cls, source: Any) -> Any:
        if not isinstance(source, str | Path) or not str(source):
            raise ValueError(f'expected "cacl", "clip" or the path of a folder, but got {quoted(source)}')
        return source

    @model_validator(mode="after")
    def _has_what_to_compare(self) -> CAMs:
        if self.compare and self.source == "cacl":
            raise ValueError("compare: expected another source than 'cacl' to compare its CAMs with")
        return self


class IRN(Training, CRF):
    """``[irn]``: label mining and IRNet (Ahn et al. 2019)."""

    epochs: Epochs = 3
    lr: Weight = 0.1
    """Of the edge branch; that of the displacement branch is ten times that."""
    schedule: Schedule = "poly"
    scale: tuple[Weight, Weight] = (0.5, 1.5)
    radius: Radius = 10
    """Pairs of pixels of the stride-4 grid that are less than this apart are looked at."""
    foreground_score: Share | Literal["auto"] = "auto"
    """Background score of the CRF that decides what is foreground; 0.30 in IRNet. ``"auto"`` is the higher one of the
    two that the CAMs ask for by their values alone (see :func:`cacl.thresholds.split_scores`)."""
    background_score: Share | Literal["auto"] = "auto"
    """Background score of the CRF that decides what is background; 0.10 in IRNet. ``"auto"`` is the lower one."""

    @model_validator(mode="after")
    def _in_order(self) -> IRN:
        low, high = self.background_score, self.foreground_score
        if low != "auto" and high != "auto" and low > high:
            raise ValueError(f"background_score: expected at most foreground_score {high}, but got {low}")
        return self


class Walk(Table):
    """The random walk: that of IRNet (:func:`cacl.random_walk.propagate`) or over colours (:func:`~.spread`)."""

    power: Annotated[float, Field(ge=0.01, le=100, strict=True)] = 1.0
    """Of the CAMs before the walk; above 1 for CAMs that reach far beyond the objects."""
    radius: Radius = 5
    """In pixels of the stride-4 grid, of the neighbours of a step."""
    beta: Weight = 10.0
    """IRNet: power of the affinity: the larger, the less passes an edge."""
    steps: Count = 256
    """IRNet: steps of the walk."""
    colour: Sigma = 5.0
    """Colours: the standard deviation, of 255, of the affinity."""


class Masks(CRF, Walk):
    """``[masks]``: random walk and pseudo masks."""

    affinity: Literal["none", "colour", "irn"] = "colour"
    """What a random walk spreads the CAMs over before the CRF: ``"colour"`` pixels of like colour, ``"irn"`` all up to
    the edges of IRNet, which is trained for it; ``"none"`` is no walk."""
    background_score: Share | Literal["auto"] = "auto"
    """A pixel whose largest value is not above this is background; ``"auto"`` is the lower one of the two scores that
    the CAMs ask for by their values alone (see :func:`cacl.thresholds.split_scores`), half-way to that of each class
    (:func:`cacl.thresholds.class_levels`)."""
    unsure: Share = 0.05
    """255 where a pixel is foreground at one of ``background_score ± unsure`` and background at the other."""
    regions: Annotated[Path | None, Mark.EVALUATION] = None
    """A folder of proposals, such as superpixels or SAM's, ``<id>.png`` with a number a region and 0 for none; masks
    are snapped to them (:func:`cacl.mining.snap`)."""


class Segment(Training):
    """``[segment]``: DeepLabV2 on the pseudo masks.

    ``preset`` gives the values of the keys that are not given themselves: ``"deeplab"`` those of the public recipe
    (20 000 iterations on VOC's 10 582 images), ``"paper"`` those of CA-CL (40 000 iterations).
    """

    chosen_by: ClassVar[str] = "preset"
    choices: ClassVar[Mapping[str, Mapping[str, Any]]] = {"deeplab": {}, "paper": {"epochs": 37.8, "lr": 0.005}}

    preset: Literal["deeplab", "paper"] = "deeplab"
    """Whose numbers."""
    backbone: str = "resnet101"
    """A torchvision ResNet, ``"timm:NAME"``, or ``"scenes"``; empty for that of ``[camnet]``, or the one passed in."""
    weights: FileOrName = "DEFAULT"
    """As in ``[camnet]``, or ``"cacl"``: the backbone that CA-CL has trained, of the same network."""
    epochs: Epochs = 18.9
    batch_size: BatchSize = 10
    lr: Weight = 2.5e-4
    """Of the trunk."""
    head_factor: Weight = 10.0
    """The head's weights learn at this times ``lr``, its biases at twice that."""
    freeze_batch_norm: Switch = True
    """Leave statistics and weights of batch norm as they are."""
    multi_scale: Switch = True
    """Train at three scales and their maximum; else at one, whose loss has one term instead of four: at equal time it
    learns more from few photos, at a higher ``lr``."""
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.9
    weight_decay: Weight = 5e-4
    """None for the head's biases."""
    schedule: Schedule = "poly"
    crop: Side = 321
    scale: tuple[Weight, Weight] = (0.78, 2.34)
    """The range of the longer side over ``crop``: half to three halves of a photo of 500 pixels."""


class Tags(Table):
    """``[tags]``: the classifier of whole images."""

    strengths: Annotated[tuple[Sigma, ...], Field(min_length=1)] = STRENGTHS
    """The penalties that cross-validation on the tags chooses among."""


class Photos(CRF):
    """How masks of photos are made: how large they are seen, and the CRF on DeepLabV2's output of the public recipe."""

    gaussian: tuple[Sigma, Weight] = (1.0, 3.0)
    bilateral: tuple[Sigma, Sigma, Weight] = (67.0, 3.0, 4.0)
    longest: Annotated[int, Field(ge=32, le=16384, strict=True)] = 1024
    """Longer side in pixels of what the network and the CRF see; larger photos are scaled down to it."""


class Predict(Photos):
    """``[predict]``: masks by the segmenter."""

    split: Annotated[str, Mark.EVALUATION] = ""
    """Split that masks are made for; if empty, ``val`` of VOC, and that of ``[data] eval`` of other data, or where that
    is empty the training images. Masks of these hold their own labels only."""
    tags: Switch = False
    """Weigh the network's classes by those that the encoder sees in the whole photo (the stage ``tags``), which helps
    a network that has seen few photos; tables against papers go without."""


class Report(Table):
    """``[report]``: what is shown at the end."""

    images: Positive = 8
    """Photos in each table of photos."""


TABLES: dict[str, type[Table]] = {
    "warmup": Warmup, "cacl": CACL, "cams": CAMs, "irn": IRN, "masks": Masks, "segment": Segment, "tags": Tags,
    "predict": Predict,
}  # fmt: skip
"""Stage of CA-CL -> its table, in the order of :data:`cacl.stages.chain.CHAIN`."""
