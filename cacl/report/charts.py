"""Charts as SVG that follows the page's colours."""

from __future__ import annotations

import hashlib
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from cacl.figures.style import GRID, INK, MUTED, PAPER, any_letters

_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}


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
