"""Labels for other tools: each format is read back by its own library, pixel by pixel, and nothing else is touched."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import tracemalloc
import zipfile
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from cacl import cli, scenes
from cacl.artifacts import ImageCAMs, save_cams, save_mask
from cacl.config import Config
from cacl.datasets import COCO, open_dataset
from cacl.datasets.rle import columns_of, compressed, lengths_of, uncompressed
from cacl.errors import InputError
from cacl.label_formats import FORMATS, Drawing
from cacl.label_sources import read_classes
from cacl.labels import export_labels
from cacl.outlines import INSIDE, outlines, regions_of
from cacl.runs.folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

CLASSES = ("Straßenbahn", 'say "hi", no: #1', "a&b <c>'s", "plain \\ {x}")


def blobs(seed, size, classes=4):
    """Regions with holes, islands in them and specks that touch at corners."""
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.random(size), 2) for _ in range(classes)])
    mask = np.where(fields.max(0) > 0.55, fields.argmax(0) + 1, 0)
    specks = rng.random(size) < 0.05
    return np.where(specks, rng.integers(0, classes + 1, size), mask).astype(np.uint8)


def hard_masks():
    """Name of a photo -> its mask."""
    ring = np.zeros((40, 50), np.uint8)
    ring[5:35, 5:45] = 1
    ring[10:30, 10:40] = 0
    ring[15:25, 15:35] = 1
    ring[18:22, 20:30] = 2
    ring[6, 6] = ring[7, 7] = 0  # two holes that touch at a corner
    dots = np.zeros((9, 7), np.uint8)
    dots[0, 0] = dots[0, -1] = dots[-1, 0] = dots[-1, -1] = 3
    dots[4, 3] = 255
    part = blobs(3, (40, 50))
    part[:, 30:40] = 255
    return {
        "blobs.jpg": blobs(0, (40, 50)),
        "sub/ring.png": ring,
        'sub/ü "q", it\'s & a.jpg': blobs(1, (31, 64)),
        "empty.jpg": np.zeros((20, 30), np.uint8),
        "open.jpg": np.full((20, 30), 255, np.uint8),
        "part.jpg": part,
        "dots.png": dots,
        "one.png": np.ones((1, 1), np.uint8),
        "line.png": np.array([[2, 2, 2, 2, 0]], np.uint8),
        "images/a/images/b.jpg": blobs(4, (24, 24)),
        "frame.0001.jpg": blobs(5, (24, 24)),
        "turned.JPG": blobs(6, (30, 20)),
        "twin.jpg": blobs(7, (16, 16)),
        "twin.png": blobs(8, (16, 17)),
    }


def write(root, masks):
    """A folder of photos, and one of masks called as `cacl predict` does."""
    shared = {name.rpartition(".")[0] for name in masks}
    shared = {stem for stem in shared if sum(name.rpartition(".")[0] == stem for name in masks) > 1}
    for i, (name, mask) in enumerate(masks.items()):
        pixels = np.random.default_rng(i).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        photo, turned = Image.fromarray(pixels), Image.Exif()
        if name.startswith("turned"):
            photo = photo.transpose(Image.Transpose.ROTATE_90)
            turned[0x0112] = 6
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(root / "photos" / name, exif=turned)
        save_mask(root / "masks" / f"{id_of(name, shared)}.png", mask)
    return root


def id_of(name, shared=("twin",)):
    stem = name.rpartition(".")[0]
    return name if stem in shared else stem


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write(tmp_path_factory.mktemp("labels"), hard_masks())
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    return root


def exported(folder, out, format, **options):
    options = {"photos": folder / "photos", "classes": CLASSES, "workers": 0, "progress": False, **options}
    return export_labels(folder / "masks", out, format, **options)


def files():
    """Name in the new folder -> mask."""
    return {f"{id_of(name)}.{name.rpartition('.')[2]}": mask for name, mask in hard_masks().items()}


def same(got, wanted):
    np.testing.assert_array_equal(got, wanted)


# Outlines


def regions(count):
    rng = np.random.default_rng(0)
    for i in range(count):
        size = tuple(rng.integers(1, 40, 2))
        smooth = ndimage.gaussian_filter(rng.random(size), 2)
        thick = ndimage.binary_dilation(rng.random(size) < 0.1, iterations=2)
        yield (rng.random(size) < rng.random(), smooth > np.median(smooth), thick)[i % 3]


def drawn_by_pillow(polygons, shape, value=1):
    image = Image.new("L", shape[::-1])
    for points in polygons:
        ImageDraw.Draw(image).polygon([tuple(point) for point in points.tolist()], fill=value, outline=value)
    return np.asarray(image)


def area(points):
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - np.roll(x, -1) @ y)) / 2


def test_outlines_are_the_pixels_whoever_draws_them():
    cv2, api = pytest.importorskip("cv2"), pytest.importorskip("pycocotools.mask")
    for region in regions(300):
        edges, inside = outlines(region), outlines(region, inset=INSIDE)
        if edges:
            code = api.merge(api.frPyObjects([points.ravel().tolist() for points in edges], *region.shape))
            same(api.decode(code).astype(bool), region)
        for rounded in (np.floor, np.round):
            canvas = np.zeros(region.shape, np.uint8)
            for points in inside:
                cv2.fillPoly(canvas, [rounded(points).astype(np.int32)], 1)
            same(canvas.astype(bool), region)


def test_outlines_have_the_area_of_their_pixels_and_are_few():
    for region in regions(150):
        polygons, inside = outlines(region), outlines(region, inset=INSIDE)
        assert sum(map(area, polygons)) == pytest.approx(region.sum())
        assert len(polygons) == len(inside) == ndimage.label(region, np.ones((3, 3)))[1]
        same(drawn_by_pillow(inside, region.shape).astype(bool), region)
        for points in polygons:
            assert (points != np.roll(points, 1, 0)).any(1).all()
            assert (points.min(0) >= 0).all()
            assert (points.max(0) <= region.shape[::-1]).all()


def test_a_square_with_a_hole_by_hand():
    region = np.ones((3, 3), bool)
    region[1, 1] = False
    (points,) = outlines(region)
    way = [tuple(map(int, point)) for point in points]
    steps = {tuple(sorted(pair)) for pair in pairwise([*way, way[0]])}
    cut = ((0, 1), (1, 1))
    inner = {((1, 1), (2, 1)), ((2, 1), (2, 2)), ((1, 2), (2, 2)), ((1, 1), (1, 2))}
    assert steps - inner - {cut} == {
        ((0, 0), (3, 0)),
        ((3, 0), (3, 3)),
        ((0, 3), (3, 3)),
        ((0, 1), (0, 3)),
        ((0, 0), (0, 1)),
    }
    assert inner | {cut} <= steps
    assert sum(tuple(sorted(pair)) == cut for pair in pairwise([*way, way[0]])) == 2


def test_fewer_points_stay_near():
    rng = np.random.default_rng(1)
    field = ndimage.gaussian_filter(rng.random((300, 400)), 8)
    region = field > np.median(field)
    exact, near = outlines(region), outlines(region, tolerance=1)
    assert sum(map(len, near)) < 0.3 * sum(map(len, exact))
    drawn = drawn_by_pillow(outlines(region, tolerance=1, inset=INSIDE), region.shape)
    got = np.zeros(region.shape, bool)
    for points in near:
        filled(got, points, True)
    assert (got & region).sum() / (got | region).sum() > 0.97
    assert (drawn & region).sum() / (drawn | region).sum() > 0.96
    away = sum(ndimage.distance_transform_edt(np.pad(side, 1))[1:-1, 1:-1] for side in (region, ~region))
    assert away[got != region].max() < 1.5  # between the middles of pixels: a half less to the edge
    for region in (np.ones((1, 1), bool), np.ones((1, 30), bool), np.eye(9, dtype=bool)):
        (points,) = outlines(region, tolerance=5)
        assert area(points) == pytest.approx(region.sum(), rel=0.05)


def test_a_chain_of_thousands_of_holes_is_one_polygon():
    region = np.ones((3, 6001), bool)
    region[1, 1::2] = False
    (points,) = outlines(region, inset=INSIDE)
    same(drawn_by_pillow([points], region.shape).astype(bool), region)


def test_regions_are_parts_or_classes_and_small_ones_go():
    mask = np.array([[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 0, 255], [1, 0, 255, 0]], np.uint8)
    assert [(r.value, r.left, r.top, r.pixels.sum()) for r in regions_of(mask)] == [
        (1, 0, 0, 2), (1, 0, 3, 1), (2, 3, 0, 2), (255, 2, 2, 2)
    ]  # fmt: skip
    assert [(r.value, r.pixels.shape) for r in regions_of(mask, parts=False)] == [
        (1, (4, 2)),
        (2, (2, 1)),
        (255, (2, 2)),
    ]
    assert [(r.value, r.pixels.sum()) for r in regions_of(mask, parts=False, min_area=2)] == [(1, 2), (2, 2), (255, 2)]
    assert [r.value for r in regions_of(mask, min_area=3)] == [255]
    assert not list(regions_of(np.zeros((3, 3), np.uint8)))


def test_run_lengths_are_those_of_pycocotools():
    api = pytest.importorskip("pycocotools.mask")
    for region in regions(100):
        own = columns_of(region, 0, 0, region.shape[::-1])
        assert sum(own) == region.size
        code = api.encode(np.asfortranarray(region.astype(np.uint8)))["counts"].decode()
        assert compressed(own) == code
        assert uncompressed(compressed(own)) == own
    placed = np.zeros((9, 8), bool)
    placed[3:5, 2:6] = [[1, 0, 0, 1], [1, 1, 0, 1]]
    assert columns_of(placed[3:5, 2:6], 2, 3, (8, 9)) == lengths_of(placed.T)


# COCO


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("options", [{"shape": "rle"}, {"tolerance": 0}])
def test_coco_is_pixel_for_pixel_what_pycocotools_reads(folder, tmp_path, options, parts):
    api = pytest.importorskip("pycocotools.coco")
    made = exported(folder, tmp_path / "out", "coco", parts=parts, **options)
    read = api.COCO(tmp_path / "out/annotations/instances_train.json")
    assert [read.cats[i]["name"] for i in sorted(read.cats)] == list(CLASSES)
    wanted = files()
    assert {image["file_name"] for image in read.dataset["images"]} == set(wanted)
    assert made.photos == len(wanted)
    assert made.labels == len(read.anns)
    for image in read.dataset["images"]:
        mask = wanted[image["file_name"]]
        assert (image["height"], image["width"]) == mask.shape
        assert (tmp_path / "out/train" / image["file_name"]).is_file()
        got = np.zeros_like(mask)
        for annotation in read.imgToAnns[image["id"]]:
            own = read.annToMask(annotation).astype(bool)
            assert own.sum() == annotation["area"]
            rows, columns = np.nonzero(own)
            left, top = columns.min(), rows.min()
            assert annotation["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
            got[own] = 255 if annotation["iscrowd"] else annotation["category_id"]
        same(got, mask)
    plain = [a for a in read.anns.values() if not a["iscrowd"]]
    if not parts:
        pairs = [(a["image_id"], a["category_id"]) for a in plain]
        assert len(pairs) == len(set(pairs))


def test_coco_comes_home(folder, tmp_path):
    """Our own reader: `[data] format = "coco"`."""
    exported(folder, tmp_path / "out", "coco", shape="rle")
    home = COCO(tmp_path / "out", "train")
    assert home.classes == CLASSES
    wanted = {id_of(name): mask for name, mask in hard_masks().items()}
    ids = {entry.id: i for i, entry in enumerate(home.entries)}
    assert len(ids) == len(wanted)
    for name, mask in wanted.items():
        index = ids[name if name in ids else name.rpartition(".")[0]]
        same(home.mask(index).numpy(), mask)
        assert home.image(index).shape[1:] == mask.shape
        assert (np.flatnonzero(home.labels(index)) + 1).tolist() == sorted(set(np.unique(mask)) - {0, 255})


def test_supervision_reads_coco(folder, tmp_path):
    supervision = pytest.importorskip("supervision")
    exported(folder, tmp_path / "out", "coco", shape="rle", copy=True)  # it refuses links that lead elsewhere
    path = tmp_path / "out/annotations/instances_train.json"
    data = supervision.DetectionDataset.from_coco(str(tmp_path / "out/train"), str(path), force_masks=True)
    assert data.classes == list(CLASSES)
    compare_detections(data, tmp_path / "out/train", crowds=True)


def compare_detections(data, photos, *, crowds):
    wanted, seen = files(), 0
    for path, _, detections in data:
        mask = wanted[os.path.relpath(path, photos)]
        got = np.zeros_like(mask)
        for i, k in enumerate(detections.class_id):
            crowd = crowds and detections.data["iscrowd"][i]
            got[detections.mask[i]] = 255 if crowd else k + 1
        same(got, mask if crowds else np.where(mask == 255, 0, mask))
        seen += 1
    assert seen == len(wanted)


# YOLO


def test_yolo_lines_are_the_pixels(folder, tmp_path):
    made = exported(folder, tmp_path / "out", "yolo", tolerance=0)
    assert made.open == 3
    count = 0
    for file, mask in files().items():
        photo = tmp_path / "out/images/train" / file
        assert photo.is_symlink()
        label = Path("/labels/".join(str(photo).rsplit("/images/", 1))).with_suffix(".txt")  # where YOLO looks
        got = np.zeros_like(mask)
        for line in label.read_text().splitlines():
            k, *numbers = line.split()
            points = np.array(numbers, np.float32).reshape(-1, 2) * np.array(mask.shape[::-1], np.float32)
            got[drawn_by_pillow([points], mask.shape) > 0] = int(k) + 1
            count += 1
        same(got, np.where(mask == 255, 0, mask))
    assert count == made.labels


def test_ultralytics_reads_yolo(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    pytest.importorskip("ultralytics")
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset, polygon2mask

    exported(folder, tmp_path / "out", "yolo", tolerance=0)
    for photo in ("one.png", "line.png", "dots.png"):  # it refuses photos of less than 10 pixels
        (tmp_path / "out/images/train" / photo).unlink()
    data = check_det_dataset(str(tmp_path / "out/data.yaml"), autodownload=False)
    assert list(data["names"].values()) == list(CLASSES)
    read = YOLODataset(img_path=data["train"], data=data, task="segment", augment=False)
    wanted = {os.path.join(data["train"], file): mask for file, mask in files().items()}
    assert len(read.labels) == len(wanted) - 3
    for label in read.labels:
        mask = wanted[label["im_file"]]
        assert label["shape"] == mask.shape
        got = np.zeros_like(mask)
        for k, points in zip(label["cls"][:, 0], label["segments"], strict=True):
            pixels = (points * np.array(mask.shape[::-1], np.float32)).ravel()
            got[polygon2mask(mask.shape, [pixels]) > 0] = k + 1
        same(got, np.where(mask == 255, 0, mask))


def test_supervision_reads_yolo(tmp_path):
    supervision = pytest.importorskip("supervision")
    flat = {name: mask for name, mask in hard_masks().items() if "/" not in name}  # it looks into one folder
    root = write(tmp_path, flat)
    exported(root, tmp_path / "out", "yolo", tolerance=0)
    data = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "out/images/train"), str(tmp_path / "out/labels/train"), str(tmp_path / "out/data.yaml"),
        force_masks=True,
    )  # fmt: skip
    assert data.classes == list(CLASSES)
    wanted = files()
    seen = 0
    for path, _, detections in data:
        mask = wanted[Path(path).name]
        if Path(path).name == "turned.JPG":
            continue  # it takes the size of a photo that lies on its side
        got = np.zeros_like(mask)
        for own, k in zip(detections.mask if len(detections) else (), detections.class_id, strict=True):
            got[own] = k + 1
        same(got, np.where(mask == 255, 0, mask))
        seen += 1
    assert seen == len(flat) - 1


# labelme


@pytest.mark.parametrize("options", [{"shape": "rle"}, {"tolerance": 0}, {"tolerance": 0, "parts": False}])
def test_labelme_is_pixel_for_pixel(folder, tmp_path, options):
    exported(folder, tmp_path / "out", "labelme", **options)
    names = (tmp_path / "out/labels.txt").read_text(encoding="utf-8").splitlines()
    assert names == ["__ignore__", "_background_", *CLASSES]
    values = dict(zip(names, [255, *range(5)], strict=True))
    for file, mask in files().items():
        label = json.loads((tmp_path / "out" / file).with_suffix(".json").read_text(encoding="utf-8"))
        assert set(label) == {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"}
        assert ((tmp_path / "out" / file).parent / label["imagePath"]).is_file()
        assert (label["imageHeight"], label["imageWidth"]) == mask.shape
        got = np.zeros_like(mask)
        for shape in label["shapes"]:
            points = np.array(shape["points"])
            if shape["shape_type"] == "mask":
                (left, top), (right, bottom) = points.astype(int)
                own = np.zeros(mask.shape, bool)
                inner = Image.open(io.BytesIO(base64.b64decode(shape["mask"])))
                own[top : bottom + 1, left : right + 1] = np.asarray(inner).astype(bool)
            else:
                own = drawn_by_pillow([points], mask.shape) > 0
            got[own] = values[shape["label"]]
        same(got, mask)


@pytest.mark.parametrize("shape", ["polygon", "rle"])
def test_labelme_reads_it(folder, tmp_path, shape, monkeypatch):
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    module = pytest.importorskip("labelme._label_file", exc_type=ImportError)
    shapes = pytest.importorskip("labelme.utils.shape", exc_type=ImportError)
    exported(folder, tmp_path / "out", "labelme", shape=shape, tolerance=0)
    names = (tmp_path / "out/labels.txt").read_text(encoding="utf-8").splitlines()
    values = dict(zip(names, [255, *range(5)], strict=True))
    for file, mask in files().items():
        read = module.LabelFile(str((tmp_path / "out" / file).with_suffix(".json")))
        with Image.open(io.BytesIO(read.image_data)) as photo:
            assert photo.size == mask.shape[::-1]
        same(shapes.shapes_to_label(mask.shape, read.shapes, values)[0], mask)


# CVAT


def elements(out):
    with zipfile.ZipFile(out / "annotations.zip") as archive:
        assert archive.testzip() is None
        return ElementTree.fromstring(archive.read("annotations.xml")), archive.namelist()


@pytest.mark.parametrize("shape", ["polygon", "rle"])
def test_cvat_is_pixel_for_pixel(folder, tmp_path, shape):
    exported(folder, tmp_path / "out", "cvat", shape=shape, tolerance=0, parts=False)
    root, members = elements(tmp_path / "out")
    assert members == ["annotations.xml"]
    assert root.findtext("version") == "1.1"
    names = [label.findtext("name") for label in root.iter("label")]
    assert names == [*CLASSES, "__ignore__"]
    assert [label["name"] for label in json.loads((tmp_path / "out/labels.json").read_text("utf-8"))] == names
    values = dict(zip(names, (1, 2, 3, 4, 255), strict=True))
    wanted, images = files(), list(root.iter("image"))
    assert [int(image.get("id")) for image in images] == list(range(len(wanted)))
    for image in images:
        mask = wanted.pop(image.get("name"))
        assert (int(image.get("height")), int(image.get("width"))) == mask.shape
        got = np.zeros_like(mask)
        for one in image:
            value = values[one.get("label")]
            if one.tag == "polygon":
                points = np.array([pair.split(",") for pair in one.get("points").split(";")], float)
                filled(got, points, value)
                continue
            left, top, width, height = (int(one.get(key)) for key in ("left", "top", "width", "height"))
            runs = list(map(int, one.get("rle").split(",")))
            inner = np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width)
            got[top : top + height, left : left + width][inner == 1] = value
        same(got, mask)
    assert not wanted


def filled(canvas, points, value):
    """The pixels whose middle is in a polygon, by the even-odd rule."""
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]] + 0.5
    inside = np.zeros(canvas.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True):
        if ay != by:
            crossed = (ay > y) != (by > y)
            inside ^= crossed & (x < ax + (y - ay) / (by - ay) * (bx - ax))
    canvas[inside] = value


def test_datumaro_reads_cvat(tmp_path):
    datumaro = pytest.importorskip("datumaro")
    flat = {name: mask for name, mask in hard_masks().items() if "/" not in name and "twin" not in name}
    root = write(tmp_path, flat)
    exported(root, tmp_path / "out", "cvat", shape="rle", copy=True)
    with zipfile.ZipFile(tmp_path / "out/annotations.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert {path.name for path in (tmp_path / "unpacked/images").iterdir()} == set(flat)
    data = datumaro.Dataset.import_from(str(tmp_path / "unpacked"), "cvat")
    names = [label.name for label in data.categories()[datumaro.AnnotationType.label]]
    assert names == [*CLASSES, "__ignore__"]
    wanted = {id_of(name): mask for name, mask in flat.items()}
    assert {item.id for item in data} == set(wanted)
    for item in data:
        got = np.zeros_like(wanted[item.id])
        for one in item.annotations:
            got[one.image.astype(bool)] = 255 if names[one.label] == "__ignore__" else one.label + 1
        same(got, wanted[item.id])


# What is around them


@pytest.mark.parametrize(
    ("format", "workers"),
    [("coco", "0"), ("yolo", "0"), ("labelme", "0"), ("cvat", "0"), pytest.param("coco", "2", marks=pytest.mark.slow)],
)
def test_processes_copies_and_the_command_give_the_same(folder, tmp_path, format, workers, capsys, monkeypatch):
    monkeypatch.setattr("cacl.labels._WORTH", 1)
    one, two = tmp_path / "one", tmp_path / "two"
    exported(folder, one, format, copy=True)
    arguments = [str(folder / "masks"), "--photos", str(folder / "photos"), "--classes", str(folder / "classes.txt")]
    assert cli.main(["labels", *arguments, "--format", format, "--out", str(two), "--workers", workers]) == 0
    said = capsys.readouterr().out
    assert f"of {len(files())} photos in {two}\n" in said
    assert ("YOLO takes for background" in said) == (format == "yolo")
    texts = [path.relative_to(two) for path in two.rglob("*") if path.suffix in (".json", ".txt", ".yaml")]
    assert texts
    for path in texts:
        assert (one / path).read_bytes() == (two / path).read_bytes()
    copies = [path for path in one.rglob("*") if path.suffix.lower() in (".jpg", ".png")]
    assert not any(path.is_symlink() for path in copies)
    assert all(path.is_symlink() for path in two.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    if format != "cvat":
        assert len(copies) == len(files())


def test_photos_without_a_mask_are_counted(folder, tmp_path):
    masks = tmp_path / "masks"
    save_mask(masks / "blobs.png", hard_masks()["blobs.jpg"])
    made = export_labels(masks, tmp_path / "out", "coco", photos=folder / "photos", classes=CLASSES, workers=0)
    assert (made.photos, made.left_out) == (1, len(files()) - 1)


def test_masks_of_16_bits_are_read(folder, tmp_path):
    mask = hard_masks()["blobs.jpg"]
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "masks/blobs.png")
    options = {"photos": folder / "photos", "classes": CLASSES, "workers": 0, "shape": "rle"}
    export_labels(tmp_path / "masks", tmp_path / "out", "coco", **options)
    same(COCO(tmp_path / "out", "train").mask(0).numpy(), mask)


def test_what_is_wrong_is_one_line_and_nothing_is_left(folder, tmp_path):
    good, photos = hard_masks()["blobs.jpg"], folder / "photos"
    for name, mask in {"large": good[:, :-1], "value": np.full_like(good, 9), "fine": good}.items():
        save_mask(tmp_path / name / "blobs.png", mask)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/blobs.png").write_bytes(b"nothing")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "used")
    fine = {"photos": photos, "classes": CLASSES, "workers": 0}
    cases = [
        ("large", {}, "masks?.*photo's 50 x 40 pixels, but got 49 x 40"),
        ("value", {}, "expected values 0 to 4 and 255, but got 9"),
        ("broken", {}, "not a mask that decodes"),
        ("fine", {"classes": None}, "--classes"),
        ("fine", {"classes": ["a", "A"]}, "stands twice"),
        ("fine", {"photos": folder / "photos/sub"}, "called as their photos are"),
        ("fine", {"photos": tmp_path / "used"}, "no photos here"),
        ("fine", {"format": "yolo", "shape": "rle"}, "polygon"),
        ("fine", {"format": "voc"}, "format"),
        ("fine", {"min_area": 0}, "min_area"),
        ("fine", {"tolerance": float("nan")}, "tolerance"),
        ("fine", {"worst_first": True}, "worst_first.*no run folder"),
        ("fine", {"confidence": True}, "confidence.*no run folder"),
        ("fine", {"stage": "masks"}, "stage.*no run folder"),
        ("nowhere", {}, "expected a run folder, or a folder of masks"),
        ("fine", {"out": tmp_path / "used"}, "not there yet"),
        ("fine", {"out": tmp_path / "link"}, "not there yet"),
        ("fine", {"out": tmp_path / "used/mine.txt"}, "not there yet"),
        ("fine", {"format": "cvat", "classes": ["a\x01", "b", "c", "d"]}, "XML"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for source, changes, message in cases:
        options = {"out": tmp_path / "out", "format": "coco", **fine, **changes}
        with pytest.raises(InputError, match=message) as caught:
            export_labels(tmp_path / source, options.pop("out"), options.pop("format"), **options)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before, (source, changes)
    assert (tmp_path / "used/mine.txt").read_text() == "mine"
    (tmp_path / "out").mkdir()  # an empty one will do
    export_labels(tmp_path / "fine", tmp_path / "out", "coco", **fine)


def test_names_that_are_no_utf8_are_said(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / "photos").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "photos" / name)
    except (OSError, UnicodeError):
        pytest.skip("this file system has names in UTF-8 only")
    save_mask(tmp_path / "masks" / name, np.ones((4, 4), np.uint8))
    with pytest.raises(InputError, match="UTF-8"):
        export_labels(
            tmp_path / "masks", tmp_path / "out", "coco", photos=tmp_path / "photos", classes=["a"], workers=0
        )


def test_other_processes_of_torchrun_do_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["labels", "nowhere", "--format", "coco", "--out", str(tmp_path / "out")]) == 0
    assert not any(tmp_path.iterdir())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("format", ["coco", "cvat"])
def test_any_number_of_photos_takes_the_same_memory(tmp_path, format):
    mask = hard_masks()["sub/ring.png"]
    drawn = FORMATS[format].draw(list(regions_of(mask)), (50, 40), Drawing(CLASSES, "rle", 0))
    peaks = []
    for count in (10000, 30000):
        (tmp_path / str(count)).mkdir()
        tracemalloc.start()
        writer = FORMATS[format].writer(tmp_path / str(count), "train", CLASSES, False)
        for i in range(count):
            writer.add(f"{i}.jpg", (50, 40), drawn, Path("none.jpg"))
        writer.close()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000


def test_class_names_are_those_of_a_text_or_a_model(tmp_path):
    (tmp_path / "classes.txt").write_text("\ufeffboat\r\n\n tram \n", encoding="utf-8")
    assert read_classes(tmp_path / "classes.txt") == ["boat", "tram"]
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError):
            read_classes(path)


# Runs


@pytest.fixture
def run(tmp_path):
    """A run whose pseudo masks are true, but for one that is of another photo."""
    root = tmp_path / "scenes"
    scenes.generate(root, train=6, val=2, size=64, workers=0, progress=False)
    settings = [f"data.root={root}", f"run.out={tmp_path / 'run'}", "scenes.train=6", "scenes.val=2", "scenes.size=64"]
    config = Config.load("scenes", [*settings, "run.device=cpu", "run.workers=0", "masks.affinity=none"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text(config.to_toml(), encoding="utf-8")
    dataset = open_dataset("scenes", root, "train")
    for i, entry in enumerate(dataset.entries):
        mask = dataset.mask(i).numpy()
        shown = np.zeros_like(mask) if i == 4 else mask  # all background: no region of its tags
        save_mask(tmp_path / f"run/masks/train/{entry.id}.png", shown)
        maps = np.stack([mask[::4, ::4] == k + 1 for k in entry.labels]).astype(np.float16)
        save_cams(tmp_path / f"run/cams/train/{entry.id}.npz", ImageCAMs(np.array(entry.labels), maps))
    RunFolder(tmp_path / "run").mark("masks", "key", finished=True)
    return tmp_path / "run", dataset


def test_a_run_says_what_to_correct_first(run, tmp_path):
    folder, dataset = run
    made = export_labels(folder, tmp_path / "out", "coco", shape="rle", worst_first=True, workers=0, progress=False)
    assert made.photos == 6
    rows = list(csv.reader((tmp_path / "out/first.csv").open(encoding="utf-8")))
    assert rows[0] == ["photo", "agreement"]
    assert rows[1][0] == f"{dataset.entries[4].id}.jpg"
    numbers = [float(row[1]) for row in rows[1:]]
    assert numbers == sorted(numbers)
    listed = json.loads((tmp_path / "out/annotations/instances_train.json").read_text(encoding="utf-8"))["images"]
    assert [image["file_name"] for image in listed] == [row[0] for row in rows[1:]]
    home = COCO(tmp_path / "out", "train")
    ids = {entry.id: i for i, entry in enumerate(home.entries)}
    assert home.classes == dataset.classes
    for i, entry in enumerate(dataset.entries):
        if i != 4:
            same(home.mask(ids[entry.id]).numpy(), dataset.mask(i).numpy())


def test_confidence_is_what_the_cams_say(run, tmp_path):
    folder, dataset = run
    export_labels(folder, tmp_path / "out", "labelme", confidence=True, workers=0, progress=False)
    for i, entry in enumerate(dataset.entries):
        said = np.asarray(Image.open(tmp_path / f"out/confidence/{entry.id}.png")).astype(int)
        truth = dataset.mask(i).numpy()
        mask = np.zeros_like(truth) if i == 4 else truth
        assert said.shape == mask.shape
        seen = np.kron(truth[::4, ::4], np.ones((4, 4), np.uint8))  # as coarse as CAMs are
        for k in range(len(dataset.classes) + 1):
            inner = ndimage.binary_erosion((mask == k) & (seen == k), iterations=6)
            assert said[inner].min(initial=255) == 255
            if i == 4 and k:
                assert said[ndimage.binary_erosion(seen == k, iterations=6)].max(initial=0) == 0


def test_a_run_that_is_not_so_far_and_what_it_does_not_keep(run, tmp_path):
    folder, dataset = run
    cases = [
        ({"stage": "predict"}, "stage `predict` has finished"),
        ({"photos": "x"}, "photos.*is a run"),
        ({"classes": ["x"]}, "classes.*is a run"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            export_labels(folder, tmp_path / "out", "coco", workers=0, **options)
    RunFolder(folder).mark("predict", "key", finished=True)
    with pytest.raises(InputError, match="keeps no scores"):
        export_labels(folder, tmp_path / "out", "coco", workers=0, stage="predict", confidence=True)
    (folder / f"masks/train/{dataset.entries[0].id}.png").unlink()
    with pytest.raises(InputError, match="no such file"):
        export_labels(folder, tmp_path / "out", "coco", workers=0)
    RunFolder(folder).mark("masks", "key", finished=False)
    with pytest.raises(InputError, match="stage `masks` has finished"):
        export_labels(folder, tmp_path / "out", "coco", workers=0)
    assert not (tmp_path / "out").exists()
