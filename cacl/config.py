"""The configuration: a tree of tables, read from TOML on top of a preset; unknown keys are refused."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from cacl.errors import InputError, did_you_mean, quoted, shown
from cacl.prompts import DEFAULT_TEMPLATES, PromptSet

PRESETS = ("voc", "coco", "scenes")
_ASSETS = Path(__file__).with_name("assets")

Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Positive = Annotated[int, Field(ge=1, le=10**6, strict=True)]
Batch = Annotated[int, Field(ge=1, le=2**16, strict=True)]
Side = Annotated[int, Field(ge=16, le=2**14, strict=True)]
Radius = Annotated[int, Field(ge=1, le=64, strict=True)]
Epochs = Annotated[float, Field(ge=0, le=1e6, strict=True)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Cosine = Annotated[float, Field(ge=-1, le=1, strict=True)]
Sigma = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Factor = Annotated[float, Field(gt=0, le=16, strict=True)]
Switch = Annotated[bool, Field(strict=True)]


class Table(BaseModel):
    """One table of the TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str | Path) and ("\0" in str(text) or not _is_utf8(str(text))):
                raise ValueError(f"expected text in UTF-8 without zeros, but got {quoted(str(text))}")
        return value


class Run(Table):
    """``[run]``: where, and on what."""

    out: Path = Field(default_factory=lambda: Path.cwd() / "cacl-run")
    """The run folder."""
    seed: Count = 0
    device: str = "auto"
    """A torch device; ``"auto"`` takes a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: Count = 2
    """Processes that load images, at most one a core; changes nothing in the result."""
    checkpoint_seconds: Weight = 60.0
    crf: Literal["auto", "pydensecrf", "torch"] = "auto"
    """Backend of the CRFs; ``"auto"`` takes pydensecrf if it is installed."""
    compile: Switch = False
    """``torch.compile`` the networks that are trained."""
    timeout_seconds: Annotated[float, Field(gt=0, le=1e6, strict=True)] = 1800.0
    """In a run of several processes, one that has not answered for so long is given up."""


class Data(Table):
    """``[data]``: the images."""

    format: Literal["voc", "coco", "csv", "scenes"]
    """``"scenes"`` is drawn into ``root`` when it is first needed (see :func:`cacl.scenes.generate`)."""
    root: Path
    train: str = "train"
    """Split that is trained on: images and labels, never a mask."""
    eval: str = "val"
    """Split that CAMs are evaluated on where it has masks; empty for none."""


class Scenes(Table):
    """``[scenes]``: what is drawn for the data format ``"scenes"``."""

    train: Positive = 400
    val: Positive = 100
    size: Annotated[int, Field(ge=32, le=4096, strict=True)] = 160
    seed: Count = 0
    """Of the drawing; ``[run] seed`` is that of the training."""


class Encoder(Table):
    """``[encoder]``: the image-text encoder."""

    name: str = "ViT-B/32"
    """For :func:`cacl.load_encoder`."""


class Prompts(Table):
    """``[prompts]``: the context templates."""

    templates: tuple[str, ...] = DEFAULT_TEMPLATES

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
    weights: str = "DEFAULT"
    """torchvision's name of the pretrained weights, ``"DEFAULT"`` for the best ones, or the path of a file with some;
    empty for random ones."""


class Training(Table):
    """What every stage that trains has."""

    epochs: Epochs
    batch_size: Batch = 16
    lr: Weight
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    weight_decay: Weight = 1e-4
    schedule: Literal["cosine", "poly", "constant"]
    crop: Side = 512
    scale: tuple[Weight, Weight] = (0.625, 1.25)
    """Range of the longer side over ``crop``."""


class Warmup(Training):
    """``[warmup]``: the multi-label classifier; 0 epochs start CA-CL from the backbone's own weights."""

    epochs: Epochs = 5
    lr: Weight = 0.1
    schedule: Literal["cosine", "poly", "constant"] = "poly"


class CACL(Training):
    """``[cacl]``: CA-CL training, under the paper's names."""

    epochs: Epochs = 20
    lr: Weight = 2.5e-4
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    margin: Annotated[float, Field(ge=0, le=2, strict=True)] = 0.5
    alpha: Weight = 40.0
    beta: Weight = 1.0
    gamma: Weight = 0.4
    threshold: Cosine = 0.26
    threshold_mode: Literal["soft", "quantile", "fixed"] = "fixed"
    threshold_bounds: tuple[Cosine, Cosine] = (0.2, 0.3)
    threshold_lr: Weight | None = None
    threshold_quantile: Share = 0.8
    threshold_momentum: Share = 0.99
    template: Count | None = None
    """Always this template instead of DCPS."""


class CAMs(Table):
    """``[cams]``: CAMs at inference."""

    scales: Annotated[tuple[Factor, ...], Field(min_length=1)] = (0.5, 1.0, 1.5, 2.0)
    flip: Switch = True


class Refined(Table):
    """What every stage with a CRF has (see :class:`cacl.crf.DenseCRF`)."""

    gaussian: tuple[Sigma, Weight] = (3.0, 3.0)
    """Smoothness: standard deviation in pixels, weight."""
    bilateral: tuple[Sigma, Sigma, Weight] = (50.0, 5.0, 10.0)
    """Appearance: standard deviations in pixels and in colour values (of 255), weight."""
    iterations: Count = 10
    """0 for no CRF."""


class IRN(Training, Refined):
    """``[irn]``: label mining and IRNet (Ahn et al. 2019)."""

    epochs: Epochs = 3
    lr: Weight = 0.1
    """Of the edge branch; that of the displacement branch is ten times that."""
    schedule: Literal["cosine", "poly", "constant"] = "poly"
    scale: tuple[Weight, Weight] = (0.5, 1.5)
    radius: Radius = 10
    """Pairs of pixels of the stride-4 grid that are less than this apart are looked at."""
    foreground_score: Share = 0.30
    background_score: Share = 0.10
    """Background scores of the two CRFs of the label mining."""


class Masks(Refined):
    """``[masks]``: random walk and pseudo masks."""

    background_score: Share = 0.25
    unsure: Share = 0.05
    """255 where a pixel is foreground at one of ``background_score ± unsure`` and background at the other."""
    power: Annotated[float, Field(ge=0.01, le=100, strict=True)] = 1.0
    """Of the CAMs before the walk; above 1 for CAMs that reach far beyond the objects."""
    radius: Radius = 5
    beta: Weight = 10.0
    steps: Count = 256


class Segment(Training):
    """``[segment]``: DeepLabV2 on the pseudo masks.

    ``preset`` gives the values of the keys that are not given themselves: ``"deeplab"`` those of the public recipe
    (20 000 iterations on VOC's 10 582 images), ``"paper"`` those of CA-CL (40 000 iterations).
    """

    preset: Literal["deeplab", "paper"] = "deeplab"
    backbone: str = "resnet101"
    """A torchvision ResNet or ``"scenes"``; empty for that of ``[camnet]``, or the one that was passed in."""
    weights: str = "DEFAULT"
    """As in ``[camnet]``, or ``"cacl"``: the backbone that CA-CL has trained, of the same network."""
    epochs: Epochs
    batch_size: Batch = 10
    lr: Weight
    """Of the trunk."""
    head_factor: Weight = 10.0
    """The head's weights learn at this times ``lr``, its biases at twice that."""
    freeze_batch_norm: Switch = True
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.9
    weight_decay: Weight = 5e-4
    schedule: Literal["cosine", "poly", "constant"] = "poly"
    crop: Side = 321
    scale: tuple[Weight, Weight] = (0.78, 2.34)
    """The range of the longer side over ``crop``: half to three halves of a photo of 500 pixels."""

    @model_validator(mode="wrap")
    @classmethod
    def _of_preset(cls, given: Any, validated: ModelWrapValidatorHandler[Segment]) -> Segment:
        if not isinstance(given, dict):
            return validated(given)
        preset = _SEGMENT["paper" if given.get("preset") == "paper" else "deeplab"]
        table = validated({**preset, **given})
        table.model_fields_set.difference_update(preset.keys() - given.keys())  # so that another preset gives its own
        return table


_SEGMENT = {"deeplab": {"epochs": 18.9, "lr": 2.5e-4}, "paper": {"epochs": 37.8, "lr": 0.005}}


class Predict(Refined):
    """``[predict]``: masks by the segmenter."""

    split: str = ""
    """Split that masks are made for; if empty, ``val`` of VOC, and that of ``[data] eval`` of other data."""
    longest: Annotated[int, Field(ge=32, le=16384, strict=True)] = 1024
    """Longer side in pixels of what the network and the CRF see; larger photos are scaled down to it."""
    gaussian: tuple[Sigma, Weight] = (1.0, 3.0)
    bilateral: tuple[Sigma, Sigma, Weight] = (67.0, 3.0, 4.0)


class Report(Table):
    """``[report]``: what is shown at the end."""

    images: Positive = 8


class Config(Table):
    """The whole configuration; :meth:`load` reads one."""

    run: Run = Field(default_factory=Run)
    data: Data
    scenes: Scenes = Scenes()
    encoder: Encoder = Encoder()
    prompts: Prompts = Prompts()
    backgrounds: Backgrounds = Backgrounds()
    camnet: CAMNetwork = CAMNetwork()
    warmup: Warmup = Warmup()
    cacl: CACL = CACL()
    cams: CAMs = CAMs()
    irn: IRN = IRN()
    masks: Masks = Masks()
    segment: Segment = Field(default_factory=lambda: Segment.model_validate({}))
    predict: Predict = Predict()
    report: Report = Report()

    @classmethod
    def load(cls, source: str | PathLike[str], overrides: Sequence[str] = ()) -> Config:
        """Read a preset (``"voc"``, ``"coco"``, ``"scenes"``) or a TOML file.

        A file may name the preset that it builds on in a top-level key ``base``. Its relative paths are taken from
        its own folder, those of overrides and presets from the current one.

        Args:
            source: the preset's name or the file's path.
            overrides: ``"table.key=value"``, the value as in TOML; what is no TOML value is a string.

        Raises:
            ValueError: one line that names file, table and key.
        """
        name, where = str(source), shown(source)
        tables = _preset(name) if name in PRESETS else _file(Path(name))
        tables = _merge(tables, _absolute(_overrides(overrides), Path.cwd()))
        try:
            config = cls.model_validate(tables)
        except ValidationError as error:
            raise InputError("\n".join(f"{where}: {_line(cls, e)}" for e in error.errors())) from None
        own = name not in PRESETS and Path(name).absolute() == config.run.out.absolute() / "config.toml"
        if own and Path(name).read_text(encoding="utf-8") != config.to_toml(config.run.out):
            raise InputError(f"{where}: [run] out: expected another folder: this file would be overwritten")
        return config

    @classmethod
    def of_run(cls, run: Path) -> Config:
        """The configuration of a run folder, also of one that was moved or that an older version wrote.

        Raises:
            ValueError: if there is none.
        """
        # With another folder to write to, since a run's own configuration is taken for a mistake where it would change.
        return cls.load(run / "config.toml", ["run.out=elsewhere"]).changed({"run": {"out": run.absolute()}})

    @property
    def segmented_split(self) -> str:
        """The split that the segmenter makes masks for; empty for none."""
        # CAMs of VOC are scored on its training images, as the field does, and segmenters on the others.
        standard = "val" if self.data.format == "voc" and self.data.eval else self.data.eval
        return self.predict.split or standard

    def changed(self, changes: Mapping[str, Mapping[str, Any]]) -> Config:
        """A copy with other values, table -> key -> value."""
        given = _merge(self.model_dump(exclude_unset=True), {"run": {"out": self.run.out}})  # not of another folder now
        return Config.model_validate(_merge(given, changes))

    def to_toml(self, folder: Path | None = None) -> str:
        """The configuration as TOML; loads back to an equal one.

        What a preset within a table gives stands there as a comment, so that another preset in its place gives its own.

        Args:
            folder: where the file will lie. Paths in it are relative to it, so that it may be moved with its files.
        """
        lines = []
        tables = self.model_dump(mode="json")
        for table, key in _PATHS:
            path = tables[table][key]
            if folder is not None and path and Path(path).is_relative_to(folder):
                tables[table][key] = Path(path).relative_to(folder).as_posix()
        for name, table in tables.items():
            given = getattr(self, name)
            marks = {k: "# " if _is_required(given, k) and k not in given.model_fields_set else "" for k in table}
            lines += [f"[{name}]", *(f"{marks[k]}{k} = {_value(v)}" for k, v in table.items() if v is not None), ""]
        return "\n".join(lines)


def _is_required(table: Table, key: str) -> bool:
    return type(table).model_fields[key].is_required()


_PATHS = (("run", "out"), ("data", "root"), ("backgrounds", "file"))


def _preset(name: str) -> dict[str, Any]:
    return _absolute(_toml(_ASSETS / "presets" / f"{name}.toml"), Path.cwd())


def _file(path: Path) -> dict[str, Any]:
    tables = _absolute(_toml(path), path.absolute().parent)
    base = tables.pop("base", None)
    if base is None:
        return tables
    if base not in PRESETS:
        raise InputError(f"{shown(path)}: base: expected a preset ({', '.join(PRESETS)}), but got {quoted(base)}")
    return _merge(_preset(base), tables)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        hint = f" and no preset ({', '.join(PRESETS)})" if len(path.parts) == 1 and not path.suffix else ""
        raise InputError(f"{shown(path)}: no such file{hint}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: numbers of thousands of digits too
        raise InputError(f"{shown(path)}: expected a TOML file, but {error}") from None


def _overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        table, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise InputError(f"Expected an override like cacl.epochs=3, but got {override!r}.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text.strip()
        tables.setdefault(table, {})[name] = value
    return tables


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def _absolute(tables: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths -> absolute ones."""
    for table, key in _PATHS:
        values = tables.get(table)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            values[key] = str(folder / os.path.expanduser(values[key]))
    for table, key in (("encoder", "name"), ("camnet", "weights"), ("segment", "weights")):
        values = tables.get(table)
        if isinstance(values, dict) and isinstance(values.get(key), str) and values[key]:
            checkpoint = folder / os.path.expanduser(values[key])
            if checkpoint.is_file():  # else it is a name
                values[key] = str(checkpoint)
    return tables


def _line(model: type[BaseModel], error: Any) -> str:
    """One of pydantic's errors in one line that names table and key."""
    where = [shown(part) for part in error["loc"]]
    for part in where[:-1]:
        kind = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            break
        model = kind
    name = f"[{where[0]}] {'.'.join(where[1:])}" if len(where) > 1 else f"[{where[0]}]"
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown {'key' if len(where) > 1 else 'table'}{did_you_mean(where[-1], model.model_fields)}"
    if error["type"] == "missing":
        return f"{name}: missing"
    if error["type"] == "value_error":  # of this package: a whole sentence
        return f"{name}: {error['msg'].removeprefix('Value error, ')}"
    return f"{name}: {error['msg'][0].lower() + error['msg'][1:]}, but got {quoted(error['input'])}"


def _is_utf8(text: str) -> bool:
    """Names of files need not be; what is no UTF-8 in them Python keeps as half characters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _value(value: Any) -> str:
    # JSON's strings, finite numbers, booleans and lists of them are TOML's, but for DEL; escaped, JSON writes what is
    # outside of the 16-bit range as two halves, which TOML refuses.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
