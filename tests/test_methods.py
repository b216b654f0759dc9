"""CLIMS, QA-CLIMS and POLE against a plain loop over the pairs in numpy, and trained in CA-CL's place."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from test_criterion import BACKGROUNDS, IMAGENET_MEAN, IMAGENET_STD, NAMES
from test_matching import contrast, cosine, matching
from torch.nn import functional as F

from cacl import BackgroundSet, CAMNet, ablate, pipeline
from cacl.config import Config
from cacl.datasets import CSVDataset
from cacl.matching import Adapter
from cacl.methods import CLIMSLoss, POLELoss, QACLIMSLoss
from cacl.prompts import BACKGROUND_WORDS
from cacl.runs.session import Session
from cacl.settings import Machine
from cacl.stages.contrast import criterion_of, train_cacl
from cacl.tables import CACL

LABELS = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
SYNONYMS = {"cat": ("kitten", "tom"), "boat": ("ship",)}
THRESHOLD = 0.05


@pytest.fixture
def batch(randn):
    return randn(3, 3, 48, 40), randn(3, 3, 3, 5).sigmoid().requires_grad_(), LABELS


def regions(encoder, images, cams):
    """Foreground and background features of each pair, one at a time, and its class."""
    rows = []
    for image, own, labels in zip(images, cams.detach(), LABELS, strict=True):
        pixels = image.double().permute(1, 2, 0).numpy() * IMAGENET_STD + IMAGENET_MEAN
        pixels = torch.from_numpy((pixels - encoder.mean) / encoder.std).permute(2, 0, 1)[None].float()
        size = (encoder.image_size,) * 2
        pixels = F.interpolate(pixels, size, mode="bilinear")
        for k in labels.nonzero()[:, 0].tolist():
            mask = F.interpolate(own[None, k : k + 1], size, mode="bilinear")
            with torch.no_grad():
                both = [encoder.encode_image(pixels * part)[0].double().numpy() for part in (mask, 1 - mask)]
            rows.append((*both, k))
    f, b, k = zip(*rows, strict=True)
    return np.array(f), np.array(b), list(k)


def texts(encoder, words):
    return encoder.encode_text([f"a photo of {word}." for word in words]).double().numpy()


def suppressed(f, words):
    s = cosine(f[:, None], words[None])
    return -np.log(1 - s * (s >= THRESHOLD)).sum()


def close(terms, **wanted):
    for name, value in wanted.items():
        assert getattr(terms, name).item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_clims(batch):
    encoder = TinyEncoder()
    terms = CLIMSLoss(encoder, NAMES, aliases={"dog": "puppy"}, threshold=THRESHOLD)(*batch)
    f, b, k = regions(encoder, *batch[:2])
    t = texts(encoder, ["cat", "puppy", "boat"])[k]
    match, bgs = matching(f, b, t).mean(), suppressed(f, texts(encoder, BACKGROUND_WORDS))
    area = batch[1].mean().item()
    close(terms, total=match + bgs + 0.2 * area, matching=match, bgs=bgs, region=area)
    close(terms, foreground_similarity=cosine(f, t).mean(), background_similarity=cosine(b, t).mean())


def test_clims_of_coco(batch):
    encoder = TinyEncoder()
    settings = {"weights": (2.0, 14.0), "beta": 1.25, "threshold": THRESHOLD, "words": ["sky", "road"]}
    terms = CLIMSLoss(encoder, NAMES, **settings)(*batch)
    f, b, k = regions(encoder, *batch[:2])
    match = matching(f, b, texts(encoder, NAMES)[k], weights=(2.0, 14.0)).mean()
    bgs = suppressed(f, texts(encoder, ["sky", "road"]))
    close(terms, total=match + 1.25 * bgs + 0.2 * batch[1].mean().item(), bgs=bgs)


def test_qa_clims(batch):
    encoder = TinyEncoder()
    terms = QACLIMSLoss(encoder, NAMES, backgrounds=BACKGROUNDS)(*batch)
    f, b, k = regions(encoder, *batch[:2])
    words = np.zeros((3, 2, f.shape[1]))
    for i, name in enumerate(NAMES):
        own = texts(encoder, BACKGROUNDS[name])
        words[i, : len(own)] = own
    value = contrast(f, b, texts(encoder, NAMES)[k], words[k]).sum()
    close(terms, total=value + 0.2 * batch[1].mean().item(), contrast=value)


def test_pole(batch):
    """Its adapters, written out."""
    encoder = TinyEncoder()
    loss = POLELoss(encoder, NAMES, synonyms=SYNONYMS, threshold=THRESHOLD)
    terms = loss(*batch)
    f, b, k = regions(encoder, *batch[:2])
    chosen = []
    for row, index in zip(f, k, strict=True):
        candidates = texts(encoder, [NAMES[index], *SYNONYMS.get(NAMES[index], ())])
        chosen.append(max(candidates, key=lambda t: cosine(row, t)))
    t = np.array(chosen)

    def adapted(adapter, v):
        first, _, second, _ = (getattr(layer, "weight", None) for layer in adapter.layers)
        a = np.maximum(np.maximum(v @ first.detach().double().numpy().T, 0) @ second.detach().double().numpy().T, 0)
        return 0.2 * a + 0.8 * v

    unit = t / np.linalg.norm(t, axis=1, keepdims=True)
    image, text = loss.image_adapter, loss.text_adapter
    match = matching(adapted(image, f), adapted(image, b), adapted(text, unit), weights=(10.0, 25.0)).mean()
    bgs = suppressed(f, texts(encoder, BACKGROUND_WORDS))
    close(terms, total=match + bgs, matching=match, bgs=bgs, region=0)
    terms.total.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in loss.parameters())
    assert {name.partition(".")[0] for name, _ in loss.named_parameters()} == {"image_adapter", "text_adapter"}
    state = POLELoss(encoder, NAMES, synonyms=SYNONYMS, threshold=THRESHOLD, seed=1).state_dict()
    assert not torch.equal(state["image_adapter.layers.0.weight"], image.layers[0].weight)


def test_an_adapter_begins_at_a_fifth():
    adapter = Adapter(8)
    torch.nn.init.zeros_(adapter.layers[2].weight)
    torch.testing.assert_close(adapter(torch.ones(2, 8)), torch.full((2, 8), 0.8))


def make(name, encoder):
    if name == "qa":
        return QACLIMSLoss(encoder, NAMES, backgrounds=BACKGROUNDS)
    return CLIMSLoss(encoder, NAMES) if name == "clims" else POLELoss(encoder, NAMES, synonyms=SYNONYMS)


@pytest.mark.parametrize("name", ["clims", "qa", "pole"])
def test_the_gradient_reaches_the_cams_and_no_encoder(name, batch):
    encoder = TinyEncoder()
    loss = make(name, encoder)
    loss(*batch).total.backward()
    gradient = batch[1].grad
    assert gradient[0, :2].abs().max() > 0
    assert gradient[2, 2].abs().max() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not any("encoder" in key for key in loss.state_dict())


@pytest.mark.parametrize("name", ["clims", "qa", "pole"])
def test_without_a_label_nothing_but_the_area_is_left(name, batch):
    images, cams, labels = batch
    terms = make(name, TinyEncoder())(images, cams, labels * 0)
    terms.total.backward()
    assert terms.total.item() == pytest.approx(0 if name == "pole" else 0.2 * cams.mean().item())
    assert cams.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: CLIMSLoss(e, NAMES, gamma=-1), "`gamma` to be a number in"),
        (lambda e: CLIMSLoss(e, NAMES, words=[]), "`words`"),
        (lambda e: POLELoss(e, NAMES, synonyms={"cat": "kitten"}), "`synonyms` to have a list of words for 'cat'"),
        (lambda e: QACLIMSLoss(e, NAMES, normalization="clip"), '`normalization` to be one of "encoder", "imagenet"'),
        (lambda e: QACLIMSLoss(e, NAMES, temperature=0), "`temperature` to be a number in"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(TinyEncoder())


@pytest.mark.parametrize("kind", [CLIMSLoss, POLELoss])
def test_it_trains_in_the_place_of_the_other_loss(tmp_path, kind):
    dataset = CSVDataset(write_csv(tmp_path / "data"), "train")
    criterion = kind(TinyEncoder(), dataset.classes)
    net = CAMNet(2, backbone=TinyBackbone())
    before = {name: value.clone() for name, value in (net.state_dict() | criterion.state_dict()).items()}
    settings = CACL(epochs=1, batch_size=3, crop=32, lr=0.01)
    train_cacl(net, criterion, dataset, settings, machine=Machine(progress=False))
    after = net.state_dict() | criterion.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in net.state_dict())
    if kind is POLELoss:
        assert not torch.equal(after["text_adapter.ratio"], before["text_adapter.ratio"])


# In a run


def load(root, out, *settings):
    common = ["data.format=csv", "data.train=train", "data.eval=val", f"data.root={root}", f"run.out={out}"]
    return Config.load("voc", [*common, *settings])


def test_a_method_brings_its_own_numbers_and_a_key_of_ones_own_wins(tmp_path):
    table = load(tmp_path, tmp_path, "cacl.method=qa-clims", "cacl.epochs=3").table(CACL)
    assert (table.epochs, table.batch_size, table.lr, table.schedule) == (3, 8, 3.5e-4, "poly")
    assert (table.alpha, table.background_weight, table.gamma) == (10, 8, 0.2)
    pole = load(tmp_path, tmp_path, "cacl.method=pole").table(CACL)
    assert (pole.epochs, pole.lr, pole.alpha, pole.background_weight, pole.beta) == (15, 2.5e-4, 10, 25, 1)
    own = load(tmp_path, tmp_path).table(CACL)
    assert (own.epochs, own.schedule, own.alpha, own.gamma) == (20, "cosine", 40, 0.4)
    with pytest.raises(ValueError, match=r"\[cacl\] method: input should be 'cacl', 'clims', 'qa-clims' or 'pole'"):
        load(tmp_path, tmp_path, "cacl.method=clim")


RUN = [
    "run.device=cpu", "run.workers=0", "run.progress=false", "warmup.epochs=0", "cacl.epochs=1",
    "cacl.batch_size=3", "cacl.crop=32", "cacl.lr=0.01", "cams.scales=[1.0]",
]  # fmt: skip


@pytest.mark.parametrize("name", ["clims", "qa-clims", "pole"])
def test_a_run_trains_with_it(tmp_path, name):
    """The same weights as by hand."""
    root = write_csv(tmp_path / "data")
    config = load(root, tmp_path / "out", *RUN, f"cacl.method={name}", 'cacl.words=["lake", "track"]')
    encoder, stages = TinyEncoder(), ["warmup", "cacl", "cams"]
    result = pipeline.run(config, encoder=encoder, backbone=TinyBackbone(), stages=stages)
    names, words = ("boat", "train"), {"words": ["lake", "track"]}
    loss = {
        "clims": lambda: CLIMSLoss(encoder, names, **words),
        "qa-clims": lambda: QACLIMSLoss(encoder, names, backgrounds=BackgroundSet.voc()),
        "pole": lambda: POLELoss(encoder, names, **words),
    }[name]()
    net = CAMNet(2, backbone=TinyBackbone())
    net.load_state_dict(torch.load(result.out / "warmup/model.pt", weights_only=True))
    train_cacl(net, loss, CSVDataset(root, "train"), config.table(CACL), machine=Machine(progress=False))
    made = torch.load(result.out / "cacl/model.pt", weights_only=True)
    assert all(torch.equal(value, made[key]) for key, value in net.state_dict().items())
    records = [json.loads(line) for line in (result.out / "log.jsonl").read_text().splitlines()]
    logged = {"qa-clims": "contrast"}.get(name, "matching")
    assert all(record[logged] > 0 for record in records if record["stage"] == "cacl")
    assert pipeline.plan(config, stages, encoder=encoder, backbone=TinyBackbone()) == [
        "warmup: finished", "cacl: finished", "cams: finished",
    ]  # fmt: skip
    other = load(root, tmp_path / "out", *RUN, "cacl.method=cacl")
    assert "cacl: to be done again" in pipeline.plan(other, stages, encoder=encoder, backbone=TinyBackbone())


def test_the_report_calls_it_by_its_name(tmp_path):
    root = write_csv(tmp_path / "data")
    more = ["segment.epochs=0", "segment.backbone=", "irn.epochs=0", "masks.affinity=none", "report.images=2"]
    config = load(root, tmp_path / "out", *RUN, *more, "cacl.method=clims")
    result = pipeline.run(config, encoder=TinyEncoder(), backbone=TinyBackbone())
    page = (result.out / "report/index.html").read_text()
    assert "CAM after CLIMS" in page
    assert "CAM after CA-CL" not in page
    assert "the same 10 background words for all classes" in page


def test_synonyms_of_ones_own(tmp_path):
    root = write_csv(tmp_path / "data")
    (tmp_path / "synonyms.json").write_text('{"boat": ["ship", "barge"]}')
    config = load(root, tmp_path / "out", *RUN, "cacl.method=pole", f"cacl.synonyms={tmp_path / 'synonyms.json'}")
    session = Session(config, TinyEncoder(), TinyBackbone())
    known = criterion_of(session, config.table(CACL)).selector.prompt_features
    encoded = TinyEncoder().encode_text([f"a photo of {word}." for word in ("boat", "ship", "barge", "train")])
    wanted = F.normalize(encoded, dim=-1)[torch.tensor([[0, 1, 2], [3, 3, 3]])]
    torch.testing.assert_close(known, wanted)
    config = load(root, tmp_path / "out", *RUN, "cacl.method=pole", "cacl.synonyms=nowhere.json")
    with pytest.raises(ValueError, match=r"nowhere.json: expected a JSON object of words a class"):
        pipeline.run(config, encoder=TinyEncoder(), backbone=TinyBackbone(), stages=["warmup", "cacl"])


SCENES = ["scenes.train=2", "scenes.val=2", "scenes.size=32", "run.workers=0"]


@pytest.mark.parametrize("name", ["clims", "qa-clims", "pole"])
def test_the_embedded_encoder_knows_the_words_of_its_preset(tmp_path, name):
    places = [f"run.out={tmp_path / 'out'}", f"data.root={tmp_path / 'data'}"]
    config = Config.load("scenes", [*SCENES, *places, f"cacl.method={name}"])
    assert criterion_of(Session(config), config.table(CACL))


def test_words_that_the_encoder_does_not_know_show_before_the_warm_up(tmp_path):
    config = Config.load(
        "scenes",
        [*SCENES, f"run.out={tmp_path / 'out'}", f"data.root={tmp_path / 'data'}", "cacl.method=clims",
         'cacl.words=["zeppelin"]'],
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not know the word 'zeppelin'"):
        pipeline.run(config, stages=["warmup", "cacl"])
    assert not (tmp_path / "out/warmup/model.pt").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["clims", "qa", "pole"])
def test_features_of_any_precision(name, dtype, batch):
    class Other(TinyEncoder):
        def encode_image(self, images):
            return super().encode_image(images).to(dtype)

    wanted = make(name, TinyEncoder())(*batch).total
    loss = make(name, Other())(*batch).total
    loss.backward()
    torch.testing.assert_close(loss.float(), wanted.float(), rtol=2e-2, atol=2e-2)


def test_words_that_are_classes():
    encoder = TinyEncoder()
    assert CLIMSLoss(encoder, ["person", "player"]).names == ("person", "player")  # no alias that is a class itself
    for kind in (CLIMSLoss, POLELoss):
        with pytest.raises(ValueError, match="Background word 'tree' is one of the classes"):
            kind(encoder, ["Tree", "boat"])
    pole = POLELoss(encoder, ["boat", "ship"], synonyms={"boat": ["ship", "barge"]})
    assert pole.selector.prompt_features.shape[1] == 2


def test_tables_of_ca_cl_are_of_no_other_method(tmp_path):
    config = load(write_csv(tmp_path / "data"), tmp_path / "out", *RUN, "cacl.method=pole")
    with pytest.raises(
        ValueError, match=r"\[cacl\] method: expected 'cacl', whose parts the tables vary, but got 'pole'"
    ):
        ablate.run(config, tables=["4"], seeds=1, encoder=TinyEncoder(), backbone=TinyBackbone())
