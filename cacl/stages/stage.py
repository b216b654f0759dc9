"""What a stage is: its settings, what it does and needs, what its result scores. A new one is one file like this:

.. code-block:: python

    class Squares(Table):
        \"\"\"``[squares]``: masks of squares.\"\"\"

        side: Positive = 8
        \"\"\"In pixels.\"\"\"

    def make_squares(dataset, out, settings=Squares(), *, machine=Machine(), keep=False): ...

    def _run(run, settings, folder, journal):
        make_squares(run.train, folder / "train", settings, machine=run.machine, keep=True)

    STAGE = Stage("squares", Squares, run=_run, files=("train",), stands_for=("irn", "masks"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from torch import nn

from cacl._support.identity import UnknownError, identity
from cacl.datasets import Dataset
from cacl.encoders import ImageTextEncoder
from cacl.errors import InputError
from cacl.images import Mask
from cacl.log import Journal
from cacl.settings import Machine, Table
from cacl.stages.score import Score

S = TypeVar("S", bound=Table)
T = TypeVar("T", bound=Table)
Made = TypeVar("Made")
Network = TypeVar("Network", bound=nn.Module)
Role = Literal["train", "eval", "segmented"]
"""What a split is there for: to be trained on, to score CAMs on, to be segmented."""


class Context(Protocol):
    """What a stage sees of the run that it is a part of."""

    @property
    def machine(self) -> Machine:
        """Where it is computed."""

    @property
    def seed(self) -> int:
        """Of everything that is random."""

    @property
    def train(self) -> Dataset:
        """The images that are trained on."""

    @property
    def eval(self) -> Dataset | None:
        """The images that CAMs are scored on; None where there is no such split, or it has no masks."""

    @property
    def segmented(self) -> Dataset:
        """The images that the segmenter makes masks for; :attr:`train` itself where these are the same."""

    @property
    def encoder(self) -> ImageTextEncoder:
        """The image-text encoder, on the device."""

    @property
    def given_criterion(self) -> Callable[..., Any] | None:
        """What was given to :func:`cacl.pipeline.run` instead of CA-CL's loss."""

    def table(self, kind: type[T]) -> T:
        """The settings of a kind: those of the table that has them, or the defaults."""

    def folder(self, stage: str) -> Path:
        """The folder of a stage, or of the last one before this that stands for it."""

    def finished(self, stage: str) -> bool:
        """Whether a stage has finished with these settings."""

    def fingerprint(self, role: Role) -> str:
        """A hash of the images with a role, and of their labels; empty where there is no such split."""

    def identity(self, argument: Literal["encoder", "backbone", "criterion"]) -> str:
        """What tells one given object from another; empty where none was given."""

    def network(self, make: Callable[..., Network], stage: str | None = None) -> Network:
        """A network with the backbone of ``[camnet]``, or the one that was given, on the device.

        Args:
            make: takes ``backbone`` and ``weights``, as :class:`cacl.CAMNet` does.
            stage: whose ``model.pt`` it gets; None for the weights that it starts from.
        """

    def own_network(self, make: Callable[..., Network], backbone: str, weights: str) -> Network:
        """As :meth:`network`, with a backbone of its own, and with the weights that it starts from."""

    def own_backbone(self) -> nn.Module | None:
        """A copy of the backbone that was given."""

    def to_train(self, net: Network) -> Network:
        """The network, compiled where ``[run] compile`` says so."""

    def shared(self, name: str, make: Callable[[], Made]) -> Made:
        """What several uses share: made once and put on the device, kept until the last stage that names it in ``uses``
        has ended."""


class Judged(NamedTuple):
    """Masks whose agreement with the encoder is looked at."""

    what: str
    """What they are called, as in :class:`cacl.stages.score.Score`."""
    masks: Path | Callable[[int], Mask]
    """A folder of ``<id>.png``, or an image's index -> its mask ``(H, W)``."""
    background_score: float | None = None
    crf: bool = False
    auto: bool = False
    """Whether the background score was chosen by the values of the CAMs alone."""


def _nothing(run: Context, settings: Any) -> Sequence[object]:
    return ()


@dataclass(frozen=True)
class Stage(Generic[S]):
    """One stage of a chain; everything that anybody else needs to know of it."""

    name: str
    """Of the stage, its folder and its table."""
    settings: type[S]
    """The class of its table."""
    run: Callable[[Context, S, Path, Journal], None]
    """Does it, on all processes: run, settings, the stage's folder, and what a training leaves of itself."""
    needs: tuple[str, ...] = ()
    """The stages whose results it reads; they come before it in the chain, or others that stand for them."""
    also_needs: Callable[[S], Sequence[str]] = lambda settings: ()
    """The stages that it needs with some settings only."""
    on_demand: bool = False
    """Whether it is only done where a later stage needs it, or when it is asked for by its name."""
    spares: Callable[[S], Sequence[str]] = lambda settings: ()
    """The stages before it that are on demand with some settings of its own."""
    brought: Callable[[S], bool] = lambda settings: False
    """Whether with some settings it is done, though not asked for, where a stage is that needs it."""
    title: str | Callable[[S], str] = ""
    """What people call it."""
    files: tuple[str, ...] = ()
    """Folders in its own that hold a file an image; they are removed when it is done anew."""
    stands_for: tuple[str, ...] = ()
    """Stages that it takes the place of, for those after it: in their stead, or between them and whoever needs them."""
    uses: tuple[str, ...] = ()
    """What it takes from :meth:`Context.shared`, and ``"encoder"``: freed when nobody who uses it is left."""
    also_uses: Callable[[S], Sequence[str]] = lambda settings: ()
    """What it takes from there with some settings only."""
    depends: Callable[[Context, S], Sequence[object]] = _nothing
    """What its result follows from besides its settings and the stages that it needs."""
    version: int = 1
    """Raised when its result changes though its settings do not, or when a default does: what was made before is then
    made again."""
    check: Callable[[Context, S], object] = _nothing
    """Raises for what is wrong with its settings, before the first step of any stage that is to be done."""
    scored_on: Role | None = None
    """The images that its result is scored on, where they have masks, and judged on; None for neither."""
    score: Callable[[Context, S, Dataset], Score] | None = None
    """What its result scores on them, on all processes."""
    score_depends: Callable[[Context, S], Sequence[object]] = _nothing
    """What the score follows from besides the result, the images and the settings that only an evaluation reads."""
    judged: Callable[[Context, S, Dataset, float | None], Judged] | None = None
    """The masks that it made of them, whose agreement with the encoder is measured (:mod:`cacl.agreement`); at the
    background score that is given, that of its mean IoU, or at its own where that is None."""
    shown: str | Callable[[S], str] = ""
    """What the report calls its score: ``{what}`` is the score's own name, ``{crf}`` `` + CRF`` where there is one; the
    score's own name if empty."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)
        for name in ("needs", "files", "stands_for", "uses"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))

    def used(self, settings: S) -> set[str]:
        """What it takes from :meth:`Context.shared`, with some settings."""
        return {*self.uses, *self.also_uses(settings)}

    def titled(self, settings: S) -> str:
        """What people call it, with some settings."""
        return self.title(settings) if callable(self.title) else self.title

    def key(self, run: Context, settings: S, needed: Sequence[str]) -> str:
        """A hash of everything that its result follows from, ``needed`` being the keys of the stages that it needs.

        Settings at their defaults are left out, so that a new one changes no key.
        """
        own = [self.name, self.version, _origin(self.run), _origin(self.settings)]
        own += [settings.differing(), self.depends(run, settings)]
        precision = run.machine.precision if run.machine.precision == "fp32" else f"{run.machine.precision} {_HALF}"
        return hash_of(*own, run.fingerprint("train"), run.seed, precision, needed)

    def score_key(self, run: Context, settings: S, key: str, *rest: object) -> str:
        """A hash of everything that its score follows from."""
        return hash_of(key, settings.differing(evaluation=True), self.score_depends(run, settings), *rest)


_HALF = 2
"""Version of what is computed in half precision; before 2, a training stayed with the weights of its first step."""


def hash_of(*parts: object) -> str:
    """A short hash of values, and of tables by what differs from their defaults.

    Raises:
        ValueError: if a value cannot be told from another.
    """
    try:
        return identity(_plain(parts))[:16]
    except UnknownError as error:
        raise InputError(f"Expected `depends` of a stage to give values that can be told apart, but {error}") from None


def _plain(value: object) -> object:
    if isinstance(value, Table):
        return _plain(value.differing())
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in sorted(value.items(), key=lambda item: str(item[0]))}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _origin(thing: Any) -> str:
    """Where something from outside comes from; what is this package's own is known by its stage's version."""
    module = getattr(thing, "__module__", None) or ""  # of code that is executed as a text it is None
    return "" if module.partition(".")[0] == "cacl" else f"{module}.{getattr(thing, '__qualname__', '')}"
