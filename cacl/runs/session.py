"""What a configuration means: its data sets, networks and objects, each made when it is first needed; its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from cacl import scenes
from cacl._support.answers import check_given
from cacl._support.cores import usable_cores
from cacl._support.distributed import local_device, local_rank_zero_first, local_world_size, rank_zero
from cacl._support.identity import identity_or_new
from cacl._support.precision import decided, native_precision
from cacl._support.surroundings import building
from cacl._support.weights import check_can_be_saved, check_takes_part, copied, load_state, load_weights
from cacl.config import Config
from cacl.constants import Precision
from cacl.datasets import FORMATS, Dataset, open_dataset
from cacl.datasets.files import Fingerprint, fingerprint
from cacl.encoders import ImageTextEncoder, load_encoder
from cacl.errors import InputError
from cacl.runs.folder import RunFolder
from cacl.settings import CAMNetwork, Encoder, Machine, Scenes, Table
from cacl.stages.chain import Chain, stage_of
from cacl.stages.stage import Role, Stage

Made = TypeVar("Made")
Network = TypeVar("Network", bound=nn.Module)
T = TypeVar("T", bound=Table)


class NotDrawnError(InputError):
    """Scenes that would have to be drawn first."""


@dataclass
class Session:
    """One call of :func:`cacl.pipeline.run`; it is the :class:`cacl.stages.stage.Context` of every stage.

    Args:
        config: the configuration.
        given_encoder: instead of the configuration's.
        given_backbone: instead of the configuration's.
        given_criterion: instead of CA-CL's loss.
        chain: the stages; those of the configuration if empty.
        planning: whether nothing is computed, written or drawn.
        drawing: whether scenes that are missing are drawn; else they are an error.
        resume: whether what the run folder says counts.
    """

    config: Config
    given_encoder: ImageTextEncoder | None = None
    given_backbone: nn.Module | None = None
    given_criterion: Callable[..., Any] | None = None
    chain: Chain = ()
    planning: bool = False
    drawing: bool = True
    resume: bool = True
    keys: dict[str, str] = field(default_factory=dict, init=False)
    """Stage -> the hash of everything that its result follows from, as far as anybody has asked."""
    _opened: dict[str, Dataset] = field(default_factory=dict, init=False)
    _identities: dict[str, str] = field(default_factory=dict, init=False)
    _at: Stage[Any] | None = field(default=None, init=False)
    _shared: dict[str, tuple[Any, torch.device | None]] = field(default_factory=dict, init=False)
    """Name -> what is shared, and the device that it came on if it was given."""

    def __post_init__(self) -> None:
        self.chain = self.chain or self.config.chain
        check_given(self.given_encoder, self.given_backbone, self.given_criterion)

    @property
    def out(self) -> Path:
        return self.config.run.out

    @cached_property
    def files(self) -> RunFolder:
        return RunFolder(self.out)

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @cached_property
    def _device(self) -> torch.device | str:
        return "cpu" if self.planning else local_device(self.config.run.device, "[run] device")  # it may not be there

    @cached_property
    def precision(self) -> Precision:
        """That of the configuration; where it is ``"auto"``, what the run has been begun in, or what the device has."""
        chosen = self.config.run.precision
        begun = self.files.precision if chosen == "auto" else chosen
        if self.planning:  # the device may not be here
            return begun or native_precision(self._device)
        return decided(begun or "auto", self._device)

    @cached_property
    def machine(self) -> Machine:
        return Machine(
            device=self._device,
            workers=min(self.config.run.workers, max(1, usable_cores() // local_world_size())),
            precision=self.precision,
            progress=self.config.run.progress,
            crf=self.config.run.crf,
        )

    # Tables and stages

    def table(self, kind: type[T]) -> T:
        return self.config.table(kind)

    def settings(self, stage: Stage[T]) -> T:
        """The table of a stage."""
        return cast(T, getattr(self.config, stage.name))

    def stage(self, name: str) -> Stage[Any]:
        """The stage that a name means to the one that is being looked at (see :func:`cacl.stages.chain.stage_of`)."""
        return stage_of(self.chain, name, self._at)

    @contextmanager
    def at(self, stage: Stage[Any]) -> Iterator[None]:
        """Look at a stage: whatever it asks, it asks as that stage."""
        before, self._at = self._at, stage
        try:
            yield
        finally:
            self._at = before

    def needs(self, stage: Stage[Any]) -> list[Stage[Any]]:
        """The stages whose results a stage reads."""
        known = [*stage.needs, *stage.also_needs(self.settings(stage))]
        names = {name for each in self.chain for name in (each.name, *each.stands_for)}
        if missing := [need for need in known if need not in names]:
            raise InputError(f"[{stage.name}]: needs the stage {missing[0]!r}, which is not in the chain")
        with self.at(stage):
            return [self.stage(need) for need in known]

    def folder(self, stage: str) -> Path:
        return self.out / self.stage(stage).name

    def key_of(self, stage: Stage[Any]) -> str:
        """The hash of everything that the result of this very stage follows from."""
        if stage.name not in self.keys:
            needed = [self.key_of(need) for need in self.needs(stage)]
            with self.at(stage):
                self.keys[stage.name] = stage.key(self, self.settings(stage), needed)
        return self.keys[stage.name]

    def finished(self, stage: str) -> bool:
        return self.is_finished(self.stage(stage))

    def is_finished(self, stage: Stage[Any]) -> bool:
        """Whether this very stage has finished with these settings."""
        return self.files.finished(stage.name, self.key_of(stage))

    def identity(self, argument: Literal["encoder", "backbone", "criterion"]) -> str:
        """What tells one given object from another; where that cannot be known, it is another every time."""
        if argument not in self._identities:
            given = {
                "encoder": self.given_encoder,
                "backbone": self.given_backbone,
                "criterion": self.given_criterion,
            }[argument]
            found = "" if given is None else identity_or_new(given, argument, trained=argument == "backbone")
            self._identities[argument] = found
        return self._identities[argument]

    # Data sets

    def open(self, split: str) -> Dataset:
        """A split of the data set, which is drawn if it is one of scenes; listed once, whoever asks for it."""
        if split not in self._opened:
            data = self.config.data
            if FORMATS[data.format].drawn:
                drawn = self.table(Scenes).model_dump()
                drawing = self.drawing and not self.planning
                if not drawing and not scenes.is_drawn(data.root, **drawn):
                    raise NotDrawnError(f"{data.root}: the scenes have to be drawn first")
                if drawing:
                    draw = partial(scenes.generate, workers=self.machine.workers, progress=self.machine.progress)
                    rank_zero(partial(draw, data.root, **drawn))
            self._opened[split] = open_dataset(data.format, data.root, split, range=data.range, look=False)
        return self._opened[split]

    @cached_property
    def train(self) -> Dataset:
        return self.open(self.config.data.train)

    @cached_property
    def eval(self) -> Dataset | None:
        if not self.config.data.eval:
            return None
        dataset = self.open(self.config.data.eval)
        return dataset if dataset.masked else None

    @cached_property
    def segmented(self) -> Dataset:
        return self.open(self.config.segmented_split)

    @property
    def splits(self) -> dict[str, str]:
        """Role of a data set -> its split."""
        data = self.config.data
        return {"train": data.train, "eval": data.eval, "segmented": self.config.segmented_split}

    @property
    def datasets(self) -> dict[str, Dataset]:
        """Role -> data set, of those that there are."""
        roles = {"train": self.train, "eval": self.eval, "segmented": self.segmented}
        return {role: dataset for role, dataset in roles.items() if dataset is not None}

    @cached_property
    def fingerprints(self) -> dict[str, Fingerprint]:
        """Of the splits by their roles, as this run found them; files that are found to be missing are an error."""

        def look() -> dict[str, Fingerprint]:
            known, found = self.known_data, dict[str, Fingerprint]()  # by split
            for role, split in self.splits.items():
                if split and split not in found:
                    sample = self.config.data.sample
                    found[split] = fingerprint(self.open(split), sample=sample, known=known.get(role))
            return {role: found[split] for role, split in self.splits.items() if split}

        return rank_zero(look)

    @property
    def known_data(self) -> dict[str, Any]:
        """Role -> the fingerprint of the data that were last checked; empty where everything is to be done again."""
        return self.files.data if self.resume else {}

    def fingerprint(self, role: Role) -> str:
        return self.fingerprints[role].images if self.splits[role] else ""

    # Networks and other large objects

    @property
    def encoder(self) -> ImageTextEncoder:
        def make() -> ImageTextEncoder:
            if self.given_encoder is not None:
                return self.given_encoder
            return local_rank_zero_first(lambda: load_encoder(self.table(Encoder).name))

        return self.shared("encoder", make)

    def shared(self, name: str, make: Callable[[], Made]) -> Made:
        if name not in self._shared:
            made: object = make()
            came_on = None
            if isinstance(made, nn.Module):
                if any(made is given for given in (self.given_encoder, self.given_criterion)):
                    check_takes_part({name: made})
                    came_on = next((tensor.device for tensor in (*made.parameters(), *made.buffers())), None)
                self._placed(made)
            self._shared[name] = made, came_on
        return cast(Made, self._shared[name][0])

    def release(self, used: set[str]) -> None:
        """Let go of what is shared and not used any more; what was given goes back to where it came from."""
        for name in self._shared.keys() - used:
            made, came_on = self._shared.pop(name)
            if came_on is not None:
                made.to(came_on)

    def own_backbone(self) -> nn.Module | None:
        return None if self.given_backbone is None else copied("backbone", self.given_backbone)

    def network(self, make: Callable[..., Network], stage: str | None = None) -> Network:
        table, path = self.table(CAMNetwork), None if stage is None else self.folder(stage) / "model.pt"
        state = None if path is None else load_state(path)
        own = self.own_backbone()
        backbone = table.backbone if own is None else own
        net = self._made(make, backbone, table.weights if state is None else "")
        if state is not None:
            load_weights(net, state, path)
        return self._placed(net)

    def own_network(self, make: Callable[..., Network], backbone: str, weights: str) -> Network:
        return self._placed(self._made(make, backbone, weights))

    def _made(self, make: Callable[..., Network], backbone: str | nn.Module, weights: str) -> Network:
        with building():
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed the GPUs too
            net = make(backbone=backbone, weights=weights or None)
        check_can_be_saved("backbone", net)
        return net

    def _placed(self, net: Network) -> Network:
        return net.to(self.machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def to_train(self, net: Network) -> Network:
        if self.config.run.compile:
            net.compile()
        return net
