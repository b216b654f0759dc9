"""The drawn world, its encoder and its backbone, and the whole run on it."""

import json
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cacl import BackgroundSet, CAMNet, PromptSet, load_encoder, pipeline, scenes
from cacl.config import Config
from cacl.datasets import CSVDataset, check_folder
from cacl.embedded import ASSET
from cacl.stages.chain import CHAIN


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return scenes.generate(tmp_path_factory.mktemp("scenes") / "data", train=16, val=8, seed=3)


def test_a_data_set_in_the_project_s_own_format(world):
    assert check_folder(world) == []
    train, val = CSVDataset(world, "train"), CSVDataset(world, "val")
    assert (len(train), len(val)) == (16, 8)
    assert train.classes == scenes.CLASSES
    for dataset in (train, val):
        for index in range(len(dataset)):
            image, labels, mask = dataset.image(index), dataset.labels(index), dataset.mask(index)
            assert image.shape == (3, 160, 160)
            assert {int(k) - 1 for k in mask.unique() if k} == set(labels.nonzero().flatten().tolist())
            words = np.asarray(Image.open(world / "words" / f"{dataset.entries[index].id}.png"))
            assert np.array_equal(words == 0, mask.numpy() > 0)  # a pixel is an object or has a background word


def test_the_world_has_what_makes_it_hard():
    assert len(scenes.CLASSES) >= 8
    assert len(scenes.LOOKS) == 5
    assert all(len(words) == 7 and set(words) <= set(scenes.WORDS) for words in scenes.BACKGROUNDS.values())
    BackgroundSet(scenes.BACKGROUNDS)  # refuses words that are classes
    drawn = [scenes.draw(np.random.default_rng(i), 64) for i in range(300)]
    assert {scene.look for scene in drawn} == set(scenes.LOOKS) - {"origami"}
    assert 0.1 < np.mean([len(scene.classes) > 1 for scene in drawn]) < 0.6
    # A class's own words are seen with it far more often than without it.
    for name in ("boat", "train", "bird", "cow"):
        word = scenes.BACKGROUNDS[name][0]
        with_it = np.mean([word in scene.backgrounds for scene in drawn if name in scene.classes])
        without = np.mean([word in scene.backgrounds for scene in drawn if name not in scene.classes])
        assert with_it > 2 * without


def test_the_seed_decides_and_workers_do_not(world, tmp_path):
    again = scenes.generate(tmp_path / "again", train=16, val=8, seed=3, workers=2)
    assert content(again) == content(world)
    other = scenes.generate(tmp_path / "other", train=16, val=8, seed=4)
    assert content(other)["images/train_00000.jpg"] != content(world)["images/train_00000.jpg"]
    more = scenes.generate(tmp_path / "more", train=17, val=8, seed=3)
    assert content(more)["images/val_00000.jpg"] == content(world)["images/val_00000.jpg"]


def test_drawing_again_changes_nothing_and_other_settings_draw_anew(tmp_path):
    folder = scenes.generate(tmp_path / "data", train=3, val=1, size=48)
    image = folder / "images/train_00000.jpg"
    before = image.stat().st_mtime_ns
    assert scenes.generate(folder, train=3, val=1, size=48) == folder
    assert image.stat().st_mtime_ns == before
    scenes.generate(folder, train=2, val=1, size=64)
    assert len(CSVDataset(folder, "train")) == 2
    assert CSVDataset(folder, "train").image(0).shape == (3, 64, 64)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "dataset.csv").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty folder, or one with scenes"):
        scenes.generate(tmp_path)
    assert (tmp_path / "dataset.csv").read_text() == "mine"


@pytest.mark.parametrize(
    "setting", [{"train": 0}, {"val": -1}, {"val": 1.5}, {"size": 8}, {"seed": -1}, {"workers": -1}]
)
def test_settings_out_of_range(tmp_path, setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}`"):
        scenes.generate(tmp_path / "data", **setting)
    assert not (tmp_path / "data").exists()


def test_fifty_images_a_second_on_one_core(tmp_path):
    scenes.draw(np.random.default_rng(0))  # patterns are made once
    start = time.process_time()
    scenes.generate(tmp_path / "data", train=100, val=1)
    assert 101 / (time.process_time() - start) > 50


@cache
def seen(count=300):
    """Cosines of unseen scenes and their regions with all texts: ``(regions, texts, 4 looks)`` a scene."""
    encoder = load_encoder("scenes")
    prompts = PromptSet(list(scenes.LOOKS.values())[:4])
    text = prompts.encode(encoder, (*scenes.CLASSES, *scenes.WORDS))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    result = []
    for i in range(count):
        scene = scenes.draw(np.random.default_rng((2**31, i)))
        image = (torch.from_numpy(np.array(scene.image)).permute(2, 0, 1) / 255 - mean) / std
        regions = [torch.ones(160, 160)]
        objects = [k for k in range(len(scenes.CLASSES)) if (scene.mask == k + 1).any()]
        words = [w for w in range(len(scenes.WORDS)) if (scene.words == w + 1).mean() > 0.02]
        for region in [*(scene.mask == k + 1 for k in objects), *(scene.words == w + 1 for w in words)]:
            inside = torch.from_numpy(region).float()
            regions += [inside, 1 - inside]
        views = F.interpolate(torch.stack([image * r for r in regions]), size=encoder.image_size, mode="bilinear")
        features = F.normalize(encoder.encode_image(views), dim=1)
        result.append((objects, words, torch.einsum("nd,wtd->nwt", features, text).mean(-1)))
    return result


def test_the_encoder_knows_the_class_of_unseen_scenes():
    classes = len(scenes.CLASSES)
    hits = [int(cosine[0, :classes].argmax()) == objects[0] for objects, _, cosine in seen() if len(objects) == 1]
    assert len(hits) > 150
    assert 0.9 <= np.mean(hits) < 1


def test_the_encoder_is_closer_to_the_object_than_to_the_rest():
    closer = [
        bool(cosine[1 + 2 * i, k] > cosine[2 + 2 * i, k])
        for objects, _, cosine in seen()
        for i, k in enumerate(objects)
    ]
    assert np.mean(closer) >= 0.9


def test_the_encoder_understands_backgrounds():
    closer = [
        bool(cosine[i, len(scenes.CLASSES) + w] > cosine[i + 1, len(scenes.CLASSES) + w])
        for objects, words, cosine in seen()
        for i, w in zip(range(1 + 2 * len(objects), 10**6, 2), words, strict=False)
    ]
    assert np.mean(closer) >= 0.8


def test_the_encoder_is_small_frozen_and_says_what_it_does_not_know():
    assert ASSET.stat().st_size <= 6 * 2**20
    encoder = load_encoder("scenes")
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(ValueError, match=r"does not know the word 'boot'.*did you mean"):
        encoder.encode_text(["a photo of boot."])
    image = torch.zeros(2, 3, 80, 80, requires_grad=True)
    features = encoder.encode_image(image)
    features.sum().backward()
    assert features.shape == encoder.encode_text(["A photo of: boat", "an image of water"]).shape
    assert image.grad.abs().sum() > 0


def test_the_backbone():
    net = CAMNet(3, backbone="scenes")
    assert net(torch.zeros(1, 3, 64, 64)).cams.shape == (1, 3, 8, 8)
    first = next(net.backbone.parameters())
    assert torch.equal(first, next(CAMNet(3, backbone="scenes").backbone.parameters()))
    assert not torch.equal(first, next(CAMNet(3, backbone="scenes", weights=None).backbone.parameters()))
    with pytest.raises(ValueError, match="`weights` to be one of DEFAULT, None"):
        CAMNet(3, backbone="scenes", weights="IMAGENET1K_V1")


def test_all_stages_on_twelve_scenes_in_under_a_minute(tmp_path):
    start = time.monotonic()
    small = [
        "scenes.train=8", "scenes.val=4", "warmup.epochs=1", "cacl.epochs=1", "warmup.batch_size=4",
        "cacl.batch_size=4", "segment.epochs=1", "segment.batch_size=4",
        "run.workers=0",
    ]  # fmt: skip
    options = [part for setting in small for part in ("--set", setting)]
    command = [sys.executable, "-m", "cacl", "run", "scenes", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    out = tmp_path / "cacl-scenes"
    assert set(json.loads((out / "metrics.json").read_text())) == {
        stage.name for stage in CHAIN if stage.score and not stage.on_demand
    }
    assert f"picture: {out / 'report/cams.png'}" in done.stdout
    assert "cacl: CAM mIoU" in done.stdout
    for name, columns in (("cams", 5), ("masks", 6)):
        with Image.open(out / f"report/{name}.png") as picture:
            assert picture.width > columns * 160 - 1
            assert picture.height > 4 * 160
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert again.stdout == done.stdout
    assert again.stderr.count("finished before") == len(pipeline.STAGES) - 1  # without IRNet


@pytest.mark.slow
def test_ca_cl_beats_the_warm_up(tmp_path):
    settings = [f"run.out={tmp_path}", f"data.root={tmp_path / 'data'}"]
    metrics = pipeline.run(Config.load("scenes", settings), stages=["warmup", "cacl"]).metrics
    assert metrics["cacl"]["miou"] - metrics["warmup"]["miou"] > 0.05  # 8.8 ± 1.4 points over five seeds


def test_own_words_beside_a_csv_are_used(world, tmp_path):
    from cacl.runs.session import Session
    from cacl.stages.contrast import backgrounds
    from cacl.tables import CACL

    settings = [f"data.root={world}", "data.format=csv", f"run.out={tmp_path}"]
    session = Session(Config.load("scenes", settings))
    assert backgrounds(session, session.table(CACL))["boat"] == scenes.BACKGROUNDS["boat"][:5]
