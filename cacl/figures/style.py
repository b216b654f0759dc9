"""The look of the charts: colours, type, and curves that are smoothed and named at their ends."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK, MUTED, GRID, PAPER = "#1c2430", "#5b6472", "#d9dde3", "#ffffff"
"""Colours of what is no data: text, lesser text, lines, background."""
SERIES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a8f98")
"""Colours of the data, told apart with any colour vision (Okabe and Ito 2008)."""
WIDTH = 9.6
"""Of a chart, in inches."""
_STYLE: dict[str, Any] = {
    "font.size": 9.0, "font.family": "DejaVu Sans", "text.color": INK, "text.parse_math": False,
    "figure.facecolor": PAPER, "axes.facecolor": "none", "savefig.dpi": 150,
    "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.linewidth": 0.8, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.titlelocation": "left", "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlecolor": INK,
    "axes.titlepad": 8.0, "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.6,
    "xtick.color": GRID, "xtick.labelcolor": MUTED, "xtick.major.size": 3.0,
    "ytick.color": GRID, "ytick.labelcolor": MUTED, "ytick.major.size": 0.0, "ytick.major.pad": 5.0,
    "legend.frameon": False, "legend.fontsize": 9.0, "legend.handlelength": 0.9, "legend.handleheight": 0.9,
    "lines.linewidth": 1.6, "lines.solid_capstyle": "round",
    "figure.constrained_layout.wspace": 0.05, "figure.constrained_layout.hspace": 0.05,
}  # fmt: skip
_POINTS = 500
"""Of a curve at most; more cannot be told apart at this width."""


class End(NamedTuple):
    """Where a curve ends, and its name."""

    y: float
    name: str
    colour: str


def check_report() -> None:
    """Raise an ImportError that names the extra, where what charts and the page are made with is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Charts and reports need an extra: pip install 'cacl[report]' ({error})") from None


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """In this module's look, whatever the caller's settings are, which stay as they are."""

    @functools.wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Figure:
        check_report()
        import matplotlib

        with matplotlib.rc_context(), any_letters():
            matplotlib.rcdefaults()
            settings: Any = matplotlib.rcParams  # its keys' types differ from release to release
            settings.update(_STYLE)
            figure = function(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made when they are first drawn: here, in this look
        return figure

    return draw


@contextmanager
def any_letters() -> Iterator[None]:
    """No warning of letters that the font lacks which text is measured with; who shows it may have them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_figure(size: tuple[float, float], *, constrained: bool = True) -> Figure:
    """An empty figure of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure


def add_curve(
    axes: Axes,
    records: Iterable[Mapping[str, Any]],
    key: str,
    name: str,
    colour: str,
    scale: float = 1.0,
    *,
    smooth: bool = True,
) -> list[End]:
    """Draw ``key`` over the epochs; returns its end, or nothing where no record has a finite value."""
    points = [(float(r["epoch"]), scale * float(r[key])) for r in records if _number(r, "epoch") and _number(r, key)]
    if not points:
        return []
    x, y = np.array(points).T
    thin = slice(None, None, -(-len(x) // _POINTS))
    line = smoothed(y, len(y) // 25) if smooth else y
    if smooth:
        axes.plot(x[thin], y[thin], color=colour, linewidth=0.7, alpha=0.25, zorder=1.5)
    axes.plot(x[thin], line[thin], color=colour, label=name or None)
    return [End(float(line[-1]), name, colour)]


def smoothed(values: NDArray[np.floating], reach: int) -> NDArray[np.float64]:
    """The mean of each value and its neighbours up to ``reach`` on either side, as many on one as on the other."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    places = np.arange(len(values))
    near = np.minimum(reach, np.minimum(places, len(values) - 1 - places))
    # Near the ends the window shrinks; a quarter of it stays, or the last value would be a single step's.
    low, high = np.minimum(places - near, len(values) - 1 - reach // 2), np.maximum(places + near, reach // 2)
    low, high = np.maximum(low, 0), np.minimum(high, len(values) - 1)
    result: NDArray[np.float64] = (sums[high + 1] - sums[low]) / (high + 1 - low)
    return result


def finish_curves(axes: Axes, ends: Sequence[End]) -> None:
    """Name the curves at their ends, far enough from each other to be read, and label the epochs."""
    axes.set(xlabel="epoch")
    axes.margins(x=0.02)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    apart = 0.095  # of the axes' height: a line of text in the charts of this module
    named = sorted((end for end in ends if end.name), key=lambda end: end.y)
    places = [(end.y - low) / (high - low) for end in named]
    for _ in range(50):
        for i in range(len(places) - 1):
            if (lack := apart - (places[i + 1] - places[i])) > 1e-6:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
    for place, end in zip(places, named, strict=True):
        at: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
        axes.annotate("●", (1, place), xytext=(3, 0), color=end.colour, fontsize=7, **at)
        axes.annotate(end.name, (1, place), xytext=(12, 0), **at)


def series(count: int) -> list[str]:
    """As many colours, the same again where there are more than there are colours."""
    return [SERIES[i % len(SERIES)] for i in range(count)]


def round_up(value: float, step: int) -> int:
    return step * math.ceil(value / step)


def duration(seconds: float) -> str:
    """Seconds as people say them: ``41 s``, ``3.2 min``, ``1.7 h``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def memory(megabytes: float) -> str:
    """Megabytes as people say them: ``812 MB``, ``3.1 GB``."""
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def _number(record: Mapping[str, Any], key: str) -> bool:
    value = record.get(key)
    return isinstance(value, int | float) and math.isfinite(value)
