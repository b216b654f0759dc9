"""The pipeline: every stage on drawn photos, skipped, resumed, killed, and refused."""

import gc
import json
import re
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from PIL import Image

import cacl
from cacl import cli, pipeline
from cacl._support import progress
from cacl._support.files import locked, replacing
from cacl.config import Config
from cacl.datasets import FORMATS, open_dataset
from cacl.images import VOC_COLOURS, read_mask
from cacl.log import Log
from cacl.metrics import ConfusionMatrix
from cacl.photos import load_segmenter
from cacl.pictures import overlay
from cacl.predict import predict
from cacl.runs.session import Session
from cacl.stages.chain import CHAIN
from cacl.stages.predict import make_predictions

SETTINGS = [
    "data.format=csv", "data.train=train", "data.eval=val", "run.device=cpu", "run.workers=0",
    "warmup.epochs=2", "warmup.batch_size=3", "warmup.crop=32", "warmup.lr=0.01",
    "cacl.epochs=2", "cacl.batch_size=3", "cacl.crop=32", "cacl.lr=0.01", "cacl.threshold=0.2", "cams.scales=[1.0]",
    "irn.epochs=2", "irn.batch_size=3", "irn.crop=32", "irn.lr=0.01", "irn.radius=4",
    "segment.epochs=2", "segment.batch_size=3", "segment.crop=32", "segment.lr=0.001", "segment.backbone=",
]  # fmt: skip
STAGES = [stage.name for stage in CHAIN]
"""Without the report, which takes longer than all of them: where a test looks at it, stages are None."""
UNASKED = [name for name in pipeline.STAGES if name != "tags"]
"""What the preset does by itself."""


@pytest.fixture
def root(tmp_path):
    return write_csv(tmp_path / "data")


def configure(root, out, *more):
    return Config.load("voc", [*SETTINGS, f"data.root={root}", f"run.out={out}", *more])


def run(root, out, *more, **arguments):
    arguments = {"encoder": TinyEncoder(), "backbone": TinyBackbone(), "stages": STAGES, **arguments}
    return pipeline.run(configure(root, out, *more), **arguments)


def files(out: Path) -> dict[str, bytes]:
    """What a run made, without what tells times and its folder: in the log, the configuration, the report."""
    result = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in ("times.json", "index.html"):
            name = path.relative_to(out).as_posix()
            result[name] = path.read_bytes()
            if name == "log.jsonl":
                records = [json.loads(line) for line in path.read_text().splitlines()]
                result[name] = json.dumps([{**r, "images_per_second": 0} for r in records]).encode()
            if name == "config.toml":
                lines = path.read_text().splitlines()
                result[name] = "\n".join(
                    x for x in lines if not x.startswith(("out", "workers", "checkpoint"))
                ).encode()
    return result


def test_a_run_leaves_what_the_documentation_says(root, tmp_path):
    result = run(root, tmp_path / "out", stages=None)
    names = set(files(result.out))
    assert names == {
        "config.toml", "data.json", "log.jsonl", "metrics.json",
        "warmup/model.pt", "warmup/stage.json", "cacl/model.pt", "cacl/stage.json", "cams/stage.json",
        "irn/model.pt", "irn/stage.json", "masks/stage.json", "segment/model.pt", "segment/stage.json",
        "predict/stage.json", "report/stage.json", *(f"report/{i}.png" for i in ("cams", "masks", "segmentation")),
        *(f"predict/eval/{i}.png" for i in range(6, 9)), *(f"{i}/agreement.json" for i in ("cams", "masks", "predict")),
        *(f"cams/train/{i}.npz" for i in range(6)), *(f"irn/labels/{i}.png" for i in range(6)),
        *(f"masks/walk/{i}.npz" for i in range(6)), *(f"masks/train/{i}.png" for i in range(6)),
    }  # fmt: skip
    assert (result.out / "report/index.html").is_file()
    times = json.loads((result.out / "times.json").read_text())
    assert list(times) == UNASKED
    assert all(cost["seconds"] > 0 for cost in times.values())
    written = Config.load(result.out / "config.toml")  # with what it has been computed in
    assert written == configure(root, tmp_path / "out", f"run.precision={written.run.precision}")
    assert written.run.precision != "auto"
    metrics = json.loads((result.out / "metrics.json").read_text())
    assert metrics == result.metrics
    assert {name: (m["split"], m["images"], m.get("background_score"), m["crf"]) for name, m in metrics.items()} == {
        "warmup": ("val", 3, 0.15, False),
        "cacl": ("val", 3, 0.15, False),
        "cams": ("train", 6, 0.15, False),
        "irn": ("train", 6, 0.15, True),
        "masks": ("train", 6, 0.25, True),
        "segment": ("val", 3, None, False),
        "predict": ("val", 3, None, True),
    }
    assert metrics["cacl"]["oracle"]["miou"] >= metrics["cacl"]["miou"]
    assert "cacl: CAM mIoU" in result.summary()
    assert "(val, 3 images, background score 0.15, no CRF; oracle" in result.summary()
    assert re.search(r"irn: CAM \+ CRF mIoU .* \(train, 6 images, background score 0.15, CRF\)", result.summary())
    assert "masks: pseudo masks mIoU" in result.summary()
    assert re.search(r"segment: DeepLabV2 mIoU \d+\.\d % \(val, 3 images, no CRF\)", result.summary())
    assert re.search(r"predict: DeepLabV2 mIoU \d+\.\d % \(val, 3 images, CRF\)", result.summary())
    records = [json.loads(line) for line in (result.out / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in records] == [
        (s, i) for s in ("warmup", "cacl", "irn", "segment") for i in (1, 2, 3, 4)
    ]
    wanted = {
        "epoch", "lr", "images_per_second", "loss", "itc", "bgs", "region", "foreground_similarity",
        "background_similarity", "pass_rate", "threshold", "template_share",
    }  # fmt: skip
    assert wanted <= set(records[7])
    assert {"loss", "background", "foreground", "negative", "displacement_foreground"} <= set(records[-5])
    assert sum(records[7]["template_share"]) == pytest.approx(1, abs=1e-4)


def test_the_models_are_left_alone_and_the_seed_decides(root, tmp_path):
    backbone, encoder = TinyBackbone(), TinyEncoder()
    before = backbone.conv.weight.clone()
    state = torch.get_rng_state()
    first = pipeline.run(configure(root, tmp_path / "a"), encoder=encoder, backbone=backbone, stages=STAGES)
    assert torch.equal(backbone.conv.weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert files(run(root, tmp_path / "b", backbone=backbone).out) == files(first.out)
    assert files(run(root, tmp_path / "c", "run.seed=1").out)["cacl/model.pt"] != files(first.out)["cacl/model.pt"]


def test_finished_stages_are_skipped_until_something_changes(root, tmp_path):
    out = tmp_path / "out"
    run(root, out)

    def stages_of(*more, **arguments):
        seen = []
        run(root, out, *more, callback=lambda r: seen.append(r["stage"]), **arguments)
        return list(dict.fromkeys(seen))

    before = files(out)
    assert stages_of() == []
    assert files(out) == before
    assert stages_of("masks.beta=5") == ["segment"]
    after = files(out)
    assert {name for name in before if before[name] != after[name]} >= {f"masks/walk/{i}.npz" for i in range(6)}
    assert before["irn/model.pt"] == after["irn/model.pt"]
    assert stages_of("irn.radius=3") == ["irn", "segment"]
    assert stages_of("cams.flip=false") == ["irn", "segment"]
    assert files(out)["cams/train/0.npz"] != before["cams/train/0.npz"]
    assert stages_of("cacl.alpha=10") == ["cacl", "irn", "segment"]
    assert stages_of("cacl.alpha=10", "run.workers=1", "run.checkpoint_seconds=1") == []
    assert stages_of("warmup.lr=0.02", "cacl.alpha=10") == ["warmup", "cacl", "irn", "segment"]
    assert stages_of("warmup.lr=0.02", "cacl.alpha=10", resume=False) == ["warmup", "cacl", "irn", "segment"]
    (root / "images/0.png").write_bytes((root / "images/1.png").read_bytes())
    assert stages_of("warmup.lr=0.02", "cacl.alpha=10") == ["warmup", "cacl", "irn", "segment"]
    # A mask or a scale of the CAMs changes what is measured, and nothing that was trained.
    scores = json.loads((out / "metrics.json").read_text())
    (root / "masks/7.png").write_bytes((root / "masks/6.png").read_bytes())
    assert stages_of("warmup.lr=0.02", "cacl.alpha=10", "cams.scales=[2.0]") == ["irn", "segment"]
    again = json.loads((out / "metrics.json").read_text())
    assert all(again[stage]["iou"] != scores[stage]["iou"] for stage in ("warmup", "cacl", "cams"))
    assert list(again) == ["warmup", "cacl", "cams", "irn", "masks", "segment", "predict"]
    encoder = TinyEncoder()
    encoder.head.weight.data += 0.1
    assert stages_of("warmup.lr=0.02", "cacl.alpha=10", encoder=encoder) == ["cacl", "irn", "segment"]


def test_a_stage_needs_those_before_it(root, tmp_path):
    with pytest.raises(ValueError, match="the stage 'warmup' has not finished with these settings; run it first"):
        run(root, tmp_path / "out", stages=["cacl"])
    run(root, tmp_path / "out", stages=["warmup"])
    run(root, tmp_path / "out", stages=["cacl"])
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match="the stage 'warmup' has not finished with these settings; run it first"):
        run(root, tmp_path / "out", "warmup.lr=0.5", stages=["cacl"])
    assert files(tmp_path / "out") == before
    with pytest.raises(ValueError, match="the stage 'cacl' has not finished with these settings"):
        run(root, tmp_path / "out", "cacl.beta=0", stages=["cams"])
    with pytest.raises(ValueError, match='Expected argument `stages` to be one of "warmup", "cacl", "cams", "irn"'):
        run(root, tmp_path / "out", stages=["came"])


def test_bad_photos_are_listed_before_the_first_step_and_nothing_is_lost(root, tmp_path):
    run(root, tmp_path / "out")
    before = files(tmp_path / "out")
    (root / "images/1.png").write_text("broken")
    (root / "images/4.png").write_text("broken too")
    with pytest.raises(ValueError, match=r"images/1.png: not an image that decodes") as error:
        run(root, tmp_path / "out")
    assert len(str(error.value).splitlines()) == 2
    assert files(tmp_path / "out") == before


def test_every_split_is_looked_at_before_the_first_step(root, tmp_path):
    table = (root / "dataset.csv").read_text()
    for i in range(9):
        table = table.replace(f"masks/{i}.png", "")
    (root / "dataset.csv").write_text(table)
    (root / "images/4.png").write_text("broken")
    with pytest.raises(ValueError, match=r"images/4.png: not an image that decodes"):
        run(root, tmp_path / "out", "data.eval=train", "predict.split=val")
    (root / "images/7.png").write_text("broken")
    with pytest.raises(ValueError, match=r"images/7.png: not an image that decodes"):
        run(root, tmp_path / "out", "data.eval=", "predict.split=val")
    with pytest.raises(
        ValueError, match=r'\[segment\] weights: expected "DEFAULT" or "cacl" where no backbone is named'
    ):
        run(root, tmp_path / "out", "segment.weights=mine.pth")


def test_the_segmenter_may_start_from_ca_cl(root, tmp_path):
    settings = ["segment.weights=cacl", "segment.epochs=0", "segment.freeze_batch_norm=false"]
    out = run(root, tmp_path / "out", *settings).out
    one, two = (torch.load(out / f"{stage}/model.pt", weights_only=True) for stage in ("cacl", "segment"))
    assert torch.equal(one["backbone.conv.weight"], two["weights"]["backbone.conv.weight"])
    with pytest.raises(ValueError, match=r"\[segment\] weights: the backbone of \[camnet\]: does not fit: 1 of"):
        run(root, tmp_path / "out2", *settings, "segment.backbone=resnet18")


def test_bad_masks_of_the_training_images_show_before_the_first_step(root, tmp_path):
    Image.new("L", (64, 48), 7).save(root / "masks/2.png")
    with pytest.raises(ValueError, match=r"masks/2.png: expected values 0 to 2 or 255, but got 7"):
        run(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_settings_leave_nothing_of_the_run_before(root, tmp_path, monkeypatch):
    whole = files(run(root, tmp_path / "whole", "cacl.alpha=5").out)
    out = run(root, tmp_path / "out").out
    written = []

    def stopping(path):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return replacing(path)

    monkeypatch.setattr("cacl.artifacts.replacing", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(root, out, "cacl.alpha=5")
    run(root, out, "cacl.alpha=5")
    assert files(out) == whole
    assert list(run(root, out, "warmup.lr=0.02", stages=["warmup"]).metrics) == ["warmup"]


def test_restart_does_every_file_again(root, tmp_path):
    out = run(root, tmp_path / "out").out
    before = files(out)
    (out / "cams/train/0.npz").write_text("broken")
    run(root, out, resume=False)
    assert files(out) == before


def test_a_checkpoint_that_a_kill_left_is_removed(root, tmp_path):
    out = run(root, tmp_path / "out").out
    (out / "cacl/checkpoint.pt").write_text("left")
    run(root, out)
    assert not (out / "cacl/checkpoint.pt").exists()


def test_another_checkpoint_under_the_same_name_is_another_encoder(root, tmp_path, clip_state):
    torch.save(clip_state, tmp_path / "clip.pt")
    seen = []
    for _ in range(2):
        run(root, tmp_path / "out", f"encoder.name={tmp_path / 'clip.pt'}", encoder=None, stages=["warmup", "cacl"],
            callback=lambda record: seen.append(record["stage"]))  # fmt: skip
        torch.save({**clip_state, "logit_scale": torch.zeros(()), "text_projection": -clip_state["text_projection"]},
                   tmp_path / "clip.pt")  # fmt: skip
    assert list(dict.fromkeys(seen)) == ["warmup", "cacl"]
    assert [seen.count(stage) for stage in ("warmup", "cacl")] == [4, 8]


def test_plan_says_what_would_be_done(root, tmp_path):
    config = configure(root, tmp_path / "out", "cacl.beta=0")
    pipeline.run(config, encoder=None, backbone=None, stages=[])  # writes the configuration, and no stage
    assert pipeline.plan(config) == [f"{name}: new" for name in UNASKED]
    small = [*SETTINGS, f"data.root={root}", f"run.out={tmp_path / 'out'}", "camnet.backbone=resnet18"]
    config = Config.load("voc", [*small, "camnet.weights="])
    pipeline.run(config, stages=["warmup"])
    assert pipeline.plan(config, ["warmup"]) == ["warmup: finished"]
    assert pipeline.plan(config, ["warmup"], resume=False) == ["warmup: to be done again"]
    changed = Config.load("voc", [*small, "camnet.weights=", "warmup.lr=1"])
    assert pipeline.plan(changed, ["warmup"]) == ["warmup: to be done again"]


def test_data_without_masks_trains_and_has_no_mean_iou(root, tmp_path):
    table = (root / "dataset.csv").read_text().replace("masks/", "masks/gone-")
    for i in range(9):
        table = table.replace(f"masks/gone-{i}.png", "")
    (root / "dataset.csv").write_text(table)
    metrics = run(root, tmp_path / "out").metrics
    assert {name: record["miou"] for name, record in metrics.items()} == dict.fromkeys(("cams", "masks", "predict"))
    assert list(run(root, tmp_path / "out2", "data.eval=").metrics) == ["cams", "masks", "predict"]


def test_no_warmup_epochs_starts_from_the_backbone(root, tmp_path):
    run(root, tmp_path / "out", "warmup.epochs=0", stages=["warmup"])
    state = torch.load(tmp_path / "out/warmup/model.pt", weights_only=True)
    assert torch.equal(state["backbone.conv.weight"], TinyBackbone().conv.weight)


@pytest.mark.parametrize(
    "settings",
    [
        ["cacl.threshold_mode=soft", "cacl.threshold=0.25"],
        ["cacl.threshold_mode=quantile"],
        ["cacl.beta=0", "cacl.template=2"],
        ["run.precision=bf16"],
    ],
)
def test_modes(root, tmp_path, settings):
    run(root, tmp_path / "out", *settings, stages=["warmup", "cacl"])
    last = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[-1])
    assert last["stage"] == "cacl"
    assert -1 < last["threshold"] < 1


def test_clip_from_a_checkpoint(root, tmp_path, clip_state):
    torch.save(clip_state, tmp_path / "clip.pt")
    run(root, tmp_path / "out", f"encoder.name={tmp_path / 'clip.pt'}", encoder=None, stages=["warmup", "cacl"])
    assert (tmp_path / "out/cacl/model.pt").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["run.device=tpu"], r"\[run\] device: expected a device of this machine, but got 'tpu'"),
        (["data.train=tarin"], "expected rows of split 'tarin', but there is train, val"),
        (["encoder.name=ViT-B/23"], "but got 'ViT-B/23'; did you mean \"ViT-"),
        (["camnet.backbone=resnet51"], "Expected argument `backbone` to be one of"),
        (["warmup.scale=[2.0,1.0]"], r"Expected argument `scale\[1\]` to be a number in \[2, 100\], but got 1.0"),
        (["cacl.template=4"], r"Expected argument `template` to be in \[0, 3\], but got 4"),
        (["backgrounds.file=none.json"], "none.json: "),
        (
            ["irn.foreground_score=0.05"],
            r"\[irn\] background_score: expected at most foreground_score 0.05, but got 0.1",
        ),
        (["irn.bilateral=[50.0, 0.0, 10.0]"], r"\[irn\] bilateral.1: input should be greater than 0, but got 0.0"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_lost(root, tmp_path, settings, message):
    run(root, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as error:
        run(root, tmp_path / "out", *settings, encoder=None if "encoder" in settings[0] else TinyEncoder(),
            backbone=None if "backbone" in settings[0] else TinyBackbone())  # fmt: skip
    assert "\n" not in str(error.value)
    assert files(tmp_path / "out") == before


def test_a_model_of_another_size_is_refused(root, tmp_path):
    run(root, tmp_path / "out", stages=["warmup"])
    path = tmp_path / "out/warmup/model.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "classifier.weight": torch.zeros(3, 8, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"model.pt: does not fit: 2 of 3 parameters match; 'classifier.weight'"):
        run(root, tmp_path / "out", stages=["cacl"])


def test_attribute_of_the_package():
    code = "import cacl; assert cacl.pipeline.run is __import__('cacl.pipeline').pipeline.run"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'pipelines'"):
        cacl.pipelines  # noqa: B018


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}]
from test_pipeline import run
run({root!r}, {out!r}, *{settings!r}, "run.workers={workers}")
"""


@pytest.mark.parametrize(
    ("kills", "workers"),
    [(3, 0), pytest.param(10, 1, marks=pytest.mark.slow), pytest.param(10, 2, marks=pytest.mark.slow)],
)
def test_killed_and_started_again_is_the_same_byte_for_byte(root, tmp_path, kills, workers):
    settings = ["run.checkpoint_seconds=0", "warmup.epochs=15", "cacl.epochs=15", "irn.epochs=10", "cacl.momentum=0.9"]
    settings += ["cacl.threshold_mode=soft", "cacl.threshold=0.25"]
    whole = files(run(root, tmp_path / "whole", *settings).out)
    out = tmp_path / "killed"
    tests = str(Path(__file__).parent)
    script = SCRIPT.format(tests=tests, root=str(root), out=str(out), settings=settings, workers=workers)
    log = out / "log.jsonl"
    killed = 0
    for number in range(kills + 1):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        if number == kills:
            assert process.wait(120) == 0
            break
        # Somewhere in the next steps: the log tells how far it is.
        lines = log.read_text().count("\n") if log.is_file() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.is_file() and log.read_text().count("\n") >= lines + 40 // kills:
                break
            time.sleep(0.002)
        process.kill()
        killed += process.wait() != 0
    assert killed >= kills - 1
    assert files(out) == whole


MEMORY = """
import resource, sys
sys.path[:0] = [{tests!r}]
from test_pipeline import run
run({root!r}, {out!r}, "warmup.epochs=1", "cacl.epochs=1", "irn.epochs=1",
    *(f"{{stage}}.batch_size=16" for stage in ("warmup", "cacl", "irn")))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.posix
@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    peaks = []
    for images in (250, 2500):
        root = write_csv(tmp_path / f"data{images}", train=images)
        code = MEMORY.format(tests=str(Path(__file__).parent), root=str(root), out=str(tmp_path / f"out{images}"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 30, f"MiB at 250 and 2 500 images: {peaks}"


def test_another_backend_of_the_crf_does_its_stages_again(root, tmp_path):
    pytest.importorskip("pydensecrf.densecrf")
    seen = []
    for backend in ("auto", "pydensecrf", "torch"):
        run(root, tmp_path / "out", f"run.crf={backend}", callback=lambda record: seen.append(record["stage"]))
    assert [seen.count(stage) for stage in ("warmup", "cacl", "irn")] == [4, 4, 8]


def test_stages_without_a_crf_and_with_any_score(root, tmp_path):
    settings = ["irn.iterations=0", "masks.iterations=0", f"masks.background_score={0.1 + 0.2!r}"]
    result = run(root, tmp_path / "out", *settings)
    assert [result.metrics[stage]["crf"] for stage in ("irn", "masks")] == [False, False]
    assert result.metrics["irn"]["miou"] == pytest.approx(result.metrics["cams"]["miou"], abs=1e-6)
    assert result.metrics["masks"]["miou"] == pytest.approx(result.metrics["masks"]["walk"]["miou"], abs=1e-6)
    assert result.metrics["masks"]["background_score"] == 0.3


def test_a_stage_that_is_done_again_leaves_nothing_of_later_ones(root, tmp_path):
    out = run(root, tmp_path / "out").out
    assert {record["stage"] for record in Log(out / "log.jsonl").records()} == {"warmup", "cacl", "irn", "segment"}
    run(root, out, "cacl.alpha=10", stages=["warmup", "cacl"])
    assert {record["stage"] for record in Log(out / "log.jsonl").records()} == {"warmup", "cacl"}
    assert list(json.loads((out / "times.json").read_text())) == ["warmup", "cacl"]
    run(root, out, "warmup.lr=0.5", stages=["warmup"])
    assert {record["stage"] for record in Log(out / "log.jsonl").records()} == {"warmup"}


class Plain:
    """An encoder that is no module."""

    image_size, mean, std = 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)

    def __init__(self, shift=0.0, hidden=None):
        self.inner, self.shift, self.hidden = TinyEncoder(), shift, hidden

    def encode_image(self, images):
        return self.inner.encode_image(images) + self.shift

    def encode_text(self, texts):
        return self.inner.encode_text(texts)


def test_another_encoder_that_is_no_module_is_another(root, tmp_path, caplog):
    def stages_of(encoder):
        seen = []
        run(root, tmp_path / "out", encoder=encoder, stages=["warmup", "cacl"],
            callback=lambda record: seen.append(record["stage"]))  # fmt: skip
        return list(dict.fromkeys(seen))

    assert stages_of(Plain()) == ["warmup", "cacl"]
    assert stages_of(Plain()) == []
    assert stages_of(Plain(0.5)) == ["cacl"]
    with caplog.at_level("WARNING", "cacl"):
        one, two = (Plain(hidden=(i for i in range(3))) for _ in range(2))
        assert [stages_of(one), stages_of(one), stages_of(two)] == [["cacl"], [], ["cacl"]]
    assert (
        "encoder: what it gives is done again in every process, since a Plain cannot be told from another"
        in caplog.text
    )
    keyed = Plain(hidden=(i for i in range(3)))
    keyed.key = "plain v1"
    assert [stages_of(keyed), stages_of(keyed)] == [["cacl"], []]


def test_other_statistics_of_a_given_encoder_are_another_encoder(root, tmp_path):
    seen = []
    for change in ({}, {"mean": (0.1, 0.1, 0.1)}, {"std": (1.0, 1.0, 1.0)}, {"image_size": 48}):
        encoder = TinyEncoder()
        vars(encoder).update(change)
        run(root, tmp_path / "out", encoder=encoder, stages=["warmup", "cacl"],
            callback=lambda record: seen.append(record["stage"]))  # fmt: skip
    assert [seen.count(stage) for stage in ("warmup", "cacl")] == [4, 16]


class WithExtraState(TinyBackbone):
    """Its layout is part of its state, and no tensor."""

    layout = "caffe"

    def get_extra_state(self):
        return {"layout": self.layout}

    def set_extra_state(self, state):
        self.layout = state["layout"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_backbones_that_are_hard_to_copy_or_to_save(root, tmp_path):
    out = run(root, tmp_path / "extra", backbone=WithExtraState()).out
    assert run(root, out, backbone=WithExtraState()).metrics
    normed = TinyBackbone()
    torch.nn.utils.weight_norm(normed.conv)
    run(root, tmp_path / "normed", backbone=normed, stages=["warmup", "cacl", "cams"])
    strange = WithExtraState()
    strange.layout = object()
    with pytest.raises(
        ValueError, match=r"argument `backbone` .* whose state can be saved, but its 'backbone\._extra_"
    ):
        run(root, tmp_path / "strange", backbone=strange)
    locked = TinyBackbone()
    locked.lock = (i for i in range(3))
    locked.key = "locked"
    with pytest.raises(ValueError, match="argument `backbone` to be a module that can be copied, but TinyBackbone"):
        run(root, tmp_path / "locked", backbone=locked)


def test_masks_that_say_nothing_have_no_mean(root, tmp_path, recwarn):
    for i in range(9):
        Image.new("L", (64, 48), 255).save(root / f"masks/{i}.png")
    result = run(root, tmp_path / "out")

    def refuse(constant):
        raise AssertionError(constant)

    metrics = json.loads((result.out / "metrics.json").read_text(), parse_constant=refuse)
    assert {own["miou"] for own in metrics.values()} == {None}
    assert metrics == run(root, tmp_path / "out").metrics
    assert "cams: CAM mIoU of no pixel (train, 6 images" in result.summary()
    assert not [str(w.message) for w in recwarn if "mean" in str(w.message).lower()]


def everything(folder: Path) -> dict[str, tuple]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*")}


TINY_SCENES = [
    "scenes.train=4", "scenes.val=2", "scenes.size=32", "warmup.epochs=1", "warmup.crop=32", "run.device=cpu",
    "run.workers=0",
]  # fmt: skip


def test_planning_writes_nothing_and_draws_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [part for setting in TINY_SCENES for part in ("--set", setting)]
    assert cli.main(["run", "scenes", "--dry-run", *options]) == 0
    assert "warmup: new" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    pipeline.run(Config.load("scenes", TINY_SCENES), stages=["warmup"])
    before = everything(tmp_path)
    assert cli.main(["run", "scenes", "--dry-run", *options]) == 0
    assert "warmup: finished\ncacl: new\n" in capsys.readouterr().out
    assert cli.main(["run", "scenes", "--dry-run", *options, "--set", "scenes.size=40"]) == 0
    assert "warmup: to be done again\ncacl: new\n" in capsys.readouterr().out
    with locked(tmp_path / "cacl-scenes"):  # somebody else is using it
        held = everything(tmp_path)
        assert pipeline.plan(Config.load("scenes", TINY_SCENES), ["warmup"]) == ["warmup: finished"]
        assert everything(tmp_path) == held
    assert {name: state for name, state in everything(tmp_path).items() if name in before} == {
        **before, str(tmp_path / "cacl-scenes"): everything(tmp_path)[str(tmp_path / "cacl-scenes")],
    }  # fmt: skip


def test_planning_says_the_truth_of_what_is_given(root, tmp_path):
    config = configure(root, tmp_path / "out")
    given = {"encoder": TinyEncoder(), "backbone": TinyBackbone()}
    assert pipeline.plan(config, ["cams"], **given) == ["cams: needs cacl"]
    pipeline.run(config, **given, stages=["warmup", "cacl"])
    assert pipeline.plan(config, ["warmup", "cacl", "cams"], **given) == [
        "warmup: finished", "cacl: finished", "cams: new",
    ]  # fmt: skip
    other = TinyEncoder()
    other.head.weight.data += 1
    assert pipeline.plan(config, ["warmup", "cacl"], **{**given, "encoder": other}) == [
        "warmup: finished", "cacl: to be done again",
    ]  # fmt: skip
    assert pipeline.plan(config, ["cams"], **{**given, "encoder": other}) == ["cams: needs cacl"]
    assert pipeline.plan(config, ["warmup", "cacl"], resume=False, **given) == [
        "warmup: to be done again", "cacl: to be done again",
    ]  # fmt: skip
    # What is done again takes the later ones along, though their own settings are the same.
    pipeline.run(config, **given, stages=["cams"])
    assert pipeline.plan(config, ["cacl"], resume=False, **given) == ["cacl: to be done again"]
    before = everything(tmp_path / "out")
    pipeline.plan(config, **given)
    assert everything(tmp_path / "out") == before


def test_what_is_not_needed_any_more_is_freed(root, tmp_path, monkeypatch):
    made: list[weakref.ref] = []

    def load(name):
        encoder = TinyEncoder()
        made.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr("cacl.runs.session.load_encoder", load)
    alive = {}

    def watch(record):
        gc.collect()
        alive.setdefault(record["stage"], [ref() is not None for ref in made])

    run(root, tmp_path / "out", encoder=None, callback=watch)
    # One more to judge the pseudo masks; that of CA-CL judges the CAMs.
    assert alive == {"warmup": [False], "cacl": [False, True], "irn": [False] * 2, "segment": [False] * 3}
    alive.clear()
    made.clear()
    run(root, tmp_path / "out", "irn.radius=3", encoder=None, callback=watch)  # CA-CL has finished: none is loaded
    assert alive == {"irn": [], "segment": [False]}


def test_a_given_encoder_goes_back_to_where_it_came_from(root, tmp_path):
    places = []

    class Moving(TinyEncoder):
        def to(self, *args, **kwargs):
            places.append(args[0])
            return super().to(*args, **kwargs)

    run(root, tmp_path / "out", encoder=Moving(), stages=["warmup", "cacl", "cams"])
    assert places == [torch.device("cpu")] * 4  # to check settings, and to train


def test_nothing_shows_progress_where_it_is_not_wanted(root, tmp_path, monkeypatch):
    shown = []

    def spy(*args, disable, **kwargs):
        shown.append(disable)
        return real(*args, disable=True, **kwargs)

    real = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", spy)
    run(root, tmp_path / "out", "run.progress=false")
    assert shown
    assert set(shown) == {True}
    shown.clear()
    run(root, tmp_path / "out2")
    assert set(shown) == {None}  # where there is a terminal
    shown.clear()
    assert cli.main(["check", str(root), "--no-progress"]) == 0
    assert set(shown) == {True}


def test_a_run_and_predict_count_the_same_cores(root, tmp_path, monkeypatch):
    run(root, tmp_path / "out", "segment.backbone=scenes", "segment.weights=")
    machines = []

    def spy(net, photos, finish, settings, *, crf, tags, range, machine):
        machines.append(machine.workers)
        return iter(())

    monkeypatch.setattr("cacl.predict.segment_each", spy)
    for module in ("cacl.predict", "cacl.runs.session"):
        monkeypatch.setattr(f"{module}.usable_cores", lambda: 3)
    predict(tmp_path / "out", [root / "images"], tmp_path / "masks")
    predict(tmp_path / "out", [root / "images"], tmp_path / "masks", workers=9)
    predict(tmp_path / "out", [root / "images/0.png"], tmp_path / "masks")  # one photo needs no process
    session = Session(configure(root, tmp_path / "out", "run.workers=9"))
    assert [*machines, session.machine.workers] == [3, 3, 1, 3]


def test_another_format_of_data_is_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "mine", replace(FORMATS["csv"], is_here=lambda folder: False))
    assert run(root, tmp_path / "out", "data.format=mine", stages=["warmup"]).metrics
    with pytest.raises(ValueError, match=r"\[data\] format: input should be 'csv', .*or 'mine', but got 'mien'"):
        configure(root, tmp_path / "out", "data.format=mien")


def test_colours_for_people_are_not_those_in_files(root, tmp_path, monkeypatch):
    colours = np.roll(VOC_COLOURS, 7, 0)
    plain = run(root, tmp_path / "plain", stages=None)
    monkeypatch.setattr("cacl.pictures.COLOURS", colours)
    other = run(root, tmp_path / "other", stages=None)
    one, two = files(plain.out), files(other.out)
    changed = {name for name in one if one[name] != two[name]}
    assert changed == {"report/cams.png", "report/masks.png", "report/segmentation.png"}
    mask = np.ones((4, 4), np.uint8)
    assert (overlay(np.zeros((4, 4, 3), np.uint8), mask) == (0.65 * colours[1]).astype(np.uint8)).all()
    assert f"#{colours[1].tobytes().hex()}" in (other.out / "report/index.html").read_text()


def test_what_nobody_needs_is_done_when_it_is_asked_for(root, tmp_path):
    names = [line.partition(":")[0] for line in pipeline.plan(configure(root, tmp_path / "out", "masks.affinity=none"))]
    assert names == ["warmup", "cacl", "cams", "masks", "segment", "predict", "report"]
    names = [line.partition(":")[0] for line in pipeline.plan(configure(root, tmp_path / "out"))]
    assert names == UNASKED
    asked = pipeline.plan(configure(root, tmp_path / "out", "masks.affinity=none"), stages=["cams", "irn"])
    assert asked == ["cams: needs cacl", "irn: needs cams"]


@pytest.mark.parametrize("settings", [("data.eval=",), ("predict.split=train",)])
def test_masks_of_the_training_images_hold_their_own_labels(root, tmp_path, settings):
    result = run(root, tmp_path / "out", *settings)
    dataset = open_dataset("csv", root, "train")
    net, classes = load_segmenter(tmp_path / "out/segment/model.pt", backbone=TinyBackbone())
    make_predictions(net, dataset, tmp_path / "by hand", labelled=True)
    made = sorted((tmp_path / "out/predict/train").iterdir())
    assert [path.read_bytes() for path in made] == [
        path.read_bytes() for path in sorted((tmp_path / "by hand").iterdir())
    ]
    assert len(made) == len(dataset)
    assert not (tmp_path / "out/predict/eval").exists()
    matrix = ConfusionMatrix(len(classes))
    for i, path in enumerate(made):
        matrix.update(dataset.mask(i).numpy(), read_mask(path).numpy())
    record = result.metrics["predict"]
    assert (record["what"], record["split"]) == ("DeepLabV2, labels known", "train")
    assert record["miou"] == pytest.approx(matrix.miou, abs=1e-6)
