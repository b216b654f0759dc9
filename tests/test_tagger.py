"""The classifier of whole images against scipy, and what a segmenter makes of what it says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from scipy.optimize import minimize
from test_pipeline import configure
from torch.nn import functional as F

from cacl import PromptSet, load_encoder, pipeline
from cacl.cli import main
from cacl.config import Config
from cacl.datasets import CSVDataset, open_dataset
from cacl.deeplab import DeepLabV2
from cacl.images import read_image
from cacl.photos import segment_photos
from cacl.predict import open_model, predict
from cacl.runs.evaluation import _words
from cacl.runs.session import Session
from cacl.settings import Machine
from cacl.stages.chain import CHAIN
from cacl.stages.predict import make_predictions
from cacl.stages.tags import PhotoTagger, load_tagger, train_tagger
from cacl.tagger import STRENGTHS, Tagger, weights_of
from cacl.transforms import normalize


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def tagged():
    """40 images of 3 classes in 8 dimensions; the last class is never shown."""
    rng = np.random.default_rng(0)
    texts = unit(rng.normal(size=(3, 8)))
    labels = rng.integers(0, 2, (40, 3))
    labels[:, 2] = 0
    features = labels @ texts + 0.4 * rng.normal(size=(40, 8))
    return features, labels, texts


def objective(features, labels, texts, strength):
    """The docstring's, in numpy: what is to be minimised over (s, v, b), with its gradient."""
    f, k = unit(features), labels.shape[1]
    shown, n = labels.sum(0), len(labels)
    targets = np.where(labels == 1, (shown + 1) / (shown + 2), 1 / (n - shown + 2))

    def value(x):
        s, v, b = x[0], x[1 : 1 + texts.size].reshape(texts.shape), x[1 + texts.size :]
        z = s * f @ texts.T + f @ v.T + b
        loss = (np.logaddexp(0, z) - targets * z).sum() / n + strength * (v**2).sum()
        d = (1 / (1 + np.exp(-z)) - targets) / n
        return loss, np.concatenate([[(d * (f @ texts.T)).sum()], (d.T @ f + 2 * strength * v).ravel(), d.sum(0)])

    return value, 1 + texts.size + k


def numpy_probabilities(x, features, texts):
    s, v, b = x[0], x[1 : 1 + texts.size].reshape(texts.shape), x[1 + texts.size :]
    return 1 / (1 + np.exp(-(unit(features) @ (s * texts + v).T + b)))


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_it_is_the_minimum_that_scipy_finds(tagged, strength):
    features, _, texts = tagged
    tagger = Tagger.fit(*map(torch.from_numpy, tagged), strengths=[strength])
    value, size = objective(*tagged, strength)
    found = minimize(value, np.zeros(size), jac=True, method="BFGS", options={"gtol": 1e-8})
    assert np.allclose(
        tagger(torch.from_numpy(features).float()), numpy_probabilities(found.x, features, texts), atol=2e-4
    )


def test_the_strength_is_that_of_the_least_error_on_what_was_left_out(tagged):
    features, labels, texts = tagged
    errors = {}
    for strength in STRENGTHS:
        errors[strength] = 0.0
        for fold in range(5):
            out = np.arange(40) % 5 == fold
            value, size = objective(features[~out], labels[~out], texts, strength)
            x = minimize(value, np.zeros(size), jac=True, method="BFGS", options={"gtol": 1e-8}).x
            p = numpy_probabilities(x, features[out], texts)
            errors[strength] -= (labels[out] * np.log(p) + (1 - labels[out]) * np.log(1 - p)).sum()
    best = min(errors, key=errors.get)
    chosen = Tagger.fit(*map(torch.from_numpy, tagged))
    alone = Tagger.fit(*map(torch.from_numpy, tagged), strengths=[best])
    torch.testing.assert_close(chosen.weight, alone.weight, rtol=1e-2, atol=1e-2)
    others = [Tagger.fit(*map(torch.from_numpy, tagged), strengths=[s]) for s in STRENGTHS if s != best]
    assert all((chosen.weight - other.weight).abs().max() > 0.05 for other in others)


def test_a_class_that_no_image_shows_or_all_do_stays_finite(tagged):
    features, labels, texts = tagged
    labels[:, 1] = 1
    tagger = Tagger.fit(torch.from_numpy(features), torch.from_numpy(labels), torch.from_numpy(texts))
    p = tagger(torch.from_numpy(features).float())
    assert p.isfinite().all()
    assert p[:, 2].max() < 0.1
    assert p[:, 1].min() > 0.9


def test_with_few_images_the_texts_say_what_the_others_are():
    """One photo a class leaves most of the 32 dimensions unknown; the texts know them."""
    rng = np.random.default_rng(1)
    texts = unit(rng.normal(size=(4, 32)))
    shown = np.arange(200) % 4
    features = torch.from_numpy(texts[shown] + 0.35 * rng.normal(size=(200, 32)))
    labels = F.one_hot(torch.from_numpy(shown), 4)
    own = Tagger.fit(features[:4], labels[:4], torch.from_numpy(texts))
    other = Tagger.fit(features[:4], labels[:4], torch.from_numpy(unit(rng.normal(size=(4, 32)))))
    right = [(t(features[4:].float()).argmax(1).numpy() == shown[4:]).mean() for t in (own, other)]
    assert right[0] > right[1] + 0.15


def test_several_texts_a_class_count_by_their_mean(tagged):
    features, labels, texts = map(torch.from_numpy, tagged)
    three = torch.stack([texts, texts.roll(1, 1), texts.roll(2, 1)], 1)
    mean = Tagger.fit(features, labels, F.normalize(three, dim=-1).mean(1))
    torch.testing.assert_close(Tagger.fit(features, labels, 7 * three).weight, mean.weight, rtol=1e-3, atol=1e-3)


def test_one_image_is_enough():
    tagger = Tagger.fit(torch.eye(2)[:1], torch.tensor([[1, 0]]), torch.eye(2))
    assert tagger(torch.eye(2)).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(0, 8), "labels": torch.zeros(0, 3)}, "`features` to be of at least one image"),
        ({"features": torch.full((40, 8), torch.nan)}, "`features` to be finite"),
        ({"labels": torch.zeros(39, 3)}, "`labels` to be of 40 images"),
        ({"labels": torch.full((40, 3), 2)}, "`labels`"),
        ({"texts": torch.zeros(3, 7)}, "`texts` to be as long as `features`, 8"),
        ({"strengths": []}, "`strengths` to be at least one number above 0"),
        ({"strengths": [0.0]}, "`strengths` to be at least one number above 0"),
    ],
)
def test_what_does_not_fit_is_one_line(tagged, change, message):
    given = dict(zip(("features", "labels", "texts"), map(torch.from_numpy, tagged), strict=True))
    with pytest.raises(ValueError, match=message):
        Tagger.fit(**{**given, **change})
    with pytest.raises(ValueError, match=r"`features` to be a tensor \(B, 8\)"):
        Tagger(torch.zeros(3, 8), torch.zeros(3))(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"`bias` to be a tensor \(3,\)"):
        Tagger(torch.zeros(3, 8), torch.zeros(2))


def test_weights_are_over_the_largest():
    given = torch.tensor([[0.1, 0.2, 0.05], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    wanted = torch.tensor([[0.5, 1.0, 0.25], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(weights_of(given), wanted)


# What a segmenter makes of it


@pytest.fixture
def dataset(tmp_path):
    return CSVDataset(write_csv(tmp_path / "data"), "train")


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DeepLabV2(3, backbone=TinyBackbone())
    for branch in net.aspp:
        branch.weight.data *= 30
    return net.eval()


def keep(index, pixels, mask):
    return mask


@pytest.mark.parametrize("workers", [0, 2])
def test_classes_are_weighed_by_their_tags(dataset, net, workers):
    photos = [entry.image for entry in dataset.entries]
    tags = np.array([[0.2, 0.1], [0.0, 0.3], [1.0, 1.0], [0.0, 0.0], [0.001, 1.0], [1.0, 0.1]], dtype=np.float32)
    machine = Machine(workers=workers, progress=False)
    seen = set()
    for index, mask in segment_photos(net, photos, keep, crf=False, tags=tags, machine=machine):
        p = net.predict(normalize(dataset.image(index))[None])[0].numpy()
        row = tags[index]
        p[1:] *= (row / max(row.max(), 1e-9))[:, None, None]
        assert np.array_equal(mask, p.argmax(0))
        seen |= set(np.unique(mask).tolist())
    assert seen == {0, 1, 2}
    with pytest.raises(ValueError, match=r"`tags` to be \(2,\) for each photo, but got \(3,\) for .*0.png"):
        list(segment_photos(net, photos, keep, tags=np.ones((6, 3), np.float32)))


def test_an_encoder_sees_whole_photos_in_its_own_square(dataset):
    """By hand: the photo squeezed to the square, the encoder's statistics, the encoder."""
    encoder = TinyEncoder()
    found = train_tagger(encoder, dataset, machine=Machine(progress=False))
    rows = []
    for entry in dataset.entries:
        side = encoder.image_size
        pixels = F.interpolate(
            read_image(entry.image)[None].float(), size=(side, side), mode="bilinear", antialias=True
        )
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.mean, encoder.std))
        rows.append(encoder.encode_image((pixels / 255 - mean) / std)[0])
    labels = torch.stack([dataset.labels(i) for i in range(len(dataset))])
    texts = PromptSet().encode(encoder, dataset.classes)
    wanted = Tagger.fit(torch.stack(rows).detach(), labels, texts)(torch.stack(rows).detach())
    p = list(found([entry.image for entry in dataset.entries], machine=Machine(progress=False)))
    np.testing.assert_allclose(p, wanted.numpy(), atol=0.02)  # of bytes after the squeeze
    again = list(found([entry.image for entry in dataset.entries], machine=Machine(progress=False, workers=2)))
    assert np.array_equal(p, again)


def test_a_photo_that_cannot_be_read_says_nothing_or_stops_the_training(dataset):
    found = train_tagger(TinyEncoder(), dataset, machine=Machine(progress=False))
    dataset.entries[1].image.write_text("broken")
    assert (next(found([dataset.entries[1].image], machine=Machine(progress=False))) == 1).all()
    with pytest.raises(ValueError, match=r"images/1.png: not an image"):
        train_tagger(TinyEncoder(), dataset, machine=Machine(progress=False))


SMALL = [
    "scenes.train=11", "scenes.val=3", "scenes.size=64", "run.workers=0", "run.device=cpu", "run.progress=false",
    "warmup.epochs=0", "cacl.epochs=0", "segment.epochs=0", "masks.iterations=2", "report.images=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that weighs by tags, its encoder one with a name."""
    root = tmp_path_factory.mktemp("tags")
    out = root / "out"
    pipeline.run(Config.load("scenes", [*SMALL, f"data.root={root / 'data'}", f"run.out={out}"]))
    return open_dataset("scenes", root / "data", "val"), out


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_the_chain_learns_tags_and_weighs_with_them(run, tmp_path):
    dataset, out = run
    known = load_tagger(out / "tags/model.pt")
    assert (known.classes, known.encoder) == (dataset.classes, "scenes")
    made = pictures(out / "predict/eval")
    (net, _), settings = open_model(out)
    tagger = PhotoTagger(known.tagger, load_encoder("scenes"))
    make_predictions(net, dataset, tmp_path / "by hand", settings, tagger=tagger)
    assert pictures(tmp_path / "by hand") == made
    record = json.loads((out / "metrics.json").read_text())["predict"]
    assert record["what"] == "DeepLabV2 + tags"
    photos = [entry.image for entry in dataset.entries]
    predict(out, photos, tmp_path / "photos", progress=False, device="cpu")
    assert list(pictures(tmp_path / "photos").values()) == list(made.values())
    predict(out, photos, tmp_path / "none", tags=False, progress=False)
    make_predictions(net, dataset, tmp_path / "without", settings)
    assert pictures(tmp_path / "none") == pictures(tmp_path / "without") != made


def test_tags_on_the_command_line(run, tmp_path, capsys):
    dataset, out = run
    photo = str(dataset.entries[0].image)
    model = str(out / "segment/model.pt")
    assert (
        main(["predict", str(out), photo, "--no-tags", "--no-crf", "--out", str(tmp_path / "a"), "--no-progress"]) == 0
    )
    assert main(["predict", model, photo, "--no-crf", "--out", str(tmp_path / "b"), "--no-progress"]) == 0
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    copied = shutil.copytree(out, tmp_path / "copied")
    shutil.rmtree(copied / "tags")
    capsys.readouterr()
    assert main(["predict", str(copied), photo, "--out", str(tmp_path / "c")]) == 2
    assert "copied: expected a run folder whose stage `tags` has finished" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_an_encoder_of_ones_own_has_to_be_passed_again(tmp_path):
    root, out = write_csv(tmp_path / "data"), tmp_path / "out"
    settings = [
        "camnet.backbone=scenes",
        "camnet.weights=DEFAULT",
        "segment.backbone=scenes",
        "segment.weights=",
        "predict.tags=true",
    ]
    pipeline.run(configure(root, out, *settings), encoder=TinyEncoder())
    photos = [root / "images/0.png"]
    with pytest.raises(ValueError, match="its encoder is an object that was passed in; pass it as `encoder`"):
        predict(out, photos, tmp_path / "masks", progress=False)
    assert predict(out, photos, tmp_path / "masks", encoder=TinyEncoder(), progress=False).masks
    with pytest.raises(ValueError, match="expected the model of a stage `tags`"):
        load_tagger(out / "segment/model.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_features_of_any_precision(dataset, dtype):
    class Other(TinyEncoder):
        def encode_image(self, images):
            return super().encode_image(images).to(dtype)

    photos = [entry.image for entry in dataset.entries]
    quiet = Machine(progress=False)
    taggers = (train_tagger(encoder, dataset, machine=quiet) for encoder in (TinyEncoder(), Other()))
    wanted, found = (list(tagger(photos, machine=quiet)) for tagger in taggers)
    np.testing.assert_allclose(found, wanted, atol=0.02)


def test_it_learns_inside_inference_mode(tagged):
    wanted = Tagger.fit(*map(torch.from_numpy, tagged))
    with torch.inference_mode():
        assert torch.equal(Tagger.fit(*map(torch.from_numpy, tagged)).weight, wanted.weight)


def test_what_is_wrong_with_an_encoder_shows_before_the_training(tmp_path):
    class Wide(TinyEncoder):
        def encode_image(self, images):
            return super().encode_image(images)[:, :-1]

    class Terms(NamedTuple):
        total: torch.Tensor

    def criterion(images, cams, labels):  # needs no encoder
        return Terms(cams.mean())

    root = write_csv(tmp_path / "data")
    config = configure(root, tmp_path / "out", "predict.tags=true")
    with pytest.raises(ValueError, match="features as long as"):
        pipeline.run(config, encoder=Wide(), backbone=TinyBackbone(), criterion=criterion)
    assert not (tmp_path / "out/warmup/model.pt").exists()
    with pytest.raises(ValueError, match=r"\[tags\] strengths"):
        configure(root, tmp_path / "out", "tags.strengths=[0.0]")


def test_where_no_stage_needs_an_encoder_none_is_loaded(tmp_path):
    """A chain of one's own, whose masks are judged where the run has an encoder anyway."""
    chain = tuple(replace(stage, uses=()) if stage.name == "cacl" else stage for stage in CHAIN)
    config = Config.load("scenes", [*SMALL, f"data.root={tmp_path / 'data'}", f"run.out={tmp_path / 'out'}",
                                    "predict.tags=false", "encoder.name=/nowhere/clip.pt"], chain=chain)  # fmt: skip
    assert _words(Session(config)) is None
    tagged = Config.load(
        "scenes", [*SMALL, f"data.root={tmp_path / 'data'}", f"run.out={tmp_path / 'out'}"], chain=chain
    )
    assert _words(Session(tagged)) is not None
