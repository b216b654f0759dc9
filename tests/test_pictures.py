"""Pictures: VOC's colours, thresholds by hand, and a table whose cells are where they should be."""

import numpy as np

from cacl.images import VOC_COLOURS
from cacl.pictures import COLOURS, heatmap, overlay, palette, sheet, threshold


def test_the_palette_is_voc_s():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128),
             20: (0, 64, 128), 255: (224, 224, 192)}  # fmt: skip
    colours = VOC_COLOURS
    assert {value: tuple(colours[value].tolist()) for value in known} == known
    assert (palette()[:255] == COLOURS[:255]).all()
    assert (palette()[255] == 255).all()


def test_threshold():
    maps = np.array([[[0.1, 0.9], [0.15, 0.2]], [[0.05, 0.3], [0.16, 0.8]]], dtype=np.float32)
    assert threshold(np.array([2, 5]), maps).tolist() == [[0, 3], [6, 6]]
    assert threshold(np.array([2, 5]), maps, 0.85).tolist() == [[0, 3], [0, 0]]
    assert threshold(np.array([], dtype=np.int64), np.zeros((0, 2, 3), np.float32)).tolist() == [[0, 0, 0]] * 2


def test_heatmap_is_red_where_it_is_high():
    photo = np.zeros((1, 3, 3), np.uint8)
    high, low, none = heatmap(photo, np.array([[[0.9, 0.1, 0.0]], [[0.2, 0.0, 0.0]]], np.float32))[0].astype(int)
    assert high[0] > 100 > high[2]
    assert low[2] > 100 > low[0]
    assert none[0] == none[1] == 0
    assert np.array_equal(heatmap(photo, np.zeros((0, 1, 3), np.float32))[0, 0], none)


def test_overlay_shows_classes_and_what_is_ignored():
    photo = np.full((1, 3, 3), 100, np.uint8)
    background, first, ignored = overlay(photo, np.array([[0, 1, 255]]))[0].tolist()
    assert background == [35, 35, 35]
    assert first == [int(35 + 0.65 * colour) for colour in COLOURS[1]]
    assert min(ignored) > 195


def test_a_sheet_shows_every_picture_in_its_place():
    red, blue = np.full((20, 30, 3), (255, 0, 0), np.uint8), np.full((40, 10, 3), (0, 0, 255), np.uint8)
    table = np.asarray(sheet(["one", "two"], [("first", [red, blue]), ("second", [blue, red])], height=40))
    is_red = (table == (255, 0, 0)).all(-1)
    is_blue = (table == (0, 0, 255)).all(-1)
    assert is_red.sum() == 2 * 60 * 40
    assert is_blue.sum() == 2 * 10 * 40
    top, left = 80, table.shape[1] // 2
    assert is_red[:top, :left].sum() == is_red[top:, left:].sum() == 60 * 40
    wide = np.zeros((10, 100, 3), np.uint8)
    assert sheet(["wide"], [("", [wide])], height=40).width <= 60 + 12
