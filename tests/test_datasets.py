"""Data sets: every kind of photo opens, and every problem is a line with the file's path."""

import pickle
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from drawn import write_csv, write_voc
from PIL import Image

from cacl.datasets import VOC, CSVDataset, check, check_folder, open_dataset
from cacl.images import read_image, read_mask


def gradient(mode):
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    image = Image.fromarray(np.stack([ramp, ramp, ramp], -1))
    return image.convert("L").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_the_same_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    gradient(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 30, 40)
    assert image.dtype == torch.uint8
    difference = image.float() - torch.from_numpy(np.array(gradient("RGB"))).permute(2, 0, 1)
    assert difference.abs().max() <= 3


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    gradient("RGB").save(tmp_path / "x.jpg", exif=exif, quality=100)
    assert read_image(tmp_path / "x.jpg").shape == (3, 40, 30)


def test_bad_photos_are_one_line(tmp_path):
    gradient("RGB").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:90])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "pickle.png").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "number.ppm").write_bytes(b"P6 16\xbd 16 255\n")  # Pillow raises a ValueError
    for name in ("cut.png", "text.jpg", "pickle.png", "number.ppm"):
        with pytest.raises(ValueError, match=rf"{name}: not an image that decodes") as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=rf"{name}: (not a mask that decodes|expected a palette or grey mask)"):
            read_mask(tmp_path / name)
    with pytest.raises(ValueError, match=r"none.png: no such file"):
        read_image(tmp_path / "none.png")


def test_palette_mask_keeps_its_values(tmp_path):
    mask = Image.new("P", (2, 2))
    values = np.array([[0, 1], [2, 255]], np.uint8)
    mask.putdata(values.ravel().tolist())
    mask.putpalette([*range(256)] * 3)
    mask.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == values.tolist()
    Image.new("RGB", (4, 4), (128, 0, 0)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"rgb.png: expected a palette or grey mask, but got mode RGB"):
        read_mask(tmp_path / "rgb.png")


def test_csv(tmp_path):
    data = CSVDataset(write_csv(tmp_path), "train")
    assert data.classes == ("boat", "train")
    assert len(data) == 6
    assert len(CSVDataset(tmp_path)) == 9
    sample = data[2]
    assert sample.id == "2"
    assert sample.image.shape == (3, 48, 64)
    assert sample.labels.tolist() == [1, 1]
    assert set(np.unique(sample.mask)) == {0, 1, 2}


def test_csv_without_mask_and_with_blanks(tmp_path):
    write_csv(tmp_path)
    (tmp_path / "classes.txt").write_text("\ufeffboat \n train\n\n")
    (tmp_path / "dataset.csv").write_text(
        'image,labels,mask,split\r\nimages/0.png, boat ; train ,,train\r\n\r\n"images/1.png",,,train\r\n'
    )
    data = CSVDataset(tmp_path, "train")
    assert [data[i].labels.tolist() for i in range(2)] == [[1, 1], [0, 0]]
    assert data[0].mask is None
    with pytest.raises(ValueError, match=r"0.png: the image has no mask"):
        data.mask(0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("images/0.png,boot,,train", r"dataset.csv: line 2: unknown label 'boot'; did you mean \"boat\"\?"),
        ("images/0.png,boat,train", r"dataset.csv: line 2: expected 4 columns, but got 3"),
        ("images/none.png,boat,,train", r"none.png: no such file"),
        (",boat,,train", r"dataset.csv: line 2: expected an image, but it is empty"),
        (".,boat,,train", r"dataset.csv: line 2: expected an image, but it is empty"),
        ("a" * 300 + ".png,boat,,train", r"a.png: no such file"),
        ('"' + "images/0.png,boat,,train\n" * 9999, r"dataset.csv: line \d+: expected a row of a CSV file, but"),
        ("../0.png,boat,,train", r"line 2: expected a path inside the folder, but got '../0.png'"),
        ("/etc/passwd,boat,,train", r"line 2: expected a path inside the folder, but got '/etc/passwd'"),
        ("images/0.png,boat,,train\nimages/0.png,boat,,train", r"dataset.csv: duplicate id images/0"),
        ("images/0.png,boat,,test", r"dataset.csv: expected rows of split 'train', but there is test"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    write_csv(tmp_path)
    (tmp_path / "dataset.csv").write_text("image,labels,mask,split\n" + row)
    with pytest.raises(ValueError, match=message):
        CSVDataset(tmp_path, "train")


def test_bad_csv_files(tmp_path):
    with pytest.raises(ValueError, match=r"classes.txt: no such file"):
        CSVDataset(tmp_path)
    write_csv(tmp_path)
    (tmp_path / "dataset.csv").write_text("picture,labels,mask,split\n")
    with pytest.raises(ValueError, match="expected the header image,labels,mask,split, but got 'picture,labels"):
        CSVDataset(tmp_path)
    (tmp_path / "dataset.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"dataset.csv: expected a text file in UTF-8"):
        CSVDataset(tmp_path)
    (tmp_path / "classes.txt").write_text("boat\nboat\n")
    write_csv(tmp_path / "b")
    (tmp_path / "b" / "classes.txt").write_text("boat\ntrain\nboat\n")
    with pytest.raises(ValueError, match=r"classes.txt: duplicate class 'boat'"):
        CSVDataset(tmp_path / "b")


def test_voc(tmp_path):
    write_voc(tmp_path)
    data = VOC(tmp_path, "train")
    assert len(data) == 4
    sample = data[2]
    assert sample.id == "2007_000002"
    assert [data.classes[k] for k in sample.labels.nonzero()[:, 0]] == ["boat", "train"]
    assert set(np.unique(sample.mask)) == {0, 4, 19}
    assert [entry.id for entry in VOC(tmp_path, "train_aug").entries] == [entry.id for entry in data.entries]
    assert open_dataset("voc", tmp_path, "val")[0].id == "2007_000004"


def test_bad_voc(tmp_path):
    write_voc(tmp_path)
    with pytest.raises(ValueError, match=r"expected split 'trian' as trian.txt, but there is train, val"):
        VOC(tmp_path, "trian")
    (tmp_path / "Annotations/2007_000000.xml").write_text("<annotation><object><name>ship</name></object></annotation>")
    (tmp_path / "Annotations/2007_000001.xml").write_text("<annot")
    (tmp_path / "JPEGImages/2007_000002.jpg").unlink()
    with pytest.raises(ValueError, match="unknown class 'ship'") as error:
        VOC(tmp_path, "train")
    lines = str(error.value).splitlines()
    (tmp_path / "Annotations/2007_000003.xml").write_text('<?xml version="1.0" encoding="none"?><annotation/>')
    with pytest.raises(ValueError, match=r"2007_000003.xml: not an annotation that parses \(unknown encoding"):
        VOC(tmp_path, "train")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train.txt: expected an id a line, but it is empty"):
        VOC(tmp_path, "train")
    assert len(lines) == 3
    assert "2007_000001.xml: not an annotation that parses" in lines[1]
    assert lines[2].endswith("2007_000002.jpg: no such file")


def test_check_lists_every_problem(tmp_path):
    write_csv(tmp_path)
    assert check_folder(tmp_path) == []
    (tmp_path / "images/0.png").write_text("no image")
    Image.new("L", (10, 10)).save(tmp_path / "masks/1.png")
    Image.new("L", (64, 48), 7).save(tmp_path / "masks/2.png")
    (tmp_path / "masks/3.png").unlink()
    problems = check_folder(tmp_path)
    assert len(problems) == 4
    for part in (
        "masks/3.png: no such file",
        "images/0.png: not an image that decodes",
        "masks/1.png: expected 64×48 pixels as the image, but got 10×10",
        "masks/2.png: expected values 0 to 2 or 255, but got 7",
    ):
        assert any(part in problem for problem in problems), part


def test_check_of_voc_and_of_nothing(tmp_path):
    assert check_folder(write_voc(tmp_path / "voc")) == []
    (tmp_path / "voc/JPEGImages/2007_000005.jpg").write_text("broken")
    assert check_folder(tmp_path / "voc", splits=["train_aug"]) == []
    assert len(check_folder(tmp_path / "voc", splits=["train_aug", "val"])) == 1
    (tmp_path / "voc/SegmentationClassAug/2007_000000.png").write_text("broken")
    assert len(check_folder(tmp_path / "voc")) == 2
    write_csv(tmp_path / "voc")
    assert check_folder(tmp_path / "voc") == []
    assert len(check_folder(tmp_path / "voc", format="voc")) == 2
    (tmp_path / "none/ImageSets/Segmentation").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Segmentation: expected a list of ids for each split"):
        check_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="no data set here"):
        check_folder(tmp_path)


def test_training_check_opens_no_mask(tmp_path):
    data = CSVDataset(write_csv(tmp_path), "train")
    for path in (tmp_path / "masks").iterdir():
        path.write_text("no mask")
    assert check(data, masks=False) == []
    assert len(check(data)) == 6


def test_fingerprint_follows_the_data(tmp_path):
    write_csv(tmp_path)
    first = CSVDataset(tmp_path, "train").fingerprint()
    assert CSVDataset(tmp_path, "train").fingerprint() == first
    (tmp_path / "images/0.png").write_bytes((tmp_path / "images/1.png").read_bytes())
    assert CSVDataset(tmp_path, "train").fingerprint() != first


def test_a_table_of_any_size_takes_little_memory(tmp_path, monkeypatch):
    write_csv(tmp_path)
    rows = (f"images/{i:012}.png,boat;train,masks/{i:012}.png,{'val' if i % 8 else 'train'}" for i in range(4000))
    (tmp_path / "dataset.csv").write_text("\n".join(["image,labels,mask,split", *rows]))
    monkeypatch.setattr("cacl.datasets.files._state", lambda path: (0, 0))
    monkeypatch.setattr(sys, "intern", lambda name: name)  # pathlib's table of names grows by megabytes at any time
    for split, count, most in (("train", 500, 1e6), ("val", 3500, 2e6)):
        tracemalloc.start()
        data = CSVDataset(tmp_path, split)
        used, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(data) == count
        assert data.entries[-1].image == tmp_path / f"images/{int(data.entries[-1].id):012}.png"
        assert used < 120 * count + 100_000
        assert peak < most


def test_other_masks(tmp_path):
    """What a subclass reads in its own way stays so, but for the masks."""

    class Bright(CSVDataset):
        def image(self, index):
            return super().image(index) + 1

        def labels(self, index):
            return 1 - super().labels(index)

        def mask(self, index):
            raise AssertionError

    data = Bright(write_csv(tmp_path), "train")
    (tmp_path / "made").mkdir()
    Image.new("L", (64, 48), 7).save(tmp_path / "made/2.png")
    other = data.with_masks(tmp_path / "made")
    assert other.image(2).equal(read_image(tmp_path / "images/2.png") + 1)
    assert other[2].labels.tolist() == [0, 0]
    assert other[2].mask.unique().tolist() == [7]
    assert other.entries[-1] == data.entries[5]._replace(mask=tmp_path / "made/5.png")
    assert [entry.mask.name for entry in other.entries[1:3]] == ["1.png", "2.png"]
    assert len(other) == len(other.masked) == 6
    data.entries = tuple(entry._replace(mask=None) for entry in data.entries)
    assert data.masked == []
    assert data.with_masks(tmp_path / "made").entries[2].mask == tmp_path / "made/2.png"


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="Expected argument `format` to be one of csv, voc, coco, scenes, but got"):
        open_dataset("cocoa", tmp_path, "train")


def test_what_systems_leave_in_vocs_folders_is_no_data(tmp_path):
    root = write_voc(tmp_path / "voc")
    for name in ("ImageSets/Segmentation/._train.txt", "SegmentationClassAug/._2007_000001.png"):
        (root / name).write_bytes(b"\0\5\x16\7")
    assert check_folder(root) == []
    assert [entry.id for entry in VOC(root, "train_aug").entries] == [f"2007_{i:06}" for i in range(4)]
