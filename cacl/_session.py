"""One run: what its configuration means, which stages are finished, and what they scored."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import nn

from cacl import scenes
from cacl._scores import SCORED_ON, describe, is_sound, score
from cacl._support.distributed import (
    barrier,
    local_device,
    local_rank_zero_first,
    local_world_size,
    rank,
    rank_zero,
    world_size,
)
from cacl._support.files import read_json, write_json, write_text
from cacl._support.identity import UnknownError, identity
from cacl._support.pool import usable_cores
from cacl._support.weights import check_can_be_saved, copied, load_state, load_weights, save_state
from cacl.camnet import CAMNet
from cacl.config import Config, Refined, Training
from cacl.crf import check_backend
from cacl.criterion import CACLLoss
from cacl.datasets import Dataset, check, open_dataset
from cacl.deeplab import DeepLabV2
from cacl.encoders import ImageTextEncoder, load_encoder
from cacl.errors import InputError
from cacl.irn import IRNet
from cacl.log import Callback, Log, Record, forget_costs, measured
from cacl.losses import BGSuppressionLoss
from cacl.prompts import BackgroundSet, PromptSet
from cacl.training import Loop
from cacl.transforms import RandomView

logger = logging.getLogger("cacl")

Network = TypeVar("Network", bound=nn.Module)

STAGES = ("warmup", "cacl", "cams", "irn", "masks", "segment", "predict", "report")
"""The stages in their order; each builds on the one before it."""
_FILES = ("train", "labels", "walk", "eval")
"""The folders in a stage's folder that hold a file an image."""


@dataclass
class Session:
    """One call of :func:`run`: the configuration and what is made from it when it is first needed."""

    config: Config
    given_encoder: ImageTextEncoder | None
    given_backbone: nn.Module | None
    callback: Callback | None
    keys: dict[str, str] = field(default_factory=dict)
    opened: dict[str, Dataset] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.config.run.out

    @cached_property
    def device(self) -> torch.device:
        return local_device(self.config.run.device, "[run] device")

    @property
    def workers(self) -> int:
        return min(self.config.run.workers, max(1, usable_cores() // local_world_size()))

    @property
    def inference(self) -> dict[str, Any]:
        """How CAMs are made from a network, for :mod:`cacl.cams`."""
        table = self.config.cams
        return {"scales": table.scales, "flip": table.flip, "device": self.device, "workers": self.workers}

    def open(self, split: str) -> Dataset:
        """A split of the data set, which is drawn if it is one of scenes; listed once, whoever asks for it."""
        if split not in self.opened:
            data = self.config.data
            if data.format == "scenes":
                drawn = self.config.scenes.model_dump()
                rank_zero(partial(scenes.generate, data.root, **drawn, workers=self.workers))
            self.opened[split] = open_dataset(data.format, data.root, split)
        return self.opened[split]

    @cached_property
    def train(self) -> Dataset:
        return self.open(self.config.data.train)

    @cached_property
    def eval(self) -> Dataset | None:
        """The split to evaluate on, or None where there is none or it has no masks."""
        if not self.config.data.eval:
            return None
        dataset = self.open(self.config.data.eval)
        return dataset if dataset.masked else None

    @cached_property
    def segmented(self) -> Dataset | None:
        """The images that the segmenter makes masks for, with masks or without."""
        split = self.config.segmented_split
        return self.open(split) if split else None

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the data sets, with their masks, as this run found them."""
        datasets = {"train": self.train, "eval": self.eval, "segmented": self.segmented}
        found = {name: dataset for name, dataset in datasets.items() if dataset is not None}
        return rank_zero(lambda: {name: dataset.fingerprint(masks=True) for name, dataset in found.items()})

    @cached_property
    def encoder(self) -> ImageTextEncoder:
        encoder = self.given_encoder
        if encoder is None:
            encoder = local_rank_zero_first(lambda: load_encoder(self.config.encoder.name))
        if isinstance(encoder, nn.Module):
            encoder.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return encoder

    @cached_property
    def log(self) -> Log:
        return Log(self.out / "log.jsonl")

    def net(self, stage: str | None = None) -> CAMNet:
        """A network with its initial weights, or with those that a finished stage left."""
        return self._network(partial(CAMNet, len(self.train.classes)), stage)

    def irnet(self, stage: str | None = None) -> IRNet:
        """As :meth:`net`; its backbone is the untrained one of ``[camnet]``."""
        return self._network(IRNet, stage)

    def _network(self, make: Callable[..., Network], stage: str | None) -> Network:
        path = self.out / (stage or "") / "model.pt"
        return self._made(make, load_state(path) if stage else None, path)

    def _made(
        self,
        make: Callable[..., Network],
        state: dict[str, Any] | None,
        path: Path,
        *,
        backbone: str | nn.Module | None = None,
        weights: str = "",
    ) -> Network:
        """A network on the device, with a backbone of its own or that of ``[camnet]``, and with ``state`` from a file
        or else with the weights that it starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.run.seed)  # torch.manual_seed would seed the GPUs too
            if backbone is None:
                given = self.given_backbone
                backbone = self.config.camnet.backbone if given is None else copied("backbone", given)
                weights = self.config.camnet.weights
            net = make(backbone=backbone, weights=weights if weights and state is None else None)
        check_can_be_saved("backbone", net)
        if state is not None:
            load_weights(net, state, path)
        return net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def compiled(self, net: Network) -> Network:
        """The network, to be trained."""
        if self.config.run.compile:
            net.compile()
        return net

    def save(self, path: Path, state: Mapping[str, Any]) -> None:
        """Write what a stage leaves behind, in one of the processes that have it."""
        if rank() == 0:
            save_state(path, state)

    def segmenter(self, *, trained: bool = False) -> DeepLabV2:
        """DeepLabV2 with the weights that it starts from, or with those of the stage ``segment``."""
        table = self.config.segment
        of_cacl = table.weights == "cacl"
        if not table.backbone and not of_cacl and table.weights != "DEFAULT":
            raise InputError(
                f'[segment] weights: expected "DEFAULT" or "cacl" where no backbone is named, but got {table.weights!r}'
            )
        own = {"backbone": table.backbone, "weights": "" if of_cacl else table.weights} if table.backbone else {}
        make = partial(DeepLabV2, len(self.train.classes) + 1, freeze_batch_norm=table.freeze_batch_norm)
        path = self.out / "segment" / "model.pt"
        net = self._made(make, load_state(path).get("weights") or {} if trained else None, path, **own)
        if of_cacl and not trained:
            trunk = self.net("cacl" if self.finished("cacl") else None).backbone  # untrained, it shows whether it fits
            load_weights(net.backbone, trunk.state_dict(), "[segment] weights: the backbone of [camnet]")
        return net

    @cached_property
    def backgrounds(self) -> BackgroundSet | None:
        words, names = self.config.backgrounds, self.train.classes
        if self.config.cacl.beta == 0:
            return None
        beside = self.config.data.root / "backgrounds.json"
        file = words.file or (beside if beside.is_file() and self.config.data.format in ("csv", "scenes") else None)
        return BackgroundSet.from_json(file, words.n) if file else BackgroundSet.built_in(names, words.n or 5)

    @cached_property
    def criterion(self) -> CACLLoss:
        table = self.config.cacl
        suppression = BGSuppressionLoss(
            table.threshold,
            mode=table.threshold_mode,
            bounds=table.threshold_bounds,
            quantile=table.threshold_quantile,
            momentum=table.threshold_momentum,
        )
        criterion = CACLLoss(
            self.encoder,
            self.train.classes,
            prompts=PromptSet(self.config.prompts.templates),
            backgrounds=self.backgrounds,
            alpha=table.alpha,
            beta=table.beta,
            gamma=table.gamma,
            margin=table.margin,
            suppression=suppression,
            template=table.template,
        )
        return criterion.to(self.device)

    def crf(self, table: Refined) -> dict[str, Any]:
        """How CRFs are done, for :mod:`cacl.masks`."""
        backend = check_backend(self.config.run.crf)
        # One process is enough where a GPU does the work.
        on_gpu = backend == "torch" and self.device.type == "cuda"
        crf = {"gaussian": table.gaussian, "bilateral": table.bilateral, "iterations": table.iterations}
        return {
            "crf": {**crf, "backend": backend, "device": self.device if on_gpu else "cpu"},
            "workers": 0 if on_gpu else self.workers,
        }

    def loop(self, table: Training, *, masks: bool = False) -> Loop:
        run = self.config.run
        return Loop(
            epochs=table.epochs,
            batch_size=table.batch_size,
            view=RandomView(table.crop, scale=table.scale),
            schedule=table.schedule,
            seed=run.seed,
            workers=self.workers,
            device=self.device,
            precision=run.precision,
            checkpoint_seconds=run.checkpoint_seconds,
            masks=masks,
        )

    def prepare(self, stages: Sequence[str]) -> None:
        """Check settings and data before the first step, and write down the configuration."""
        with barrier():
            _ = self.train, self.eval, self.segmented
        _ = self.fingerprints
        # Of rank 0: a file may have another time on another machine.
        named = STAGES[: 1 + max((STAGES.index(name) for name in stages), default=-1)]
        self.keys |= rank_zero(lambda: {name: self.key(name) for name in named})
        with barrier():
            self._check_settings(stages)
        rank_zero(self._check_data)

    def _check_settings(self, stages: Sequence[str]) -> None:
        for before, name in pairwise(STAGES):
            if name in stages and before not in stages and not self.finished(before):
                raise InputError(f"{self.out}: the stage {before!r} has not finished with these settings; run it first")
        # What is wrong with a setting shows now: not after the warm-up, and not when files have been replaced.
        for name in ("warmup", "cacl", "irn", "segment"):
            table = getattr(self.config, name)
            self.loop(table)
            if name in stages and table.batch_size < world_size():
                wanted = f"at least 1 image for each of the {world_size()} processes"
                raise InputError(f"[{name}] batch_size: expected {wanted}, but got {table.batch_size}")
        if "warmup" in stages and not self.finished("warmup"):
            self.net()
        if "cacl" in stages and not self.finished("cacl"):
            _ = self.criterion
        if not {"irn", "masks", "predict", "report"}.isdisjoint(stages):
            check_backend(self.config.run.crf)
            low, high = self.config.irn.background_score, self.config.irn.foreground_score
            if low > high:
                raise InputError(f"[irn] background_score: expected at most foreground_score {high}, but got {low}")
        if "irn" in stages and not self.finished("irn"):
            self.irnet()
        if "segment" in stages and not self.finished("segment"):
            self.segmenter()

    def _check_data(self) -> None:
        data = self.config.data
        for split, dataset in ((data.eval, self.eval), (self.config.segmented_split, self.segmented)):
            if dataset is not None and dataset.classes != self.train.classes:
                raise InputError(f"{data.root}: expected the split {split!r} to have the classes of {data.train!r}")
        if read_json(self.out / "data.json") != self.fingerprints:
            # Training never opens a mask, but the CAMs of the training images are evaluated where there are masks.
            datasets = [data for data in (self.train, self.eval, self.segmented) if data is not None]
            different = {data.entries: data for data in datasets}.values()
            problems = [line for data in different for line in check(data, progress=True)]
            if problems:
                raise InputError("\n".join(dict.fromkeys(problems)))
        write_text(self.out / "config.toml", self.config.to_toml(self.out))
        write_json(self.out / "data.json", self.fingerprints)

    def do(self, name: str, body: Body, *, resume: bool) -> None:
        """One stage, unless it is finished, and its evaluation, unless that is known."""
        key, folder = self.key(name), self.out / name
        state = rank_zero(lambda: self._begin(name, resume=resume))
        if not state.get("finished"):
            with measured(self.out / "times.json", name, again=not state) as cost:
                body(self, folder, {"key": key, "log": self.log, "callback": self.callback})
            rank_zero(lambda: self._end(name))
            logger.info("%s: finished in %.0f s", name, cost["seconds"])
        self.evaluate(name)

    def _begin(self, name: str, *, resume: bool) -> dict[str, Any]:
        """What is known of a stage with these settings, in the way of which nothing lies; empty if it begins anew."""
        key, folder = self.key(name), self.out / name
        path = folder / "stage.json"
        state = read_json(path)
        if resume and state.get("key") == key:
            if state.get("finished"):
                logger.info("%s: finished before", name)
                self._forget_checkpoint(name)  # left by a kill just after the stage
            return state
        if state:
            reason = "its settings or data changed" if resume else "that was asked for"
            logger.info("%s: done again, since %s", name, reason)
        # Nothing of another run stays, and what builds on this stage is done again too.
        again = STAGES[STAGES.index(name) :]
        for later in again:
            (self.out / later / "stage.json").unlink(missing_ok=True)
            self.keep_metrics(later, None)
        self.log.forget(again)
        forget_costs(self.out / "times.json", again)
        self._forget_checkpoint(name)
        for files in (folder / name for name in _FILES):
            if files.is_symlink():
                files.unlink()
            elif files.is_dir():
                shutil.rmtree(files)
        write_json(path, {"key": key, "finished": False})
        return {}

    def _end(self, name: str) -> None:
        write_json(self.out / name / "stage.json", {"key": self.key(name), "finished": True})
        self._forget_checkpoint(name)

    def _forget_checkpoint(self, name: str) -> None:
        for file in ("checkpoint.pt", "checkpoint.pt.tmp"):
            (self.out / name / file).unlink(missing_ok=True)

    def key(self, name: str) -> str:
        """A hash of everything that a stage's result depends on, the stages before it included."""
        if name not in self.keys:
            config, run = self.config, self.config.run
            common: list[object] = [run.seed, run.precision]
            if name == "warmup":
                mine = [
                    config.warmup,
                    config.camnet,
                    _identity("backbone", self.given_backbone),
                    self.train.fingerprint(),
                ]
                mine += _state_of(config.camnet.weights)
            elif name == "cacl":
                words = self.backgrounds and {name: self.backgrounds.get(name) for name in self.train.classes}
                mine = [config.cacl, config.encoder, config.prompts, words]
                mine += [_identity("encoder", self.given_encoder), self.key("warmup")]
                mine += _state_of(config.encoder.name)
            elif name == "cams":
                mine = [config.cams, self.key("cacl")]
            elif name == "irn":
                mine = [config.irn, check_backend(run.crf), self.key("cams")]
            elif name == "masks":
                mine = [config.masks, self.key("irn")]
            elif name == "segment":
                own = config.segment.backbone or [config.camnet, _identity("backbone", self.given_backbone)]
                mine = [config.segment, own, self.key("masks"), *_state_of(config.segment.weights)]
            elif name == "predict":
                photos = self.segmented and self.segmented.fingerprint()
                mine = [config.predict.model_copy(update={"split": ""}), photos, self.key("segment")]
            else:
                mine = [config.report, self.key("predict"), self.fingerprints]
            self.keys[name] = _hash(*common, *mine)
        return self.keys[name]

    def finished(self, stage: str) -> bool:
        return read_json(self.out / stage / "stage.json") == {"key": self.key(stage), "finished": True}

    def evaluate(self, name: str) -> None:
        """Mean IoU of what a finished stage gives: on the split to evaluate, or of the training images."""
        role = SCORED_ON.get(name)
        dataset: Dataset | None = getattr(self, role) if role else None
        if role is None or dataset is None or not dataset.masked:
            return
        split = self.config.segmented_split if role == "segmented" else getattr(self.config.data, role)
        settings = self.config.predict.longest if role == "segmented" else self.config.cams
        key = _hash(self.key(name), settings, split, self.fingerprints[role])
        if rank_zero(lambda: self.metrics.get(name, {}).get("key") == key):
            return
        metrics = {**score(self, name, dataset), "split": split, "key": key}
        rank_zero(lambda: self.keep_metrics(name, metrics))
        logger.info("%s", describe(name, metrics))

    @property
    def metrics(self) -> dict[str, Any]:
        """``metrics.json``: what is known of each stage, in their order."""
        known = read_json(self.out / "metrics.json")
        return {stage: known[stage] for stage in STAGES if is_sound(known.get(stage))}

    def keep_metrics(self, name: str, metrics: Record | None) -> None:
        known = self.metrics
        if metrics is not None or name in known:
            both = {**known, name: metrics}
            write_json(self.out / "metrics.json", {stage: both[stage] for stage in STAGES if both.get(stage)})


Body = Callable[[Session, Path, dict[str, Any]], None]
"""What a stage does: session, the stage's folder, and the arguments that every training loop takes."""


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps([repr(part) for part in parts]).encode()).hexdigest()[:16]


def _state_of(file: str) -> list[int]:
    """Size and time of a file; nothing for what is a name."""
    path = Path(file)
    return [path.stat().st_size, path.stat().st_mtime_ns] if file and path.is_file() else []


def _identity(argument: str, thing: object) -> str:
    """What tells one encoder or backbone from another; where that cannot be known, it is another every time."""
    if thing is None:
        return ""
    try:
        return identity(thing)
    except UnknownError as error:
        logger.warning(
            "%s: what it gives is done again, since a %s cannot be told from another one: %s. Give it an attribute "
            "`key`, a text that changes whenever its results do.", argument, type(thing).__name__, error,
        )  # fmt: skip
        return uuid4().hex
