"""One run: what its configuration means, which stages are finished, and what they scored."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cacl import scenes
from cacl._checks import InputError, first_line
from cacl._files import load_state, load_weights, read_json, write_json, write_text
from cacl._log import Callback, Log, Record
from cacl.camnet import CAMNet
from cacl.cams import evaluate_cams
from cacl.config import Config, Refined, Training
from cacl.crf import check_backend
from cacl.criterion import CACLLoss
from cacl.datasets import Dataset, check, open_dataset
from cacl.encoders import ImageTextEncoder, load_encoder
from cacl.irn import IRNet
from cacl.losses import BGSuppressionLoss
from cacl.masks import evaluate_refined
from cacl.metrics import BACKGROUND_SCORE, SCORES
from cacl.prompts import BackgroundSet, PromptSet
from cacl.training import Loop
from cacl.transforms import RandomView

logger = logging.getLogger("cacl")

Network = TypeVar("Network", bound=nn.Module)

STAGES = ("warmup", "cacl", "cams", "irn", "masks", "report")
"""The stages in their order; each builds on the one before it."""
_FILES = ("train", "labels", "walk")
"""The folders in a stage's folder that hold a file an image."""
_SCORED_ON = {"warmup": "eval", "cacl": "eval", "cams": "train", "irn": "train", "masks": "train"}
"""Stage -> the key of ``[data]`` that names the split its result is scored on; other stages have no score."""


@dataclass
class Session:
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
            reason = first_line(error)
            raise InputError(f"[run] device: expected a device of this machine, but got {name!r}: {reason}") from None
        return device

    @property
    def workers(self) -> int:
        return min(self.config.run.workers, os.cpu_count() or 1)

    @property
    def inference(self) -> dict[str, Any]:
        """How CAMs are made from a network, for :mod:`cacl.cams`."""
        table = self.config.cams
        return {"scales": table.scales, "flip": table.flip, "device": self.device, "workers": self.workers}

    def open(self, split: str) -> Dataset:
        """A split of the data set, which is drawn if it is one of scenes."""
        data = self.config.data
        if data.format == "scenes":
            scenes.generate(data.root, **self.config.scenes.model_dump(), workers=self.workers)
        return open_dataset(data.format, data.root, split)

    @cached_property
    def train(self) -> Dataset:
        return self.open(self.config.data.train)

    @cached_property
    def eval(self) -> Dataset | None:
        """The split to evaluate on, or None where there is none or it has no masks."""
        if not self.config.data.eval:
            return None
        dataset = self.open(self.config.data.eval)
        return dataset if any(entry.mask for entry in dataset.entries) else None

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the data sets, with their masks, as this run found them."""
        datasets = {"train": self.train, "eval": self.eval}
        return {name: dataset.fingerprint(masks=True) for name, dataset in datasets.items() if dataset is not None}

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

    def net(self, stage: str | None = None) -> CAMNet:
        """A network with its initial weights, or with those that a finished stage left."""
        return self._network(partial(CAMNet, len(self.train.classes)), stage)

    def irnet(self, stage: str | None = None) -> IRNet:
        """As :meth:`net`; its backbone is the untrained one of ``[camnet]``."""
        return self._network(IRNet, stage)

    def _network(self, make: Callable[..., Network], stage: str | None) -> Network:
        table = self.config.camnet
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.run.seed)  # torch.manual_seed would seed the GPUs too
            backbone: str | nn.Module = table.backbone
            if self.given_backbone is not None:
                backbone = copy.deepcopy(self.given_backbone)
            pretrained = table.weights if stage is None else ""
            net = make(backbone=backbone, weights=pretrained or None)
        if stage is not None:
            path = self.out / stage / "model.pt"
            load_weights(net, load_state(path), path)
        return net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    @cached_property
    def backgrounds(self) -> BackgroundSet | None:
        words, names = self.config.backgrounds, self.train.classes
        if self.config.cacl.beta == 0:
            return None
        beside = self.config.data.root / "backgrounds.json"
        file = words.file or (beside if beside.is_file() and self.config.data.format != "voc" else None)
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
        for before, name in pairwise(STAGES):
            if name in stages and before not in stages and not self.finished(before):
                raise InputError(f"{self.out}: the stage {before!r} has not finished with these settings; run it first")
        # What is wrong with a setting shows now: not after the warm-up, and not when files have been replaced.
        for table in (self.config.warmup, self.config.cacl, self.config.irn):
            self.loop(table)
        if "warmup" in stages and not self.finished("warmup"):
            self.net()
        if "cacl" in stages and not self.finished("cacl"):
            _ = self.criterion
        if not {"irn", "masks", "report"}.isdisjoint(stages):
            check_backend(self.config.run.crf)
            low, high = self.config.irn.background_score, self.config.irn.foreground_score
            if low > high:
                raise InputError(f"[irn] background_score: expected at most foreground_score {high}, but got {low}")
        if "irn" in stages and not self.finished("irn"):
            self.irnet()
        if read_json(self.out / "data.json") != self.fingerprints:
            # Training never opens a mask, but the CAMs of the training images are evaluated where there are masks.
            datasets = [dataset for dataset in (self.train, self.eval) if dataset is not None]
            problems = [line for dataset in datasets for line in check(dataset, progress=True)]
            if problems:
                raise InputError("\n".join(dict.fromkeys(problems)))
        try:
            write_text(self.out / "config.toml", self.config.to_toml())
            write_json(self.out / "data.json", self.fingerprints)
        except OSError as error:
            raise InputError(f"{self.out}: expected a folder to write to, but {error.strerror or error}") from None

    def do(self, name: str, body: Body, *, resume: bool) -> None:
        """One stage, unless it is finished, and its evaluation, unless that is known."""
        key, folder = self.key(name), self.out / name
        path = folder / "stage.json"
        state = read_json(path)
        same = resume and state.get("key") == key
        if same and state.get("finished"):
            logger.info("%s: finished before", name)
            (folder / "checkpoint.pt").unlink(missing_ok=True)  # left by a kill just after the stage
        else:
            if not same:
                if state:
                    reason = "its settings or data changed" if resume else "that was asked for"
                    logger.info("%s: done again, since %s", name, reason)
                # Nothing of another run stays, and what builds on this stage is done again too.
                for later in STAGES[STAGES.index(name) :]:
                    (self.out / later / "stage.json").unlink(missing_ok=True)
                    self.keep_metrics(later, None)
                (folder / "checkpoint.pt").unlink(missing_ok=True)
                for files in (folder / name for name in _FILES):
                    if files.is_symlink():
                        files.unlink()
                    elif files.is_dir():
                        shutil.rmtree(files)
            start = time.monotonic()
            write_json(path, {"key": key, "finished": False})
            body(self, folder, {"key": key, "log": self.log, "callback": self.callback})
            write_json(path, {"key": key, "finished": True})
            (folder / "checkpoint.pt").unlink(missing_ok=True)
            logger.info("%s: finished in %.0f s", name, time.monotonic() - start)
        self.evaluate(name)

    def key(self, name: str) -> str:
        """A hash of everything that a stage's result depends on, the stages before it included."""
        if name not in self.keys:
            config, run = self.config, self.config.run
            common: list[object] = [run.seed, run.precision]
            if name == "warmup":
                mine = [config.warmup, config.camnet, _identity(self.given_backbone), self.train.fingerprint()]
            elif name == "cacl":
                words = self.backgrounds and {name: self.backgrounds.get(name) for name in self.train.classes}
                mine = [config.cacl, config.encoder, config.prompts, words]
                mine += [_identity(self.given_encoder), self.key("warmup")]
                if (checkpoint := Path(config.encoder.name)).is_file():
                    mine += [checkpoint.stat().st_size, checkpoint.stat().st_mtime_ns]
            elif name == "cams":
                mine = [config.cams, self.key("cacl")]
            elif name == "irn":
                mine = [config.irn, check_backend(run.crf), self.key("cams")]
            elif name == "masks":
                mine = [config.masks, self.key("irn")]
            else:
                mine = [config.report, self.key("masks"), self.fingerprints]
            self.keys[name] = _hash(*common, *mine)
        return self.keys[name]

    def finished(self, stage: str) -> bool:
        return read_json(self.out / stage / "stage.json") == {"key": self.key(stage), "finished": True}

    def evaluate(self, name: str) -> None:
        """Mean IoU of what a finished stage gives: on the split to evaluate, or of the training images."""
        role = _SCORED_ON.get(name)
        dataset: Dataset | None = getattr(self, role) if role else None
        if role is None or dataset is None or not any(entry.mask for entry in dataset.entries):
            return
        split = getattr(self.config.data, role)
        key = _hash(self.key(name), self.config.cams, split, self.fingerprints[role])
        if self.metrics.get(name, {}).get("key") == key:
            return
        metrics = {**self._score(name, dataset), "split": split, "key": key}
        self.keep_metrics(name, metrics)
        logger.info("%s", describe(name, metrics))

    def _score(self, name: str, dataset: Dataset) -> Record:
        """What is evaluated, its mean IoU and that of every class, and the oracle's where there is a score to sweep."""
        masks = name == "masks"
        score = round(self.config.masks.background_score, 6) if masks else BACKGROUND_SCORE
        table = self.config.masks if masks else self.config.irn
        crf = name in ("irn", "masks") and table.iterations > 0
        what = "pseudo masks" if masks else "CAM + CRF" if crf else "CAM"
        record: Record = {"what": what, "background_score": score, "crf": crf}
        folder = self.out / ("masks/walk" if masks else "cams/train")
        if name == "irn" or masks:
            matrix, images = evaluate_refined(dataset, folder, background_score=score, **self.crf(table))
            record |= {"images": images, **_iou(matrix.iou, dataset.classes)}
            if name == "irn":
                return record
        source = folder if masks or name == "cams" else self.net(name)
        sweep = evaluate_cams(source, dataset, scores=sorted({*SCORES, score}), **self.inference)
        best, miou = sweep.oracle
        oracle = {"background_score": best, "miou": round(miou, 6)}
        alone = _iou(sweep.iou[sweep.scores.index(score)], dataset.classes)
        if masks:
            return {**record, "walk": {"miou": alone["miou"], "oracle": oracle}}
        return {**record, "images": sweep.images, **alone, "oracle": oracle}

    @property
    def metrics(self) -> dict[str, Any]:
        """``metrics.json``: what is known of each stage, in their order."""
        known = read_json(self.out / "metrics.json")
        return {stage: known[stage] for stage in STAGES if isinstance(known.get(stage), dict)}

    def keep_metrics(self, name: str, metrics: Record | None) -> None:
        known = self.metrics
        if metrics is not None or name in known:
            both = {**known, name: metrics}
            write_json(self.out / "metrics.json", {stage: both[stage] for stage in STAGES if both.get(stage)})


Body = Callable[[Session, Path, dict[str, Any]], None]
"""What a stage does: session, the stage's folder, and the arguments that every training loop takes."""


def describe(name: str, metrics: Record) -> str:
    """One evaluation in one line, with everything that a mean IoU needs beside it."""
    line = (
        f"{name}: {metrics['what']} mIoU {100 * metrics['miou']:.1f} % ({metrics['split']}, {metrics['images']} "
        f"images, background score {metrics['background_score']}, {'CRF' if metrics['crf'] else 'no CRF'}"
    )
    walk = metrics.get("walk", {})
    if walk:
        line += f"; the random walk alone {100 * walk['miou']:.1f} %"
    if oracle := metrics.get("oracle", walk.get("oracle")):
        line += f"; oracle {100 * oracle['miou']:.1f} % at {oracle['background_score']}"
    return line + ")"


def _iou(values: NDArray[np.float64], classes: Sequence[str]) -> Record:
    named = zip(("background", *classes), values.tolist(), strict=True)
    return {"miou": round(float(np.nanmean(values)), 6), "iou": {k: round(v, 6) for k, v in named if v == v}}


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
