"""Pseudo masks as files: label mining, IRNet and the random walk over a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import write_csv
from PIL import Image

from cacl.artifacts import ImageCAMs, load_cams, save_cams, save_mask
from cacl.datasets import CSVDataset, Dataset
from cacl.images import VOC_COLOURS, read_mask
from cacl.irn import IRNet
from cacl.log import Journal
from cacl.metrics import ConfusionMatrix
from cacl.mining import mine_labels
from cacl.random_walk import propagate, spread
from cacl.settings import Machine
from cacl.stages.cams import evaluate_cams
from cacl.stages.irn import make_labels, train_irnet
from cacl.stages.levels import own_levels, own_scores
from cacl.stages.masks import make_masks, walk, walk_cams
from cacl.stages.refined import evaluate_refined, refine_cams
from cacl.tables import IRN, Masks, Walk
from cacl.thresholds import BINS, count_maxima, least_cross_entropy
from cacl.transforms import normalize


@pytest.fixture
def dataset(tmp_path):
    return CSVDataset(write_csv(tmp_path / "data"), "train")


@pytest.fixture
def cams(dataset, tmp_path):
    """Rough CAMs: the mask at a quarter of the size, blurred by a pixel."""
    for i, entry in enumerate(dataset.entries):
        mask = dataset.mask(i).numpy()[::4, ::4]
        maps = []
        for k in entry.labels:
            core = (mask == k + 1).astype(np.float32)
            maps.append(np.mean([np.roll(core, shift, axis) for shift in (-1, 0, 1) for axis in (0, 1)], 0))
        save_cams(tmp_path / f"cams/{entry.id}.npz", ImageCAMs(np.array(entry.labels), np.array(maps, np.float16)))
    return tmp_path / "cams"


def net() -> IRNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return IRNet("scenes")


@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        (IRN(foreground_score=0.3, background_score=0.1), (0.1, 0.3)),
        (IRN(), None),
        (IRN(background_score=0.6), (0.6, 0.6)),
        (IRN(foreground_score=0.2), (0.2, 0.2)),
    ],
)
def test_mined_labels_are_written_as_pictures(dataset, cams, tmp_path, settings, scores):
    make_labels(dataset, cams, tmp_path / "labels", settings)
    own = own_scores(dataset, cams)
    low, high = scores or (own.low, own.high)
    for i, entry in enumerate(dataset.entries):
        with Image.open(tmp_path / f"labels/{entry.id}.png") as file:
            assert file.mode == "P"
            assert np.array_equal(np.array(file.getpalette()).reshape(-1, 3), VOC_COLOURS)
            found = load_cams(cams / f"{entry.id}.npz", 2)
            photo = dataset.image(i).permute(1, 2, 0).numpy()
            mined = mine_labels(
                photo, found.classes, found.maps, foreground_score=high, background_score=low
            )  # fmt: skip
            assert np.array_equal(np.array(file), mined)
    assert {path.name for path in (tmp_path / "labels").iterdir()} == {f"{i}.png" for i in range(6)}


def test_processes_write_the_same_labels(dataset, cams, tmp_path):
    make_labels(dataset, cams, tmp_path / "one")
    make_labels(dataset, cams, tmp_path / "two", machine=Machine(workers=2))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_what_is_there_can_be_kept(dataset, cams, tmp_path):
    save_mask(tmp_path / "labels/2.png", np.full((48, 64), 9, np.uint8))
    make_labels(dataset, cams, tmp_path / "labels", keep=True)
    assert (read_mask(tmp_path / "labels/2.png") == 9).all()
    make_labels(dataset, cams, tmp_path / "labels")
    assert (read_mask(tmp_path / "labels/2.png") != 9).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_file_of_cams_is_named(dataset, cams, tmp_path, workers):
    (cams / "3.npz").unlink()
    machine = Machine(workers=workers)
    for make in (
        lambda: make_labels(dataset, cams, tmp_path / "labels", machine=machine),
        lambda: walk_cams(net(), dataset, cams, tmp_path / "walk", machine=machine),
        lambda: make_masks(dataset, cams, tmp_path / "masks", machine=machine),
        lambda: evaluate_refined(dataset, cams, background_score=0.15, machine=machine),
    ):
        with pytest.raises(ValueError, match=r"cams/3.npz: no such file$"):
            make()


def train(network: IRNet, dataset: Dataset, labels: Path, epochs: float = 2) -> list[dict]:
    records: list[dict] = []
    settings = IRN(epochs=epochs, batch_size=2, crop=48, scale=(0.625, 1.25), radius=4, weight_decay=1e-4)
    train_irnet(network, dataset, labels, settings, journal=Journal(callback=records.append))
    return records


def test_irnet_finds_the_edges_of_the_mined_labels(dataset, cams, tmp_path):
    make_labels(dataset, cams, tmp_path / "labels")
    network = net()
    records = train(network, dataset, tmp_path / "labels", epochs=20)
    first, last = (np.mean([record["loss"] for record in part]) for part in (records[:10], records[-10:]))
    assert last < 0.7 * first
    assert records[0].keys() >= {"background", "foreground", "negative", "displacement_foreground"}
    image, mask = dataset.image(0), dataset.mask(0).numpy()[2::4, 2::4]
    edges = network.predict(normalize(image)[None])[0].numpy()
    across = np.zeros_like(mask, bool)
    across[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    across[1:] |= mask[1:] != mask[:-1]
    assert edges[across].mean() > 2 * edges[~across].mean()


def test_the_walk_is_that_of_the_networks_edges(dataset, cams, tmp_path):
    network = net()
    walk_cams(network, dataset, cams, tmp_path / "walk", Walk(power=2.0, radius=3, beta=2.0, steps=9))
    for i, entry in enumerate(dataset.entries):
        seeds = torch.from_numpy(load_cams(cams / f"{entry.id}.npz", 2).maps).float() ** 2
        edges = network.predict(normalize(dataset.image(i))[None])[0]
        walked = propagate(seeds, edges, radius=3, beta=2.0, steps=9)
        walked = walked / walked.max()
        stored = load_cams(tmp_path / f"walk/{entry.id}.npz", 2)
        np.testing.assert_allclose(stored.maps, walked.numpy(), atol=1e-3)


def test_the_walk_over_colours_is_that_of_the_photo(dataset, cams, tmp_path):
    walk_cams(None, dataset, cams, tmp_path / "walk", Walk(power=2.0, radius=3, colour=20.0))
    for i, entry in enumerate(dataset.entries):
        seeds = torch.from_numpy(load_cams(cams / f"{entry.id}.npz", 2).maps).float() ** 2
        photo = dataset.image(i).float()
        photo = photo.view(3, 12, 4, 16, 4).mean((2, 4))  # of 48 x 64 pixels
        walked = spread(seeds, photo, radius=3, colour=20.0)
        stored = load_cams(tmp_path / f"walk/{entry.id}.npz", 2)
        np.testing.assert_allclose(stored.maps, (walked / walked.max()).numpy(), atol=2e-3)


@pytest.mark.parametrize("unsure", [0.0, 0.1])
def test_masks_are_foreground_background_or_unsure(dataset, cams, tmp_path, unsure):
    make_masks(dataset, cams, tmp_path / "masks", Masks(background_score=0.4, unsure=unsure, iterations=0))
    for entry in dataset.entries:
        found = load_cams(cams / f"{entry.id}.npz", 2)
        maps = found.resized((48, 64))
        wanted = found.classes[maps.argmax(0)] + 1
        wanted[maps.max(0) <= 0.4 + unsure] = 255
        wanted[maps.max(0) <= 0.4 - unsure] = 0
        mask = read_mask(tmp_path / f"masks/{entry.id}.png").numpy()
        assert np.array_equal(mask, wanted)
        assert (mask == 255).any() == (unsure > 0)


def test_masks_that_choose_their_scores_have_one_a_class(dataset, cams, tmp_path):
    """Twice as faint a class gets as much, but for the half of it that is not believed."""
    for entry in dataset.entries:
        found = load_cams(cams / f"{entry.id}.npz", 2)
        faint = np.where(found.classes == 1, 0.5, 1)[:, None, None]
        save_cams(cams / f"{entry.id}.npz", ImageCAMs(found.classes, (found.maps * faint).astype(np.float16)))
    scores, levels = own_levels(dataset, cams)
    alone = []
    for k in range(2):
        counts = np.zeros(BINS, np.int64)
        for entry in dataset.entries:
            if k in entry.labels:
                found = load_cams(cams / f"{entry.id}.npz", 2)
                counts += count_maxima(found.maps[found.classes == k])
        alone.append(least_cross_entropy(counts))
    assert alone[1] < alone[0]
    np.testing.assert_allclose(levels, [scores.low / ((scores.low + own) / 2) for own in alone])
    make_masks(dataset, cams, tmp_path / "masks", Masks(unsure=0, iterations=0))
    make_masks(dataset, cams, tmp_path / "given", Masks(unsure=0, iterations=0, background_score=scores.low))
    differs = False
    for entry in dataset.entries:
        found = load_cams(cams / f"{entry.id}.npz", 2)
        maps = found.resized((48, 64)) * levels[found.classes][:, None, None]
        wanted = np.where(maps.max(0) > scores.low, found.classes[maps.argmax(0)] + 1, 0)
        mask = read_mask(tmp_path / f"masks/{entry.id}.png").numpy()
        assert (mask == wanted).mean() > 0.999  # half precision
        differs |= not np.array_equal(mask, read_mask(tmp_path / f"given/{entry.id}.png").numpy())
    assert differs


def test_masks_with_a_crf(dataset, cams, tmp_path):
    make_masks(dataset, cams, tmp_path / "masks", Masks(background_score=0.4, unsure=0))
    for index, mask in refine_cams(dataset, cams, range(6), background_score=0.4):
        stored = read_mask(tmp_path / f"masks/{dataset.entries[index].id}.png").numpy()
        assert (stored == mask).mean() > 0.999


def test_cams_of_another_size_are_resized(randn):
    maps = np.zeros((2, 3, 4), np.float16)
    maps[1, 1, 1] = 1
    walked = walk(ImageCAMs(np.array([0, 5]), maps), torch.zeros(12, 16), Walk(steps=4))
    assert walked.maps.shape == (2, 12, 16)
    assert walked.maps.max() == 1
    assert not walked.maps[0].any()


def test_nothing_to_walk_from():
    none = walk(ImageCAMs(np.zeros(0, np.int64), np.zeros((0, 3, 4), np.float16)), torch.zeros(3, 4))
    assert none.maps.shape == (0, 3, 4)
    zero = walk(ImageCAMs(np.array([1]), np.zeros((1, 3, 4), np.float16)), torch.zeros(3, 4))
    assert not zero.maps.any()


def test_an_image_without_a_label_is_background(dataset, cams, tmp_path):
    entry = dataset.entries[0]._replace(labels=())
    alone = Dataset(dataset.classes, [entry])
    save_cams(cams / "0.npz", ImageCAMs(np.zeros(0, np.int64), np.zeros((0, 12, 16), np.float16)))
    make_labels(alone, cams, tmp_path / "labels")
    for network in (None, net()):
        walk_cams(network, alone, cams, tmp_path / "walk")
        assert not load_cams(tmp_path / "walk/0.npz", 2).maps.size
    make_masks(alone, tmp_path / "walk", tmp_path / "masks")
    for path in (tmp_path / "labels/0.png", tmp_path / "masks/0.png"):
        assert not read_mask(path).any()
    train(net(), alone, tmp_path / "labels", epochs=1)


def test_odd_images(tmp_path):
    """One row, one column, smaller than the radius, larger than 2000 pixels."""
    (tmp_path / "classes.txt").write_text("thing")
    sizes = {"row": (1, 37), "column": (37, 1), "small": (3, 2), "large": (70, 2100)}
    rows = ["image,labels,mask,split"]
    for name, size in sizes.items():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
        rows.append(f"{name}.png,thing,,train")
        grid = [-(-side // 4) for side in size]
        save_cams(tmp_path / f"cams/{name}.npz", ImageCAMs(np.array([0]), np.ones((1, *grid), np.float16)))
    (tmp_path / "dataset.csv").write_text("\n".join(rows))
    dataset = CSVDataset(tmp_path, "train")
    make_labels(dataset, tmp_path / "cams", tmp_path / "labels")
    train(net(), dataset, tmp_path / "labels", epochs=1)
    for network in (None, net()):
        walk_cams(network, dataset, tmp_path / "cams", tmp_path / "walk")
    make_masks(dataset, tmp_path / "walk", tmp_path / "masks")
    for name, size in sizes.items():
        assert read_mask(tmp_path / f"masks/{name}.png").shape == size


def test_cams_after_a_crf(dataset, cams):
    matrix, images = evaluate_refined(dataset, cams, background_score=0.3)
    assert images == 6
    masks = dict(refine_cams(dataset, cams, range(6), background_score=0.3))
    other = ConfusionMatrix(2)
    for i, mask in masks.items():
        other.update(dataset.mask(i).numpy(), mask)
    assert np.array_equal(matrix.counts, other.counts)
    assert matrix.miou > evaluate_cams(cams, dataset, scores=(0.3,)).miou(0.3)


@pytest.mark.parametrize(("name", "value"), [("background_score", 1.5), ("unsure", -0.1)])
def test_settings_of_masks_out_of_range_are_named(dataset, cams, tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        make_masks(dataset, cams, tmp_path / "masks", Masks(**{name: value}))


@pytest.mark.parametrize(("name", "value"), [("power", 0.0), ("beta", -1.0), ("radius", 0), ("steps", -1)])
def test_settings_of_the_walk_out_of_range_are_named(dataset, cams, tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        walk_cams(net(), dataset, cams, tmp_path / "walk", Walk(**{name: value}))


def test_what_is_wrong_with_an_image_names_it(dataset, cams, tmp_path):
    maps = np.full((1, 12, 16), np.nan, np.float16)
    save_cams(cams / "4.npz", ImageCAMs(np.array([1]), maps))
    with pytest.raises(ValueError, match=r"cams/4.npz: expected maps that are finite and not negative$"):
        make_labels(dataset, cams, tmp_path / "labels")
    settings = IRN(foreground_score=0.3, background_score=0.1, bilateral=(1e-4, 1e-4, 1.0))
    with pytest.raises(
        ValueError, match=r"images/0.png: Expected argument `bilateral` to be wider for an image of 64×48"
    ):
        make_labels(dataset, cams, tmp_path / "labels", settings, machine=Machine(crf="torch"))


def test_own_reading_of_images_is_used(dataset, cams, tmp_path):
    class Own(Dataset):
        def image(self, index):
            return dataset.image(int(self.entries[index].id))

    own = Own(dataset.classes, [entry._replace(image=tmp_path / "nowhere") for entry in dataset.entries])
    make_labels(own, cams, tmp_path / "labels")
    assert len(train(net(), own, tmp_path / "labels", epochs=1)) == 3
