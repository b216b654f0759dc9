"""From a configuration to results: wires the stages, skips what is finished, goes on where it was stopped."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cacl._checks import InputError, check_choice
from cacl._files import load_state, load_weights, read_json, save_state, write_json, write_text
from cacl.camnet import CAMNet
from cacl.cams import evaluate_cams, make_cams, train_cacl, train_classifier
from cacl.config import Config, Training
from cacl.criterion import CACLLoss
from cacl.datasets import Dataset, check, open_dataset
from cacl.encoders import ImageTextEncoder, load_encoder
from cacl.losses import BGSuppressionLoss
from cacl.metrics import BACKGROUND_SCORE
from cacl.prompts import BackgroundSet, PromptSet
from cacl.training import Callback, Log, Loop, Record
from cacl.transforms import RandomView

logger = logging.getLogger("cacl")


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    out: Path
    """The run folder."""
    metrics: dict[str, Any]
    """``metrics.json``: for each evaluation its mIoU with split, background score, CRF, number of images."""

    def summary(self) -> str:
        """A line for each evaluation."""
        return "\n".join(describe(name, metrics) for name, metrics in self.metrics.items())


def run(
    config: Config | str | PathLike[str],
    *,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
    stages: Sequence[str] | None = None,
    resume: bool = True,
    callback: Callback | None = None,
) -> Result:
    """Run the stages of the chain: ``warmup`` → ``cacl`` → ``cams``.

    A finished stage is skipped when nothing that it depends on has changed; a stopped one goes on from its last
    checkpoint.

    Args:
        config: a configuration, or what :meth:`cacl.config.Config.load` takes.
        encoder: instead of the configuration's.
        backbone: instead of the configuration's; copied, so that it stays as it is.
        stages: which stages, all by default; those before them must be finished.
        resume: go on from what the run folder holds; False does the stages again.
        callback: gets every record of ``log.jsonl`` as it is written.

    Returns:
        The run folder and its metrics.

    Raises:
        ValueError: if the configuration, the data or a file of the run is wrong: one line a problem.
    """
    config = config if isinstance(config, Config) else Config.load(config)
    wanted = tuple(STAGES) if stages is None else tuple(stages)
    for stage in wanted:
        check_choice("stages", stage, STAGES)
    session = _Session(config, encoder, backbone, callback)
    session.prepare(wanted)
    for name, body in STAGES.items():
        if name in wanted:
            session.do(name, body, resume=resume)
    return Result(config.run.out, read_json(session.out / "metrics.json"))


def plan(config: Config, stages: Sequence[str] | None = None) -> list[str]:
    """The stages that :func:`run` would go through, with what the run folder says of each."""
    states = {name: read_json(config.run.out / name / "stage.json") for name in STAGES}
    lines = []
    for name in STAGES if stages is None else stages:
        check_choice("stages", name, STAGES)
        state = states[name]
        lines.append(f"{name}: {'finished' if state.get('finished') else 'started' if state else 'new'}")
    return lines


def describe(name: str, metrics: Record) -> str:
    """One evaluation in one line, with everything that a mean IoU needs beside it."""
    oracle = metrics["oracle"]
    return (
        f"{name}: CAM mIoU {100 * metrics['miou']:.1f} % ({metrics['split']}, {metrics['images']} images, background "
        f"score {metrics['background_score']}, {'CRF' if metrics['crf'] else 'no CRF'}; "
        f"oracle {100 * oracle['miou']:.1f} % at {oracle['background_score']})"
    )


@dataclass
class _Session:
    """One call of :func:`run`: the configuration and what is made from it when it is first needed."""

    config: Config
    given_encoder: ImageTextEncoder | None
    given_backbone: nn.Module | None
    callback: Callback | None
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.config.run.out

    @cached_property
    def device(self) -> torch.device:
        name = self.config.run.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"[run] device: expected a device of this machine, but got {name!r}: {reason}") from None
        return device

    @cached_property
    def train(self) -> Dataset:
        return open_dataset(self.config.data.format, self.config.data.root, self.config.data.train)

    @cached_property
    def eval(self) -> Dataset | None:
        """The split to evaluate on, or None where there is none or it has no masks."""
        data = self.config.data
        if not data.eval:
            return None
        dataset = open_dataset(data.format, data.root, data.eval)
        if dataset.classes != self.train.classes or not any(entry.mask for entry in dataset.entries):
            return None
        return dataset

    @cached_property
    def encoder(self) -> ImageTextEncoder:
        encoder = self.given_encoder
        if encoder is None:
            encoder = load_encoder(self.config.encoder.name)
        if isinstance(encoder, nn.Module):
            encoder.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return encoder

    @cached_property
    def log(self) -> Log:
        return Log(self.out / "log.jsonl")

    def net(self, weights: str | None = None) -> CAMNet:
        """A network with its initial weights, or with those that a finished stage left."""
        table = self.config.camnet
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            backbone: str | nn.Module = table.backbone
            if self.given_backbone is not None:
                backbone = copy.deepcopy(self.given_backbone)
            net = CAMNet(len(self.train.classes), backbone=backbone, weights=table.weights or None)
        if weights is not None:
            path = self.out / weights / "model.pt"
            load_weights(net, load_state(path), path)
        return net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    @cached_property
    def backgrounds(self) -> BackgroundSet | None:
        words, names = self.config.backgrounds, self.train.classes
        if self.config.cacl.beta == 0:
            return None
        if words.file is None:
            return BackgroundSet.built_in(names, words.n or 5)
        return BackgroundSet.from_json(words.file, words.n)

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

    def loop(self, table: Training) -> Loop:
        run = self.config.run
        return Loop(
            epochs=table.epochs,
            batch_size=table.batch_size,
            view=RandomView(table.crop, scale=table.scale),
            schedule=table.schedule,
            seed=run.seed,
            workers=run.workers,
            device=self.device,
            precision=run.precision,
            checkpoint_seconds=run.checkpoint_seconds,
        )

    def prepare(self, stages: Sequence[str]) -> None:
        """Check settings and data before the first step, and write down the configuration."""
        keys = {"train": self.train.fingerprint()}
        if self.eval is not None:
            keys["eval"] = self.eval.fingerprint(masks=True)
        if read_json(self.out / "data.json") != keys:
            # Training never opens a mask; only what is evaluated needs good ones.
            problems = check(self.train, masks=False, progress=True)
            if self.eval is not None:
                problems += check(self.eval, progress=True)
            if problems:
                raise InputError("\n".join(dict.fromkeys(problems)))
        try:
            write_text(self.out / "config.toml", self.config.to_toml())
            write_json(self.out / "data.json", keys)
        except OSError as error:
            raise InputError(f"{self.out}: expected a folder to write to, but {error.strerror or error}") from None
        self.keys["data"] = keys["train"]
        if "cacl" in stages and not self.finished("cacl"):
            _ = self.criterion  # a wrong encoder or prompt shows now, and not after the warm-up

    def do(self, name: str, body: _Body, *, resume: bool) -> None:
        """One stage, unless it is finished, and its evaluation, unless that is known."""
        key = self.key(name)
        path = self.out / name / "stage.json"
        state = read_json(path)
        same = resume and state.get("key") == key
        if same and self.finished(name):
            logger.info("%s: finished before", name)
        else:
            if not same:
                if state:
                    reason = "its settings or data changed" if resume else "that was asked for"
                    logger.info("%s: done again, since %s", name, reason)
                (self.out / name / "checkpoint.pt").unlink(missing_ok=True)
                self.keep_metrics(name, None)
                self.log.rewind(name, 0)
            start = time.monotonic()
            write_json(path, {"key": key, "finished": False})
            body(self, self.out / name, {"key": key, "log": self.log, "callback": self.callback})
            write_json(path, {"key": key, "finished": True})
            (self.out / name / "checkpoint.pt").unlink(missing_ok=True)
            logger.info("%s: finished in %.0f s", name, time.monotonic() - start)
        self.evaluate(name)

    def key(self, name: str) -> str:
        """A hash of everything that a stage's result depends on, the stages before it included."""
        if name not in self.keys:
            config, run = self.config, self.config.run
            common: list[object] = [run.seed, run.precision, self.device.type]
            if name == "warmup":
                mine = [config.warmup, config.camnet, _identity(self.given_backbone), self.keys["data"]]
            elif name == "cacl":
                words = self.backgrounds and {name: self.backgrounds.get(name) for name in self.train.classes}
                mine = [config.cacl, config.encoder, config.prompts, words]
                mine += [_identity(self.given_encoder), self.key("warmup")]
            else:
                mine = [config.cams, self.key("cacl")]
            self.keys[name] = _hash(*common, *mine)
        return self.keys[name]

    def finished(self, stage: str) -> bool:
        return read_json(self.out / stage / "stage.json") == {"key": self.key(stage), "finished": True}

    def needs(self, stage: str) -> None:
        if not self.finished(stage):
            raise InputError(f"{self.out}: the stage {stage!r} has not finished with these settings; run it first")

    def evaluate(self, name: str) -> None:
        """Mean IoU of a finished stage's CAMs: on the split to evaluate, or of the files that were written."""
        dataset, split = self.eval, self.config.data.eval
        if name == "cams":
            dataset, split = self.train, self.config.data.train
        if dataset is None or not any(entry.mask for entry in dataset.entries):
            return
        table = self.config.cams
        key = _hash(self.key(name), table, split, dataset.fingerprint(masks=True))
        if read_json(self.out / "metrics.json").get(name, {}).get("key") == key:
            return
        source = self.out / "cams" / "train" if name == "cams" else self.net(name)
        sweep = evaluate_cams(
            source,
            dataset,
            scales=table.scales,
            flip=table.flip,
            device=self.device,
            workers=self.config.run.workers,
        )
        classes = ("background", *self.train.classes)
        at = sweep.iou[sweep.scores.index(BACKGROUND_SCORE)]
        score, best = sweep.oracle
        metrics = {
            "miou": round(sweep.miou(BACKGROUND_SCORE), 6),
            "split": split,
            "images": sweep.images,
            "background_score": BACKGROUND_SCORE,
            "crf": False,
            "iou": {k: round(float(v), 6) for k, v in zip(classes, at, strict=True) if v == v},
            "oracle": {"background_score": score, "miou": round(best, 6)},
            "key": key,
        }
        self.keep_metrics(name, metrics)
        logger.info("%s", describe(name, metrics))

    def keep_metrics(self, name: str, metrics: Record | None) -> None:
        path = self.out / "metrics.json"
        known = read_json(path)
        if metrics is not None or name in known:
            others = {k: v for k, v in known.items() if k != name}
            both = others if metrics is None else {**others, name: metrics}
            write_json(path, {stage: both[stage] for stage in STAGES if stage in both})


_Body = Callable[[_Session, Path, dict[str, Any]], None]


def _warmup(session: _Session, folder: Path, run: dict[str, Any]) -> None:
    table = session.config.warmup
    net = session.net()
    rates = {"lr": table.lr, "momentum": table.momentum, "weight_decay": table.weight_decay}
    train_classifier(net, session.train, session.loop(table), checkpoint=folder / "checkpoint.pt", **rates, **run)
    save_state(folder / "model.pt", net.state_dict())


def _cacl(session: _Session, folder: Path, run: dict[str, Any]) -> None:
    session.needs("warmup")
    table = session.config.cacl
    net = session.net("warmup")
    rates = {"lr": table.lr, "momentum": table.momentum, "weight_decay": table.weight_decay}
    train_cacl(
        net,
        session.criterion,
        session.train,
        session.loop(table),
        threshold_lr=table.threshold_lr,
        checkpoint=folder / "checkpoint.pt",
        **rates,
        **run,
    )
    save_state(folder / "model.pt", net.state_dict())


def _cams(session: _Session, folder: Path, run: dict[str, Any]) -> None:
    session.needs("cacl")
    table, workers = session.config.cams, session.config.run.workers
    # Files of this very stage from before a stop are kept; others are written anew.
    made = folder / "made.json"
    keep = read_json(made) == {"key": run["key"]}
    write_json(made, {"key": run["key"]})
    make_cams(
        session.net("cacl"),
        session.train,
        folder / "train",
        scales=table.scales,
        flip=table.flip,
        device=session.device,
        workers=workers,
        keep=keep,
    )


STAGES: dict[str, _Body] = {"warmup": _warmup, "cacl": _cacl, "cams": _cams}
"""The stages in their order."""


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps([repr(part) for part in parts]).encode()).hexdigest()[:16]


def _identity(module: object) -> str:
    """What tells one encoder or backbone from another: its class, and the values of its parameters."""
    if module is None:
        return ""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    if isinstance(module, nn.Module):
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
