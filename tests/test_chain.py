"""A stage and a criterion from outside: nothing in the package knows them, and everything works with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from test_pipeline import SETTINGS, files
from torch import Tensor, nn

from cacl import cli, pipeline, present_pairs, split_regions
from cacl.artifacts import cams_of, save_mask, to_make
from cacl.config import Config
from cacl.loading import Batch
from cacl.metrics import ConfusionMatrix
from cacl.report import report
from cacl.settings import Share, Table, Training, Weight
from cacl.stages import cams, contrast, predict, segment, warmup
from cacl.stages.chain import CHAIN
from cacl.stages.score import Score
from cacl.stages.stage import Stage
from cacl.tables import IRN
from cacl.training import fit

# --- a stage in place of `irn` and `masks`: a threshold that is learnt, and pseudo masks by it ---


class Simple(Training):
    """``[simple]``: pseudo masks by one threshold, which a training finds."""

    epochs: float = 3
    lr: Weight = 0.1
    schedule: str = "constant"
    start: Share = 0.2
    """Where the threshold starts."""


class Threshold(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(start))


def make_simple(run, settings, folder, journal):
    net = Threshold(settings.start)

    def step(batch: Batch) -> dict[str, Tensor]:
        return {"loss": (net.value - 0.3) ** 2 + 0 * batch.images.mean(), "threshold": net.value}

    groups = [{"params": list(net.parameters()), "lr": settings.lr}]
    fit(step, {"net": net}, groups, run.train, settings, name="simple", seed=run.seed, journal=journal)
    cams.save_model(folder, net)
    for i in to_make(run.train, folder / "train", ".png", keep=True):
        found, size = cams_of(run.train, run.folder("cams") / "train", i), run.train.mask(i).shape
        maps = found.resized(size)
        best = np.where(maps.max(0) > net.value.item(), found.classes[maps.argmax(0)] + 1, 0)
        save_mask(folder / "train" / f"{run.train.entries[i].id}.png", best.astype(np.uint8))


def score_simple(run, settings, dataset):
    matrix = ConfusionMatrix(len(dataset.classes))
    made = dataset.with_masks(run.folder("simple") / "train")
    for i in dataset.masked:
        matrix.update(dataset.mask(i).numpy(), made.mask(i).numpy())
    return Score.of("simple masks", matrix.iou, dataset.classes, len(dataset.masked))


SIMPLE = Stage(
    "simple", Simple, run=make_simple, title="simple masks", needs=("cams",), files=("train",),
    stands_for=("irn", "masks"), scored_on="train", score=score_simple,
)  # fmt: skip
MINE = (warmup.STAGE, contrast.STAGE, cams.STAGE, SIMPLE, segment.STAGE, predict.STAGE)
OWN = [setting for setting in SETTINGS if not setting.startswith("irn.")]


def configure(root, out, *more):
    settings = [*OWN, "simple.batch_size=3", "simple.crop=32", f"data.root={root}", f"run.out={out}", *more]
    return Config.load("voc", settings, chain=MINE)


def run(root, out, *more, **arguments):
    arguments = {"encoder": TinyEncoder(), "backbone": TinyBackbone(), "chain": MINE, **arguments}
    return pipeline.run(configure(root, out, *more), **arguments)


@pytest.fixture
def root(tmp_path):
    return write_csv(tmp_path / "data")


def test_a_stage_from_outside_runs_and_shows_everywhere(root, tmp_path):
    result = run(root, tmp_path / "out")
    names = {"warmup", "cacl", "cams", "simple", "segment", "predict"}
    assert set(result.metrics) == names
    assert list(result.metrics) == [stage.name for stage in MINE]
    assert result.metrics["simple"]["what"] == "simple masks"
    assert "simple: simple masks mIoU" in result.summary()
    stages = {record["stage"] for record in map(json.loads, (result.out / "log.jsonl").read_text().splitlines())}
    assert stages == {"warmup", "cacl", "simple", "segment"}
    assert set(json.loads((result.out / "times.json").read_text())) == {*names, "report"}
    page = (result.out / "report/index.html").read_text()
    assert "Simple masks" in page
    assert "Loss: simple masks" in page
    assert "[simple]" in page
    again = report(result.out, tmp_path / "again", encoder=TinyEncoder(), backbone=TinyBackbone(), chain=MINE)
    assert "Simple masks" in again.read_text()
    # The segmenter has learnt from its masks, and of the stages whose place it takes nothing is there.
    assert not (result.out / "irn").exists()
    assert not (result.out / "masks").exists()
    assert (result.out / "segment/model.pt").is_file()


def test_a_stage_from_outside_is_skipped_when_finished(root, tmp_path):
    def stages_of(*more):
        seen = []
        run(root, tmp_path / "out", *more, callback=lambda record: seen.append(record["stage"]))
        return list(dict.fromkeys(seen))

    given = {"encoder": TinyEncoder(), "backbone": TinyBackbone(), "chain": MINE}
    names = [*(stage.name for stage in MINE), "report"]
    assert pipeline.plan(configure(root, tmp_path / "out"), **given) == [f"{name}: new" for name in names]
    assert stages_of() == ["warmup", "cacl", "simple", "segment"]
    before = files(tmp_path / "out")
    assert stages_of() == []
    assert files(tmp_path / "out") == before
    assert pipeline.plan(configure(root, tmp_path / "out"), **given) == [f"{name}: finished" for name in names]
    changed = configure(root, tmp_path / "out", "simple.start=0.1")
    assert pipeline.plan(changed, **given)[2:] == ["cams: finished", *(f"{n}: to be done again" for n in names[3:])]
    assert stages_of("simple.start=0.1") == ["simple", "segment"]
    newer = tuple(replace(stage, version=2) if stage is SIMPLE else stage for stage in MINE)
    config = Config.load("voc", [*OWN, f"data.root={root}", f"run.out={tmp_path / 'out'}", "simple.batch_size=3",
                                 "simple.crop=32", "simple.start=0.1"], chain=newer)  # fmt: skip
    assert "simple: to be done again" in pipeline.plan(config, **{**given, "chain": newer})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["simple.strat=0.1"], r'voc: \[simple\] strat: unknown key; did you mean "start"\?$'),
        (["simple.start=2.0"], r"voc: \[simple\] start: input should be less than or equal to 1, but got 2.0$"),
        (["masks.beta=2"], r"voc: \[masks\]: unknown table$"),
    ],
)
def test_its_table_is_checked_like_the_others(root, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        configure(root, tmp_path / "out", *settings)


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}]
from test_chain import run
run({root!r}, {out!r}, *{settings!r})
"""


def test_a_killed_stage_from_outside_goes_on(root, tmp_path):
    settings = ["run.checkpoint_seconds=0", "simple.epochs=60"]
    whole = files(run(root, tmp_path / "whole", *settings).out)
    out, tests = tmp_path / "killed", str(Path(__file__).parent)
    code = SCRIPT.format(tests=tests, root=str(root), out=str(out), settings=settings)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    log, deadline = out / "log.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and log.read_text().count('"simple"') > 20:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() != 0
    assert (out / "simple/checkpoint.pt").is_file()
    given = {"encoder": TinyEncoder(), "backbone": TinyBackbone(), "chain": MINE}
    assert "simple: to be continued" in pipeline.plan(configure(root, out, *settings), **given)
    steps = []
    run(root, out, *settings, callback=lambda record: steps.append((record["stage"], record["step"])))
    assert steps[0][0] == "simple"
    assert steps[0][1] > 20
    assert files(out) == whole


def test_a_stage_between_two_others_stands_for_the_first(root, tmp_path, monkeypatch):
    """One word in the chain: whoever needs the masks after it has its, and it has theirs."""

    class Between(Table):
        value: Share = 0.5

    def copy(run, settings, folder, journal):
        assert run.folder("masks").name == "masks"
        shutil.copytree(run.folder("masks") / "train", run.folder("between") / "train")

    place = [stage.name for stage in CHAIN].index("segment")
    between = Stage("between", Between, run=copy, needs=("masks",), files=("train",), stands_for=("masks",))
    chain = (*CHAIN[:place], between, *CHAIN[place:])
    seen = []
    train = segment.train_segmenter
    monkeypatch.setattr(segment, "train_segmenter", lambda net, data, masks, *a, **k: seen.append(masks) or train(
        net, data, masks, *a, **k))  # fmt: skip
    given = {"encoder": TinyEncoder(), "backbone": TinyBackbone(), "chain": chain}

    def config(*more):
        return Config.load("voc", [*SETTINGS, f"data.root={root}", f"run.out={tmp_path / 'out'}", *more], chain=chain)

    result = pipeline.run(config(), **given)
    assert seen == [tmp_path / "out/between/train"]
    assert result.metrics["masks"]["what"] == "pseudo masks"
    words = dict(line.split(": ") for line in pipeline.plan(config("between.value=0.1"), **given))
    again = {name for name, word in words.items() if word == "to be done again"}
    assert again == {"between", "segment", "predict", "report"}


def test_the_commands_take_a_chain_too(root, tmp_path, capsys):
    small = ["camnet.backbone=resnet18", "camnet.weights=", f"data.root={root}", f"run.out={tmp_path / 'out'}"]
    options = [part for setting in [*OWN, *small] for part in ("--set", setting)]
    assert cli.main(["run", "voc", "--dry-run", *options], chain=MINE) == 0
    out = capsys.readouterr().out
    assert "[simple]" in out
    assert "simple: new" in out
    assert "[masks]" not in out
    assert cli.main(["run", "voc", "--dry-run", *options, "--set", "simple.start=no"], chain=MINE) == 2
    assert "[simple] start: input should be a valid number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ((warmup.STAGE, segment.STAGE), "to have 'masks', or a stage that stands for it, before 'segment'"),
        ((contrast.STAGE, warmup.STAGE), "to have 'warmup', or a stage that stands for it, before 'cacl'"),
        ((warmup.STAGE, warmup.STAGE), "stages of different names, but 'warmup' stands twice"),
        ((replace(warmup.STAGE, name="data"),), r"stages of other names than \[data\]'s"),
        ((replace(warmup.STAGE, name="report"),), r"stages of other names than \[report\]'s"),
        ((replace(warmup.STAGE, name="../x"),), "stages with plain names, but got '../x'"),
        (("warmup",), "to hold stages, but got str"),
    ],
)
def test_a_chain_that_cannot_be(root, chain, message):
    with pytest.raises(ValueError, match=f"Expected argument `chain` .*{message}"):
        pipeline.run("voc", chain=chain)


def test_a_configuration_of_another_chain_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="Expected argument `config` to be of the same `chain`"):
        pipeline.run(Config.load("voc", [f"data.root={root}"]), chain=MINE)
    assert pipeline.plan(configure(root, tmp_path / "out"))[3] == "simple: new"  # its own chain


def test_a_stage_of_the_same_name_may_have_another_table(root):
    class Other(IRN):
        extra: Share = 0.5

    chain = tuple(replace(stage, settings=Other) if stage.name == "irn" else stage for stage in CHAIN)
    config = Config.load("scenes", ["irn.extra=0.25", "irn.epochs=1"], chain=chain)
    assert (config.irn.extra, config.irn.epochs, config.irn.lr) == (0.25, 1, 0.2)


# --- a criterion: CLIMS (Xie et al. 2022), with one prompt a class and shared background words ---


class CLIMSTerms(NamedTuple):
    total: Tensor
    foreground: Tensor
    background: Tensor
    suppression: Tensor
    area: Tensor


class CLIMS(nn.Module):
    def __init__(self, encoder, names, words=("tree", "river", "sea", "rocks"), weights=(10.0, 24.0, 1.0, 0.2)):
        super().__init__()
        self._encoder, self.weights = [encoder], weights
        unit = nn.functional.normalize
        self.register_buffer("text", unit(encoder.encode_text([f"a photo of {name}." for name in names]), dim=-1))
        self.register_buffer("words", unit(encoder.encode_text([f"a photo of {word}." for word in words]), dim=-1))

    def forward(self, images, cams, labels):
        encoder = self._encoder[0]
        regions = split_regions(images, cams, labels, size=encoder.image_size)
        features = encoder.encode_image(torch.cat((regions.foreground, regions.background)))
        foreground, background = nn.functional.normalize(features, dim=-1).chunk(2)
        text = self.text[regions.class_index]
        near, far = ((x * text).sum(-1).clamp(1e-4, 0.9999) for x in (foreground, background))
        similar = (foreground @ self.words.T).clamp(max=0.9999)
        terms = (
            -near.log().mean(),
            -(1 - far).log().mean(),
            -((1 - similar).log() * (similar > 0.26)).sum(),
            cams.mean(),
        )
        return CLIMSTerms(sum(w * term for w, term in zip(self.weights, terms, strict=True)), *terms)

    def record(self):
        return {"mean_word": self.words.mean(1)}


CRITERION = ["warmup", "cacl", "cams"]


def records_of(root, out, **arguments):
    records = []
    config = Config.load("voc", [*SETTINGS, f"data.root={root}", f"run.out={out}"])
    arguments = {"backbone": TinyBackbone(), "stages": CRITERION, **arguments}
    result = pipeline.run(config, callback=records.append, **arguments)
    return result, [record for record in records if record["stage"] == "cacl"]


def test_a_criterion_from_outside_trains(root, tmp_path):
    def clims(**settings):
        return CLIMS(TinyEncoder(), ("boat", "train"), **settings)

    result, records = records_of(root, tmp_path / "out", criterion=clims())
    assert len(records) == 4
    keys = {"loss", "foreground", "background", "suppression", "area", "mean_word"}
    assert keys <= records[0].keys()
    assert "threshold" not in records[0]
    assert len(records[0]["mean_word"]) == 4
    terms = [records[0][key] for key in ("foreground", "background", "suppression", "area")]
    assert records[0]["loss"] == pytest.approx(np.dot([10, 24, 1, 0.2], terms), rel=1e-4)
    assert list(result.metrics) == CRITERION
    # Equal ones are known again, and others are others.
    assert records_of(root, tmp_path / "out", criterion=clims())[1] == []
    assert len(records_of(root, tmp_path / "out", criterion=clims(weights=(10.0, 24.0, 1.0, 0.4)))[1]) == 4
    assert len(records_of(root, tmp_path / "out", encoder=TinyEncoder())[1]) == 4


def test_a_function_is_a_criterion_and_a_criterion_stays_as_it_was(root, tmp_path):
    def area(images, cams, labels):
        image, classes = present_pairs(labels)
        return CLIMSTerms((1 - cams[image, classes]).mean(), *torch.zeros(4))

    assert len(records_of(root, tmp_path / "area", criterion=area)[1]) == 4

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images, cams, labels):
            return CLIMSTerms((self.scale * cams).mean(), *torch.zeros(4))

    criterion = Scaled().eval()
    assert len(records_of(root, tmp_path / "scaled", criterion=criterion)[1]) == 4
    assert criterion.scale == 1
    assert not criterion.training
    assert records_of(root, tmp_path / "scaled", criterion=criterion)[1] == []


def test_what_is_no_criterion_is_said(root, tmp_path):
    with pytest.raises(ValueError, match="argument `criterion` to return a NamedTuple with a `total`, but got Tensor"):
        records_of(root, tmp_path / "out", criterion=lambda images, cams, labels: cams.mean())
