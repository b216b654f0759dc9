"""The text of a model card: Markdown, with the Hugging Face hub's facts at its top."""

from __future__ import annotations

from collections.abc import Sequence

from cacl.errors import shown


def model_card(
    title: str, summary: str, code: Sequence[str], built: str, names: Sequence[str], *, license: str, about: str
) -> str:
    """A card.

    Args:
        title: its heading.
        summary: what the network is.
        code: how it is loaded, in Python.
        built: what it is built from, and what it takes.
        names: what its values mean, from 0; empty where nobody knows.
        license: the hub's name of it; empty for none.
        about: Markdown: what it was trained on, and how good it is.
    """
    facts = ["library_name: cacl", "pipeline_tag: image-segmentation", "tags:"]
    facts += ["- weakly-supervised-semantic-segmentation", *([f"license: {license}"] if license else [])]
    values = [f"{value} {shown(name)}" for value, name in enumerate(names)]
    listed = ["```text", *values, "```"] if values else ["Their names are not written down."]
    lines = ["---", *facts, "---", "", f"# {title}", "", summary, "", "```python", *code, "```", "", built, ""]
    lines += ["## Classes", "", *listed, "", about.strip() or "## Data and figures\n\nNot written down.", ""]
    return "\n".join(lines)


def as_code(text: object) -> str:
    """A text in Markdown that stays as it is, also in a table."""
    return f"`{shown(text).replace('`', chr(39)).replace('|', '¦')}`"
