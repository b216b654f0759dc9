"""The report as one HTML file: charts as SVG that follows the page's colours, photos as data, everything escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from cacl.figures.style import check_report
from cacl.images import Pixels
from cacl.pictures import palette
from cacl.report.gallery import Gallery
from cacl.stages.score import Score

_TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
_LARGEST = (300, 225)
"""Width and height in pixels of a photo on the page at most."""


@dataclass(frozen=True)
class Block:
    """One of: a chart, a gallery, two galleries side by side, a table, or a line of text; with a caption."""

    caption: str = ""
    chart: str = ""
    galleries: Sequence[tuple[str, Gallery]] = ()
    """Each with a heading, or an empty one."""
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    """The columns' names, and rows; the first cell of a row is its name, the others are numbers."""
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
    judged: list[Score]
    """What can be said without ground truth."""
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


def picture_uri(pixels: Pixels) -> str:
    """``(H, W, 3)`` as a JPEG in a data URI."""
    image = Image.fromarray(pixels)
    image.thumbnail(_LARGEST)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colour(value: int) -> str:
    """The colour of a mask value in CSS; white for what is ignored."""
    return f"#{palette()[value].tobytes().hex()}"
