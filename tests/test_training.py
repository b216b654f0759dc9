"""The loop: equal to plain PyTorch, equal after a stop, and honest about what goes wrong."""

import json
import math
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from drawn import write_csv
from torch import nn

from cacl.datasets import CSVDataset
from cacl.loading import mixed
from cacl.log import Log
from cacl.training import Loop, train
from cacl.transforms import RandomView


class Line(nn.Module):
    """A classifier with dropout, whose random numbers must survive a stop too."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 2, 8, stride=8)
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.3)

    def forward(self, images):
        return self.drop(self.norm(self.conv(images))).mean((2, 3))


@pytest.fixture
def data(tmp_path):
    return CSVDataset(write_csv(tmp_path / "data", train=7), "train")


def settings(**changes):
    return Loop(**{"epochs": 3, "batch_size": 3, "view": RandomView(32), "progress": False, **changes})


def run(data, loop, *, stop=None, net=None, **arguments):
    net = Line() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    steps = []

    def step(batch):
        if len(steps) == stop:
            raise KeyboardInterrupt
        steps.append(batch.ids)
        loss = nn.functional.multilabel_soft_margin_loss(net(batch.images), batch.labels)
        return {"loss": loss, "extra": torch.tensor([1.0, 2.0])}

    train(step, {"net": net}, optimizer, data, loop, **arguments)
    return net, steps


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_equals_a_plain_loop(data):
    """SGD with a cosine schedule, written here without the loop, on the views that (seed, epoch, image) determine."""
    net, reference = Line(), Line()
    net.drop.p = reference.drop.p = 0.0
    loop = settings()
    _, steps = run(data, loop, net=net)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    position = 0
    for ids in steps:
        images, labels = [], []
        for id in ids:
            generator = torch.Generator().manual_seed(mixed(loop.seed, position // len(data), int(id)))
            images.append(loop.view(data.image(int(id)), generator=generator)[0])
            labels.append(data.labels(int(id)))
            position += 1
        optimizer.zero_grad()
        logits = reference(torch.stack(images))
        nn.functional.multilabel_soft_margin_loss(logits, torch.stack(labels)).backward()
        optimizer.step()
        scheduler.step()
    assert len(steps) == 7  # 3 epochs of 7 images in batches of 3
    for a, b in zip(net.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_every_image_once_an_epoch(data):
    _, steps = run(data, settings(epochs=3))
    seen = [id for ids in steps for id in ids]
    epochs = [sorted(seen[i : i + 7]) for i in (0, 7, 14)]
    assert epochs == [sorted(entry.id for entry in data.entries)] * 3
    assert seen[:7] != seen[7:14]


def test_a_batch_larger_than_the_data(data):
    _, steps = run(data, settings(epochs=2, batch_size=10))
    assert [len(ids) for ids in steps] == [10, 10]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stopped_and_resumed_is_the_same(data, tmp_path, workers):
    whole, _ = run(data, settings(), log=Log(tmp_path / "a.jsonl"), checkpoint=tmp_path / "a.pt")
    loop = settings(workers=workers, checkpoint_seconds=0)
    for stop in (2, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(data, loop, stop=stop, log=Log(tmp_path / "b.jsonl"), checkpoint=tmp_path / "b.pt")
    parts, steps = run(data, loop, log=Log(tmp_path / "b.jsonl"), checkpoint=tmp_path / "b.pt")
    assert len(steps) == 1
    assert same(whole, parts)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()

    def without_time(name):
        return [{k: v for k, v in r.items() if k != "images_per_second"} for r in Log(tmp_path / name).records()]

    assert without_time("a.jsonl") == without_time("b.jsonl")
    assert [record["step"] for record in without_time("b.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("step", [2, 7])
def test_a_signal_is_not_lost_in_the_last_step(data, tmp_path, step):
    def stop(record):
        if record["step"] == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(data, settings(), checkpoint=tmp_path / "c.pt", callback=stop)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _, steps = run(data, settings(), checkpoint=tmp_path / "c.pt")
    assert len(steps) == 7 - step


def test_another_seed_is_another_run(data):
    assert not same(run(data, settings())[0], run(data, settings(seed=1))[0])


def test_the_global_generator_is_left_alone(data):
    state = torch.get_rng_state()
    run(data, settings())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_of_another_run_is_not_used(data, tmp_path):
    run(data, settings(), checkpoint=tmp_path / "c.pt", key="a")
    _, steps = run(data, settings(), checkpoint=tmp_path / "c.pt", key="b")
    assert len(steps) == 7


def test_a_checkpoint_of_another_size_is_refused(data, tmp_path):
    run(data, settings(), checkpoint=tmp_path / "c.pt")
    other = Line()
    other.conv = nn.Conv2d(3, 2, 4, stride=8)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(
        ValueError, match=r"c.pt: does not fit: 6 of 7 parameters match; 'conv.weight': expected"
    ) as error:
        run(data, settings(), net=other, checkpoint=tmp_path / "c.pt")
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_a_checkpoint_that_is_a_pickle_is_refused(data, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save(Payload(), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c.pt: not a checkpoint \(nothing in it was run\)"):
        run(data, settings(), checkpoint=tmp_path / "c.pt")
    assert not (tmp_path / "executed").exists()


def test_a_loss_that_is_not_finite_stops(data, tmp_path):
    net = Line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    count = iter(range(100))

    def step(batch):
        loss = net(batch.images).sum()
        return {"loss": loss * float("nan") if next(count) == 3 else loss}

    with pytest.raises(
        RuntimeError, match=r"demo: the loss is nan at step 4 \(images \d, \d, \d\); the last good"
    ) as error:
        train(
            step,
            {"net": net},
            optimizer,
            data,
            settings(checkpoint_seconds=0),
            name="demo",
            checkpoint=tmp_path / "c.pt",
        )
    assert "\n" not in str(error.value)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_breaks_midway_is_one_line(data, workers):
    data.entries[3].image.write_text("broken")
    with pytest.raises(ValueError, match=r"images/3.png: not an image that decodes") as error:
        run(data, settings(workers=workers))
    assert "\n" not in str(error.value)


def test_log_and_callback(data, tmp_path):
    records = []
    run(data, settings(schedule="poly"), name="demo", log=Log(tmp_path / "log.jsonl"), callback=records.append)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == records
    assert [record["step"] for record in records] == list(range(1, 8))
    assert records[0]["extra"] == [1.0, 2.0]
    assert records[0]["stage"] == "demo"
    for i, record in enumerate(records):
        assert record["lr"] == pytest.approx(0.1 * (1 - i / 7) ** 0.9, rel=1e-4)
        assert math.isfinite(record["loss"])
        assert record["images_per_second"] > 0


def test_a_log_line_that_was_cut_off_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "a", "step": 1}\n{"stage": "b", "step": 5}\n{"stage": "a", "st')
    log = Log(tmp_path / "log.jsonl")
    log.rewind("a", 1)
    assert log.records() == [{"stage": "a", "step": 1}, {"stage": "b", "step": 5}]
    log.rewind("b", 4)
    assert (tmp_path / "log.jsonl").read_text() == '{"stage": "a", "step": 1}\n'


def test_a_log_of_something_else_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'1\n\xff\xfe\n{"stage": "a", "step": 1}\n')
    Log(tmp_path / "log.jsonl").rewind("b", 0)
    assert (tmp_path / "log.jsonl").read_text() == '{"stage": "a", "step": 1}\n'


@pytest.mark.parametrize("around", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_half_precision_follows_full(data, around):
    """Step by step, to a few percent of what the loss falls by: each computes with the weights that it was left."""

    def losses(precision):
        found, net = [], Line()
        with around():
            net.conv(torch.zeros(1, 3, 8, 8))  # in autocast, torch keeps the weights that it has cast
            trained, _ = run(
                data, settings(epochs=9, precision=precision), net=net, callback=lambda each: found.append(each["loss"])
            )
        return np.array(found), trained

    full, _ = losses("fp32")
    assert np.ptp(full) > 0.2
    half, net = losses("bf16")
    assert not np.array_equal(full, half)
    assert np.abs(full - half).max() < 0.05 * np.ptp(full)
    before = Line()
    assert not any(map(torch.equal, net.parameters(), before.parameters()))


def test_fp16_scales_its_gradients(data, tmp_path):
    net, steps = run(data, settings(epochs=9, precision="fp16"), checkpoint=tmp_path / "c.pt")
    scaler = torch.load(tmp_path / "c.pt", weights_only=True)["scaler"]
    # Each overflow halves the scale of 2^16 and leaves its step out; the others count as good.
    overflows = 16 - math.log2(scaler["scale"])
    assert overflows < len(steps) / 2
    assert scaler["_growth_tracker"] > 0
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert not same(net, Line())


def test_masks_come_when_asked_for(data):
    seen = []

    def step(batch):
        seen.append(batch.masks)
        return {"loss": net(batch.images).sum()}

    net = Line()
    train(step, {"net": net}, torch.optim.SGD(net.parameters(), lr=0.0), data, settings(epochs=1, masks=True))
    assert seen[0].shape == (3, 32, 32)
    assert seen[0].dtype == torch.uint8


def test_training_opens_no_mask(data):
    for entry in data.entries:
        entry.mask.unlink()
    assert len(run(data, settings(epochs=1))[1]) == 3


def test_no_epochs_is_nothing(data, tmp_path):
    net, steps = run(data, settings(epochs=0), checkpoint=tmp_path / "c.pt")
    assert steps == []
    assert same(net, Line())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"schedule": "step"},
            'Expected argument `schedule` to be one of "cosine", "poly", "constant", but got \'step\'.',
        ),
        ({"precision": "fp8"}, "Expected argument `precision` to be one of"),
        ({"epochs": -1}, "Expected argument `epochs` to be a number of at least 0, but got -1."),
        ({"batch_size": 0}, "Expected argument `batch_size` to be at least 1, but got 0."),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        settings(**setting)
