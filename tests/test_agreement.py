"""The figure that needs no masks: its formula, what it prefers, and where a run says it."""

import html
import json
import re

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from PIL import Image
from test_pipeline import SETTINGS

from cacl import BackgroundSet, load_encoder, pipeline, scenes
from cacl.agreement import Agreement, MaskJudge
from cacl.artifacts import load_cams, save_mask
from cacl.config import Config
from cacl.constants import IMAGENET_MEAN, IMAGENET_STD
from cacl.datasets import CSVDataset
from cacl.prompts import DEFAULT_TEMPLATES
from cacl.report import report
from cacl.runs import evaluation
from cacl.settings import Table
from cacl.stages.quality import evaluate_agreement, labelled
from cacl.stages.score import Score
from cacl.stages.stage import Judged, Stage

NAMES = ("boat", "train")
WORDS = BackgroundSet({"boat": ["pier"], "train": ["track", "sky", "gravel"]})


class Colours(TinyEncoder):
    """Knows red boats and green trains; everything else is grey to it."""

    def encode_image(self, images):
        red, green, _ = (images * torch.tensor(self.std).view(3, 1, 1) + torch.tensor(self.mean).view(3, 1, 1)).unbind(
            1
        )
        seen = [(red - green - 0.2).relu(), (green - red - 0.2).relu(), 0.02 * torch.ones_like(red)]
        return torch.stack(seen, 1).mean((2, 3))

    def encode_text(self, texts):
        return torch.eye(3)[[0 if "boat" in text else 1 if "train" in text else 2 for text in texts]]


@pytest.fixture
def batch(randn):
    """Images ``(4, 3, 32, 32)``, masks and labels; the encoder sees images of this size."""
    images = randn(4, 3, 32, 32)
    masks = np.zeros((4, 32, 32), dtype=np.uint8)
    masks[0, 5:20, 3:17] = 1
    masks[0, 18:30, 15:30] = 2
    masks[0, 0:4] = 255  # counts as background
    masks[1, 10:, 8:24] = 2
    masks[2, 4:9] = 2  # shows a class that is no label, and lacks the one that is
    images[2, :, 4:9] += 2
    labels = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]])
    return images, torch.from_numpy(masks), labels


def by_hand(encoder, images, masks, labels):
    """The formulas in plain numpy, image by image, pixel by pixel: (evidence of the pairs, explained, edges)."""

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def texts(*words):
        listed = [template.replace("{}", word) for word in words for template in DEFAULT_TEMPLATES]
        return unit(encoder.encode_text(listed).detach().numpy().astype(np.float64))

    evidence, explained, edges = [], [], []
    for image, mask, label in zip(images.numpy().astype(np.float64), masks.numpy(), labels.numpy(), strict=True):
        mask = np.where(mask == 255, 0, mask)
        photo = image.transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN
        seen = (photo - encoder.mean) / encoder.std
        for k in np.flatnonzero(label):
            region = torch.from_numpy((seen * (mask == k + 1)[:, :, None]).transpose(2, 0, 1)).float()
            feature = unit(encoder.encode_image(region[None]).detach().numpy().astype(np.float64))[0]
            evidence.append(max(texts(NAMES[k]) @ feature) - max(texts(*WORDS[NAMES[k]]) @ feature))
        colours = image.transpose(1, 2, 0)
        within = sum(colours[mask == v].var(0).sum() * (mask == v).sum() for v in np.unique(mask))
        explained.append(1 - within / (colours.reshape(-1, 3).var(0).sum() * mask.size))
        steps, borders = [], []
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                for other in ((y + 1, x), (y, x + 1)):
                    if max(other) < 32:
                        steps.append(np.abs(colours[y, x] - colours[other]).mean())
                        borders.append(mask[y, x] != mask[other])
        edges.append(np.mean(np.array(steps)[borders]) / np.mean(steps) if any(borders) else 0.0)
    return evidence, explained, edges


def test_the_formula_is_that_of_plain_numpy(encoder, batch):
    evidence, explained, edges = by_hand(encoder, *batch)
    rows = MaskJudge(encoder, NAMES, backgrounds=WORDS)(*batch)
    assert encoder.training  # left as it was
    assert rows[:, 0].tolist() == pytest.approx([evidence[0] + evidence[1], evidence[2], evidence[3], 0], abs=1e-5)
    assert rows[:, 1].tolist() == [2, 1, 1, 0]
    assert rows[:, 2].tolist() == pytest.approx(explained, abs=1e-5)
    assert rows[:, 3].tolist() == pytest.approx(edges, abs=1e-4)
    assert explained[2] > 0.1
    assert explained[3] == pytest.approx(0, abs=1e-9)
    agreement = Agreement.of(rows)
    assert agreement == pytest.approx((np.mean(evidence), np.mean(explained), np.mean(edges), 4, 4), abs=1e-4)
    # A class with fewer words than others: what fills the gap is near to nothing, nor is it the nearest.
    pier = torch.nn.functional.normalize(encoder.encode_text([t.replace("{}", "pier") for t in DEFAULT_TEMPLATES]))
    empty = torch.nn.functional.normalize(encoder.encode_image(torch.zeros(1, 3, 32, 32)))  # that of the third image
    assert (pier @ empty.T).max() < 0


def test_the_total_is_computed_by_hand():
    agreement = Agreement(evidence=0.04, explained=0.2, edges=4.0, pairs=3, images=2)
    assert agreement.total == pytest.approx((0.04 * (0.2 * 0.8) ** 0.5) ** 0.5)
    assert agreement._replace(evidence=-0.01).total == 0
    assert Agreement(2.0, 1.0, 1e9, 1, 1).total <= 1
    assert Agreement.of(torch.zeros(0, 5)) == (0, 0, 0, 0, 0)
    assert Agreement.of(torch.zeros(0, 5)).total == 0


def test_images_add_up_and_their_size_does_not_matter(encoder, batch):
    judge = MaskJudge(encoder, NAMES, backgrounds=WORDS)
    images, masks, labels = batch
    rows = judge(*batch)
    alone = torch.cat([judge(images[i : i + 1], masks[i : i + 1], labels[i : i + 1]) for i in range(4)])
    assert torch.allclose(rows, alone, atol=1e-5)
    # A pixel as a block of 2 by 2 is the same pixel at half the size.
    larger = judge(images.repeat_interleave(2, 2).repeat_interleave(2, 3), masks, labels)
    assert torch.allclose(rows, larger, atol=1e-5)
    larger = judge(images, masks.repeat_interleave(2, 1).repeat_interleave(2, 2), labels.bool())
    assert torch.allclose(rows, larger, atol=1e-5)
    centres = torch.zeros(4, 96, 96, dtype=torch.uint8)  # of blocks of 3 by 3, whose other pixels nobody looks at
    centres[:, 1::3, 1::3] = masks
    assert torch.allclose(rows, judge(images, centres, labels), atol=1e-5)
    assert torch.allclose(judge(images, masks.long(), labels.float()), rows)
    half = judge(images.half(), masks, labels)
    assert half.dtype == torch.float32
    assert torch.allclose(half, rows, atol=0.01)


def test_nothing_to_see_is_nothing(encoder):
    judge = MaskJudge(encoder, NAMES, backgrounds=WORDS)
    flat = torch.full((1, 3, 48, 40), 0.7)
    mask = torch.zeros(1, 48, 40, dtype=torch.uint8)
    mask[:, 10:20] = 1
    assert judge(flat, mask, torch.ones(1, 2))[0, 1:].tolist() == [2, 0, 0, 1]
    assert judge(flat, mask, torch.zeros(1, 2))[0].tolist() == [0, 0, 0, 0, 1]
    assert judge(flat[:0], mask[:0], torch.zeros(0, 2)).shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 1, 32, 32)}, r"`images` to be a tensor \(B, 3, H, W\), but got shape \(4, 1"),
        ({"images": np.zeros((4, 3, 32, 32))}, "`images` to be a tensor .* torch.from_numpy"),
        ({"masks": torch.zeros(4, 32, 32)}, "`masks` to be of integers, but got torch.float32"),
        ({"masks": np.zeros((4, 32, 32), np.uint8)}, r"`masks` to be a tensor \(B, h, w\), but got ndarray"),
        ({"masks": torch.zeros(3, 32, 32, dtype=torch.uint8)}, r"`masks` to be a tensor \(4, h, w\)"),
        ({"masks": torch.full((4, 32, 32), 3)}, r"`masks` to be of values in \[0, 2\] or 255, but got 3"),
        ({"masks": torch.full((4, 32, 32), -1)}, r"`masks` to be of values in \[0, 2\] or 255, but got -1"),
        ({"labels": torch.ones(3, 2)}, "`labels` to be of the same batch size as `images` 4"),
        ({"labels": torch.ones(4, 3)}, r"`labels` to be a tensor \(B, 2\)"),
        ({"labels": torch.full((4, 2), -1)}, r"`labels` to be 0 \(absent\) or 1 \(present\)"),
    ],
)
def test_what_does_not_go_together_is_one_line(encoder, batch, change, message):
    arguments = {**dict(zip(("images", "masks", "labels"), batch, strict=True)), **change}
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        MaskJudge(encoder, NAMES, backgrounds=WORDS)(**arguments)
    assert "\n" not in str(caught.value)


def test_objects_that_are_none_are_refused_at_once(encoder):
    with pytest.raises(ValueError, match="no built-in background words for 'zeppelin'"):
        MaskJudge(encoder, ("boat", "zeppelin"))
    with pytest.raises(TypeError, match=r"to have `image_size`, but str lacks it; load_encoder\('scenes'\) makes one"):
        MaskJudge("scenes", NAMES)
    with pytest.raises(TypeError, match="`backgrounds` to be a BackgroundSet, but got dict"):
        MaskJudge(encoder, NAMES, backgrounds={"boat": ["sky"]})


def moved(mask, way):
    """A mask shifted by an eighth of its side, or with objects that are smaller or larger than they are."""
    kept = np.zeros_like(mask)
    side = max(mask.shape)
    if way == "shifted":
        kept[side // 8 :, side // 8 :] = mask[: -side // 8, : -side // 8]
        return kept
    if way == "all background":
        return kept
    if way == "one object":
        return np.full_like(mask, mask.max())
    r = side // 16
    views = np.lib.stride_tricks.sliding_window_view(np.pad(mask, r, mode="edge"), (2 * r + 1, 2 * r + 1))
    same, largest = views.min((2, 3)), views.max((2, 3))
    return np.where(same == largest, mask, 0) if way == "shrunk" else largest.astype(mask.dtype)


def test_the_truth_agrees_more_than_what_is_wrong(tmp_path):
    data = scenes.generate(tmp_path / "data", train=8, val=0, seed=5)
    dataset = CSVDataset(data, "train")
    judge = MaskJudge(load_encoder("scenes"), dataset.classes, backgrounds=BackgroundSet(scenes.BACKGROUNDS))
    truth = evaluate_agreement(judge, dataset, lambda i: dataset.mask(i).numpy()).whole
    assert truth.total > 0.1
    for way in ("shifted", "shrunk", "grown", "one object", "all background"):
        wrong = evaluate_agreement(judge, dataset, lambda i, way=way: moved(dataset.mask(i).numpy(), way)).whole
        assert wrong.total < truth.total - 0.01, (way, wrong, truth)


def test_a_data_set_s_files(tmp_path):
    root = write_csv(tmp_path / "data", train=7, val=1)
    table = (root / "dataset.csv").read_text().replace("images/2.png,boat;train", "images/2.png,")
    (root / "dataset.csv").write_text(table)
    dataset, judge = CSVDataset(root, "train"), MaskJudge(Colours(), NAMES, backgrounds=WORDS)
    assert labelled(dataset, 200) == [0, 1, 3, 4, 5, 6]
    assert labelled(dataset, 3) == [0, 3, 5]
    found = evaluate_agreement(judge, dataset, root / "masks")
    assert found.whole[3:] == (7, 6)  # photo 5 shows both
    assert list(found.photos) == [0, 1, 3, 4, 5, 6]
    assert found.whole.evidence * 7 == pytest.approx(sum(each.evidence * each.pairs for each in found.photos.values()))
    assert found.whole.total > 0.5  # what is red is a boat
    assert evaluate_agreement(judge, dataset, lambda i: dataset.mask(i).numpy()) == found
    assert evaluate_agreement(judge, dataset, root / "masks", indices=[3, 5]).whole[3:] == (3, 2)
    (root / "masks/4.png").unlink()
    with pytest.raises(ValueError, match=r"masks/4.png: no such file"):
        evaluate_agreement(judge, dataset, root / "masks")
    with pytest.raises(ValueError, match="`dataset` to be images with labels, but got none with one"):
        evaluate_agreement(judge, dataset, root / "masks", indices=[])


# Runs


def configure(root, out, *more):
    return Config.load("voc", [*SETTINGS, f"data.root={root}", f"run.out={out}", "report.images=2", *more])


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """Data without a single mask, whose last photos have no labels either, and a whole run on them."""
    folder = tmp_path_factory.mktemp("blind")
    root = write_csv(folder / "data", train=6, val=3)
    table = re.sub(r"masks/\d\.png", "", (root / "dataset.csv").read_text())
    (root / "dataset.csv").write_text(table.replace("images/8.png,boat;train", "images/8.png,"))
    config = configure(root, folder / "out")
    return root, pipeline.run(config, encoder=Colours(), backbone=TinyBackbone())


def test_a_run_without_masks_has_a_figure_for_its_masks(blind):
    root, result = blind
    assert json.loads((result.out / "metrics.json").read_text()) == result.metrics
    assert list(result.metrics) == ["cams", "masks", "predict"]
    train, val = CSVDataset(root, "train"), CSVDataset(root, "val")
    judge = MaskJudge(Colours(), NAMES)  # the built-in words, as in the run

    def cam(i):
        cams = load_cams(result.out / f"cams/train/{i}.npz", 2)
        maps = cams.resized((48, 64))
        return np.where(maps.max(0) > 0.15, cams.classes[maps.argmax(0)] + 1, 0).astype(np.uint8)

    wanted = {
        "cams": evaluate_agreement(judge, train, cam).whole,
        "masks": evaluate_agreement(judge, train, result.out / "masks/train").whole,
        "predict": evaluate_agreement(judge, val, result.out / "predict/eval").whole,
    }
    for name, own in wanted.items():
        record = result.metrics[name]
        assert record["miou"] is None
        assert record["images"] == 0
        assert list(record["judged"].values()) == pytest.approx(list(own), abs=1e-4)
        assert record["agreement"] == pytest.approx(own.total, abs=2e-3)
    assert [own.images for own in wanted.values()] == [6, 6, 2]
    assert wanted["cams"].total > 0


def test_the_summary_says_it(blind):
    _, result = blind
    shown = [f"{result.metrics[name]['agreement']:.3f}" for name in ("cams", "masks", "predict")]
    lines = [line for line in result.summary().splitlines() if not re.match("(picture|report):", line)]
    assert lines == [
        f"cams: CAM, without masks: agreement {shown[0]} (train, 6 images, background score 0.15)",
        f"masks: pseudo masks, without masks: agreement {shown[1]} (train, 6 images, background score 0.25)",
        f"predict: DeepLabV2, without masks: agreement {shown[2]} (val, 2 images)",
        f"without masks: agreement {' → '.join(shown)} (CAM → pseudo masks → DeepLabV2 of val)",
    ]
    for name, record in result.metrics.items():
        assert Score.read(record).record() | {"key": record["key"]} == record, name


def test_it_is_not_computed_again_until_something_changes(blind, monkeypatch):
    root, result = blind
    done = []

    def count(judge, dataset, masks, **arguments):
        done.append(len(dataset))
        return evaluate_agreement(judge, dataset, masks, **arguments)

    monkeypatch.setattr(evaluation, "evaluate_agreement", count)
    again = pipeline.run(configure(root, result.out), encoder=Colours(), backbone=TinyBackbone())
    assert (done, again.metrics) == ([], result.metrics)
    # Of another's words the result of a criterion of one's own knows nothing, but the figure follows from them.
    (root / "few.json").write_text('{"boat": ["sky"], "train": ["grass"]}')
    common = {"encoder": Colours(), "backbone": TinyBackbone(), "stages": ["warmup", "cacl", "cams"]}
    settings = ["cacl.beta=0.0", "warmup.epochs=0", "cacl.epochs=0"]
    out = result.out.with_name("words")
    first = pipeline.run(configure(root, out, *settings), **common)
    second = pipeline.run(configure(root, out, *settings, f"backgrounds.file={root / 'few.json'}"), **common)
    assert done == [6, 6]
    assert first.metrics["cams"]["key"] != second.metrics["cams"]["key"]


@pytest.mark.posix
def test_without_words_or_an_encoder_there_is_none(blind, monkeypatch):
    root, result = blind
    stages = ["warmup", "cacl", "cams"]
    settings = ["warmup.epochs=0", "cacl.epochs=0"]
    other = result.out.with_name("zeppelins")
    other.mkdir()
    for name in ("images", "dataset.csv", "classes.txt"):
        (other / name).symlink_to(root / name)
    (other / "dataset.csv").unlink()
    (other / "dataset.csv").write_text((root / "dataset.csv").read_text().replace("boat", "zeppelin"))
    (other / "classes.txt").unlink()
    (other / "classes.txt").write_text("zeppelin\ntrain")
    config = configure(other, other / "out", *settings, "cacl.beta=0.0")
    assert pipeline.run(config, encoder=Colours(), backbone=TinyBackbone(), stages=stages).metrics == {}

    def load(name):
        raise AssertionError("an encoder that the run does not need")

    monkeypatch.setattr("cacl.runs.session.load_encoder", load)
    config = configure(root, other / "own", *settings)
    assert pipeline.run(config, criterion=print, backbone=TinyBackbone(), stages=stages).metrics == {}


class Copies(Table):
    """``[copies]``: masks that are there already."""


def copy_masks(run, settings, folder, journal):
    for entry in run.train.entries:
        mask = np.asarray(Image.open(entry.image.parents[1] / f"masks/{entry.image.name}"))
        save_mask(folder / f"train/{entry.id}.png", mask)


def test_a_stage_from_outside_gets_it_with_a_word(blind):
    root, result = blind
    copies = Stage(
        "copies", Copies, run=copy_masks, files=("train",), scored_on="train",
        judged=lambda run, settings, dataset, known: Judged("copies", run.folder("copies") / "train"),
    )  # fmt: skip
    out = result.out.with_name("copies")
    settings = [x for x in SETTINGS if x.startswith(("data", "run"))]
    config = Config.load("voc", [*settings, f"data.root={root}", f"run.out={out}"], chain=(copies,))
    with_it = pipeline.run(config, encoder=Colours(), chain=(copies,), stages=["copies"])
    found = evaluate_agreement(MaskJudge(Colours(), NAMES), CSVDataset(root, "train"), out / "copies/train")
    assert with_it.summary() == f"copies: copies, without masks: agreement {found.whole.total:.3f} (train, 6 images)"
    assert found.whole.total > 0


def rows(page, number):
    table = re.findall(r'<table class="numbers">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)[number]
    cells = [re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in cells]


def test_the_report_of_a_run_without_masks_is_whole(blind):
    _, result = blind
    page = result.report.read_text()
    metrics = result.metrics
    scores = {"cams": ["0.15", "off"], "masks": ["0.25", "on"], "predict": ["–", "on"]}
    names = {"cams": "CAM of the training images", "masks": "Pseudo masks", "predict": "DeepLabV2 + CRF"}
    wanted = []
    for name, own in metrics.items():
        parts = own["judged"]
        wanted.append([
            names[name], f"{own['agreement']:.3f}", own["split"], str(parts["images"]), *scores[name],
            f"{parts['evidence']:.3f}", f"{100 * parts['explained']:.1f}", f"{parts['edges']:.2f}", name,
        ])  # fmt: skip
    assert rows(page, 0) == wanted
    assert "There is no mean IoU: the data has no ground-truth masks. What follows needs none." in page
    assert re.findall(r'<section id="(\w+)"', page) == [
        "results", "training", "classes", "cams", "masks", "segmentation", "agreement", "costs", "settings",
    ]  # fmt: skip
    assert "None" not in re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL)
    # The photos that agree least come first, those that agree most beside them.
    section = page[page.index('<section id="agreement"') : page.index('<section id="costs"')]
    shown = re.findall(r"<b>([\d.]+)</b> · (\d)", section)
    wanted = []
    for name, count in (("cams", 2), ("masks", 2), ("predict", 1)):
        photos = json.loads((result.out / name / "agreement.json").read_text())["photos"]
        assert [value for _, value in photos] == sorted(value for _, value in photos)
        assert len(photos) == metrics[name]["judged"]["images"]
        wanted += [(f"{value:.3f}", id) for id, value in [*photos[:count], *photos[: -count - 1 : -1]]]
    assert shown == wanted
    assert section.count("<img") == 2 * len(wanted)
    assert "Pseudo masks: least agreement" in section


def test_photos_of_files_that_are_gone_are_left_out_of_the_report(blind, tmp_path):
    _, result = blind
    photos = json.loads((result.out / "masks/agreement.json").read_text())["photos"]
    lost, other = result.out / f"masks/train/{photos[0][0]}.png", result.out / "cams/agreement.json"
    kept = {path: path.read_bytes() for path in (lost, other)}
    lost.unlink()
    other.write_text(json.dumps({"key": "another", "photos": photos}))  # of other settings, or of another program
    try:
        page = report(result.out, tmp_path / "r.html", encoder=Colours(), backbone=TinyBackbone()).read_text()
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    section = page[page.index('<section id="agreement"') : page.index('<section id="costs"')]
    assert section.count('class="missing"') == 1
    assert "Pseudo masks: least agreement" in section
    assert "CAM: least agreement" not in section


def test_with_masks_both_are_said(tmp_path):
    record = {"what": "CAM", "background_score": 0.3, "crf": False, "images": 6, "miou": 0.5, "iou": {}, "split": "x"}
    judged = {"evidence": 0.04, "explained": 0.2, "edges": 4.0, "pairs": 7, "images": 6}
    score = Score.read({**record, "judged": judged})
    assert str(score) == "CAM mIoU 50.0 % (x, 6 images, background score 0.3, no CRF), agreement 0.127"
    score = Score.read({**record, "judged": {**judged, "images": 4}})
    assert str(score).endswith("no CRF), agreement 0.127 of 4 images")
    for wrong in ({**judged, "edges": -1.0}, {**judged, "evidence": "x"}, {"evidence": 1.0}, [1], 0.5):
        with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
            Score.read({**record, "judged": wrong})


def test_a_mask_of_the_photo_s_own_is_never_opened(tmp_path):
    root = write_csv(tmp_path / "data", train=2, val=1)
    dataset = CSVDataset(root, "train")
    for i in range(2):
        save_mask(tmp_path / f"made/{i}.png", np.asarray(Image.open(root / f"masks/{i}.png")))
        (root / f"masks/{i}.png").write_bytes(b"no image")
    assert evaluate_agreement(MaskJudge(Colours(), NAMES), dataset, tmp_path / "made").whole.images == 2
