"""The archive for VOC's server: read with other tools, and nothing wrong gets into one."""

import gzip
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from cacl import voc_archive
from cacl.artifacts import save_mask
from cacl.voc_archive import export_voc

IDS = ["2008_000006", "2008_000011", "2008_000012"]
SIZES = {"2008_000006": (50, 37), "2008_000011": (33, 50), "2008_000012": (50, 50)}  # width, height
VOC_COLOURS = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}


def values(id):
    width, height = SIZES[id]
    return (np.arange(width * height).reshape(height, width) % 21).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """VOC's test split has photos and a list, and nothing else; its ids stand in no order here."""
    (tmp_path / "VOC2012/JPEGImages").mkdir(parents=True)
    (tmp_path / "VOC2012/ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "VOC2012/ImageSets/Segmentation/test.txt").write_text("\n".join(reversed(IDS)) + "\n")
    for id, size in SIZES.items():
        Image.new("RGB", size, (90, 120, 60)).save(tmp_path / f"VOC2012/JPEGImages/{id}.jpg")
        save_mask(tmp_path / f"masks/{id}.png", values(id))
    return tmp_path


def export(folder, **options):
    return export_voc(folder / "masks", folder / "VOC2012", folder / "results.tgz", **options)


def refused(folder, **options):
    """The lines of the error; an archive that was there is there as it was, and nothing beside it."""
    (folder / "results.tgz").write_bytes(b"the archive of yesterday")
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=r".") as error:
        export(folder, **options)
    assert (folder / "results.tgz").read_bytes() == b"the archive of yesterday"
    assert sorted(folder.iterdir()) == before
    return str(error.value).replace(f"{folder}/", "").splitlines()


def voc_colour(value):  # as VOCdevkit's VOClabelcolormap.m does it
    colour = [0, 0, 0]
    for j in range(8):
        for channel in range(3):
            colour[channel] |= (value >> channel & 1) << (7 - j)
        value >>= 3
    return colour


def save(folder, id, *, mode="P", shape=None, value=0, palette=None, **options):
    width, height = shape or SIZES[id]
    image = Image.fromarray(np.full((height, width), value, np.uint8))
    if mode == "P":
        image.putpalette(palette or [c for v in range(256) for c in voc_colour(v)])
    image.convert(mode).save(folder / f"masks/{id}.png", **options)


@pytest.mark.parametrize("competition", ["comp5", "comp6"])
def test_the_archive_holds_the_masks_and_nothing_else(folder, competition):
    (folder / "masks/notes.txt").write_text("other files are left out")
    (folder / "masks/overlays").mkdir()
    (folder / "masks/overlays/2008_000006.png").write_bytes(b"")
    assert export(folder, competition=competition) == folder / "results.tgz"
    with tarfile.open(folder / "results.tgz", "r:gz") as tar:
        names = [f"results/VOC2012/Segmentation/{competition}_test_cls/{id}.png" for id in IDS]
        assert tar.getnames() == names
        for id, name in zip(IDS, names, strict=True):
            assert tar.getmember(name).isfile()
            assert tar.getmember(name).mode == 0o644
            image = Image.open(io.BytesIO(tar.extractfile(name).read()))
            assert (image.format, image.mode, image.size) == ("PNG", "P", SIZES[id])
            assert np.array_equal(np.array(image), values(id))
            for value, colour in VOC_COLOURS.items():
                assert tuple(image.getpalette()[3 * value : 3 * value + 3]) == colour
    assert not (folder / "results.tgz.tmp").exists()


def test_the_split_stands_in_the_folders_name(folder):
    (folder / "VOC2012/ImageSets/Segmentation/val.txt").write_text(IDS[1])
    for id in (IDS[0], IDS[2]):
        (folder / f"masks/{id}.png").unlink()
    out = export_voc(folder / "masks", folder / "VOC2012", folder / "new/val.tar.gz", split="val")
    with tarfile.open(out) as tar:
        assert tar.getnames() == [f"results/VOC2012/Segmentation/comp6_val_cls/{IDS[1]}.png"]


def test_the_same_masks_give_the_same_bytes(folder):
    first = export(folder).read_bytes()
    for number, path in enumerate(sorted((folder / "masks").iterdir(), reverse=True)):
        shutil.copyfile(path, folder / "copy.png")
        path.unlink()
        shutil.move(folder / "copy.png", path)
        os.utime(path, (number, number))
        path.chmod(0o600)
    (folder / "VOC2012/ImageSets/Segmentation/test.txt").write_text("\n".join(IDS))
    again = export_voc(folder / "masks", folder / "VOC2012", folder / "other.tar.gz")
    assert again.read_bytes() == first
    assert first[4:8] == bytes(4)  # gzip's time
    assert not first[3]  # gzip's flags: no file name
    with tarfile.open(again) as tar:
        assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in tar} == {(0, 0, "", "", 315532800)}
    save(folder, IDS[0], value=7)
    assert export(folder).read_bytes() != first


def test_an_archive_is_replaced_when_all_is_right(folder):
    (folder / "results.tgz").write_bytes(b"the archive of yesterday")
    assert gzip.decompress(export(folder).read_bytes())


WRONG = {
    "grey": (
        {"mode": "L"},
        "a palette PNG of 8 bits, but got mode L, depth 8; write masks as cacl.artifacts.save_mask does",
    ),
    "colour": ({"mode": "RGB"}, "a palette PNG of 8 bits, but got mode RGB, depth 8; write masks as cacl.artifacts"),
    "4 bits": (
        {"bits": 4},
        "a palette PNG of 8 bits, but got mode P, depth 4; write masks as cacl.artifacts.save_mask",
    ),
    "size": ({"shape": (37, 50)}, "50×37 pixels as the photo, but got 37×50"),
    "row": ({"shape": (50, 38)}, "50×37 pixels as the photo, but got 50×38"),
    "value": ({"value": 21}, "values 0 to 20, but got 21"),
    "void": ({"value": 255}, "values 0 to 20, but got 255, and the server takes no void"),
    "palette": ({"palette": [*range(256)] * 3}, "the palette of VOC's masks, but got other colours; write masks as"),
    "short palette": (
        {"palette": [c for v in range(20) for c in voc_colour(v)]},
        "the palette of VOC's masks, but got other colours; write masks as",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_mask_is_refused(folder, case):
    how, message = WRONG[case]
    save(folder, IDS[0], **how)
    lines = refused(folder)
    assert len(lines) == 1
    assert lines[0].startswith(f"masks/{IDS[0]}.png: expected {message}")


@pytest.mark.parametrize("value", [0, 20])
def test_the_first_and_the_last_value_are_right(folder, value):
    save(folder, IDS[0], value=value)
    assert export(folder).is_file()


def test_colours_of_values_that_no_mask_has_are_free(folder):
    save(folder, IDS[0], palette=[c for value in range(21) for c in voc_colour(value)])
    assert export(folder).is_file()


def test_files_that_do_not_decode(folder):
    whole = (folder / f"masks/{IDS[0]}.png").read_bytes()
    (folder / f"masks/{IDS[0]}.png").write_bytes(whole[:-100])
    Image.fromarray(values(IDS[1])).save(folder / f"masks/{IDS[1]}.png", "GIF")
    (folder / f"VOC2012/JPEGImages/{IDS[2]}.jpg").write_text("no photo")
    first, second, third = refused(folder)
    assert first == f"masks/{IDS[0]}.png: not a PNG that decodes"
    assert second == f"masks/{IDS[1]}.png: not a PNG that decodes"
    assert third.startswith(f"VOC2012/JPEGImages/{IDS[2]}.jpg: not an image that decodes (")


def test_missing_and_surplus_files(folder):
    (folder / f"masks/{IDS[0]}.png").rename(folder / "masks/2008_000007.png")
    (folder / f"masks/{IDS[1]}.png").rename(folder / f"masks/{IDS[1]}.PNG")
    (folder / f"VOC2012/JPEGImages/{IDS[2]}.jpg").unlink()
    assert refused(folder) == [
        f"masks/{IDS[0]}.png: no such file",
        f"masks/{IDS[1]}.png: no such file",
        f"VOC2012/JPEGImages/{IDS[2]}.jpg: no such file",
        "masks/2008_000007.png: expected only masks of the split test, but 2008_000007 is not in it",
        f"masks/{IDS[1]}.PNG: expected only masks of the split test, but {IDS[1]} is not in it",
    ]


def test_every_problem_of_a_mask_is_a_line(folder):
    save(folder, IDS[1], value=200, shape=(5, 4), palette=[0, 0, 1] * 256)
    save(folder, IDS[2], mode="L", shape=(5, 4))
    lines = refused(folder)
    assert [line.split(":")[0] for line in lines] == [f"masks/{IDS[1]}.png"] * 3 + [f"masks/{IDS[2]}.png"] * 2


def test_many_problems_are_cut(folder):
    for number in range(30):
        shutil.copy(folder / f"masks/{IDS[0]}.png", folder / f"masks/other_{number:02}.png")
    lines = refused(folder)
    assert len(lines) == 21
    assert lines[19].startswith("masks/other_19.png: ")
    assert lines[20] == "… and 10 more"
    for number in range(20, 30):
        (folder / f"masks/other_{number}.png").unlink()
    assert len(refused(folder)) == 20


def test_a_turned_photo_has_its_upright_size(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 37)).save(folder / f"VOC2012/JPEGImages/{IDS[0]}.jpg", exif=exif)
    assert refused(folder) == [f"masks/{IDS[0]}.png: expected 37×50 pixels as the photo, but got 50×37"]
    save(folder, IDS[0], shape=(37, 50))
    assert export(folder).is_file()
    exif[0x0112] = 3
    Image.new("RGB", (37, 50)).save(folder / f"VOC2012/JPEGImages/{IDS[0]}.jpg", exif=exif)
    assert export(folder).is_file()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n", "test.txt: expected an id a line, but it is empty"),
        ("\n".join([*IDS, IDS[1]]), f"test.txt: duplicate id {IDS[1]}"),
        ("\n".join([*IDS, "../x"]), "test.txt: expected an id a line, but got '../x'"),
        (b"\xff\xfe\x00", "test.txt: expected a text file in UTF-8, but 'utf-8' codec can't decode"),
    ],
)
def test_bad_lists(folder, text, line):
    path = folder / "VOC2012/ImageSets/Segmentation/test.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (got,) = refused(folder)
    assert got.startswith(f"VOC2012/ImageSets/Segmentation/{line}")


def test_bad_arguments(folder):
    assert refused(folder, split="tset") == [
        "VOC2012/ImageSets/Segmentation: expected split 'tset' as tset.txt, but there is test"
    ]
    assert "`competition` to be one of" in refused(folder, competition="comp7")[0]
    with pytest.raises(ValueError, match=r"`out` to be a path that ends in .tgz or .tar.gz, but got '.*results.zip'"):
        export_voc(folder / "masks", folder / "VOC2012", folder / "results.zip")
    assert not (folder / "results.zip").exists()
    with pytest.raises(ValueError, match=r"VOC/ImageSets/Segmentation: expected split .* but there is no such folder"):
        export_voc(folder / "masks", folder / "VOC", folder / "results.tgz")
    shutil.rmtree(folder / "masks")
    assert refused(folder) == ["masks: no such folder"]


def test_a_mask_that_changes_after_the_check_is_not_packed(folder, monkeypatch):
    write = voc_archive._write

    def late(*arguments):
        save(folder, IDS[1], value=255)
        write(*arguments)

    monkeypatch.setattr(voc_archive, "_write", late)
    assert refused(folder) == [f"masks/{IDS[1]}.png: expected the mask that was checked, but it has changed since"]
