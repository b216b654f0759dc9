"""The examples run as they stand."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import picture, write_csv, write_voc

from cacl import BackgroundSet, CACLLoss, CAMNet, load_encoder, scenes
from cacl.artifacts import save_mask
from cacl.config import Config
from cacl.images import read_mask
from cacl.labels import export_labels
from cacl.runs.folder import RunFolder
from cacl.transforms import normalize

ROOT = Path(__file__).parents[1]


def example(name, *arguments, cwd):
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


SHORT = {
    "train_voc.py": 100,
    "drop_in.py": 60,
    "ray_predict.py": 40,
    "smp_unet.py": 40,
    "with_accelerate.py": 40,
    "with_lightning.py": 40,
}


@pytest.mark.parametrize(("name", "most"), SHORT.items())
def test_examples_stay_short(name, most):
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= most


def test_drop_in_finds_the_squares(tmp_path):
    lines = example("drop_in.py", cwd=tmp_path).splitlines()
    first, last = (float(line.split()[-1]) for line in (lines[0], lines[-1]))
    assert last > first + 0.3


def test_own_encoder(tmp_path):
    assert "foreground_similarity" in example("own_encoder.py", cwd=tmp_path)


@pytest.fixture(scope="module")
def plain():
    """The losses of each epoch in torch alone."""
    drawn = [scenes.draw(np.random.default_rng(i), 96) for i in range(32)]
    images = [normalize(torch.from_numpy(np.array(scene.image)).permute(2, 0, 1)) for scene in drawn]
    labels = torch.tensor([[name in scene.classes for name in scenes.CLASSES] for scene in drawn])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=8, shuffle=True)
        net = CAMNet(10, backbone="scenes")
        criterion = CACLLoss(load_encoder("scenes"), scenes.CLASSES, backgrounds=BackgroundSet(scenes.BACKGROUNDS))
        optimizer = torch.optim.SGD(net.parameter_groups(5e-4), momentum=0.9)
        means = []
        for _ in range(4):
            losses = []
            for some, known in loader:
                loss = criterion(some, net(some).cams, known).total
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            means.append(np.mean(losses))
    return means


def losses_of(out):
    return [float(loss) for loss in re.findall(r"^epoch \d  loss (\S+)$", out, re.MULTILINE)]


@pytest.mark.parametrize("name", ["lightning", "accelerate"])
def test_the_loops_of_others_train_as_a_plain_one(tmp_path, plain, name):
    if find_spec(name) is None:  # not imported here: Lightning changes torch.compile
        pytest.skip(f"{name} is not installed")
    losses = losses_of(example(f"with_{name}.py", cwd=tmp_path))
    assert losses == pytest.approx(plain, rel=0.01)
    assert losses[-1] < losses[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_of_accelerate_are_one(tmp_path):
    """Without batch norm in training, which has no whole batch on CPUs; rounding tells later epochs apart."""
    pytest.importorskip("accelerate")
    code = (ROOT / "examples/with_accelerate.py").read_text()
    changes = {
        "shuffle=True": "shuffle=False",
        "Accelerator()": "Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))",
        "import Accelerator": "import Accelerator, DataLoaderConfiguration",
        "net, optimizer = acc": "net.eval()\nnet, optimizer = acc",
        "range(4)": "range(1)",
    }
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    (tmp_path / "script.py").write_text(code)
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    found = []
    for command in ([sys.executable, "script.py"], many):
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(losses_of(done.stdout))
    one, two = found
    assert len(one) == len(two) == 1
    assert two == pytest.approx(one, abs=0.02)


def test_train_voc_and_its_resume(tmp_path, clip_state):
    write_voc(tmp_path / "voc")
    torch.save(clip_state, tmp_path / "clip.pt")
    small = ("--backbone", "resnet18", "--weights", "", "--crop", 32, "--batch-size", 2, "--epochs", 1, "--workers", 0)
    arguments = ("--data-root", "voc", "--out", "out", "--encoder", "clip.pt", "--warmup-epochs", 1, *small)
    out = example("train_voc.py", *arguments, cwd=tmp_path)
    assert re.search(r"CAM mIoU \d+\.\d % \(train, 4 images, background score 0.15, no CRF\)", out)
    assert len(list((tmp_path / "out/cams").iterdir())) == 4
    assert example("train_voc.py", *arguments, cwd=tmp_path) == out


def test_custom_dataset(tmp_path, clip_state):
    torch.save(clip_state, tmp_path / "clip.pt")
    for k, name in enumerate(("boat", "train")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            picture(3 * i + k, (48, 64))[0].save(tmp_path / f"photos/{name}/{i}.jpg")
    (tmp_path / "words.json").write_text('{"boat": ["water"], "train": ["rails", "gravel"]}')
    settings = [
        "encoder.name=clip.pt", "camnet.backbone=resnet18", "camnet.weights=", "run.workers=0", "cams.scales=[1.0]",
        "warmup.epochs=1", "warmup.crop=32", "warmup.batch_size=2", "cacl.epochs=1", "cacl.crop=32",
        "cacl.batch_size=2", "segment.backbone=", "segment.weights=cacl", "segment.epochs=1", "segment.crop=32",
        "segment.batch_size=2",
    ]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    example("custom_dataset.py", "photos", "--words", "words.json", *options, cwd=tmp_path)
    assert len(list((tmp_path / "my-run/cams/train").rglob("*.npz"))) == 4
    (tmp_path / "photos/boat/0.jpg").write_text("broken")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/custom_dataset.py"), "photos", "--words", "words.json"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "boat/0.jpg: not an image that decodes" in done.stderr


def test_custom_dataset_and_what_systems_leave(tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    for name in ("boat/0.jpg", "boat/more/1.jpg", "train/0.png", ".ipynb_checkpoints/0.jpg", "__MACOSX/boat/0.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0, (48, 64))[0].save(photos / name)
    for name in ("boat/.DS_Store", "boat/._0.jpg", "train/Thumbs.db", "train/notes.txt"):
        (photos / name).write_text("no photo")
    (photos / "backgrounds.json").write_text('{"boat": ["water"], "train": ["rails"]}')
    main = runpy.run_path(str(ROOT / "examples/custom_dataset.py"))["main"]

    def run(config):
        raise SystemExit("the run begins")

    monkeypatch.setattr("cacl.pipeline.run", run)
    monkeypatch.setattr("sys.argv", ["custom_dataset.py", str(photos)])
    (photos / "train/1.png").write_text("broken")
    with pytest.raises(SystemExit, match=r"train/1.png: not an image that decodes"):
        main()
    assert not (photos / "classes.txt").exists()  # the next call looks anew
    assert not (photos / "dataset.csv").exists()
    (photos / "train/1.png").unlink()
    for _ in range(2):
        with pytest.raises(SystemExit, match="the run begins"):
            main()
    assert capsys.readouterr().out.splitlines()[-1] == f"{photos}/train/notes.txt: left out"
    assert (photos / "classes.txt").read_text() == "boat\ntrain\n"
    assert (photos / "dataset.csv").read_text().splitlines() == [
        "image,labels,mask,split", "boat/0.jpg,boat,,train", "boat/more/1.jpg,boat,,train", "train/0.png,train,,train",
    ]  # fmt: skip
    (photos / "dataset.csv").unlink()
    (photos / "bus").mkdir()
    with pytest.raises(SystemExit) as stop:
        main()
    assert str(stop.value).splitlines() == [
        f"{photos}/bus: no photos here",
        f"{photos}/classes.txt: expected dataset.csv beside it; write that too, or remove this",
    ]


def test_no_path_of_a_machine_in_the_project():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run(
        [git, "grep", "-nE", "/(home|Users)/[a-z]", "--", "cacl", "examples", "docs"], cwd=ROOT, check=False
    )
    assert done.returncode == 1


@pytest.fixture
def masked_run(tmp_path):
    """A run as it is after the stage `masks`; a part of each mask is open, and one is all of it."""
    write_csv(tmp_path / "data")
    out = tmp_path / "my-run"
    overrides = [f"data.root={tmp_path / 'data'}", "data.format=csv", "data.train=train", f"run.out={out}"]
    out.mkdir()
    (out / "config.toml").write_text(Config.load("voc", overrides).to_toml(), encoding="utf-8")
    for i in range(6):
        mask = read_mask(tmp_path / f"data/masks/{i}.png").numpy()
        mask[: 48 if i == 3 else 5] = 255
        save_mask(out / f"masks/train/{i}.png", mask)
    RunFolder(out).mark("masks", "key", finished=True)
    return out


def test_smp_learns_from_pseudo_masks(masked_run, tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    small = ("--encoder", "resnet18", "--weights=", "--epochs", 6, "--batch-size", 3, "--crop", 64)
    lines = example("smp_unet.py", "my-run", "--out", "unet.pt", *small, cwd=tmp_path).splitlines()
    assert len(lines) == 6
    assert float(lines[-1].split()[-1]) < 0.8 * float(lines[0].split()[-1])
    assert torch.load(tmp_path / "unet.pt")["classes"] == ("boat", "train")


def test_lightly_train_reads_pseudo_masks(masked_run, tmp_path, monkeypatch):
    """The example gives LightlyTrain what its own reader takes; the training itself wants weights and minutes."""
    lightly_train = pytest.importorskip("lightly_train")
    from lightly_train._data.file_helpers import open_mask_numpy
    from lightly_train._data.mask_semantic_segmentation_dataset import MaskSemanticSegmentationDataArgs

    export_labels(masked_run, tmp_path / "labels", "coco", workers=0, progress=False)
    given = {}
    monkeypatch.setattr(lightly_train, "train_semantic_segmentation", lambda **settings: given.update(settings))
    monkeypatch.setattr(
        "sys.argv", ["x", str(masked_run), str(tmp_path / "labels"), "--out", str(tmp_path / "lightly")]
    )
    runpy.run_path(str(ROOT / "examples" / "lightly_segmentation.py"), run_name="__main__")
    read = MaskSemanticSegmentationDataArgs(**given["data"])
    assert read.included_classes == {0: "background", 1: "boat", 2: "train"}
    arguments = read.get_train_args()
    dataset = arguments.get_dataset_cls()(arguments, list(arguments.list_image_info()))
    assert len(dataset.image_info) == 6
    for row in dataset.image_info:
        mask = read_mask(masked_run / "masks/train" / f"{Path(row['image_filepaths']).stem}.png").numpy().astype(int)
        got = dataset.map_mask_labels_to_class_ids(open_mask_numpy(Path(row["mask_filepaths"])))
        assert (got == np.where(mask == 255, dataset.ignore_index, mask)).all()
