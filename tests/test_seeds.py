"""Seeds from elsewhere: read, held to the tags, compared, snapped to proposals, and sent through the chain."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from PIL import Image
from test_pipeline import SETTINGS, files
from test_processes import launch

from cacl import pipeline
from cacl.artifacts import ImageCAMs, load_cams, save_cams
from cacl.config import Config
from cacl.datasets import CSVDataset
from cacl.dense import DenseFeatures
from cacl.mining import mine_labels, pseudo_mask, snap
from cacl.report import report
from cacl.seeds import check_seeds, hold_to_tags, read_seeds
from cacl.settings import Machine
from cacl.stages.cams import evaluate_cams
from cacl.stages.chain import CHAIN, needed
from cacl.stages.differences import differences
from cacl.tables import CAMs


@pytest.fixture
def root(tmp_path):
    return write_csv(tmp_path / "data")


@pytest.fixture
def data(root):
    """Tags: boat, train, both, boat, train, both; 48 × 64."""
    return CSVDataset(root, "train")


@pytest.fixture
def seeds(root, tmp_path):
    """The true masks, as another tool would leave them."""
    folder = tmp_path / "seeds"
    folder.mkdir()
    for i in range(6):
        shutil.copyfile(root / f"masks/{i}.png", folder / f"{i}.png")
    return folder


def write(folder, i, mask):
    Image.fromarray(np.asarray(mask, dtype=np.uint8)).save(folder / f"{i}.png")


# Reading


def test_a_mask_becomes_its_share_of_every_cell(data, seeds):
    mask = np.asarray(Image.open(seeds / "2.png"))
    cams, found = read_seeds(data, seeds, 2)
    assert cams.classes.tolist() == [0, 1]
    assert cams.maps.dtype == np.float16
    for k in (0, 1):
        expected = (mask == k + 1).reshape(12, 4, 16, 4).mean((1, 3))
        np.testing.assert_allclose(cams.maps[k], expected, atol=1e-3)
    assert found == ((), ())


def test_what_is_no_tag_is_left_out_and_a_tag_without_a_pixel_is_empty(data, seeds):
    mask = np.zeros((48, 64))
    mask[:8] = 2
    write(seeds, 0, mask)  # a boat
    cams, found = read_seeds(data, seeds, 0)
    assert found == ((1,), (0,))
    assert cams.classes.tolist() == [0]
    assert not cams.maps.any()


def test_what_nobody_knows_counts_half_for_each_tag(data, seeds):
    mask = np.zeros((48, 64))
    mask[:8], mask[8:16] = 1, 255
    write(seeds, 2, mask)
    cams, found = read_seeds(data, seeds, 2)
    assert found == ((), (1,))
    assert cams.maps[0, :, 0].tolist() == [1, 1, 0.5, 0.5, *[0] * 8]
    assert not cams.maps[1].any()  # a tag that nobody has seen has nothing to be unsure about


def test_soft_maps_of_any_size(data, seeds):
    (seeds / "2.png").unlink()
    maps = np.zeros((2, 6, 8), dtype=np.float32)
    maps[0, :3], maps[1, 3:] = 0.25, 1
    np.savez(seeds / "2.npz", classes=[1, 0], maps=maps)
    cams, found = read_seeds(data, seeds, 2)
    assert found == ((), ())
    assert cams.classes.tolist() == [0, 1]
    assert cams.maps.shape == (2, 12, 16)
    assert cams.maps[0, -1, 0] == 1  # of class 0, which stands second in the file
    assert cams.maps[1, 0, 0] == 0.25
    np.savez(seeds / "2.npz", classes=[], maps=np.zeros((0, 6, 8)))
    with pytest.raises(ValueError, match=r"2.npz: expected classes of integers and maps of floats"):
        read_seeds(data, seeds, 2)


def test_true_masks_are_nearly_the_truth(data, seeds, tmp_path):
    hold_to_tags(data, seeds, tmp_path / "cams")
    assert evaluate_cams(tmp_path / "cams", data).oracle[1] > 0.98


def refuse(message, action):
    with pytest.raises(ValueError, match=message) as error:
        action()
    assert "\n" not in str(error.value)


def test_a_line_of_a_pixel_is_no_faint_area(data, seeds):
    mask = np.zeros((48, 64))
    mask[10] = mask[21:23, 30:32] = 1  # a line, and a small square
    write(seeds, 0, mask)
    cams, found = read_seeds(data, seeds, 0)
    assert found == ((), ())
    assert cams.maps[0].max() == 1
    assert (cams.maps[0, 2] == 1).all()


def test_bad_files_are_one_line(data, seeds):
    def read(message):
        refuse(message, lambda: read_seeds(data, seeds, 0))

    write(seeds, 0, np.zeros((24, 32)))
    read("0.png: expected a mask of its photo's 64 x 48 pixels, but got 32 x 24$")
    write(seeds, 0, np.full((48, 64), 7))
    read("0.png: expected values 0 to 2 and 255, but got 7$")
    Image.new("RGB", (64, 48), "red").save(seeds / "0.png")
    read("0.png: expected a palette or grey mask, but got")
    (seeds / "0.png").write_text("hello")
    read("0.png: not a mask that decodes")
    (seeds / "0.png").unlink()
    read("0.png: no such file")
    np.savez(seeds / "0.npz", classes=[0], maps=np.full((1, 4, 4), 200.0))
    read(r"0.npz: expected maps in \[0, 1\], but got 200$")
    np.savez(seeds / "0.npz", classes=[5], maps=np.ones((1, 4, 4)))
    read(r"0.npz: expected classes 0 to 1, but got \[5\]$")
    np.savez(seeds / "0.npz", classes=[0, 0], maps=np.ones((2, 4, 4)))
    read(r"0.npz: expected each class once, but got \[0, 0\]$")
    np.savez(seeds / "0.npz", cams=np.ones((1, 4, 4)))
    read("0.npz: not a file of CAMs")


def test_bad_folders_are_one_line(data, seeds, tmp_path):
    check_seeds(data, seeds)
    refuse("nowhere: no such folder of seeds$", lambda: check_seeds(data, tmp_path / "nowhere"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/readme.txt").touch()
    message = "other: expected seeds of each of 6 images, <id>.png or <id>.npz, but 6 have none, such as '?0'?$"
    refuse(message, lambda: check_seeds(data, tmp_path / "other"))
    (seeds / "3.npz").touch()
    refuse("seeds: expected one file of seeds an image, but '?3'? has two$", lambda: check_seeds(data, seeds))
    (seeds / "3.npz").unlink()
    for i in range(6):
        write(seeds, i, np.zeros((48, 64)))
    message = "seeds: expected seeds of the images' tags, but none has a pixel of any$"
    refuse(message, lambda: hold_to_tags(data, seeds, tmp_path / "cams"))


# Counting and comparing


def test_what_goes_against_the_tags_is_counted(data, seeds, tmp_path):
    write(seeds, 0, np.full((48, 64), 2))
    write(seeds, 3, np.full((48, 64), 2))
    write(seeds, 5, np.full((48, 64), 1))
    held = hold_to_tags(data, seeds, tmp_path / "cams")
    assert held == (6, {"train": 2}, {"boat": 2, "train": 1})
    line = "6 images; 3 tags without a pixel (boat 2, train 1); 2 classes that are no tags, left out (train 2)"
    assert str(held) == line
    assert sorted(path.name for path in (tmp_path / "cams").iterdir()) == [f"{i}.npz" for i in range(6)]
    hold_to_tags(data, seeds, tmp_path / "again", machine=Machine(workers=2))
    assert files(tmp_path / "again") == files(tmp_path / "cams")


def test_differences_by_hand(data, tmp_path):
    for i in range(6):
        count = len(data.entries[i].labels)
        one, other = np.zeros((2, count, 12, 16), dtype=np.float16)
        one[:, :6], other[:, :3] = 1, 1  # the other is half of the one
        if i == 0:
            one[:], other[:] = 0, 0  # nobody sees the boat
        if i == 1:
            other[:] = one
        if count == 2:
            one[1], other[1] = 0, 0
        for name, maps in (("one", one), ("other", other)):
            classes = np.array(data.entries[i].labels, dtype=np.int64)
            save_cams(tmp_path / name / f"{i}.npz", ImageCAMs(classes, maps))
    found = differences(data, tmp_path / "one", tmp_path / "other", 0.5, 0.5)
    boat, train = found["differences"]["boat"], found["differences"]["train"]
    assert boat == {"images": 4, "iou": 0.5, "seeds_only": 0.5, "own_only": 0.0}
    # Two of the four images with a train have no pixel of it; one of the others is the same in both.
    assert train == {"images": 4, "iou": 0.75, "seeds_only": 0.25, "own_only": 0.0}
    assert found["photos"] == [("2", 0.5), ("3", 0.5), ("4", 0.5), ("5", 0.5), ("1", 1.0)]


# Snapping


def plain_snap(mask, regions):
    result = mask.copy()
    for region in np.unique(regions[regions > 0]):
        own = regions == region
        values = mask[own].tolist()
        result[own] = max(sorted(set(values)), key=values.count)
    return result


def test_snap_is_a_vote_in_every_region():
    rng = np.random.default_rng(0)
    mask = rng.choice([0, 1, 2, 255], (20, 30), p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint8)
    regions = np.kron(np.arange(24).reshape(4, 6), np.ones((5, 5), int))
    snapped = snap(mask, regions)
    assert snapped.dtype == np.uint8
    np.testing.assert_array_equal(snapped, plain_snap(mask, regions))
    np.testing.assert_array_equal(snapped[:5, :5], mask[:5, :5])  # region 0 is none
    assert {0, 1, 2} <= set(np.unique(snapped))


def test_what_nobody_knows_has_a_vote():
    mask, one = np.full((2, 4), 255), np.ones((2, 4), int)
    mask[0, :3] = 1
    assert snap(mask, one).tolist() == [[1, 1, 1, 255], [255] * 4]  # open, but for what the class had
    mask[1, :2] = 1
    assert snap(mask, one).tolist() == [[1] * 4] * 2


def test_snap_keeps_the_tags():
    mask = np.array([[0, 0, 0, 1], [0, 0, 2, 0]])
    one = np.ones((2, 4), int)
    assert snap(mask, one).tolist() == [[0, 0, 0, 1], [0, 0, 2, 0]]  # neither may be lost
    assert snap(mask, one, labels=[0]).tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]  # class 2 is no tag
    assert snap(np.full((2, 4), 2), one, labels=[0]).tolist() == [[255] * 4] * 2


@pytest.mark.parametrize(
    ("mask", "regions", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"`regions` to be of the mask's shape \(2, 3\)"),
        (np.full((2, 3), 300), np.zeros((2, 3), int), "`mask` to be values in"),
        (np.zeros((2, 3), int), np.full((2, 3), -1), "`regions` to be numbers of at least 0"),
        (np.zeros(3, int), np.zeros(3, int), "`mask` to be an array"),
    ],
)
def test_snap_refuses(mask, regions, message):
    with pytest.raises(ValueError, match=message):
        snap(mask, regions)


# A tag without a pixel leaves the background open


@pytest.mark.parametrize("make", [lambda *a: pseudo_mask(*a, background_score=0.3), mine_labels])
def test_no_background_where_a_tag_was_not_found(make):
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    maps = np.zeros((2, 4, 4), dtype=np.float32)
    maps[0, :, :2] = 1
    assert set(np.unique(make(image, [0, 1], maps))) == {1, 255}
    maps[1, 3, 3] = 1
    assert {0, 1} <= set(np.unique(make(image, [0, 1], maps)))
    assert {0, 1} <= set(np.unique(make(image, [0], maps[:1])))
    assert not make(image, [], maps[:0]).any()


# The chain


def configure(root, out, *more):
    return Config.load("own", [*SETTINGS, "predict.tags=false", f"data.root={root}", f"run.out={out}", *more])


def run(root, out, *more, **arguments):
    given = {"encoder": TinyEncoder(), "backbone": TinyBackbone(), **arguments}
    return pipeline.run(configure(root, out, *more), **given)


def test_seeds_go_through_the_chain_and_nothing_is_trained_before(root, seeds, tmp_path, caplog):
    write(seeds, 0, np.full((48, 64), 2))
    out = tmp_path / "out"
    result = run(root, out, f"cams.source={seeds}")
    assert set(result.metrics) == {"cams", "masks", "segment", "predict"}
    assert not (out / "warmup").exists()
    assert result.metrics["cams"]["what"] == "given seeds"
    assert result.metrics["cams"]["oracle"]["miou"] > 0.85
    message = "6 images; 1 tags without a pixel (boat 1); 1 classes that are no tags, left out (train 1)"
    assert message in caplog.text
    assert json.loads((out / "cams/seeds.json").read_text()) == {
        "images": 6, "dropped": {"train": 1}, "empty": {"boat": 1},
    }  # fmt: skip
    assert set(np.unique(Image.open(out / "masks/train/0.png"))) == {255}
    page = (out / "report/index.html").read_text()
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))
    assert "Given seeds of the training images" in text
    assert "boat 4 1 0 – – –" in text
    assert "train 4 0 1 – – –" in text
    assert "a trained network is shown with [cams] compare = true." in text
    plan = pipeline.plan(configure(root, out, f"cams.source={seeds}"), encoder=TinyEncoder(), backbone=TinyBackbone())
    assert plan == [f"{name}: finished" for name in ("cams", "masks", "segment", "predict", "report")]


def test_the_stages_after_the_cams_bring_the_seeds_with_them(root, seeds, tmp_path):
    stages = ["irn", "masks", "segment", "predict", "report"]
    settings = (f"cams.source={seeds}", "masks.affinity=irn", "predict.tags=true")
    result = run(root, tmp_path / "out", *settings, stages=stages)
    assert set(result.metrics) == {"cams", "irn", "masks", "segment", "predict"}
    assert (tmp_path / "out/tags/model.pt").is_file()
    with pytest.raises(ValueError, match="the stage 'cams' has not finished with these settings; run it first"):
        run(root, tmp_path / "other", stages=["masks"])


def test_other_seeds_are_read_again_and_moved_ones_are_not(root, seeds, tmp_path):
    out = tmp_path / "out"
    run(root, out, f"cams.source={seeds}", stages=["cams"])
    moved = seeds.rename(tmp_path / "moved")
    given = {"encoder": TinyEncoder(), "backbone": TinyBackbone(), "stages": ["cams"]}
    assert pipeline.plan(configure(root, out, f"cams.source={moved}"), **given) == ["cams: finished"]
    write(moved, 0, np.ones((48, 64)))
    assert pipeline.plan(configure(root, out, f"cams.source={moved}"), **given) == ["cams: to be done again"]


def test_a_folder_of_the_run_itself_is_refused(root, seeds, tmp_path):
    out = tmp_path / "out"
    run(root, out, f"cams.source={seeds}", stages=["cams", "masks"])
    before = files(out)
    own = (f"cams.source={out / 'cams/train'}", f"cams.source={out / 'masks/train'}", f"masks.regions={out / 'masks'}")
    for setting in own:
        settings = (f"cams.source={seeds}", setting)
        message = "expected a folder of other tools, but it is the run's own, which the run would remove: copy"
        if "regions" in setting:
            message = "expected regions of each of 6 images, <id>.png, but 6 have none"
        refuse(message, lambda given=settings: run(root, out, *given, stages=["cams", "masks"]))
    assert files(out).keys() == before.keys()
    regions = f"masks.regions={out / 'masks/train'}"
    message = "masks/train: expected a folder of other tools, but it is the run's own"
    refuse(message, lambda: run(root, out, f"cams.source={seeds}", regions, stages=["cams", "masks"]))


def test_a_folder_of_seeds_needs_no_encoder(root, seeds, tmp_path):
    settings = (f"cams.source={seeds}", "encoder.name=ViT-B/nowhere")
    result = run(root, tmp_path / "out", *settings, encoder=None, stages=["cams", "masks", "segment", "predict"])
    assert result.metrics["masks"]["miou"] > 0.5
    assert "agreement" not in result.metrics["masks"]


def test_sources_that_are_none_and_folders_with_the_name_of_one(root, tmp_path):
    message = r"\[cams\] source: expected \"cacl\", \"clip\" or the path of a folder, but got 3$"
    refuse(message, lambda: configure(root, tmp_path / "out", "cams.source=3"))
    named = configure(root, tmp_path / "out", f"cams.source={tmp_path / 'out/clip'}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/other.toml").write_text(named.to_toml(tmp_path / "out"))
    assert Config.load(tmp_path / "out/other.toml").cams.source == tmp_path / "out/clip"


def test_where_seeds_and_trained_cams_disagree(root, seeds, tmp_path):
    out = tmp_path / "out"
    settings = (f"cams.source={seeds}", "cams.compare=true", "cams.scales=[1.0]")
    result = run(root, out, *settings, stages=["warmup", "cacl", "cams"])
    record = json.loads((out / "cams/seeds.json").read_text())
    assert set(record["differences"]) == {"boat", "train"}
    assert [len(load_cams(path, 2).classes) for path in sorted((out / "cams/cacl").iterdir())] == [1, 1, 2, 1, 1, 2]
    page = report(out, encoder=TinyEncoder(), backbone=TinyBackbone()).read_text()
    assert "IoU with CA-CL %" in page
    assert "least in common" in page
    assert result.metrics["cams"]["what"] == "given seeds"


def test_masks_snapped_to_proposals(root, seeds, tmp_path):
    regions = tmp_path / "regions"
    regions.mkdir()
    numbers = np.kron(np.arange(1, 13).reshape(3, 4), np.ones((16, 16), int))
    for i in range(6):
        Image.fromarray(numbers.astype(np.uint16)).save(regions / f"{i}.png")
    settings = (f"cams.source={seeds}", f"masks.regions={regions}")
    result = run(root, tmp_path / "out", *settings, stages=["masks"])
    for i in range(6):
        mask = np.asarray(Image.open(tmp_path / f"out/masks/train/{i}.png"))
        assert all(len(np.unique(mask[numbers == n])) == 1 for n in range(1, 13))
    plain = run(root, tmp_path / "plain", f"cams.source={seeds}", stages=["masks"])
    assert result.metrics["masks"]["miou"] != plain.metrics["masks"]["miou"]

    def again(message):
        refuse(message, lambda: run(root, tmp_path / "wrong", *settings, stages=["masks"]))

    Image.new("RGB", (64, 48)).save(regions / "0.png")
    again("0.png: expected numbers of regions in one channel, but got the mode RGB")
    Image.new("I;16", (32, 24)).save(regions / "0.png")
    again("0.png: expected regions of the photo's 64 x 48 pixels, but got 32 x 24")
    (regions / "0.png").unlink()
    again("regions: expected regions of each of 6 images, <id>.png, but 1 have none, such as '?0'?$")


def test_two_processes_count_together(root, seeds, tmp_path, clip_state):
    write(seeds, 1, np.full((48, 64), 1))
    write(seeds, 2, np.full((48, 64), 1))
    torch.save(clip_state, tmp_path / "clip.pt")
    given = (f"encoder.name={tmp_path / 'clip.pt'}", "run.progress=false")
    config = configure(root, tmp_path / "one", f"cams.source={seeds}", *given)
    for source in (seeds, "clip"):
        for processes, name in ((1, "one"), (2, "two")):
            path = tmp_path / f"{name}.toml"
            path.write_text(config.changed({"run": {"out": tmp_path / name}, "cams": {"source": source}}).to_toml())
            done = launch(processes, "-m", "cacl", "run", path, "--stages", "cams")
            assert done.returncode == 0, done.stderr
        made = files(tmp_path / "two/cams")
        assert made == files(tmp_path / "one/cams")
        assert source == "clip" or json.loads(made["seeds.json"])["empty"] == {"train": 2}


class DenseTiny(TinyEncoder):
    """Sees in every 8 × 8 pixels what the whole encoder sees in a photo."""

    def encode_dense(self, images):
        height, width = (side // 8 for side in images.shape[2:])
        activations = torch.nn.functional.avg_pool2d(images, 8).detach().requires_grad_()
        with torch.enable_grad():
            squares = activations.movedim(1, -1).reshape(-1, 3, 1, 1).expand(-1, 3, self.image_size, self.image_size)
            features = self.encode_image(squares).view(len(images), height, width, -1).movedim(-1, 1)
        return DenseFeatures(features, activations)


def test_clip_is_a_source_that_trains_nothing(root, tmp_path):
    result = run(root, tmp_path / "out", "cams.source=clip", encoder=DenseTiny(), stages=["cams", "masks"])
    assert set(result.metrics) == {"cams", "masks"}
    assert result.metrics["cams"]["what"] == "CLIP-ES"
    cams = load_cams(tmp_path / "out/cams/train/2.npz", 2)
    assert cams.maps.shape == (2, 12, 16)
    assert cams.maps.max() > 0.9
    page = report(tmp_path / "out", encoder=DenseTiny(), backbone=TinyBackbone())
    assert "CLIP-ES of the training images" in page.read_text()
    with pytest.raises(TypeError, match="to have `encode_dense`, but TinyEncoder lacks it"):
        run(root, tmp_path / "out", "cams.source=clip", stages=["cams"])
    own = configure(root, tmp_path / "out", "cams.source=clip", "cams.words=class")
    given = {"encoder": DenseTiny(), "backbone": TinyBackbone(), "stages": ["cams"]}
    assert pipeline.plan(own, **given) == ["cams: to be done again"]


def test_stages_that_are_not_needed_are_left_out():
    def names(source, **settings):
        tables = {"cams": CAMs(source=source, **settings)}
        return [stage.name for stage in needed(CHAIN, lambda stage: tables.get(stage.name, stage.settings()))]

    assert names("cacl") == ["warmup", "cacl", "cams", "masks", "segment", "predict"]
    assert names("clip") == names("/a/folder") == ["cams", "masks", "segment", "predict"]
    assert names("clip", compare=True) == names("cacl")
    with pytest.raises(ValueError, match="compare: expected another source than 'cacl' to compare its CAMs with"):
        CAMs(compare=True)
