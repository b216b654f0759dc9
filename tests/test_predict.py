"""``cacl predict``: any photo gives a mask of its own size, a bad one is named at the end, and no photo is lost."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from cacl.cli import main
from cacl.config import Config
from cacl.deeplab import DeepLabV2
from cacl.folders import find_photos
from cacl.images import VOC_COLOURS
from cacl.photos import load_segmenter, save_segmenter
from cacl.pictures import legend, overlay, palette
from cacl.predict import predict

CLASSES = ("boat", "train", "a <bus> with a very long name")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "segment" / "model.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DeepLabV2(4, backbone="scenes")
    for branch in net.aspp:
        branch.weight.data *= 20
    save_segmenter(path, net, CLASSES, "scenes")
    return path


@pytest.fixture
def photos(tmp_path):
    """Photos of every kind; the value says which size each has when it is upright."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((60, 50))
    sizes = {}

    def add(name, image, size=(50, 60), **options):
        image.save(folder / name, **options)
        sizes[name] = size

    add("colour.jpg", colour)
    add("grey.png", colour.convert("L"))
    add("palette.gif", colour.convert("P"))
    add("transparent.png", colour.convert("RGBA"))
    add("print.jpeg", colour.convert("CMYK"))
    add("deep.png", Image.fromarray(rng.integers(0, 65536, (50, 60), dtype=np.uint16)))
    add("bits.bmp", colour.convert("1"))
    add("float.tiff", Image.fromarray(rng.random((50, 60), dtype=np.float32)))
    add("web.webp", colour)
    add("one.png", colour.resize((1, 1)), (1, 1))
    add("strip.png", colour.resize((200, 1)), (1, 200))
    add("deeper/ünï cöde 'x'.png", colour)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    add("turned.jpg", colour, (60, 50), exif=exif)
    return folder, sizes


def test_every_kind_of_photo(model, photos, tmp_path, capsys):
    folder, sizes = photos
    assert (
        main(["predict", str(model), str(folder), "--out", str(tmp_path / "out"), "--overlay", "--workers", "0"]) == 0
    )
    out = capsys.readouterr().out
    assert "mask values: 0 background, 1 boat, 2 train, 3 a <bus> with a very long name" in out
    assert f"{len(sizes)} masks in {tmp_path / 'out'}, 0 left out" in out
    values = set()
    for name, size in sizes.items():
        stem = name.rsplit(".", 1)[0]
        with Image.open(tmp_path / f"out/{stem}.png") as mask:
            assert mask.mode == "P", name
            assert mask.size == (size[1], size[0]), name
            assert mask.getpalette()[:12] == VOC_COLOURS[:4].ravel().tolist()
            values |= set(np.unique(np.array(mask)))
        with Image.open(tmp_path / f"out/overlays/{stem}.jpg") as picture:
            assert picture.width >= 200
            assert picture.height > size[0]
    assert values <= {0, 1, 2, 3}
    assert len(values) > 1
    made = {p.relative_to(tmp_path / "out").with_suffix("").as_posix() for p in (tmp_path / "out").rglob("*.png")}
    assert made == {name.rsplit(".", 1)[0] for name in sizes}


def test_the_mask_of_a_turned_photo_is_that_of_the_upright_one(model, tmp_path):
    rng = np.random.default_rng(1)
    upright = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    predict(model, [tmp_path / "upright.png", tmp_path / "turned.png"], tmp_path / "out", workers=0)
    masks = [np.array(Image.open(tmp_path / f"out/{name}.png")) for name in ("upright", "turned")]
    assert np.array_equal(*masks)
    assert len(np.unique(masks[0])) > 1


def test_a_large_photo(model, tmp_path):
    rng = np.random.default_rng(2)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((3000, 2000)).save(tmp_path / "large.jpg")
    made = predict(model, [tmp_path / "large.jpg"], tmp_path / "out", overlays=True, longest=256, workers=0)
    with Image.open(made.masks[0]) as mask, Image.open(tmp_path / "out/overlays/large.jpg") as picture:
        assert mask.size == (3000, 2000)
        assert picture.width == 256


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_do_not_stop_the_rest(model, tmp_path, capsys, workers):
    folder = tmp_path / "photos"
    (folder / "empty").mkdir(parents=True)
    good = Image.new("RGB", (40, 30), (200, 10, 10))
    for name in ("a.png", "c.png"):
        good.save(folder / name)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no photo, and nobody said it was")
    arguments = ["predict", str(model), str(folder), str(folder / "gone.jpg"), str(folder / "empty"),
                 "--out", str(tmp_path / "out"), "--workers", str(workers)]  # fmt: skip
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    bad = {str(folder / name) for name in ("b.png", "gone.jpg", "empty")}
    assert {line.split(":")[1].strip() for line in lines} == bad
    assert "2 masks in" in captured.out
    assert "3 left out" in captured.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "c.png", "failures.txt"]
    written = (tmp_path / "out/failures.txt").read_text().splitlines()
    assert [f"cacl: {line}" for line in written] == lines
    assert main(["predict", str(model), str(folder / "a.png"), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out/failures.txt").exists()  # of the call before


@pytest.mark.posix
def test_photos_are_never_written_over(model, tmp_path, capsys):
    photo = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (200, 10, 10)).save(photo)
    before = photo.read_bytes()
    assert main(["predict", str(model), str(photo), "--out", str(tmp_path)]) == 2
    assert "a.png: expected another folder `out`: this photo would be replaced" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path)
    assert main(["predict", str(model), str(photo), "--out", str(tmp_path / "link")]) == 2
    (tmp_path / "q/overlays").mkdir(parents=True)
    drawn = tmp_path / "q/overlays/a.jpg"
    Image.new("RGB", (40, 30), (200, 10, 10)).save(drawn)
    assert main(["predict", str(model), str(drawn), "--out", str(tmp_path / "q"), "--overlay"]) == 2
    assert "this photo would be replaced" in capsys.readouterr().err
    with Image.open(drawn) as file:
        assert file.size == (40, 30)
    assert photo.read_bytes() == before


@pytest.mark.posix
def test_masks_in_a_folder_of_photos_are_no_photos(model, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    for _ in range(2):
        made = predict(model, [tmp_path], tmp_path / "masks", overlays=True, workers=0)
        assert made.masks == [tmp_path / "masks/a.png"]
    with pytest.raises(ValueError, match="no photos here besides those in `out`"):
        predict(model, [tmp_path], tmp_path, workers=0)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(predict(model, [tmp_path, tmp_path / "a.jpg"], tmp_path / "masks", workers=0).masks) == 1


PICTURE = Image.new("RGB", (40, 30), (200, 10, 10))


def test_what_pillow_reads_is_a_photo_and_the_rest_is_said(model, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    kinds = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.JP2": "JPEG2000", "d.ppm": "PPM", "e.tga": "TGA", "f.apng": "PNG"}
    for name, kind in kinds.items():
        PICTURE.save(photos / name, kind)
    PICTURE.save(photos / "frame.0001", "JPEG")
    PICTURE.save(photos / "bare", "PNG")
    (photos / "phone.heic").write_bytes(b"....ftypheic")
    for name in ("labels.txt", "boxes.json", "boxes.xml", "table.csv", "film.mp4", "old.npy"):
        (photos / name).write_text("no photo")
    litter = (".DS_Store", "._a.jfif", "Thumbs.db", ".ipynb_checkpoints/a.jpg", "__MACOSX/a.jpg", ".thumbs/x/b.jpg")
    for name in (*litter, "@eaDir/a.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_text("litter")
    made = predict(model, [photos], tmp_path / "out", crf=False, workers=0)
    assert [path.name for path in made.masks] == [f"{letter}.png" for letter in "abcdef"]
    assert made.problems == [
        f"{photos / 'bare'}: left out: its ending is that of no format; rename it, or name the file itself",
        f"{photos / 'frame.0001'}: left out: its ending is that of no format; rename it, or name the file itself",
        f"{photos / 'phone.heic'}: left out: Pillow does not read .heic here; convert it",
    ]
    assert made.others == 6  # boxes.json, boxes.xml, film.mp4, labels.txt, old.npy, table.csv
    for name in ("frame.0001", "bare"):
        (photos / name).unlink()
    (photos / "phone.heic").unlink()
    assert main(["predict", str(model), str(photos), "--out", str(tmp_path / "out"), "--no-crf", "--workers=0"]) == 0
    assert "6 masks in" in (out := capsys.readouterr().out)
    assert out.endswith(", 0 left out; 6 other files, such as boxes.json\n")


def test_files_that_are_named_keep_what_is_no_ending(model, tmp_path):
    for name in ("frame.0001", "frame.0002", "frame"):
        PICTURE.save(tmp_path / name, "JPEG")
    made = predict(
        model,
        [tmp_path / name for name in ("frame.0001", "frame.0002", "frame")],
        tmp_path / "out",
        crf=False,
        workers=0,
    )
    assert [path.name for path in made.masks] == ["frame.0001.png", "frame.0002.png", "frame.png"]


@pytest.mark.posix
def test_linked_folders_are_gone_into_once(tmp_path):
    for name in ("photos/z", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("photos/z/a.jpg", "elsewhere/b.jpg", "elsewhere/deep/c.jpg"):
        PICTURE.save(tmp_path / name)
    photos = tmp_path / "photos"
    for link, target in {
        "linked": tmp_path / "elsewhere",
        "again": tmp_path / "elsewhere",
        "a": photos / "z",  # comes first by its name, and second as it is a link
        "loop": tmp_path,
        "z/loop": photos / "z",
        "gone": tmp_path / "nowhere",
    }.items():
        (photos / link).symlink_to(target)
    (photos / "self").symlink_to(photos / "self")
    found = find_photos(photos)
    assert [path.relative_to(photos).as_posix() for path in found.photos] == [
        "z/a.jpg",
        "again/b.jpg",
        "again/deep/c.jpg",
    ]
    assert found.problems == []


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    PICTURE.save(tmp_path / "a.jpg")
    scandir = os.scandir

    def closed(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", closed)
    found = find_photos(tmp_path)
    assert [path.name for path in found.photos] == ["a.jpg"]
    assert found.problems == [f"{tmp_path / 'closed'}: cannot be read (Permission denied)"]


def test_a_segmenter_knows_the_range_of_its_images(model, tmp_path):
    net = load_segmenter(model).net
    assert load_segmenter(model).range is None  # as of older versions
    assert len(load_segmenter(model)) == 2  # `net, classes = load_segmenter(…)`
    save_segmenter(tmp_path / "model.pt", net, CLASSES, "scenes", (0, 4095))
    assert load_segmenter(tmp_path / "model.pt").range == (0, 4095)
    grey = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "bytes.png")
    Image.fromarray(np.rint(grey * (4095 / 255)).astype(np.uint16)).save(tmp_path / "deep.png")
    photos = [tmp_path / "bytes.png", tmp_path / "deep.png"]
    made = predict(tmp_path / "model.pt", photos, tmp_path / "out", crf=False, workers=0)
    assert np.array_equal(*(np.array(Image.open(path)) for path in made.masks))
    assert len(predict(model, photos, tmp_path / "out", crf=False, workers=0).problems) == 1
    made = predict(model, photos, tmp_path / "out", crf=False, range=(0, 4095), workers=0)
    assert np.array_equal(*(np.array(Image.open(path)) for path in made.masks))
    torch.save({**torch.load(tmp_path / "model.pt"), "range": [1, 0]}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt: range: expected two numbers"):
        load_segmenter(tmp_path / "model.pt")


def test_photos_of_one_name(model, tmp_path):
    photos = tmp_path / "photos"
    for name in ("x/a.jpg", "x/a.png", "y/a.jpg"):
        (photos / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (40, 30)).save(photos / name)
    made = predict(model, [photos / "x"], tmp_path / "out", workers=0)
    assert sorted(path.name for path in made.masks) == ["a.jpg.png", "a.png.png"]
    made = predict(model, [photos], tmp_path / "out2", workers=0)
    assert {p.relative_to(tmp_path / "out2").as_posix() for p in made.masks} == {
        "x/a.jpg.png", "x/a.png.png", "y/a.png",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"x/a.jpg and .*y/a.jpg: expected photos of different names"):
        predict(model, [photos / "x/a.jpg", photos / "y/a.jpg"], tmp_path / "out3", workers=0)


def test_a_run_folder_brings_its_settings(model, tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "segment").mkdir(parents=True)
    (run / "segment/model.pt").write_bytes(model.read_bytes())
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    config = Config.load("voc", [f"data.root={tmp_path}", "predict.longest=77", "predict.iterations=4"])
    (run / "config.toml").write_text(config.to_toml() + "# a remark")
    for state in ('{"finished": false}', '{"finished": true}'):
        with pytest.raises(ValueError, match=r"run: expected a run folder whose stage `segment` has finished"):
            predict(run, [tmp_path / "a.png"], tmp_path / "out")
        (run / "segment/stage.json").write_text(state)
    seen = []

    def spy(net, photos, finish, settings, *, crf, tags, range, machine):
        seen.append((settings, crf))
        return iter(())

    monkeypatch.setattr("cacl.predict.segment_each", spy)
    predict(run, [tmp_path / "a.png"], tmp_path / "out")
    predict(run, [tmp_path / "a.png"], tmp_path / "out", crf=False, longest=99)
    predict(model, [tmp_path / "a.png"], tmp_path / "out")
    assert [settings.longest for settings, _ in seen] == [77, 99, 1024]
    assert [crf and settings.iterations for settings, crf in seen] == [4, False, 10]
    assert seen[0][0].bilateral == (67.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt", "PHOTO"], "nowhere.pt: no such file"),
        (["PHOTO", "PHOTO"], "a.png: not a checkpoint (nothing in it was run)"),
        (["MODEL", "nowhere.jpg"], "nowhere.jpg: no such file or folder"),
        (["MODEL", "PHOTO", "--device", "tpu"], "device: expected a device of this machine, but got 'tpu'"),
        (["MODEL", "PHOTO", "--longest", "0"], "Expected argument `longest` to be an integer of at least 1"),
        (["MODEL", "PHOTO", "--workers", "-1"], "Expected argument `workers` to be an integer of at least 0"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, capsys, arguments, message):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    names = {"MODEL": str(model), "PHOTO": str(tmp_path / "a.png")}
    assert main(["predict", *(names.get(a, a) for a in arguments), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_legend_names_what_is_there():
    photo = np.full((40, 300, 3), 100, dtype=np.uint8)
    mask = np.zeros((40, 300), dtype=np.uint8)
    mask[:, 100:200] = 3
    picture = np.array(legend(overlay(photo, mask), mask, CLASSES))
    assert picture.shape == (60, 300, 3)
    strip = picture[40:].reshape(-1, 3)
    assert (strip == palette()[3]).all(1).any()
    assert not (strip == palette()[1]).all(1).any()
    mask[:, :50], mask[:, 50:80] = 1, 2
    many = legend(overlay(photo[:, :240], mask[:, :240]), mask[:, :240], CLASSES)
    assert many.height == 80  # goes on in another line
