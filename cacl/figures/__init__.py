"""Charts and photo grids of a run in one sober look: plain data in, a matplotlib figure out, no pyplot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cacl._support.clock import KINDS
from cacl.errors import expected
from cacl.figures.grid import photo_grid as photo_grid
from cacl.figures.style import (
    INK,
    MUTED,
    SERIES,
    WIDTH,
    add_curve,
    duration,
    finish_curves,
    memory,
    new_figure,
    round_up,
    series,
    styled,
)
from cacl.stages.chain import CHAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CLASSES_A_ROW = 21
_TERMS = {"itc": "ITC", "bgs": "BGS", "region": "REG"}


@styled
def iou_bars(rows: Mapping[str, Mapping[str, float]], *, highlight: str | None = None) -> Figure:
    """IoU of every class for several rows, such as templates (the paper's figure 2) or stages, as grouped bars.

    Args:
        rows: name -> class -> IoU in [0, 1]; a class that a row lacks has no bar.
        highlight: name of a row in the colour of the text.

    Returns:
        A panel for every 21 classes, one below the other, and a legend with the mean of each row.
    """
    classes = list(dict.fromkeys(chain.from_iterable(rows.values())))
    if not classes:
        raise expected("rows", "IoU of at least one class", dict(rows))
    panels = -(-len(classes) // _CLASSES_A_ROW)
    each = -(-len(classes) // panels)
    figure = new_figure((WIDTH, 0.6 + 2.3 * panels))
    top = round_up(100 * max(value for values in rows.values() for value in values.values()), 10)
    thick = 0.8 / len(rows)
    colours = series(len(rows))
    for panel, axes in enumerate(figure.subplots(panels, 1, squeeze=False)[:, 0]):
        shown = classes[panel * each : (panel + 1) * each]
        for i, (name, values) in enumerate(rows.items()):
            known = [(x, 100 * values[c]) for x, c in enumerate(shown) if c in values]
            axes.bar(
                [x - 0.4 + (i + 0.5) * thick for x, _ in known],
                [value for _, value in known],
                0.92 * thick,
                color=INK if name == highlight else colours[i],
                label=f"{name} (mean {100 * sum(values.values()) / len(values):.1f})",
            )
        long = max(map(len, shown)) * len(shown) > 110
        turned: dict[str, Any] = {"rotation": 38, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(shown)), shown, **(turned if long else {"va": "baseline"}))
        axes.tick_params("x", length=0, pad=4 if long else 13)
        axes.set(xlim=(-0.6, each - 0.4), ylim=(0, max(top, 10)), ylabel="IoU %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(rows), 4 if max(map(len, labels)) < 32 else 3)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.6)
    return figure


@styled
def miou_bars(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    groups: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    oracles: Sequence[float | None] | None = None,
) -> Figure:
    """Mean IoU along the chain: a horizontal bar each, the first on top.

    Args:
        labels: what was evaluated.
        values: mean IoU in [0, 1].
        groups: what is compared with what, such as the split; a colour each.
        notes: what the number needs beside it, written behind it.
        oracles: the mean IoU at the score that the masks like best, as a hollow mark; None for none.
    """
    groups = groups or [""] * len(values)
    kinds = list(dict.fromkeys(groups))
    figure = new_figure((WIDTH, 0.55 + 0.32 * len(values)))
    axes = figure.subplots()
    shares = [100 * value for value in values]
    colours = [SERIES[(0, 2, 3, 4)[kinds.index(group) % 4]] for group in groups]
    axes.barh(range(len(values)), shares, 0.62, color=colours)
    marks = [100 * o if o is not None else math.nan for o in oracles or [None] * len(values)]
    for y, (share, mark, note) in enumerate(zip(shares, marks, notes or [""] * len(values), strict=True)):
        end = max(share, mark) if mark == mark else share
        number = axes.annotate(
            f"{share:.1f}", (end, y), xytext=(7, 0), textcoords="offset points", va="center", fontweight="bold"
        )
        axes.annotate(
            note, (1, 0.5), xycoords=number, xytext=(7, 0), textcoords="offset points", va="center", color=MUTED
        )
    if any(mark == mark for mark in marks):
        axes.plot(
            marks,
            range(len(values)),
            "|",
            color=INK,
            markersize=13,
            markeredgewidth=1.4,
            label="oracle (sees the masks)",
        )
        axes.legend(loc="lower right", borderaxespad=0.2)
    axes.set_yticks(range(len(values)), labels)
    axes.tick_params("y", labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set(xlim=(0, 100), ylim=(len(values) - 0.4, -0.6), xlabel="mean IoU %")
    return figure


@styled
def method_bars(values: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Several methods by what they reach, horizontally: the mean as a bar, each seed as a point.

    Args:
        values: what was measured -> method -> mean IoU in [0, 1] of each seed; a method may have none.

    Returns:
        A group of bars a method, the first on top.
    """
    methods = list(dict.fromkeys(chain.from_iterable(values.values())))
    if not any(seeds for each in values.values() for seeds in each.values()):
        raise expected("values", "a mean IoU of at least one method", dict(values))
    figure = new_figure((WIDTH, 0.8 + 0.26 * (len(values) + 0.6) * len(methods)))
    axes = figure.subplots()
    thick = 0.8 / len(values)
    colours = series(len(values))
    for i, (what, own) in enumerate(values.items()):
        places = [y - 0.4 + (i + 0.5) * thick for y in range(len(methods))]
        means = [100 * fmean(own[name]) if own.get(name) else 0.0 for name in methods]
        axes.barh(places, means, 0.9 * thick, color=colours[i], label=what)
        for y, mean, name in zip(places, means, methods, strict=True):
            seeds = [100 * value for value in own.get(name, ())]
            if not seeds:
                continue
            axes.plot(seeds, [y] * len(seeds), "o", color=INK, markersize=3, markerfacecolor="none")
            axes.annotate(f"{mean:.1f}", (max(seeds), y), xytext=(7, 0), textcoords="offset points", va="center")
    axes.set(xlabel="mean IoU %", ylim=(len(methods) - 0.4, -0.6))
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params("y", labelcolor=INK, length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    figure.legend(loc="outside upper left", ncols=len(values))
    return figure


@styled
def loss_curves(
    records: Sequence[Mapping[str, Any]],
    *,
    weights: Mapping[str, float] | None = None,
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """The loss of every stage that trains over its epochs, smoothed, with the measured curve faint behind.

    Args:
        records: of ``log.jsonl``.
        weights: of the terms ``itc``, ``bgs``, ``region`` in the loss of CA-CL (eq. 14); with them the terms are drawn
            as they add up to the loss, else not at all.
        titles: stage -> what it is called; as CA-CL's stages are by default.

    Returns:
        A panel for each stage.
    """
    stages = list(dict.fromkeys(r["stage"] for r in records if "loss" in r and "stage" in r))
    if not stages:
        raise expected("records", "records with a stage and a loss", f"{len(records)} without")
    columns = min(len(stages), 2 if len(stages) == 4 else 3)
    rows = -(-len(stages) // columns)
    figure = new_figure((WIDTH, 0.2 + 2.3 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, stage in zip(grid, stages, strict=False):
        own = [r for r in records if r.get("stage") == stage]
        axes.set_title(f"Loss: {_title(stage, titles)}")
        parts = {"loss": ("loss", 1.0)}
        if stage == "cacl" and weights:
            parts |= {
                key: (f"{weights[key]:g} · {name}", weights[key]) for key, name in _TERMS.items() if weights.get(key)
            }
        ends = []
        for (key, (name, weight)), colour in zip(parts.items(), (INK, *SERIES), strict=False):
            ends += add_curve(axes, own, key, name if len(parts) > 1 else "", colour, weight)
        axes.set(ylim=(min(0.0, axes.get_ylim()[0]), None))
        finish_curves(axes, ends)
    for axes in grid[len(stages) :]:
        axes.remove()
    return figure


@styled
def selection_curves(records: Sequence[Mapping[str, Any]], *, templates: Sequence[str] | None = None) -> Figure:
    """What CA-CL chooses while it trains: θ beside the similarities, the pass rate, how often each template is taken.

    Args:
        records: of ``log.jsonl``; those of the stage ``cacl`` count.
        templates: the m context templates, as names of the shares.

    Returns:
        Three panels over the epochs: cosines of eq. 7 and the threshold θ of eq. 10-11; the share of background prompts
        at or above θ; the shares of the templates (eq. 4) since the beginning.
    """
    own = [r for r in records if r.get("stage") == "cacl"]
    if not own:
        raise expected("records", "records of the stage cacl", f"{len(records)} without")
    figure = new_figure((WIDTH, 2.6))
    similarity, passed, share = figure.subplots(1, 3, width_ratios=(1.0, 0.8, 1.0))
    similarity.set_title("Similarity to the text, and θ")
    names = {"foreground_similarity": "foreground", "background_similarity": "background", "threshold": "θ"}
    ends = []
    for (key, name), colour in zip(names.items(), (SERIES[0], SERIES[1], INK), strict=True):
        ends += add_curve(similarity, own, key, name, colour)
    finish_curves(similarity, ends)
    passed.set_title("Pass rate, %")
    ends = add_curve(passed, own, "pass_rate", "", SERIES[0], 100.0)
    passed.set(ylim=(0, max(passed.get_ylim()[1], 1.0)))
    finish_curves(passed, ends)
    share.set_title("Share of the templates, %")
    shares = [r for r in own if isinstance(r.get("template_share"), list)]
    count = min((len(r["template_share"]) for r in shares), default=0)
    ends = []
    for j, colour in enumerate(series(count)):
        name = templates[j] if templates and j < len(templates) else f"template {j + 1}"
        split = [{"epoch": r.get("epoch"), "share": r["template_share"][j]} for r in shares]
        ends += add_curve(share, split, "share", name, colour, 100.0, smooth=False)
    share.set(ylim=(0, None))
    finish_curves(share, ends)
    return figure


@styled
def stage_costs(costs: Mapping[str, Mapping[str, float]], *, titles: Mapping[str, str] | None = None) -> Figure:
    """Time and peak memory of each stage as horizontal bars, the time in parts where these are known.

    Args:
        costs: as in ``times.json``: stage -> ``seconds``, of which so many ``photos``, …, and ``memory_mb``.
        titles: stage -> what it is called; as CA-CL's stages are by default.
    """
    keys = [key for key in ("seconds", "memory_mb") if any(key in cost for cost in costs.values())]
    if not keys:
        raise expected("costs", "seconds or memory_mb of at least one stage", dict(costs))
    figure = new_figure((WIDTH, 0.7 + 0.3 * len(costs)))
    panels = {"seconds": "Time", "memory_mb": "Peak memory of the process"}
    for axes, key in zip(figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        values = [float(cost.get(key, math.nan)) for cost in costs.values()]
        longest = max((value for value in values if value == value), default=1.0) or 1.0
        if key == "seconds" and (kinds := [kind for kind in KINDS if any(kind in cost for cost in costs.values())]):
            _add_parts(axes, costs, kinds)
        else:
            axes.barh(range(len(values)), values, 0.62, color=SERIES[0 if key == "seconds" else 5])
        for y, value in enumerate(values):
            if value == value:
                text = duration(value) if key == "seconds" else memory(value)
                axes.annotate(text, (value, y), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set(title=panels[key], xlim=(0, 1.2 * longest), ylim=(len(values) - 0.4, -0.6), xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        axes.set_yticks(range(len(values)), [_title(stage, titles) for stage in costs])
        axes.tick_params("y", labelcolor=INK)
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=len(KINDS) + 1, columnspacing=1.2)
    return figure


def _add_parts(axes: Axes, costs: Mapping[str, Mapping[str, float]], kinds: Sequence[str]) -> None:
    # One part after the other; what remains comes last.
    begin = [0.0] * len(costs)
    for number, kind in enumerate([*kinds, "else"]):
        rest = [max(0.0, cost.get("seconds", 0.0) - start) for cost, start in zip(costs.values(), begin, strict=True)]
        parts = rest if kind == "else" else [cost.get(kind, 0.0) for cost in costs.values()]
        colour, name = SERIES[-1 if kind == "else" else number], KINDS.get(kind, "everything else")
        axes.barh(range(len(costs)), parts, 0.62, left=begin, color=colour, label=name)
        begin = [start + part for start, part in zip(begin, parts, strict=True)]


def _title(stage: str, titles: Mapping[str, str] | None) -> str:
    known = {each.name: each.titled(each.settings()) for each in CHAIN} if titles is None else titles
    return known.get(stage, stage)
