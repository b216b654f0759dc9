"""What a program has switched, or a machine lacks, changes no result, or is one line."""

from __future__ import annotations

import ast
import logging
import multiprocessing
import pwd
import re
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from torch import nn
from torchvision import tv_tensors

import cacl
from cacl import pipeline
from cacl._support import cores
from cacl.artifacts import save_mask
from cacl.config import Config
from cacl.crf import dense_crf
from cacl.datasets import CSVDataset
from cacl.deeplab import DeepLabV2
from cacl.encoders import load_encoder
from cacl.errors import InputError
from cacl.loading import load_images, order
from cacl.mining import mine_labels
from cacl.photos import Segmenter, load_segmenter, mask_of, save_segmenter
from cacl.predict import predict
from cacl.random_walk import propagate, spread
from cacl.seeds import read_seeds
from cacl.training import Loop, train
from cacl.transforms import RandomView, normalize

PACKAGE = Path(cacl.__file__).parent
MAKING = re.compile(
    r"tv_tensors\.\w+|torch\.(arange|as_tensor|empty|eye|full|linspace|logspace|ones|rand|randint|randn|randperm|tensor|zeros|sparse_\w+)"
)


def test_new_tensors_say_where_they_are():
    """What a module makes when it is constructed is where torch's own modules are; the rest follows what is given."""
    found = 0
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and MAKING.fullmatch(ast.unparse(node.func)):
                    found += 1
                    assert any(keyword.arg == "device" for keyword in node.keywords), f"{path}: line {node.lineno}"
    assert found > 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("surroundings") / "data")


@pytest.fixture
def on_meta():
    """Where a tensor that does not say where it is has no values; "cuda" is the default device of many notebooks."""

    def work(function):
        torch.set_default_device("meta")
        try:
            return function()
        finally:
            torch.set_default_device(None)

    yield work
    torch.set_default_device(None)


def works(data: Path, folder: Path):
    """Name -> what is worked out on the CPU, from what was made before."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    image = tv_tensors.Image(torch.from_numpy(photo).permute(2, 0, 1))
    mask = tv_tensors.Mask(torch.from_numpy(photo[..., 0] % 3))
    shares = rng.dirichlet((1, 1, 1), (12, 16)).transpose(2, 0, 1).astype(np.float32)
    maps, edges, logits = torch.from_numpy(shares), torch.rand(12, 16), torch.randn(3, 6, 8)
    dataset = CSVDataset(data, "train")
    model = folder / "model.pt"
    save_segmenter(model, DeepLabV2(3, backbone="scenes", weights=None), ("boat", "train"), "scenes")
    sent, empty = data / "images/0.png", folder / "seeds"
    empty.mkdir(exist_ok=True)
    save_mask(empty / "0.png", np.zeros((48, 64), np.uint8))
    return {
        "normalize": lambda: normalize(image),
        "seeds": lambda: read_seeds(dataset, empty, 0)[0].maps,
        "view": lambda: RandomView(20)(image, mask, generator=torch.Generator().manual_seed(0)),
        "order": lambda: list(order(5, 3, 0, range(3))),
        "labels": lambda: dataset.labels(2),
        "images": lambda: [image for _, image in load_images(dataset, [0, 1], 1)],
        "CRF": lambda: dense_crf(photo, shares, backend="torch"),
        "mining": lambda: mine_labels(photo, np.arange(2), shares[:2].astype(np.float16), backend="torch"),
        "walk": lambda: propagate(maps, edges, radius=3),
        "walk over colours": lambda: spread(maps, image, radius=3),
        "mask": lambda: mask_of(logits, photo, (24, 30)),
        "words": lambda: load_encoder("scenes").encode_text(["a photo of a boat."]),
        "segmenter": lambda: [*load_segmenter(model).net.state_dict().values()],
        "predict": lambda: predict(model, [sent], folder / "out", workers=0).masks[0].read_bytes(),
    }


def test_the_default_device_changes_nothing(data, tmp_path, on_meta):
    for name, work in works(data, tmp_path).items():
        wanted, got = work(), on_meta(work)
        tensors = got if isinstance(got, list | tuple) else [got]
        assert all(each.device.type == "cpu" for each in tensors if isinstance(each, torch.Tensor)), name
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, msg=name) if not isinstance(got, bytes) else None
        assert not isinstance(got, bytes) or got == wanted, name


def settings(data: Path, out: Path) -> Config:
    stages = ("warmup", "cacl")
    common = {"epochs": 1, "batch_size": 3, "crop": 32, "lr": 0.01}
    overrides = [f"{stage}.{key}={value}" for stage in stages for key, value in common.items()]
    places = [f"data.root={data}", f"run.out={out}", "data.format=csv", "data.train=train", "data.eval=val"]
    return Config.load("voc", [*overrides, *places, "run.device=cpu", "run.workers=0", "cams.scales=[1.0]"])


def run(data: Path, out: Path) -> dict[str, bytes]:
    pipeline.run(settings(data, out), encoder=TinyEncoder(), backbone=TinyBackbone(), stages=["warmup", "cacl", "cams"])
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.suffix in (".pt", ".npz")}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("surroundings") / "whole")


def test_a_run_with_another_default_device_is_the_same(data, tmp_path, whole, monkeypatch):
    made = TinyEncoder(), TinyBackbone()
    monkeypatch.setattr(f"{__name__}.TinyEncoder", lambda: made[0])
    monkeypatch.setattr(f"{__name__}.TinyBackbone", lambda: made[1])
    torch.set_default_device("meta")
    try:
        assert run(data, tmp_path / "out") == whole
        assert torch.zeros(()).is_meta
    finally:
        torch.set_default_device(None)


def test_another_default_dtype_is_refused(data, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(
            InputError, match=r"^torch's default dtype: expected torch.float32, but got torch.float64; "
        ):
            run(data, tmp_path / "out")
        with pytest.raises(InputError, match=r"^torch's default dtype"):
            load_encoder("scenes")
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_what_is_switched_outside_of_a_run_changes_nothing(data, tmp_path, whole, where):
    with where():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        net, encoder = TinyBackbone(), TinyEncoder()
        if not torch.is_inference_mode_enabled():
            assert run(data, tmp_path / "out") == whole
        else:  # what was made in it cannot be saved for a gradient; a copy of the backbone can
            with pytest.raises(InputError, match=r"^Expected `encoder` to be made outside of torch.inference_mode\(\)"):
                pipeline.run(settings(data, tmp_path / "a"), encoder=encoder, backbone=net)
            with torch.inference_mode(False):
                encoder = TinyEncoder()
            pipeline.run(settings(data, tmp_path / "out"), encoder=encoder, backbone=net, stages=["warmup", "cacl"])
            assert (tmp_path / "out/cacl/model.pt").read_bytes() == whole["cacl/model.pt"]
        after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    assert after == before


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.conv(images), 0.5).square().mean()


def trained(data: Path, *, heard=None, steps: int = 12) -> torch.Tensor:
    net = Dropping()
    train(
        lambda batch: {"loss": net(batch.images)}, {"net": net}, torch.optim.SGD(net.parameters(), lr=0.1),
        CSVDataset(data, "train"), Loop(steps / 2, 3, RandomView(32), progress=False), callback=heard,
    )  # fmt: skip
    return net.conv.weight.detach()


def test_trainings_in_threads_are_those_alone(data, caplog):
    caplog.set_level(logging.INFO, "cacl")
    alone = trained(data)
    results: list[torch.Tensor] = []
    begun = threading.Event()
    first = threading.Thread(target=lambda: results.append(trained(data, heard=lambda record: begun.set())))
    first.start()
    assert begun.wait(30)
    results.append(trained(data))
    first.join()
    assert len(results) == 2
    assert all(torch.equal(result, alone) for result in results)


def test_a_second_training_says_that_it_waits(data, caplog):
    caplog.set_level(logging.INFO, "cacl")
    begun, go_on = threading.Event(), threading.Event()

    def heard(record) -> None:
        begun.set()
        go_on.wait(30)

    first = threading.Thread(target=trained, args=(data,), kwargs={"heard": heard, "steps": 2})
    second = threading.Thread(target=trained, args=(data,), kwargs={"steps": 2})
    first.start()
    assert begun.wait(30)
    second.start()
    second.join(0.5)
    assert second.is_alive()
    go_on.set()
    first.join(30)
    second.join(30)
    assert not second.is_alive()
    (record,) = caplog.records
    assert record.getMessage().startswith("another thread of this process trains; waiting for its end")


def test_a_network_that_is_made_beside_a_training_draws_from_nobody(data, tmp_path):
    model = tmp_path / "model.pt"
    save_segmenter(model, DeepLabV2(3, backbone="scenes", weights=None), ("boat", "train"), "scenes")
    state = torch.get_rng_state()
    segmenter = load_segmenter(model)
    load_encoder("scenes")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(segmenter, Segmenter)
    alone, over = trained(data, steps=30), threading.Event()

    def make() -> None:
        while not over.is_set():
            load_segmenter(model)

    maker = threading.Thread(target=make)
    maker.start()
    try:
        assert torch.equal(trained(data, steps=30), alone)
    finally:
        over.set()
        maker.join()


@pytest.mark.parametrize("quota", [0.5, 1.5, 64])
def test_torch_takes_no_more_threads_than_the_quota(data, monkeypatch, quota):
    monkeypatch.setattr(cores, "_quota", lambda: quota)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        trained(data, heard=lambda record: seen.append(torch.get_num_threads()), steps=1)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert seen == [{0.5: 1, 1.5: 2, 64: 4}[quota]]


@pytest.fixture
def nobody(monkeypatch):
    """A user without HOME and without an entry in /etc/passwd."""

    def unknown(user: int):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_downloads_of_nobody(nobody, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^CLIP ViT-B/32: expected a home folder .*: set HOME .*, or give the path"):
        load_encoder("ViT-B/32")
    with pytest.raises(InputError, match=r"^The weights DEFAULT of resnet18: expected a home folder"):
        cacl.CAMNet(2, backbone="resnet18")
    assert not list(tmp_path.iterdir())  # no folder ~ is made here
    cacl.CAMNet(2, backbone="resnet18", weights=None)  # which needs none


def test_a_folder_that_was_removed(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError, match=r"^the current folder: it was removed; change to one that is there$"):
        Config.load("scenes")


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_nothing_stays_of_a_training_that_was_stopped(data, error):
    """Though its traceback does, in a notebook until the next error: no batch, no process that loads images."""
    batches = []

    def stop(batch):
        batches.append(weakref.ref(batch.images))
        raise error

    net, before = TinyBackbone(), set(multiprocessing.active_children())
    with pytest.raises(error) as caught:
        train(
            stop, {"net": net}, torch.optim.SGD(net.parameters(), lr=0.1),
            CSVDataset(data, "train"), Loop(9, 2, RandomView(32), workers=1),
        )  # fmt: skip
    assert caught.value.__traceback__ is not None
    assert batches[0]() is None
    assert set(multiprocessing.active_children()) <= before
