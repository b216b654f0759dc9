"""The configuration: a tree of tables, read from TOML on top of a preset; unknown keys are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, create_model

from cacl._support.names import check_working_folder
from cacl._support.toml import merged, parse_overrides, read_toml, toml_value
from cacl.datasets import FORMATS
from cacl.errors import InputError, did_you_mean, quoted, shown
from cacl.settings import Backgrounds, CAMNetwork, Data, Encoder, Mark, Prompts, Run, Scenes, Table
from cacl.tables import METHODS, TABLES, Predict, Report

if TYPE_CHECKING:
    from cacl.stages.chain import Chain

PRESETS = ("voc", "coco", "own", "scenes")
_ASSETS = Path(__file__).with_name("assets")

T = TypeVar("T", bound=Table)


class Config(Table):
    """The whole configuration; :meth:`load` reads one."""

    run: Run = Field(default_factory=Run)
    data: Data
    scenes: Scenes = Scenes()
    encoder: Encoder = Encoder()
    prompts: Prompts = Prompts()
    backgrounds: Backgrounds = Backgrounds()
    camnet: CAMNetwork = CAMNetwork()

    given_chain: ClassVar[Chain | None] = None
    """The stages whose tables it has; None for those of CA-CL."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The table of a stage; :meth:`table` gives it with its type."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Config:
        """One with the tables of CA-CL's stages, where it is asked for without others."""
        return super().__new__(config_class() if cls is Config else cls)

    @classmethod
    def model_validate(cls, obj: Any) -> Config:  # type: ignore[override]
        return config_class().model_validate(obj) if cls is Config else super().model_validate(obj)

    def __reduce__(self) -> tuple[Any, ...]:
        given = merged(self.model_dump(exclude_unset=True), {"run": {"out": self.run.out}})
        return _again, (self.given_chain, given)

    @property
    def chain(self) -> Chain:
        """The stages whose tables it has."""
        from cacl.stages.chain import CHAIN

        return CHAIN if self.given_chain is None else self.given_chain

    @property
    def stages(self) -> list[str]:
        """The names of its stages, the report's with them."""
        own = TABLES if self.given_chain is None else (stage.name for stage in self.given_chain)
        return [*own, "report"]

    def table(self, kind: type[T]) -> T:
        """The settings of a kind: those of the table that has them, or the defaults where no stage does."""
        tables = [getattr(self, name) for name in type(self).model_fields]
        same = [table for table in tables if type(table) is kind]
        return next(iter([*same, *(table for table in tables if isinstance(table, kind))]), None) or kind()

    @classmethod
    def load(cls, source: str | PathLike[str], overrides: Sequence[str] = (), *, chain: Chain | None = None) -> Config:
        """Read a preset (``"voc"``, ``"coco"``, ``"scenes"``) or a TOML file.

        A file may name the preset that it builds on in a top-level key ``base``. Its relative paths are taken from
        its own folder, those of overrides and presets from the current one.

        Args:
            source: the preset's name or the file's path.
            overrides: ``"table.key=value"``, the value as in TOML; what is no TOML value is a string.
            chain: whose stages have a table each, CA-CL's by default; what a preset says of others is left out.

        Raises:
            ValueError: one line that names file, table and key.
        """
        check_working_folder()
        name, kind = str(source), config_class(chain)
        tables = _preset(name, kind) if name in PRESETS else _file(Path(name), kind)
        config = _validated(kind, merged(tables, absolute(parse_overrides(overrides), Path.cwd(), kind)), name)
        own = name not in PRESETS and Path(name).absolute() == config.run.out.absolute() / "config.toml"
        if own and not _is_of_run(Path(name), config):
            raise InputError(f"{shown(source)}: [run] out: expected another folder: this file would be overwritten")
        return config

    @classmethod
    def of_run(cls, run: Path, *, chain: Chain | None = None) -> Config:
        """The configuration of a run folder, also of one that was moved or that an older version wrote.

        Tables of stages that are not in ``chain`` are left out.

        Raises:
            ValueError: if there is none.
        """
        # Tables of stages that are in no chain of this call say nothing about the others.
        kind, path = config_class(chain), run / "config.toml"
        tables = {name: table for name, table in _file(path, kind).items() if name in kind.model_fields}
        return _validated(kind, tables, str(path)).changed({"run": {"out": run.absolute()}})

    @classmethod
    def table_of_run(cls, run: Path, name: str, kind: type[T]) -> T:
        """One table of a run folder's configuration, whatever its chain was.

        Raises:
            ValueError: if there is none, or it is wrong.
        """
        path = run / "config.toml"
        try:
            return kind.model_validate(read_toml(path, PRESETS).get(name, {}))
        except ValidationError as error:
            lines = [_line(config_class(), {**e, "loc": (name, *e["loc"])}) for e in error.errors()]
            raise InputError("\n".join(f"{shown(path)}: {line}" for line in lines)) from None

    @property
    def segmented_split(self) -> str:
        """The split that the segmenter makes masks for: without one to evaluate on, the training images' own."""
        # CAMs of VOC are scored on its training images, as the field does, and segmenters on the others.
        other = FORMATS[self.data.format].segmented
        own = other if other and self.data.eval else self.data.eval
        return self.table(Predict).split or own or self.data.train

    def changed(self, changes: Mapping[str, Mapping[str, Any]]) -> Config:
        """A copy with other values, table -> key -> value."""
        given = merged(self.model_dump(exclude_unset=True), {"run": {"out": self.run.out}})  # not of another folder now
        return type(self).model_validate(merged(given, changes))

    def to_toml(self, folder: Path | None = None) -> str:
        """The configuration as TOML; loads back to an equal one.

        What a preset within a table gives stands there as a comment, so that another preset in its place gives its own.

        Args:
            folder: where the file will lie. Paths in it are relative to it, so that it may be moved with its files.
        """
        lines = []
        tables = self.model_dump(mode="json")
        for table, key, names in _paths(type(self)):
            path = tables[table][key]
            if folder is not None and path and path not in names and Path(path).is_relative_to(folder):
                relative = Path(path).relative_to(folder).as_posix()
                tables[table][key] = path if relative in names else relative
        for name, table in tables.items():
            chosen = getattr(self, name).chosen
            known = ((key, value) for key, value in table.items() if value is not None)
            lines += [f"[{name}]", *(f"{'# ' * (k in chosen)}{k} = {toml_value(v)}" for k, v in known), ""]
        return "\n".join(lines)


def _again(chain: Chain | None, given: dict[str, Any]) -> Config:
    return config_class(chain).model_validate(given)


def _is_of_run(path: Path, config: Config) -> bool:
    """Whether a file is what a run wrote for these settings; how much of it is shown, and to whom, changes nothing."""
    tables = _file(path, type(config))
    whole = set(read_toml(path, PRESETS)) == set(type(config).model_fields)  # else a user wrote it
    alike = {"run": {"progress": True, "track": ()}}
    return whole and _validated(type(config), tables, str(path)).changed(alike) == config.changed(alike)


def _validated(kind: type[Config], tables: Mapping[str, Any], source: str) -> Config:
    try:
        return kind.model_validate(tables)
    except ValidationError as error:
        raise InputError("\n".join(f"{shown(source)}: {_line(kind, e)}" for e in error.errors())) from None


def config_class(chain: Chain | None = None) -> type[Config]:
    """The configuration with a table for every stage of a chain, CA-CL's by default, and for the report."""
    if chain is not None:
        from cacl.stages.chain import CHAIN, check_chain

        chain = None if tuple(chain) == CHAIN else check_chain(chain)
    return _config_class(chain)


@cache
def _config_class(chain: Chain | None) -> type[Config]:
    tables: dict[str, Any] = dict(TABLES) if chain is None else {stage.name: stage.settings for stage in chain}
    if again := [name for name in tables if hasattr(Config, name) or name in (*Config.model_fields, "report", "base")]:
        raise InputError(f"Expected argument `chain` to hold stages of other names than [{again[0]}]'s.")
    tables["report"] = Report
    fields: dict[str, Any] = {name: (kind, Field(default_factory=kind)) for name, kind in tables.items()}
    made: type[Config] = create_model("Config", __base__=Config, __module__=__name__, **fields)
    made.given_chain = chain
    return made


def _columns(kind: type[Config]) -> Iterator[tuple[str, str, Any]]:
    """(table, key, what is known of the setting)."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for key, setting in field.annotation.model_fields.items():
                yield name, key, setting


def _paths(kind: type[Config]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(table, key, what else than a path it may be) of the settings that are paths."""
    found = []
    for table, key, setting in _columns(kind):
        union = get_origin(setting.annotation) in (Union, UnionType)
        parts = get_args(setting.annotation) if union else (setting.annotation,)
        if Path in parts:
            found.append((table, key, tuple(name for part in parts for name in get_args(part))))
    return found


def _preset(name: str, kind: type[Config]) -> dict[str, Any]:
    tables = absolute(read_toml(_ASSETS / "presets" / f"{name}.toml"), Path.cwd(), kind)
    known: dict[str, set[str]] = {}
    for table, key, _ in _columns(kind):
        known.setdefault(table, set()).add(key)
    return {t: {k: v for k, v in keys.items() if k in known[t]} for t, keys in tables.items() if t in known}


def _file(path: Path, kind: type[Config]) -> dict[str, Any]:
    tables = absolute(read_toml(path, PRESETS), path.absolute().parent, kind)
    base = tables.pop("base", None)
    if base is None:
        return tables
    if base not in PRESETS:
        raise InputError(f"{shown(path)}: base: expected a preset ({', '.join(PRESETS)}), but got {quoted(base)}")
    return merged(_preset(base, kind), tables)


def absolute(tables: dict[str, Any], folder: Path, kind: type[Config]) -> dict[str, Any]:
    """Relative paths -> absolute ones."""
    paths = {(table, key): names for table, key, names in _paths(kind)}
    for table, key, setting in _columns(kind):
        values = tables.get(table)
        if not isinstance(values, dict) or not isinstance(values.get(key), str):
            continue
        path = folder / os.path.expanduser(values[key])
        if values[key] in paths.get((table, key), ()):
            continue
        if (table, key) in paths or (Mark.FILE in setting.metadata and values[key] and path.is_file()):
            values[key] = str(path)  # else it is a name
    return tables


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Overrides of a configuration without those of one method, such as ``"pole.lr=0.001"``, and these by method."""
    rivals = METHODS.keys() - {"cacl"}
    own = [override for override in overrides if override.partition(".")[0].strip() in rivals]
    given = parse_overrides(own)
    kind = config_class()
    known = {method: absolute({"cacl": keys}, Path.cwd(), kind)["cacl"] for method, keys in given.items()}
    return [override for override in overrides if override not in own], known


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
        message = error["msg"].removeprefix("Value error, ")
        return f"{name} {message}" if len(where) == 1 else f"{name}: {message}"
    return f"{name}: {error['msg'][0].lower() + error['msg'][1:]}, but got {quoted(error['input'])}"
