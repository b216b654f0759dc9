"""The report as one HTML file: charts as SVG that follows the page's colours, photos as data, everything escaped."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from cacl._chart import GRID, INK, MUTED, PAPER, any_letters, check_report
from cacl._galleries import Gallery
from cacl.metrics import IGNORE
from cacl.pictures import Pixels, palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("assets") / "report.html"
_LARGEST = (300, 225)
"""Width and height in pixels of a photo on the page at most."""
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}


@dataclass(frozen=True)
class Score:
    """A line of the table of results."""

    stage: str
    what: str
    miou: float
    split: str
    images: int
    background_score: float | None
    crf: bool
    oracle: tuple[float, float] | None = None
    """The best background score and its mean IoU."""

    @property
    def conditions(self) -> str:
        """What the number needs beside it."""
        return f"{self.split}, {self.images} images, {self.settings}"

    @property
    def settings(self) -> str:
        """How the mask was made."""
        score = "" if self.background_score is None else f"background score {self.background_score:g}, "
        return f"{score}{'CRF' if self.crf else 'no CRF'}"


@dataclass(frozen=True)
class Block:
    """One of: a chart, a gallery, two galleries side by side, or a line of text; with a caption."""

    caption: str = ""
    chart: str = ""
    galleries: Sequence[tuple[str, Gallery]] = ()
    """Each with a heading, or an empty one."""
    note: str = ""


@dataclass
class Section:
    """A part of the page."""

    id: str
    title: str
    lead: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Page:
    """Everything that the page shows."""

    title: str
    facts: list[tuple[str, str]]
    scores: list[Score]
    tiles: list[tuple[Score, str]]
    """The main scores, each with what it gains."""
    chain: str
    """Chart of the scores."""
    sections: list[Section]
    settings: str
    """``config.toml``."""


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        ImportError: if the extra is missing.
    """
    check_report()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"uri": picture_uri, "colour": _colour}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(page=page)


def chart(figure: Figure, label: str) -> str:
    """A figure as an ``<svg>`` to stand in a page, in whose colours and font it is drawn; ``label`` for who cannot
    see it."""
    import matplotlib
    from markupsafe import escape

    buffer = io.StringIO()
    name = hashlib.sha256(label.encode()).hexdigest()[:8]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), any_letters():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r' xmlns(:\w+)?="[^"]*"', r"<!--.*?-->"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    # Several charts share a page: every id is this chart's own.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"(font: [^;\"]*?px) '[^;\"]*", r"\1 var(--font)", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def picture_uri(pixels: Pixels) -> str:
    """``(H, W, 3)`` as a JPEG in a data URI."""
    image = Image.fromarray(pixels)
    image.thumbnail(_LARGEST)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colour(value: int) -> str:
    """The colour of a mask value in CSS; white for what is ignored."""
    return "#ffffff" if value == IGNORE else "#" + palette()[value].tobytes().hex()
