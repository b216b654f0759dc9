"""Training DeepLabV2 on pseudo masks, its file, and masks of photos by one process or several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TinyBackbone
from drawn import write_csv
from PIL import Image
from torch.nn import functional as F

from cacl.artifacts import save_mask
from cacl.datasets import CSVDataset
from cacl.deeplab import DeepLabV2
from cacl.images import read_mask
from cacl.metrics import ConfusionMatrix
from cacl.photos import load_segmenter, mask_of, save_segmenter, segment_photos
from cacl.settings import Machine
from cacl.stages.predict import evaluate_segmenter, make_predictions
from cacl.stages.segment import train_segmenter
from cacl.tables import Photos, Segment
from cacl.transforms import normalize


@pytest.fixture
def dataset(tmp_path):
    return CSVDataset(write_csv(tmp_path / "data"), "train")


@pytest.fixture
def net():
    """A segmenter that has learnt something: what it says depends on the photo."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DeepLabV2(3, backbone=TinyBackbone())
    for branch in net.aspp:
        branch.weight.data *= 30
    return net


NO_CRF = Photos(iterations=0)


def keep(index, pixels, mask):
    return pixels.shape, mask


def training(**settings):
    return Segment(
        **{"epochs": 1, "batch_size": 3, "crop": 32, "schedule": "cosine", "scale": (0.625, 1.25), **settings}
    )


def test_training_learns_from_the_folder_of_masks_alone(dataset, tmp_path, net):
    masks = tmp_path / "pseudo"
    masks.mkdir()
    for entry in dataset.entries:
        Image.new("L", (64, 48), 2).save(masks / f"{entry.id}.png")
        entry.mask.unlink()  # its own masks are not needed
    train_segmenter(net, dataset, masks, training(epochs=20, lr=0.001))
    for _, (_, mask) in segment_photos(net, [entry.image for entry in dataset.entries], keep):
        assert (mask == 2).all()


def test_masks_that_do_not_fit_are_named(dataset, tmp_path, net):
    masks = tmp_path / "pseudo"
    masks.mkdir()
    with pytest.raises(ValueError, match=r"pseudo/\d.png: no such file"):
        train_segmenter(net, dataset, masks, training())
    for entry in dataset.entries:
        Image.new("L", (64, 48), 3).save(masks / f"{entry.id}.png")
    with pytest.raises(ValueError, match=r"pseudo: expected values 0 to 2 or 255, but got 3 in one of \d, \d, \d"):
        train_segmenter(net, dataset, masks, training())


def test_the_file_of_a_segmenter(tmp_path, net):
    path = tmp_path / "model.pt"
    save_segmenter(path, net, ("boat", "train"), "")
    with pytest.raises(ValueError, match="backbone is a module that was passed in"):
        load_segmenter(path)
    again = load_segmenter(path, backbone=TinyBackbone())
    assert again.classes == ("boat", "train")
    assert not again.net.training
    image = torch.randn(1, 3, 40, 40)
    assert torch.equal(again.net.predict(image), net.predict(image))
    named = DeepLabV2(2, backbone="scenes")
    save_segmenter(path, named, ("boat",), "scenes")
    assert torch.equal(load_segmenter(path).net.predict(image), named.predict(image))
    torch.save({"weights": {}}, path)
    with pytest.raises(ValueError, match="expected the model of a stage `segment`"):
        load_segmenter(path)
    with pytest.raises(ValueError, match=r"nowhere.pt: no such file"):
        load_segmenter(tmp_path / "nowhere.pt")


def test_a_mask_is_the_best_class_of_the_network(dataset, net):
    photos = [entry.image for entry in dataset.entries]
    seen = set()
    for index, (shape, mask) in segment_photos(net, photos, keep, crf=False):
        image = normalize(dataset.image(index))[None]
        with torch.no_grad():
            logits = F.interpolate(net.eval()(image), size=(48, 64), mode="bilinear")
        assert shape == (48, 64, 3)
        assert np.array_equal(mask, logits[0].argmax(0).numpy())
        seen |= set(np.unique(mask))
    assert len(seen) > 1


@pytest.mark.parametrize("crf", [False, True])
def test_the_number_of_processes_changes_nothing(dataset, net, crf):
    photos = [*(entry.image for entry in dataset.entries), dataset.entries[0].image.with_name("gone.png")]
    runs = [list(segment_photos(net, photos, keep, crf=crf, machine=Machine(workers=n, crf="torch"))) for n in (0, 2)]
    for (i, one), (j, two) in zip(*runs, strict=True):
        assert i == j
        if i == 6:
            assert "gone.png: no such file" in str(one) == str(two)
        else:
            assert np.array_equal(one[1], two[1])


def test_a_backbone_that_cannot_be_sent_to_other_processes(dataset, caplog):
    class Local(TinyBackbone):
        pass

    net = DeepLabV2(3, backbone=Local())
    with caplog.at_level("INFO", "cacl"):
        photos = [entry.image for entry in dataset.entries]
        assert len(list(segment_photos(net, photos, keep, crf=False, machine=Machine(workers=2)))) == 6
    assert "in one process" in caplog.text


def test_large_photos_are_scaled_down_and_masks_have_the_photos_size(tmp_path, net):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(small).resize((300, 200), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    ((_, (shape, mask)),) = segment_photos(net, [tmp_path / "large.png"], keep, Photos(longest=90), crf=False)
    assert shape == (60, 90, 3)
    assert mask.shape == (200, 300)
    assert len(np.unique(mask)) > 1
    # As bilinear probabilities of all classes at once would have it.
    logits = torch.randn(5, 8, 12, generator=torch.Generator().manual_seed(0)) * 3
    pixels = np.zeros((60, 90, 3), dtype=np.uint8)
    inner = F.interpolate(logits[None], size=(60, 90), mode="bilinear").softmax(1)
    outer = F.interpolate(inner, size=(200, 300), mode="bilinear")[0]
    best = outer.argmax(0)
    ours = mask_of(logits, pixels, (200, 300))
    near = outer.topk(2, 0).values.diff(dim=0)[0].abs() < 1e-3
    shown = torch.isin(best, torch.unique(inner[0].argmax(0)))
    assert (torch.from_numpy(ours) == best)[shown & ~near].all()
    assert (shown & ~near).float().mean() > 0.95


def test_the_crf_gets_the_classes_that_may_be_there(monkeypatch):
    given = []

    def crf(image, probabilities, **settings):
        given.append((probabilities.shape, settings))
        return probabilities

    monkeypatch.setattr("cacl.photos.dense_crf", crf)
    logits = torch.full((21, 4, 4), -20.0)
    logits[3], logits[7, 0, 0], logits[20, :, 2:] = 5.0, 4.0, 9.0
    mask = mask_of(logits, np.zeros((32, 32, 3), np.uint8), (32, 32), {"gaussian": (1.0, 2.0), "iterations": 3})
    assert given == [((3, 32, 32), {"gaussian": (1.0, 2.0), "iterations": 3})]
    assert set(np.unique(mask)) == {3, 20}
    assert mask[16, 4] == 3
    assert mask[16, 28] == 20


def test_predictions_and_their_score(tmp_path, net, dataset):
    out = tmp_path / "out"
    make_predictions(net, dataset, out, NO_CRF)
    matrix = ConfusionMatrix(2)
    for i, entry in enumerate(dataset.entries):
        with Image.open(out / f"{entry.id}.png") as file:
            assert file.mode == "P"
            assert file.getpalette()[3:6] == [128, 0, 0]
            matrix.update(dataset.mask(i).numpy(), np.array(file))
    found, images = evaluate_segmenter(net, dataset, crf=False)
    assert images == 6
    assert np.array_equal(found.counts, matrix.counts)
    (out / "0.png").unlink()
    (out / "1.png").write_text("kept")
    make_predictions(net, dataset, out, NO_CRF, keep=True)
    assert (out / "0.png").is_file()
    assert (out / "1.png").read_text() == "kept"
    dataset.entries[0].image.write_text("broken")
    with pytest.raises(ValueError, match=r"images/0.png: not an image that decodes"):
        make_predictions(net, dataset, out, NO_CRF)


def test_images_are_labelled_anew_with_their_own_labels_only(dataset, tmp_path, net):
    """Against the network's probabilities, those of other classes taken away."""
    make_predictions(net, dataset, tmp_path / "new", NO_CRF, labelled=True)
    seen = set()
    for i, entry in enumerate(dataset.entries):
        values = net.predict(normalize(dataset.image(i))[None])[0]
        others = [k + 1 for k in range(2) if k not in entry.labels]
        values[others] = -1
        made = read_mask(tmp_path / f"new/{entry.id}.png").numpy()
        assert np.array_equal(made, values.argmax(0).numpy())
        seen |= set(np.unique(made).tolist())
    assert seen == {0, 1, 2}
    make_predictions(net, dataset, tmp_path / "two", NO_CRF, labelled=True, machine=Machine(workers=2))
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    save_mask(tmp_path / "new/2.png", np.full((48, 64), 9, np.uint8))
    make_predictions(net, dataset, tmp_path / "new", NO_CRF, labelled=True, keep=True)
    assert (read_mask(tmp_path / "new/2.png") == 9).all()
