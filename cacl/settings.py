"""Settings: number types with their ranges, what a table is, the tables that no stage owns, and what stages share."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from cacl._support.names import is_utf8, state_of
from cacl._support.values import check_span
from cacl.constants import BILATERAL, GAUSSIAN, ITERATIONS, Backend, Precision
from cacl.datasets.formats import check_format
from cacl.errors import quoted
from cacl.prompts import DEFAULT_TEMPLATES, PromptSet

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from cacl.crf import CRFArguments


class Mark(enum.Enum):
    """What is special about a setting, beside its type: ``Annotated[float, Mark.EVALUATION]``."""

    EVALUATION = "only an evaluation reads it, or `depends` has what follows from it: no part of the stage's key"
    FILE = "the path of a file, or else a name"


Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Positive = Annotated[int, Field(ge=1, le=10**6, strict=True)]
BatchSize = Annotated[int, Field(ge=1, le=2**16, strict=True)]
Side = Annotated[int, Field(ge=16, le=2**14, strict=True)]
Radius = Annotated[int, Field(ge=1, le=64, strict=True)]
Epochs = Annotated[float, Field(ge=0, le=1e6, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Cosine = Annotated[float, Field(ge=-1, le=1, strict=True)]
Sigma = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Factor = Annotated[float, Field(gt=0, le=16, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
FileOrName = Annotated[str, Mark.FILE]
Schedule = Literal["cosine", "poly", "constant"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class Table(BaseModel):
    """One table of the TOML file: every key with its type, range and default, which stand nowhere else.

    A class may name a key that chooses among several sets of defaults, such as ``preset``; what the user gives himself
    wins over them, also when another set is chosen later.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    chosen_by: ClassVar[str] = ""
    """The key that chooses a set of defaults."""
    choices: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Value of that key -> key -> default, where it is another than the class's."""

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str | Path) and ("\0" in str(text) or not is_utf8(str(text))):
                raise ValueError(f"expected text in UTF-8 without zeros, but got {quoted(str(text))}")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _chosen(cls, given: Any, validated: ModelWrapValidatorHandler[Table]) -> Table:
        if not cls.chosen_by or not isinstance(given, dict):
            return validated(given)
        choice = given.get(cls.chosen_by, cls.model_fields[cls.chosen_by].default)
        defaults = cls.choices.get(choice, {}) if isinstance(choice, str) else {}
        table = validated({**defaults, **given})
        table.model_fields_set.difference_update(defaults.keys() - given.keys())
        return table

    @property
    def chosen(self) -> set[str]:
        """The keys whose values the user has not given, but chosen with another key."""
        return {key for keys in self.choices.values() for key in keys} - self.model_fields_set

    def differing(self, *, evaluation: bool = False) -> dict[str, Any]:
        """What differs from the defaults, and what has none, as plain values; of a file also its size and time.

        Args:
            evaluation: the settings that only an evaluation reads, instead of the others.
        """
        values = {}
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            differs = field.is_required() or value != field.get_default(call_default_factory=True)
            if differs and (Mark.EVALUATION in field.metadata) == evaluation:
                values[key] = self.model_dump(mode="json", include={key})[key]
                if Mark.FILE in field.metadata or isinstance(value, Path):
                    values[key] = [values[key], *state_of(Path(value))]
        return values


class Training(Table):
    """What every stage that trains has."""

    epochs: Epochs
    """Passes over the images; need not be whole."""
    batch_size: BatchSize = 16
    """Images a step, of all processes together."""
    lr: Weight
    """Learning rate at the start."""
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Of SGD."""
    weight_decay: Weight = 1e-4
    """Of SGD."""
    schedule: Schedule
    """How the learning rate falls: see :class:`cacl.training.Loop`."""
    crop: Side = 512
    """Side in pixels of what a step sees of an image."""
    scale: tuple[Weight, Weight] = (0.625, 1.25)
    """Range of the longer side over ``crop``."""


class CRF(Table):
    """What every stage with a CRF has (see :class:`cacl.crf.DenseCRF`)."""

    gaussian: tuple[Sigma, Weight] = GAUSSIAN
    """Smoothness: standard deviation in pixels, weight."""
    bilateral: tuple[Sigma, Sigma, Weight] = BILATERAL
    """Appearance: standard deviations in pixels and in colour values (of 255), weight."""
    iterations: Count = ITERATIONS
    """0 for no CRF."""

    def arguments(self, machine: Machine) -> CRFArguments:
        """Of the CRFs on a machine."""
        from cacl.crf import check_backend

        return {
            "gaussian": self.gaussian,
            "bilateral": self.bilateral,
            "iterations": self.iterations,
            "backend": check_backend(machine.crf),
            "device": machine.device if machine.crf_on_gpu else "cpu",
        }


class Run(Table):
    """``[run]``: where, and on what."""

    out: Path = Field(default_factory=lambda: Path.cwd() / "cacl-run")
    """The run folder."""
    seed: Count = 0
    """Of everything that is random."""
    device: str = "auto"
    """A torch device; ``"auto"`` takes a GPU if there is one."""
    precision: Precision | Literal["auto"] = "auto"
    """What networks compute in; ``"auto"`` is bf16 where the device has it natively and else fp32, decided when the run
    begins: its ``config.toml`` has it."""
    workers: Count = 2
    """Processes that load images, at most one a core; changes nothing in the result."""
    checkpoint_seconds: Weight = 60.0
    """Time between checkpoints."""
    crf: Backend = "auto"
    """Backend of the CRFs; ``"auto"`` takes pydensecrf if it is installed."""
    compile: Switch = False
    """``torch.compile`` the networks that are trained."""
    timeout_seconds: Annotated[float, Field(gt=0, le=1e6, strict=True)] = 1800.0
    """In a run of several processes, one that has not answered for so long is given up."""
    progress: Switch = True
    """Show progress bars where there is a terminal or a notebook."""
    track: tuple[TrackerName, ...] = ()
    """Trackers that get all that is logged and scored (see :mod:`cacl.trackers`)."""


class Data(Table):
    """``[data]``: the images."""

    format: Annotated[str, AfterValidator(check_format)]
    """One of :data:`cacl.datasets.FORMATS`; ``"scenes"`` is drawn into ``root`` when it is first needed."""
    root: Path
    """The folder."""
    train: str = "train"
    """Split that is trained on: images and labels, never a mask."""
    eval: str = "val"
    """Split that CAMs are evaluated on where it has masks; empty for none."""
    sample: Annotated[int, Field(ge=1, lt=2**63, strict=True)] = 20000
    """The most images of a split, evenly spread, that are looked at before the first step; ``cacl check`` opens all."""
    range: Annotated[tuple[Number, Number], AfterValidator(check_span)] | None = None
    """What the values of deep images span, such as ``[0, 4095]``; by their type if None (see
    :func:`cacl.images.read_image`)."""


class Scenes(Table):
    """``[scenes]``: what is drawn for the data format ``"scenes"`` (see :func:`cacl.scenes.generate`)."""

    train: Positive = 400
    """Scenes of the split ``train``."""
    val: Positive = 100
    """Scenes of the split ``val``."""
    size: Annotated[int, Field(ge=32, le=4096, strict=True)] = 160
    """Side in pixels."""
    seed: Count = 0
    """Of the drawing; ``[run] seed`` is that of the training."""


class Encoder(Table):
    """``[encoder]``: the image-text encoder."""

    name: FileOrName = "ViT-B/32"
    """For :func:`cacl.load_encoder`."""


class Prompts(Table):
    """``[prompts]``: the context templates."""

    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    """Each with exactly one ``{}``."""

    @field_validator("templates")
    @classmethod
    def _are_templates(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(PromptSet(templates))


class Backgrounds(Table):
    """``[backgrounds]``: the background words."""

    n: Positive | None = None
    """The first n words of each class; by default 5 of the built-in lists, and all of a file."""
    file: Path | None = None
    """A JSON object class -> words; ``backgrounds.json`` beside the data set's CSV, or else the built-in lists."""


class CAMNetwork(Table):
    """``[camnet]``: the network."""

    backbone: str = "resnet50"
    """A torchvision ResNet, ``"timm:NAME"``, or ``"scenes"``."""
    weights: FileOrName = "DEFAULT"
    """torchvision's name of the pretrained weights, ``"DEFAULT"`` for the best ones (of timm's names their own), or the
    path of a file with some; empty for random ones."""


@dataclass(frozen=True)
class Machine:
    """Where and how it is computed; nothing here changes a result by more than its rounding.

    Args:
        device: where networks are.
        workers: processes that load images or take one each; 0 does everything in this one.
        precision: what networks compute in: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"``.
        progress: show progress bars where there is a terminal or a notebook.
        crf: backend of the CRFs: ``"auto"``, ``"pydensecrf"``, ``"torch"``.
    """

    device: torch.device | str = "cpu"
    workers: int = 0
    precision: Precision = "fp32"
    progress: bool = True
    crf: Backend = "auto"

    @property
    def on_gpu(self) -> bool:
        return str(self.device).partition(":")[0] == "cuda"

    def autocast(self) -> AbstractContextManager[None]:
        """Where networks compute."""
        from cacl._support.precision import computing_in

        return computing_in(self.precision, self.device)

    @property
    def crf_on_gpu(self) -> bool:
        """Whether CRFs are done by a GPU, for which one process is enough."""
        from cacl.crf import check_backend

        return self.on_gpu and check_backend(self.crf) == "torch"

    @property
    def crf_workers(self) -> int:
        """Processes that do CRFs."""
        return 0 if self.crf_on_gpu else self.workers
