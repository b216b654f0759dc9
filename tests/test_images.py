"""Photos and masks of every depth: contrast by type or data set, nothing hidden is seen, masks keep their numbers."""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from drawn import write_csv
from PIL import Image

from cacl.config import Config
from cacl.datasets import CSVDataset, check, check_folder, open_dataset
from cacl.images import VOC_COLOURS, read_image, read_mask
from cacl.runs.session import Session

RAMP = np.arange(256).reshape(16, 16)
"""Every value of 8 bits once."""
NOISE = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values: np.ndarray, depth: int, colour: int = 0, more: bytes = b"") -> bytes:
    """A PNG of any depth, by the standard; ``(H, W)`` or ``(H, W, C)``."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        packed = [np.packbits(row.ravel()).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    def put(name: str, content: bytes | np.ndarray | Image.Image):
        path = tmp_path / name
        if isinstance(content, np.ndarray):
            content = Image.fromarray(content)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)
        return path

    return put


def grey(path, range=None) -> np.ndarray:
    image = read_image(path, range).numpy()
    assert (image == image[:1]).all()
    return image[0]


def upright(path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


# Deep photos


def test_16_bits_span_the_type_whatever_an_image_holds(write):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    wanted = np.rint(values / 257)
    assert (grey(write("a.png", values)) == wanted).all()
    assert (grey(write("a.tif", values)) == wanted).all()
    assert (grey(write("a.jp2", values)) == wanted).all()
    assert (grey(write("long.tif", values.astype(np.int32))) == wanted).all()
    # half the light is half the value, and so the order of two frames of one camera stays
    assert (grey(write("half.png", values // 2)) == np.rint((values // 2) / 257)).all()


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
def test_few_bits_in_16_are_black_and_so_refused(write, bits, ending):
    top = 2**bits - 1
    values = np.linspace(0, top, 256).round().astype(np.uint16).reshape(16, 16)
    path = write(f"a.{ending}", values)
    line = (
        f"{path}: expected values that fill 0 to 65535, but got 0 to {top}; say what the data set's span, such as "
        f"`[data] range = [0, {top}]`, or [0, 65535] if it is meant to be dark"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        read_image(path)
    assert (grey(path, (0, top)) == np.rint(values * (255 / top))).all()
    assert (grey(path, (0, 65535)) == np.rint(values / 257)).all()


def test_two_frames_keep_their_order(write):
    light = np.linspace(0, 4000, 256).astype(np.uint16).reshape(16, 16)
    dark = light // 20  # in 8 bits, and still darker than the other one
    one, other = (grey(write(f"{name}.png", values), (0, 4095)) for name, values in (("a", light), ("b", dark)))
    assert (one == np.rint(light * (255 / 4095))).all()
    assert (other == np.rint(dark * (255 / 4095))).all()


def test_ct_values(write):
    values = np.linspace(-1024, 3071, 256).round().astype(np.int32).reshape(16, 16)
    path = write("ct.tif", values)
    with pytest.raises(ValueError, match=r"got -1024 to 3071; say what the data set's span, .*\[-1024, 3071\]`$"):
        read_image(path)
    assert (grey(path, (-1000, 1000)) == np.rint((np.clip(values, -1000, 1000) + 1000) * (255 / 2000))).all()


def test_floats_span_0_to_1(write):
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert (grey(write("a.tif", values)) == RAMP).all()
    assert (grey(write("over.tif", values * 1.005)) == np.rint(np.clip(values * 1.005, 0, 1) * 255)).all()
    assert (grey(write("dim.tif", values / 2)) == np.rint(values / 2 * 255)).all()
    holes = values.copy()
    holes[3, 4:7] = np.nan, np.inf, -np.inf
    assert grey(write("holes.tif", holes))[3, 4:7].tolist() == [0, 255, 0]
    for name, factor, says in (
        ("bytes", 255, r"0 to 255; .*\[0, 255\]`$"),
        ("dark", 0.05, r"0 to 0.05; .*\[0, 1\]"),
        ("over2", 1.5, r"0 to 1.5; .*\[0, 1.5\]`$"),  # in [0, 255] it would be black
    ):
        with pytest.raises(ValueError, match=rf"{name}.tif: expected values that fill 0 to 1, but got {says}"):
            read_image(write(f"{name}.tif", values * np.float32(factor)))
    assert (grey(write("bytes.tif", RAMP.astype(np.float32)), (0, 255)) == RAMP).all()
    with pytest.raises(ValueError, match=r"got -0\.5 to 0\.5"):
        read_image(write("negative.tif", values - np.float32(0.5)))


def test_an_image_of_one_value_is_what_it_is(write):
    for name, value in (("black", 0), ("dim", 900), ("white", 65535)):
        assert (grey(write(f"{name}.png", np.full((4, 4), value, np.uint16))) == round(value / 257)).all()
    assert not grey(write("nan.tif", np.full((4, 4), np.nan, np.float32))).any()


def test_what_a_file_says_of_its_values_counts(write):
    """The largest value of a PGM; Pillow scales by it."""
    values = RAMP * 4
    for name, head, content in (
        ("raw.pgm", b"P5", values.astype(">u2").tobytes()),
        ("plain.pgm", b"P2", b" ".join(b"%d" % value for value in values.ravel())),
    ):
        path = write(name, head + b" 16 16 1023\n" + content)
        assert (grey(path) == np.rint(values * (255 / 1023))).all()
        assert (grey(path, (0, 511)) == np.rint(values.clip(max=511) * (255 / 511))).all()
    colours = np.repeat(values[..., None], 3, 2).astype(">u2").tobytes()
    assert np.abs(grey(write("a.ppm", b"P6 16 16 1023\n" + colours)) - values * (255 / 1023)).max() <= 0.5


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_colours_of_16_bits(write, colour):
    """Pillow reads their high bytes: that does for what fills 16 bits, and for nothing else."""
    channels = {2: 3, 4: 2, 6: 4}[colour]
    values = np.repeat((RAMP * 257)[..., None], channels, 2)
    values[..., -1:] = 65535 if colour > 2 else values[..., -1:]
    path = write("a.png", png(values, 16, colour))
    assert (grey(path) == RAMP).all()
    assert (grey(path, (0, 65535)) == RAMP).all()
    with pytest.raises(ValueError, match=r"expected grey or 8 bits where `\[data\] range` is set; write it with 8"):
        read_image(path, (0, 4095))
    values[..., : 3 if colour != 4 else 1] //= 64
    path = write("few.png", png(values, 16, colour))
    with pytest.raises(ValueError, match=r"few.png: expected values that fill 0 to 65535, but got none above 1023;"):
        read_image(path)
    assert grey(path, (0, 65535)).max() == 3


def test_8_bits_know_no_range(write):
    path = write("a.png", RAMP.astype(np.uint8))
    assert (grey(path, (0, 4095)) == RAMP).all()
    for wrong in ((5, 5), (5, 1), (0, float("nan")), (0,), "ab", (True, 3)):
        with pytest.raises(ValueError, match=r"^range: expected two numbers, the lower one first"):
            read_image(path, wrong)


def test_the_range_of_a_data_set(tmp_path):
    root = write_csv(tmp_path)
    for i in range(9):
        photo = Image.open(root / f"images/{i}.png").convert("L")
        Image.fromarray(np.asarray(photo).astype(np.uint16) * 16).save(root / f"images/{i}.png")
    assert all("expected values that fill 0 to 65535" in line for line in check_folder(root))
    assert len(check_folder(root)) == 9
    assert check_folder(root, range=(0, 4095)) == []
    for black_or_white in ((0, 65535), (3000, 4095), (-100, 10)):
        line, other = check_folder(root, range=black_or_white)
        assert line.startswith(
            f"note: {root}/dataset.csv: split 'train': 6 of 6 photos come out nearly black or white, "
        )
        assert "split 'val': 3 of 3 photos come out" in other
        low, high = black_or_white
        assert line.endswith(f"such as {root}/images/0.png: does `[data] range = [{low}, {high}]` span the values?")
    dataset = open_dataset("csv", root, "train", range=(0, 4095))
    assert 120 < dataset.image(0).max() < 160
    assert dataset.with_masks(tmp_path / "masks").image(0).equal(dataset.image(0))
    assert check(dataset) == []
    plain = CSVDataset(root, "train")
    assert len(check(plain)) == 6
    other = open_dataset("csv", root, "train", range=(0, 1023))
    assert len({each.fingerprint() for each in (plain, dataset, other)}) == 3
    assert open_dataset("csv", root, "train").fingerprint() == plain.fingerprint()


def test_the_range_is_a_setting(tmp_path):
    root = write_csv(tmp_path / "data")
    base = ["data.format=csv", f"data.root={root}", "data.train=train", f"run.out={tmp_path / 'run'}"]
    config = Config.load("voc", [*base, "data.range=[0, 4095]"])
    assert Session(config).train.range == (0, 4095)
    assert Session(Config.load("voc", base)).train.range is None
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert Config.load(tmp_path / "config.toml").data.range == (0, 4095)
    with pytest.raises(ValueError, match=r"\[data\] range: expected two numbers, .* got \(5.0, 1.0\)"):
        Config.load("voc", [*base, "data.range=[5, 1]"])


# Transparency


def over_white(pixels: np.ndarray) -> np.ndarray:
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("kind", ["png", "webp", "tif", "tga", "ico"])
def test_hidden_pixels_are_not_seen(write, kind, tmp_path):
    pixels = np.dstack([NOISE, np.zeros((16, 12), np.uint8)])
    pixels[4:8, 3:9, 3], pixels[8:12, 3:9, 3] = 255, 128
    path = tmp_path / f"a.{kind}"
    options = {"lossless": True, "exact": True} if kind == "webp" else {"sizes": [(12, 16)]} if kind == "ico" else {}
    Image.fromarray(pixels).save(path, **options)
    with Image.open(path) as file:
        assert np.asarray(file)[..., :3].std() > 20  # they are there
    assert np.abs(upright(path) - over_white(pixels)).max() <= 1
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(path, **options)
    assert (upright(path) == NOISE).all()


def test_every_way_to_be_transparent(write):
    ramp = RAMP.astype(np.uint8)
    hidden = ramp < 100
    wanted = np.where(hidden, 255, ramp)
    alpha = np.where(hidden, 0, 255).astype(np.uint8)
    assert (grey(write("la.png", np.dstack([ramp, alpha]))) == wanted).all()
    palette = Image.fromarray(ramp).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    palette.putdata(ramp.ravel())
    palette.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    each = bytes(0 if value < 100 else 255 for value in range(256))
    assert (grey(write("bytes.png", saved(palette, "PNG", transparency=each))) == wanted).all()
    one = np.where(ramp == 7, 255, ramp)
    assert (grey(write("index.png", saved(palette, "PNG", transparency=7))) == one).all()
    assert (grey(write("index.gif", saved(palette, "GIF", transparency=7))) == one).all()
    key = chunk(b"tRNS", struct.pack(">H", 7))
    assert (grey(write("key.png", png(ramp, 8, more=key))) == one).all()
    keys = chunk(b"tRNS", struct.pack(">3H", 7, 7, 7))
    assert (grey(write("keys.png", png(np.repeat(ramp[..., None], 3, 2), 8, 2, keys))) == one).all()
    few = RAMP % 4
    stretched = np.where(few == 1, 255, few * 85)  # the key is in the file's own numbers
    assert (grey(write("few.png", png(few, 2, more=chunk(b"tRNS", struct.pack(">H", 1))))) == stretched).all()
    deep = RAMP * 257
    key = chunk(b"tRNS", struct.pack(">H", 7 * 257))
    assert (grey(write("deep.png", png(deep, 16, more=key))) == one).all()
    keys = chunk(b"tRNS", struct.pack(">3H", *[7 * 257] * 3))
    assert (grey(write("deeper.png", png(np.repeat(deep[..., None], 3, 2), 16, 2, keys))) == one).all()


def test_a_photo_that_is_all_transparent(write):
    with pytest.raises(ValueError, match=r"a.png: expected a photo, but all of it is transparent; save it without"):
        read_image(write("a.png", np.zeros((4, 4, 4), np.uint8)))


# What goes with a photo


def exif(*more: bytes, orientation: int = 6) -> bytes:
    """EXIF data by the standard: the orientation, and other entries of 12 bytes."""
    entries = [struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0), *more]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + b"\0\0\0\0"


TURNED = np.rot90(NOISE, -1)
BROKEN = {
    "sound": (exif(), TURNED),
    "offset": (exif(struct.pack("<HHII", 0x11A, 5, 1, 10**8)), TURNED),
    "type": (exif(struct.pack("<HHI4s", 0x131, 77, 3, b"abc")), TURNED),
    "folder": (exif(struct.pack("<HHII", 0x8769, 4, 1, 10**6)), TURNED),
    "text": (exif(struct.pack("<HHI4s", 0x8769, 2, 4, b"abc")), TURNED),
    # What Pillow reads and cannot write again, as an image that is turned by its own function would need.
    "wide unit": (exif(struct.pack("<HHII", 0x128, 4, 1, 10**6)), TURNED),
    "maker of floats": (exif(struct.pack("<HHIf", 0x10F, 11, 1, 0.5)), TURNED),
    "folder of bytes": (exif(struct.pack("<HHI4s", 0xA005, 7, 4, b"abcd")), TURNED),
    "garbage": (b"no EXIF at all", NOISE),
    "cut": (exif()[:9], NOISE),
    "beyond": (exif(orientation=9), NOISE),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_photo_is_lost_for_its_exif(write, name, kind):
    data, wanted = BROKEN[name]
    image = Image.fromarray(NOISE)
    if kind == "PNG":
        whole = saved(image, "PNG")
        at = whole.index(b"IDAT") - 4
        found = upright(write("a.png", whole[:at] + chunk(b"eXIf", data) + whole[at:]))
        assert (found == wanted).all()
    else:
        options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
        found = upright(write(f"a.{kind.lower()}", saved(image, kind, exif=b"Exif\0\0" + data, **options)))
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted).max() <= 8


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiffs_are_turned_once(write, compression):
    data = Image.Exif()
    data[0x112] = 6
    image = Image.fromarray(NOISE)
    assert (upright(write("a.tif", saved(image, "TIFF", exif=data, compression=compression))) == TURNED).all()
    deep = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    assert (grey(write("deep.tif", saved(deep, "TIFF", exif=data, compression=compression))) == TURNED[..., 0]).all()


def test_metadata_that_pillow_refuses(write):
    whole = saved(Image.fromarray(NOISE), "PNG")
    at = whole.index(b"IDAT") - 4
    large = zlib.compress(bytes(3 * 2**20))
    turned = chunk(b"eXIf", exif())
    for more in (
        chunk(b"zTXt", b"workflow\0\0" + large),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + large),
        chunk(b"iCCP", b"profile\0\0" + large),
        chunk(b"iCCP", b"profile\0\0broken"),
        chunk(b"tEXt", b"a\0b")[:-4] + b"1234",
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nno digits"),
    ):
        assert (upright(write("a.png", whole[:at] + more + turned + whole[at:])) == TURNED).all()
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    assert (upright(write("a.png", whole[:at] + chunk(b"iTXt", xmp) + whole[at:])) == TURNED).all()
    assert (upright(write("icc.tif", saved(Image.fromarray(NOISE), "TIFF", icc_profile=b"no"))) == NOISE).all()
    with pytest.raises(ValueError, match=r"a.png: not an image that decodes"):  # pixels that are broken stay broken
        read_image(write("a.png", whole[: at + 60]))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_first_of_several(write):
    first, second = Image.fromarray(NOISE), Image.fromarray(NOISE[::-1])
    several = {"save_all": True, "append_images": [second]}
    for name, kind in (("a.png", "PNG"), ("a.tif", "TIFF")):
        assert (upright(write(name, saved(first, kind, **several))) == NOISE).all()
    stereo = saved(first, "MPO", quality=100, subsampling=0, **several)
    at = stereo.index(b"MPF\0")
    for content in (stereo, stereo[:-100], stereo[: at + 4] + bytes(30) + stereo[at + 34 :]):
        assert np.abs(upright(write("a.mpo", content)).astype(int) - NOISE).max() <= 8


# Masks


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_masks_of_every_depth_keep_their_numbers(write, depth, kind):
    top = min(2**depth - 1, 255)
    values = RAMP % (top + 1)
    if kind == "png":
        path = write("a.png", png(values, depth))
    elif kind == "pgm":
        large = 2**depth - 1
        numbers = values.astype(">u2" if large > 255 else np.uint8).tobytes()
        path = write("a.pgm", b"P5 16 16 %d\n" % large + numbers)
    else:
        path = write("a.tif", tiff(values, depth))
    mask = read_mask(path)
    assert mask.dtype == torch.uint8
    assert (mask.numpy() == values).all()


def tiff(values: np.ndarray, depth: int) -> bytes:
    """A grey TIFF of any depth, by the standard."""
    if depth == 16:
        pixels = values.astype("<u2").tobytes()
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        pixels = b"".join(np.packbits(row.ravel()).tobytes() for row in bits)
    height, width = values.shape
    tags = {256: width, 257: height, 258: depth, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_masks_in_channels_and_wide_numbers(write):
    values = (RAMP % 7).astype(np.uint8)
    values[0, 0] = 255
    opaque = np.full_like(values, 255)
    for name, stored in {
        "la.png": np.dstack([values, opaque]),
        "rgb.png": np.dstack([values] * 3),
        "rgba.png": np.dstack([values] * 3 + [opaque]),
        "16.png": values.astype(np.uint16),
        "32.tif": values.astype(np.int32),
        "float.tif": values.astype(np.float32),
    }.items():
        assert (read_mask(write(name, stored)).numpy() == values).all(), name
    palette = Image.fromarray(values)
    palette.putpalette(VOC_COLOURS.tobytes())
    for transparency in (0, bytes([0, 128, 255])):
        assert (read_mask(write("p.png", saved(palette, "PNG", transparency=transparency))).numpy() == values).all()


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (np.full((4, 4), 300, np.uint16), "expected whole numbers from 0 to 255, .* but got 300$"),
        (np.full((4, 4), 65535, np.uint16), "which is for pixels to ignore, but got 65535$"),
        (np.full((4, 4), -1, np.int32), "expected whole numbers .* but got -1$"),
        (np.full((4, 4), 0.5, np.float32), "expected whole numbers .* but got 0.5$"),
        (np.full((4, 4), np.nan, np.float32), "expected whole numbers .* but got nan$"),
        (np.full((4, 4, 3), (128, 0, 0), np.uint8), "but got mode RGB; write class numbers as one channel of 8 bits$"),
        (np.full((4, 4, 4), (1, 1, 1, 9), np.uint8), "but got mode RGBA with transparent pixels; write class numbers"),
        (png(np.full((4, 4, 3), 257), 16, 2), "but got mode RGB of 16 bits, of which Pillow reads only the high ones;"),
    ],
)
def test_what_is_no_mask(write, stored, says):
    deep = not isinstance(stored, bytes) and stored.dtype in (np.int32, np.float32)
    path = write("a.tif" if deep else "a.png", stored)
    with pytest.raises(ValueError, match=says) as error:
        read_mask(path)
    assert "\n" not in str(error.value)
