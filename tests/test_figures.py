"""The charts: as many bars, curves and pictures as there is data, named, and the caller's settings left alone."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from cacl import figures
from cacl.figures import iou_bars, loss_curves, method_bars, miou_bars, photo_grid, selection_curves, stage_costs
from cacl.figures.style import smoothed
from cacl.pictures import COLOURS


def texts(figure: Figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def records(stage, steps=40, **values):
    return [{"stage": stage, "step": i + 1, "epoch": (i + 1) / 10, **values} for i in range(steps)]


@pytest.mark.parametrize(("count", "panels"), [(3, 1), (21, 1), (22, 2), (81, 4)])
def test_iou_bars_has_a_bar_for_every_class_and_row(count, panels):
    names = [f"class {i}" for i in range(count)]
    rows = {"one": dict.fromkeys(names, 0.25), "two": dict.fromkeys(names[1:], 0.5)}
    figure = iou_bars(rows, highlight="two")
    assert isinstance(figure, Figure)
    assert len(figure.axes) == panels
    bars = [patch for axes in figure.axes for patch in axes.patches]
    assert len(bars) == 2 * count - 1
    assert {round(bar.get_height(), 6) for bar in bars} == {25.0, 50.0}
    assert [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()] == names
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one (mean 25.0)", "two (mean 50.0)"]
    # Every panel has room for as many classes as the first, so that bars are as wide everywhere.
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_labels_of_classes_do_not_overlap():
    names = [f"some long class name {i}" for i in range(81)]
    figure = iou_bars({f"template {j}": dict.fromkeys(names, 0.3) for j in range(6)})
    figure.draw_without_rendering()
    for axes in figure.axes:
        lefts = [label.get_window_extent().x1 for label in axes.get_xticklabels()]
        assert np.diff(lefts).min() > 20  # turned labels, each a line of text apart


def test_miou_bars_shows_values_with_what_belongs_beside_them():
    figure = miou_bars(
        ["warm-up", "CA-CL", "masks"],
        [0.314, 0.418, 0.5],
        groups=["val", "val", "train"],
        notes=["val, 100 images", "val, 100 images", "train, 400 images"],
        oracles=[0.33, None, None],
    )
    (axes,) = figure.axes
    assert [round(bar.get_width(), 1) for bar in axes.patches] == [31.4, 41.8, 50.0]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2
    shown = texts(figure)
    assert all(text in shown for text in ("31.4", "41.8", "50.0", "train, 400 images", "oracle (sees the masks)"))
    assert "oracle" not in texts(miou_bars(["one"], [0.5]))


def test_method_bars_shows_means_and_every_seed():
    values = {"CAM": {"CLIMS": [0.3, 0.4], "CA-CL": [0.5]}, "pseudo masks": {"CLIMS": [], "CA-CL": [0.6]}}
    figure = method_bars(values)
    (axes,) = figure.axes
    assert [round(bar.get_width(), 1) for bar in axes.patches] == [35.0, 50.0, 0.0, 60.0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[30.0, 40.0], [50.0], [60.0]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["CLIMS", "CA-CL"]
    assert all(text in texts(figure) for text in ("35.0", "50.0", "60.0", "CAM", "pseudo masks"))
    with pytest.raises(ValueError, match="Expected argument `values` to be a mean IoU of at least one method"):
        method_bars({"CAM": {"CLIMS": []}})


def test_loss_curves_has_a_panel_a_stage_and_the_weighted_terms():
    rows = records("warmup", loss=0.5) + records("cacl", loss=30.0, itc=0.5, bgs=10.0, region=0.1)
    figure = loss_curves(rows, weights={"itc": 40.0, "bgs": 1.0, "region": 0.0})
    assert [axes.get_title("left") for axes in figure.axes] == ["Loss: warm-up", "Loss: CA-CL"]
    warmup, cacl = figure.axes
    assert len(warmup.lines) == 2  # measured and smoothed
    assert len(cacl.lines) == 6
    assert {float(line.get_ydata()[-1]) for line in cacl.lines} == {30.0, 20.0, 10.0}
    assert cacl.get_xlabel() == "epoch"
    assert cacl.lines[0].get_xdata()[-1] == pytest.approx(4.0)
    assert "40 · ITC" in texts(figure)
    assert "REG" not in texts(figure)
    assert len(loss_curves(rows).axes[1].lines) == 2
    with pytest.raises(ValueError, match="Expected argument `records` to be records with a stage and a loss"):
        loss_curves([])


def test_selection_curves_names_templates_and_bears_what_is_not_finite_or_missing():
    rows = records(
        "cacl", foreground_similarity=0.3, background_similarity=0.2, threshold=0.26, pass_rate=0.1,
        template_share=[0.7, 0.3],
    )  # fmt: skip
    rows[3]["pass_rate"] = float("nan")
    rows.append({"stage": "cacl", "epoch": 4.1})
    figure = selection_curves(rows, templates=["a photo of {}.", "an image of {}."])
    similarity, passed, share = figure.axes
    assert len(similarity.lines) == 6
    assert np.isfinite(passed.lines[1].get_ydata()).all()
    assert [line.get_ydata()[0] for line in share.lines] == pytest.approx([70.0, 30.0])
    shown = texts(figure)
    assert all(name in shown for name in ("θ", "foreground", "background", "a photo of {}.", "an image of {}."))
    assert "template 2" in texts(selection_curves(rows))


def test_names_at_the_ends_of_curves_keep_apart():
    rows = records("cacl", template_share=[0.2, 0.2, 0.2, 0.2, 0.2], threshold=0.2)
    figure = selection_curves(rows)
    names = [text for text in figure.axes[2].texts if text.get_text().startswith("template")]
    heights = sorted(text.xy[1] for text in names)
    assert len(heights) == 5
    assert np.diff(heights).min() > 0.09


def test_smoothed_keeps_constants_lines_and_length():
    assert smoothed(np.full(50, 3.0), 5) == pytest.approx(np.full(50, 3.0))
    line = np.arange(50.0)
    assert smoothed(line, 5)[5:-5] == pytest.approx(line[5:-5])
    assert smoothed(line, 0) == pytest.approx(line)
    assert len(smoothed(np.arange(3.0), 8)) == 3


def test_long_runs_are_thinned_to_what_can_be_seen():
    figure = loss_curves(records("warmup", steps=20_000, loss=1.0))
    assert max(len(line.get_xdata()) for line in figure.axes[0].lines) <= 500


def test_stage_costs_says_time_and_memory_as_people_do():
    costs = {"warmup": {"seconds": 41.2, "memory_mb": 812.0}, "cacl": {"seconds": 6120.0}, "irn": {"seconds": 192.0}}
    figure = stage_costs(costs)
    assert len(figure.axes) == 2
    shown = texts(figure)
    assert all(text in shown for text in ("41 s", "1.7 h", "3.2 min", "812 MB", "warm-up", "CA-CL"))
    assert not figure.legends
    assert len(stage_costs({"warmup": {"seconds": 1.0}}).axes) == 1
    split = stage_costs(
        {"warmup": {"seconds": 10.0, "photos": 2.0, "network": 7.0}, "irn": {"seconds": 4.0, "crf": 4.1}}
    )
    bars = [[round(bar.get_width(), 1) for bar in bars] for bars in split.axes[0].containers]
    assert bars == [[2.0, 0.0], [7.0, 0.0], [0.0, 4.1], [1.0, 0.0]]
    labels = [text.get_text() for text in split.legends[0].get_texts()]
    assert labels == ["waiting for photos", "network", "CRF", "everything else"]
    with pytest.raises(ValueError, match="Expected argument `costs`"):
        stage_costs({})


def test_photo_grid_has_an_image_a_cell_and_a_legend_in_voc_colours():
    wide, tall = np.zeros((20, 60, 3), np.uint8), np.full((40, 20, 3), 255, np.uint8)
    figure = photo_grid(["photo", "mask"], [("a: boat", [wide, tall]), ("b", [tall, tall])], legend={1: "boat"})
    assert sum(len(axes.images) for axes in figure.axes) == 4
    shown = texts(figure)
    assert all(text in shown for text in ("photo", "mask", "a: boat", "boat"))
    (swatch,) = [text for text in figure.texts if text.get_text() == "■"]
    assert swatch.get_color()[:3] == pytest.approx(COLOURS[1] / 255)
    for axes in figure.axes:  # pictures keep their shape
        box = axes.get_position()
        ratio = (box.width * figure.get_figwidth()) / (box.height * figure.get_figheight())
        height, width = axes.images[0].get_array().shape[:2]
        assert ratio == pytest.approx(width / height, rel=1e-6)
    with pytest.raises(ValueError, match="a picture for each of 2 columns"):
        photo_grid(["photo", "mask"], [("a", [wide])])


def test_names_are_text_and_never_formulas():
    figure = iou_bars({"$x^2$": {"a$b$c": 0.5, "猫": 0.2}})
    assert {"a$b$c", "猫"} <= {label.get_text() for label in figure.axes[0].get_xticklabels()}
    assert not any(text.get_parse_math() for text in figure.findobj(matplotlib.text.Text) if text.get_text())


def test_the_caller_s_settings_stay_and_do_not_matter():
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        figure = figures.miou_bars(["one"], [0.5])
        assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].get_yticklabels()[0].get_fontsize() == 9


def test_nothing_is_imported_before_it_is_needed_and_pyplot_never():
    code = """
import sys, cacl.report
assert not {"matplotlib", "jinja2"} & set(sys.modules)
cacl.figures.miou_bars(["one"], [0.5])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_extra_one_line_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'cacl\[report\]'"):
        miou_bars(["one"], [0.5])
