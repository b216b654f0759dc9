"""COCO: the reader says what `json` and pycocotools say of the same file, in little memory, and names every mistake."""

from __future__ import annotations

import io
import json
import pickle
import random
import sys
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cacl import BackgroundSet
from cacl.datasets import COCO, Dataset, check, check_folder, files, open_dataset
from cacl.datasets import json_stream as _json_stream
from cacl.datasets.entries import Entries, Entry
from cacl.datasets.json_stream import JSONStream
from cacl.datasets.rle import uncompressed
from cacl.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

HEIGHT, WIDTH = 40, 50
SQUARE = [5, 5, 25, 5, 25, 25, 5, 25]
RIGHT = [20.5, 10.25, 45.75, 10, 40, 35]


def rle(region):
    """The counts of a region, column by column, as a list."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], region.T.ravel(), [2]])))
    return {"size": list(region.shape), "counts": np.diff(changes, prepend=0).tolist()}


def band(first, last):
    region = np.zeros((HEIGHT, WIDTH), np.int64)
    region[:, first:last] = 1
    return region


def compressed(region):
    mask = pytest.importorskip("pycocotools.mask")
    code = mask.encode(np.asfortranarray(region.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def example():
    """Ids with gaps and in no order, overlaps, crowds, an image without annotations and one with a crowd only."""
    shapes = [
        (70, 18, 0, [RIGHT]), (70, 1, 0, [SQUARE]), (9, 44, 1, rle(band(3, 9))), (9, 1, 0, [SQUARE, RIGHT]),
        (70, 1, 1, rle(band(20, 45))), (70, 44, 0, compressed(band(22, 26))), (70, 18, 0, rle(band(24, 25))),
        (5, 18, 1, [RIGHT]), (9, 1, 0, [[1, 1, 3, 3], [30, 30, 32, 30, 31, 33]]),
    ]  # fmt: skip
    names = {9: "ä b", 70: "COCO_1", 5: "\u5c71", 200: '\U0001f600 "q" \\'}
    return {
        "info": {"year": 2014, "nested": [[1, [2.5e3, {"a": None}]], "}]{[,"], "words": [True, False, -1e-5]},
        "licenses": [],
        "images": [{"id": i, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for i, n in names.items()],
        "annotations": [
            {"segmentation": shape, "area": 1.5, "iscrowd": crowd, "image_id": image, "category_id": k, "id": 1000 + i}
            for i, (image, k, crowd, shape) in enumerate(shapes)
        ],
        "categories": [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }


def write(root, data, split="train2014", **options):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(data, **options), encoding="utf-8")
    for i, image in enumerate(data["images"]):
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / image["file_name"])
    return path


@pytest.fixture
def coco(tmp_path):
    write(tmp_path, example())
    return tmp_path


def by_hand(path):
    """id -> (labels, mask), by the API of pycocotools: crowds, and over them the objects, the smallest last."""
    api = pytest.importorskip("pycocotools.coco").COCO(path)
    order = sorted(api.cats)
    result = {}
    for image in api.dataset["images"]:
        annotations = api.imgToAnns[image["id"]]
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in annotations:
            if annotation["iscrowd"]:
                mask[api.annToMask(annotation) == 1] = 255
        objects = [a for a in annotations if not a["iscrowd"]]
        for annotation in sorted(objects, key=lambda a: -int(api.annToMask(a).sum())):
            mask[api.annToMask(annotation) == 1] = order.index(annotation["category_id"]) + 1
        labels = sorted({order.index(a["category_id"]) for a in objects})
        result[image["file_name"].removesuffix(".jpg")] = tuple(labels), mask
    return result


def usual():
    """As the example, but for an outline of two points, which pycocotools takes for a box."""
    data = example()
    data["annotations"][8]["segmentation"] = data["annotations"][8]["segmentation"][1:]
    return data


def test_labels_and_masks_are_those_of_pycocotools(tmp_path):
    path = write(tmp_path, usual())
    data = COCO(tmp_path, "train")
    assert data.classes == ("person", "dog", "bottle")
    wanted = by_hand(path)
    assert [entry.id for entry in data.entries] == list(wanted)
    for i, (labels, mask) in enumerate(wanted.values()):
        sample = data[i]
        assert data.entries[i].labels == labels
        assert sample.labels.nonzero()[:, 0].tolist() == list(labels)
        assert sample.image.shape == (3, HEIGHT, WIDTH)
        assert sample.mask.dtype == torch.uint8
        assert np.array_equal(sample.mask, mask)
    values = [sorted(np.unique(mask)) for _, mask in wanted.values()]
    assert values == [[0, 1, 255], [0, 1, 2, 3, 255], [0, 255], [0]]
    assert [entry.labels for entry in data.entries] == [(0,), (0, 1, 2), (), ()]


@pytest.mark.parametrize("seed", range(3))
def test_random_annotations(tmp_path, seed):
    rng = np.random.default_rng(seed)
    data = example() | {"annotations": []}
    for i in range(40):
        center, points = rng.uniform(0, 50, 2), rng.uniform(-15, 15, (rng.integers(3, 9), 2))
        shape = [(center + points).ravel().round(2).tolist()]
        if i % 3 == 0:
            region = rng.integers(0, 2, (HEIGHT, WIDTH)) * band(*sorted(rng.integers(0, WIDTH, 2)))
            shape = rle(region) if i % 2 else compressed(region)
        image, category = rng.choice([9, 70, 5]).item(), rng.choice([1, 18, 44]).item()
        crowd = int(i % 10 == 0)
        data["annotations"].append(
            {"segmentation": shape, "iscrowd": crowd, "image_id": image, "category_id": category, "id": i}
        )
    path = write(tmp_path, data)
    dataset = COCO(tmp_path, "train")
    empty = {a["image_id"] for a in data["annotations"] if isinstance(a["segmentation"], dict) and nothing(a)}
    for i, (labels, mask) in enumerate(by_hand(path).values()):
        assert dataset.entries[i].labels == labels
        assert (i in dataset.masked) == (data["images"][i]["id"] not in empty)
        assert i not in dataset.masked or np.array_equal(dataset.mask(i), mask)


def nothing(annotation):
    mask = pytest.importorskip("pycocotools.mask")
    code = annotation["segmentation"]
    if isinstance(code["counts"], list):
        code = mask.frPyObjects(code, HEIGHT, WIDTH)
    return not mask.decode(code).any()


def test_an_outline_of_two_points_has_no_area(coco):
    write(coco, usual(), "val2014")
    for i in range(4):
        assert COCO(coco, "train").mask(i).equal(COCO(coco, "val").mask(i))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (3, 0, 4, 2, 1)])
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")}])
def test_key_order_and_layout_change_nothing(coco, tmp_path_factory, order, options):
    other = tmp_path_factory.mktemp("other")
    items = list(example().items())
    write(other, dict(items[i] for i in order), **options)
    one, two = COCO(coco, "train"), COCO(other, "train")
    assert one.classes == two.classes
    for i, (first, second) in enumerate(zip(one.entries, two.entries, strict=True)):
        assert (first.id, first.labels) == (second.id, second.labels)
        assert first.image.relative_to(coco) == second.image.relative_to(other)
        assert one.mask(i).equal(two.mask(i))


def read_all(text, monkeypatch, chunk):
    """An object's arrays by elements and its other values, as the stream reads them, each again from its bytes."""
    monkeypatch.setattr(_json_stream, "CHUNK", chunk)
    stream, result = JSONStream(io.BytesIO(text), Path("x.json")), {}
    for key in stream.members():
        elements = list(stream.elements()) if stream._peek() == "[" else stream.element()
        for element in elements if isinstance(elements, list) else [elements]:
            assert json.loads(text[element.start : element.start + element.length]) == element.value
        result[key] = [e.value for e in elements] if isinstance(elements, list) else elements.value
    stream.end()
    return result


DOCUMENT = {
    "a": [
        1,
        -2.5e-3,
        1e5,
        True,
        False,
        None,
        "",
        'ä\\"\u5c71\U0001f600,]}',
        [],
        {},
        [[[1], [2, [3]]], {"x": {"y": "]"}}],
    ],
    "\u00e9\n": {"nested": [1, {"deep": "\ud83d"}]},
    "empty": [],
    "number": 123456.789e3,
    "word": None,
    "long": ["x" * 70, 10**30],
}


@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": "\t"}])
def test_chunks_may_end_anywhere(monkeypatch, options):
    text = json.dumps(DOCUMENT, **options).replace('"\ud83d"', '"\\ud83d"').encode()
    for chunk in (3, 4, 5, 7, 16, 1 << 20):
        for shift in range(min(chunk, 7)):
            assert read_all(b" \n\r\t "[:shift] + text, monkeypatch, chunk) == DOCUMENT
    assert read_all(b"\xef\xbb\xbf" + text + b"\n", monkeypatch, 3) == DOCUMENT


def test_a_file_that_is_cut_off_anywhere_is_no_json(monkeypatch):
    text = json.dumps(DOCUMENT).encode()
    for length in range(len(text)):
        with pytest.raises(ValueError, match=r"^x.json: not JSON: .* at byte \d+$"):
            read_all(text[:length], monkeypatch, 1 << 20 if length % 2 else 5)


def anything(rng, depth=0):
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind < 2:
        return rng.choice(
            [None, True, False, rng.randint(-(10**9), 10**25), rng.random() * 10.0 ** rng.randint(-30, 30)]
        )
    if kind < 6:
        return "".join(rng.choices('a"\\é\u5c71\U0001f600\n\0]}, ', k=rng.randrange(9)))
    if kind < 8:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(6))]
    return {str(anything(rng, 9)): anything(rng, depth + 1) for _ in range(rng.randrange(6))}


def test_what_json_takes_is_taken_and_what_it_refuses_is_refused(monkeypatch):
    for seed in range(400):
        rng = random.Random(seed)
        document = {str(anything(rng)): anything(rng) for _ in range(rng.randrange(5))}
        text = json.dumps(document, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])).encode()
        at = rng.randrange(len(text))
        if seed % 2:
            text = text[:at] + bytes([rng.randrange(256)]) + text[at + rng.randrange(2) :]
        try:
            wanted = json.loads(text.decode())
        except ValueError:
            wanted = None
        try:
            found = read_all(text, monkeypatch, rng.choice([3, 5, 13, 1 << 20]))
        except InputError:
            found = None
        assert found == (wanted if isinstance(wanted, dict) else None), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected '{' at byte 0"),
        (b"[1]", "expected '{' at byte 0"),
        (b'{"a": [1, 2,]}', r"expecting value at byte 12|illegal trailing comma"),
        (b'{"a": [1 2]}', "expected ',' at byte 9"),
        (b'{"a" 1}', "expected ':' at byte 5"),
        (b'{"a": 1,}', "expected a key in double quotes at byte 8"),
        (b'{"a": 1} {', "expected the end of the file at byte 9"),
        (b'{"a": nul}', "expecting value at byte 6"),
        (b'{"a": [{"b" 1}]}', "expecting ':' delimiter at byte 12"),
        (b'{"a": "x\xff"}', "expected UTF-8 at byte 8"),
        (b'{"a": "x\n"}', "invalid control character at.* at byte 8"),
        (b'{"a": ' + b"[" * 100_000, "nested too deep.* at byte 7"),
        (b'{"a": ' + b"1" * 5000 + b"}", "nested too deep, or a number of thousands of digits at byte 6"),
        (b'{"a": [1.5ex]}', "expected ',' at byte 10"),
        (b"\x1f\x8b\x08", "expected '{' at byte 0"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_what_is_no_json_is_named_with_its_byte(monkeypatch, text, message, chunk):
    with pytest.raises(ValueError, match=f"^x.json: not JSON: ({message})") as error:
        read_all(text, monkeypatch, chunk)
    assert "\n" not in str(error.value)


def test_reading_on_in_vain_stops_early(monkeypatch):
    """An error in the middle is found there, and not after the rest has been read into memory."""
    file = io.BytesIO(b'{"a": [{"b": 1 "c"}' + b" " * 1_000_000)
    monkeypatch.setattr(_json_stream, "CHUNK", 100)
    stream = JSONStream(file, Path("x.json"))
    assert next(stream.members()) == "a"
    with pytest.raises(ValueError, match="delimiter at byte 15"):
        list(stream.elements())
    assert file.tell() < 1000


@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_small_chunks_give_the_same_data(coco, monkeypatch, chunk):
    whole = COCO(coco, "train")
    monkeypatch.setattr(_json_stream, "CHUNK", chunk)
    parts = COCO(coco, "train")
    assert parts.entries == whole.entries
    assert all(parts.mask(i).equal(whole.mask(i)) for i in range(4))


def change(key, index, **values):
    def edit(data):
        data[key][index].update(values)

    return edit


def without(key, index, name):
    return lambda data: data[key][index].pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            change("images", 1, file_name="../x.jpg"),
            r"image 70: expected a path inside the folder, but got '../x.jpg'$",
        ),
        (change("images", 1, file_name="/x.jpg"), r"image 70: expected a path inside the folder, but got '/x.jpg'$"),
        (change("images", 1, file_name=""), r"image 70: expected a file_name, but it is empty$"),
        (change("images", 1, file_name="a\nb.jpg"), r"train2014/a\\nb.jpg': no such file$"),
        (change("images", 1, file_name="gone.jpg"), r"train2014/gone.jpg: no such file$"),
        (change("images", 1, file_name="ä b.jpeg"), r": duplicate id ä b\n.*train2014/ä b.jpeg: no such file$"),
        (change("images", 1, file_name=7), r"images: expected an object with file_name.* at byte \d+$"),
        (change("images", 1, file_name="\ud83d.jpg"), r"images: expected an object with file_name.* at byte \d+$"),
        (change("images", 1, height=0), r"image 70: expected 1 to 178956970 pixels, but got 50×0$"),
        (change("images", 1, width=-3), r"image 70: expected 1 to 178956970 pixels, but got -3×40$"),
        (change("images", 1, width=2**40), r"images: expected an object with file_name, and the integers id, height"),
        (change("images", 1, id="70"), r"images: expected an object with file_name, and the integers id, height"),
        (change("images", 1, id=9), r"duplicate image id 9\n.*unknown image_id in 5 annotations, such as 70$"),
        (without("images", 2, "width"), r"images: expected an object .* at byte \d+ \(missing 'width'\)$"),
        (change("annotations", 3, image_id=8), r"unknown image_id in 1 annotation, such as 8$"),
        (change("annotations", 3, category_id=2), r"unknown category_id in 1 annotation, such as 2$"),
        (change("annotations", 3, category_id=1.5), r"annotations: expected an object with the integers image_id, cat"),
        (change("annotations", 3, iscrowd=None), r"annotations: expected an object with the integers image_id, cat"),
        (without("annotations", 3, "image_id"), r"annotations: expected an object .* \(missing 'image_id'\)$"),
        (
            change("categories", 0, id=1),
            r"duplicate category id 1\n.*unknown category_id in 2 annotations, such as 44$",
        ),
        (change("categories", 0, name="dog"), r"duplicate category 'dog'$"),
        (change("categories", 0, name=" "), r"categories: expected an object with name, and the integer id"),
        (change("categories", 0, name=None), r"categories: expected an object with name, and the integer id"),
        (lambda data: data["categories"].append(3), r"categories: expected an object with name, and the integer id"),
        (lambda data: data["images"].append([]), r"images: expected an object with file_name"),
        (lambda data: data["annotations"].append("x"), r"annotations: expected an object with the integers"),
        (lambda data: data.pop("annotations"), r"json: missing 'annotations'$"),
        (lambda data: [data.pop("images"), data.pop("categories")], r"json: missing 'images', 'categories'$"),
        (lambda data: data.update(images=[]), r"json: expected images, but there is none$"),
        (lambda data: data.update(categories=[]), r"json: expected 1 to 254 categories, but got 0$"),
        (lambda data: data.update(images={}), r"json: not JSON: expected '\[' at byte \d+$"),
    ],
)
def test_mistakes_in_the_file(coco, edit, message):
    path = coco / "annotations" / "instances_train2014.json"
    data = example()
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        COCO(coco, "train")
    assert all(line.lstrip("'").startswith(str(coco)) for line in str(error.value).splitlines())


def test_every_problem_is_a_line(coco):
    data = example()
    data["images"][0]["file_name"], data["images"][3]["height"] = "../x.jpg", 0
    data["annotations"][0]["category_id"] = 5
    (coco / "annotations/instances_train2014.json").write_text(json.dumps(data))
    (coco / "train2014/COCO_1.jpg").unlink()
    with pytest.raises(ValueError, match="expected a path inside") as error:
        COCO(coco, "train")
    assert len(str(error.value).splitlines()) == 4
    assert len(check_folder(coco)) == 4
    (coco / "train2014/\u5c71.jpg").write_text("broken")
    assert len(check_folder(coco)) == 5


def test_folders(coco):
    write(coco, example(), "val2017")
    assert len(COCO(coco, "train")) == len(COCO(coco, "train2014")) == len(COCO(coco, "val2017")) == 4
    assert open_dataset("coco", coco, "train").entries == COCO(coco, "train2014").entries
    with pytest.raises(ValueError, match=r"annotations: expected split 'val' as instances_val2014.json or instances_v"):
        COCO(coco, "val")
    with pytest.raises(ValueError, match=r"but there is train2014, val2017$"):
        COCO(coco, "test")
    with pytest.raises(ValueError, match=r"but there is no such file$"):
        COCO(coco / "train2014", "train")
    (coco / "val2017").rename(coco / "moved")
    with pytest.raises(ValueError, match=r"val2017: no such folder$"):
        COCO(coco, "val2017")
    (coco / "annotations/instances_a.json").mkdir()
    with pytest.raises(ValueError, match=r"expected split 'a'"):
        COCO(coco, "a")


def test_photos_in_folders_keep_these_in_their_ids(coco):
    data = example()
    for image, folder in zip(data["images"], ("a", "a", "b", "b"), strict=True):
        image["file_name"] = f"{folder}/{image['file_name']}"
    for name in "ab":
        (coco / "train2014" / name).mkdir()
    write(coco, data)
    assert [entry.id for entry in COCO(coco, "train").entries][:3] == ["a/ä b", "a/COCO_1", "b/\u5c71"]


def test_check(coco):
    write(coco, example(), "val2014")
    assert check_folder(coco) == check_folder(coco, format="coco", splits=["val"]) == []
    Image.new("RGB", (30, 20)).save(coco / "val2014/COCO_1.jpg")
    (line,) = check_folder(coco)
    assert line.endswith("instances_val2014.json: COCO_1: expected 30×20 pixels as the image, but got 50×40")
    other = example() | {"categories": example()["categories"][::2], "annotations": []}
    (coco / "annotations/instances_val2014.json").write_text(json.dumps(other))
    assert check_folder(coco)[0].endswith("expected the categories of the split train2014, but it has others")
    with pytest.raises(ValueError, match=r"annotations: expected instances_\*.json of COCO, but there is none"):
        check_folder(coco / "val2014", format="coco")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [40, 50], "counts": [1, 2]}, "its counts do not add up"),
        ({"size": [40, 50], "counts": [-1, 2001]}, "its counts do not add up"),
        ({"size": [40, 50], "counts": [1999.5, 0.5]}, "its counts do not add up"),
        ({"size": [40, 50], "counts": "01"}, "its counts do not add up"),
        ({"size": [40, 50], "counts": "ooo"}, "it is cut off"),
        ({"size": [40, 50], "counts": "a b"}, "unknown letter ' '"),
        ({"size": [50, 40], "counts": [0, 2000]}, r"its size is \[50, 40\]"),
        ({"size": ["x" * 1000], "counts": [0, 2000]}, r"its size is \['x{186}\)$"),
        ({"counts": [0, 2000]}, "'size'"),
        ([[1, 2, 3, "x", 5, 6]], "could not convert"),
        ([[1, 2, 3, 1e9, 5, 6]], "near the image"),
        ([{"size": [40, 50], "counts": [2000]}], "float"),
        ([["1", "2", "3", "4", "5", "y"]], "could not convert"),
        (7, "int"),
    ],
)
def test_bad_segmentations_are_one_line(coco, segmentation, message):
    data = example()
    data["annotations"][3]["segmentation"] = segmentation
    (coco / "annotations/instances_train2014.json").write_text(json.dumps(data))
    expected = r"train2014.json: annotation 1003: expected polygons or an RLE of 50×40 pixels \(.*" + message
    with pytest.raises(ValueError, match=expected) as error:
        COCO(coco, "train").mask(0)
    assert "\n" not in str(error.value)
    assert len(check_folder(coco)) == 1


NO_OUTLINE = [
    None, [], {}, "", [[]], [None], [5, 5, 20, 20], [[5, 5, 20, 20]], [5.0, 5.0, 2, 9.0, 9.0, 2, 12.5, 3.5, 1],
    [[5, 5], [20, 5], [20, 20]], [[[5, 5], [20, 5], [20, 20]]], [[5, 5, 5, 9, 5, 20]], [[7, 8] * 3],
    {"size": [40, 50], "counts": []}, {"size": [40, 50], "counts": ""}, {"size": [40, 50], "counts": [2000]},
    rle(band(0, 0)), {"size": [40, 50]},
]  # fmt: skip


@pytest.mark.parametrize("segmentation", [*NO_OUTLINE, "missing", "compressed"])
def test_an_object_without_an_outline_is_a_label(coco, segmentation):
    """Its image is not scored, and is named; the others are as before."""
    before = {entry.id: entry.labels for entry in COCO(coco, "train").entries}
    data = example()
    data["annotations"][3]["segmentation"] = segmentation  # the person of image 9, "ä b"
    if segmentation == "missing":
        del data["annotations"][3]["segmentation"]
    if segmentation == "compressed":
        data["annotations"][3]["segmentation"] = compressed(band(0, 0))
    (coco / "annotations/instances_train2014.json").write_text(json.dumps(data))
    dataset = COCO(coco, "train")
    assert {entry.id: entry.labels for entry in dataset.entries} == before
    assert [dataset.entries[i].id for i in dataset.masked] == ["COCO_1", "\u5c71", '\U0001f600 "q" \\']
    with pytest.raises(ValueError, match=r"ä b.jpg: the image has no mask$"):
        dataset.mask(0)
    (line,) = check_folder(coco)
    assert line.startswith(f"note: {coco}")
    assert "1 image has an object without an outline" in line
    assert line.endswith("which is a label all the same; not scored: ä b.jpg")
    data["annotations"][0]["segmentation"] = None  # of image 70
    (coco / "annotations/instances_train2014.json").write_text(json.dumps(data))
    (line,) = check_folder(coco)
    assert "2 images have objects without an outline, which are labels all the same; not scored: ä b.jpg, CO" in line


def test_a_file_without_any_outline_needs_no_pycocotools(coco, monkeypatch):
    data = example()
    for annotation in data["annotations"]:
        del annotation["segmentation"]
    (coco / "annotations/instances_train2014.json").write_text(json.dumps(data))
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    dataset = COCO(coco, "train")
    assert dataset.masked == []
    assert [entry.labels for entry in dataset.entries] == [(0,), (0, 1, 2), (), ()]
    assert len(check(dataset)) == 1
    (line,) = check_folder(coco)
    assert line.endswith("no annotation has an outline in pixels, so no image has a mask and nothing is scored")


def square(left, top, side):
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


DRAWS_NOTHING = {
    "smaller than a pixel": square(30.1, 30.1, 0.2),
    "outside of the image": square(130, 130, 20),
    "a line": [[1, 1, 5, 5, 9, 9]],
    "behind another": square(5, 5, 20),  # one of the same pixels, which comes after it
}


@pytest.mark.parametrize("case", DRAWS_NOTHING)
def test_an_outline_that_draws_nothing_is_a_label_all_the_same(tmp_path, case):
    """Labels and masks come from the same objects: no other list of classes can be the cause."""
    data = example()
    data["annotations"] = [
        {"id": i, "image_id": image, "category_id": k, "segmentation": shape}
        for i, (image, k, shape) in enumerate(
            [(9, 18, DRAWS_NOTHING[case]), (9, 1, square(5, 5, 20)), (70, 1, square(5, 5, 20)), (70, 44, [RIGHT])]
        )
    ]
    path = write(tmp_path, data)
    assert [entry.labels for entry in COCO(tmp_path, "train").entries][:2] == [(0, 1), (0, 2)]
    (line,) = check_folder(tmp_path)
    assert line == (
        f"note: {path}: split 'train2014': none of the 4 masks shows 'dog' (a label of 1 photo): outlines draw nothing "
        "there, or are behind those of smaller objects"
    )
    data["annotations"][1:3] = []  # bottle is shown and dog is not
    data["annotations"].append(data["annotations"][-1] | {"image_id": 5, "category_id": 18})
    write(tmp_path, data)
    if case != "behind another":
        assert [line.partition("train2014': ")[2][:35] for line in check_folder(tmp_path)] == [
            "1 of 4 masks show not all of the la"
        ]


def test_outlines_that_draw_nothing_at_all_are_refused(tmp_path):
    data = example()
    for annotation in data["annotations"]:
        annotation.update(segmentation=square(130, 130, 20), iscrowd=0)
    write(tmp_path, data)
    (line,) = check_folder(tmp_path)
    assert line.endswith("; the outlines draw nothing: are they in pixels, and inside of the images?")


def test_shares_of_the_image_are_no_outline(tmp_path):
    """Some tools write 0 to 1 in place of pixels, which would be drawn in the corner."""
    data = example()
    for annotation in data["annotations"]:
        annotation["segmentation"] = square(0.25, 0.125, 0.5)
    write(tmp_path, data)
    assert COCO(tmp_path, "train").masked == []
    (line,) = check_folder(tmp_path)
    assert "no annotation has an outline in pixels" in line


def test_the_background_is_no_category(coco):
    data = example()
    data["categories"][1]["name"] = "_background_"
    (coco / "annotations/instances_train2014.json").write_text(json.dumps(data))
    (line,) = check_folder(coco)
    assert "but got '_background_': the background is 0 and void is 255, without a name" in line


def test_names_in_two_unicode_forms_are_one(coco):
    """The photo "ä b.jpg" is composed on the disk."""
    data = example()
    data["images"][0]["file_name"] = unicodedata.normalize("NFD", "ä b.jpg")
    data["categories"][0]["name"] = unicodedata.normalize("NFD", "Möwe")
    path = coco / "annotations/instances_train2014.json"
    path.write_text(json.dumps(data))
    dataset = COCO(coco, "train")
    assert dataset.entries[0].id == "ä b"
    assert dataset.image(0).shape == (3, HEIGHT, WIDTH)
    assert dataset.classes == ("person", "dog", "Möwe")
    data["categories"][1]["name"] = "Möwe"
    data["images"][1]["file_name"] = "ä b.jpg"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"duplicate category 'Möwe'\n.*: duplicate id ä b$"):
        COCO(coco, "train")


def test_a_number_is_no_ending(coco):
    data = example()
    for i, image in enumerate(data["images"]):
        (coco / "train2014" / image["file_name"]).rename(coco / f"train2014/frame.{i:04}")
        image["file_name"] = f"frame.{i:04}"
    (coco / "annotations/instances_train2014.json").write_text(json.dumps(data))
    assert [entry.id for entry in COCO(coco, "train").entries] == [f"frame.{i:04}" for i in range(4)]


def test_a_file_that_changes_is_noticed(coco):
    data = COCO(coco, "train")
    path = coco / "annotations/instances_train2014.json"
    text = path.read_text()
    for changed in (
        text.replace('"image_id": 9', '"image_id": 5'),
        text[:300],
        " " + text,
        text.replace(": 44", ": 45"),
    ):
        path.write_text(changed)
        with pytest.raises(
            ValueError, match=r"expected an annotation of image 9 at byte \d+, but the file has changed"
        ):
            data.mask(0)
    path.write_text(text)
    assert data.mask(0).max() == 255
    path.unlink()
    with pytest.raises(ValueError, match=r"expected a file that can be read, but No such file"):
        data.mask(0)


def test_masks_follow_the_entries(coco):
    data = COCO(coco, "train")
    masks = [data.mask(i) for i in range(4)]
    assert data.masked == [0, 1, 2, 3]
    data.entries = data.entries[::-1]
    assert all(data.mask(i).equal(masks[3 - i]) for i in range(4))
    data.entries = tuple(entry._replace(mask=None) for entry in data.entries)
    assert data.masked == []
    assert data[0].mask is None
    with pytest.raises(ValueError, match=r"jpg: the image has no mask"):
        data.mask(0)


def test_other_masks(coco):
    data = COCO(coco, "train")
    (coco / "made").mkdir()
    Image.new("L", (WIDTH, HEIGHT), 2).save(coco / "made/COCO_1.png")
    other = data.with_masks(coco / "made")
    assert set(other.mask(1).unique().tolist()) == {2}
    assert other[1].labels.tolist() == [1, 1, 1]
    assert other.entries[1] == data.entries[1]._replace(mask=coco / "made/COCO_1.png")
    assert other.masked == [0, 1, 2, 3]


def test_without_pycocotools(coco, monkeypatch):
    data = COCO(coco, "train")
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    assert COCO(coco, "train").entries == data.entries
    assert data.mask(3).max() == 0  # no annotations
    with pytest.raises(ImportError, match=r"^Masks of COCO need an extra: pip install 'cacl\[coco\]' \("):
        data.mask(0)
    with pytest.raises(ImportError, match=r"cacl\[coco\]"):
        check(data)


def test_it_pickles(coco):
    data = COCO(coco, "train")
    again = pickle.loads(pickle.dumps(data))
    assert again.entries == data.entries
    assert again.mask(1).equal(data.mask(1))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_it_loads_in_processes(coco, context):
    data = COCO(coco, "train")
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context)
    for i, sample in enumerate(loader):
        assert sample[0] == data.entries[i].id
        assert torch.equal(sample[3], data.mask(i))


def test_the_fingerprint_looks_at_the_file_once(coco, monkeypatch):
    data = COCO(coco, "train")
    asked, state = [], files._state
    monkeypatch.setattr(files, "_state", lambda path: asked.append(path) or state(path))
    with_masks = data.fingerprint(masks=True)
    assert len(asked) == 5
    assert len(set(asked)) == 5
    path = coco / "annotations/instances_train2014.json"
    path.write_text(path.read_text() + " ")
    assert data.fingerprint(masks=True) != with_masks
    assert data.fingerprint() == COCO(coco, "train").fingerprint()


def test_the_classes_have_built_in_background_words(tmp_path):
    """Those of the real file: their ids have gaps, and 80 names in their order."""
    names = list(BackgroundSet.coco())
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    categories = [{"id": i, "name": name, "supercategory": "x"} for i, name in zip(ids, names, strict=True)]
    write(tmp_path, example() | {"categories": categories[::-1]})
    data = COCO(tmp_path, "train")
    assert data.classes == tuple(names)
    assert BackgroundSet.built_in(data.classes, 5)
    assert data.entries[1].labels == (0, names.index("dog"), names.index("bottle"))


def many(count):
    for i in range(count):
        name = f"COCO_train2014_{i:012}"
        labels = tuple(range(i % 5))
        yield Entry(name, Path(f"/data/coco/train2014/{name}.jpg"), labels, Path(f"/data/coco/masks/{name}.png"))


@pytest.fixture
def no_table_of_names(monkeypatch):
    """pathlib keeps the names that it has seen in a table of Python's, which grows by megabytes at any time."""
    monkeypatch.setattr(sys, "intern", lambda name: name)


@pytest.mark.usefixtures("no_table_of_names")
def test_entries_take_little_memory():
    sum(1 for _ in many(100))
    tracemalloc.start()
    entries = Entries(many(20_000))
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(entries) == 20_000
    assert used < 3e6
    assert peak < 4e6
    assert len(pickle.dumps(entries)) < 3e6


@pytest.mark.usefixtures("no_table_of_names")
def test_opening_takes_little_memory(tmp_path, monkeypatch):
    """A few chunks, whatever the file's size; what is kept of an annotation are 12 bytes."""
    data = example()
    outline = np.random.default_rng(0).uniform(0, 40, 2000).round(2).tolist()
    data["annotations"] = [a | {"segmentation": [outline], "id": i} for i in range(40) for a in data["annotations"]]
    path = write(tmp_path, data)
    assert path.stat().st_size > 4e6
    monkeypatch.setattr(_json_stream, "CHUNK", 1 << 16)
    COCO(tmp_path, "train")
    tracemalloc.start()
    kept = COCO(tmp_path, "train")
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 4
    assert used < 50_000
    assert peak < 1e6


def test_entries_are_those_that_were_given():
    odd = [
        Entry("a", Path("a.png"), (), None),
        Entry("b/\u5c71\udcff", Path("/x/y\udcff/\ud83dz.png"), (0, 3, 79), Path("masks/ä.png")),
        Entry("", Path("."), (300,), Path("/")),
        Entry("a" * 5000, Path("/x/y\udcff/2.png"), (1,), Path("..")),
    ]
    entries = Entries(odd)
    assert list(entries) == odd
    assert [entries[i] for i in range(-4, 0)] == odd
    assert list(entries[1:]) == odd[1:]
    assert list(entries[::-2]) == odd[::-2]
    assert entries[:0] == Entries()
    assert odd[2] in entries
    assert entries.index(odd[3]) == 3
    assert list(reversed(entries)) == odd[::-1]
    for index in (4, -5):
        with pytest.raises(IndexError):
            entries[index]
    same, other = Entries(iter(odd)), Entries([*odd[:3], odd[3]._replace(mask=None)])
    assert same == entries
    assert len({entries: 1, same: 2, other: 3}) == 2
    assert entries != tuple(odd)
    assert pickle.loads(pickle.dumps(entries)) == entries
    assert Dataset(["x"], entries).entries is entries
    assert list(Dataset(["x"], odd).entries) == odd


def test_counts_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for density in (0.02, 0.5, 0.98):
        region = (rng.random((HEIGHT, WIDTH)) < density).astype(np.int64)
        assert uncompressed(compressed(region)["counts"]) == rle(region)["counts"]
