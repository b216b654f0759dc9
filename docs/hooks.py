"""What Markdown and mkdocstrings cannot do: equations as MathML, Sphinx's docstrings, the commands' help, whole files.

MkDocs loads this file as a hook and griffe as an extension (see mkdocs.yml); it is no page.
"""

import argparse
import html
import re
import textwrap
from pathlib import Path
from typing import Any

from griffe import Extension, Module, Object
from latex2mathml.converter import convert

_ROLE = re.compile(r":(?:[a-z]+:)?(class|func|meth|attr|data|mod|exc|math):`(~?)([^`]+)`")
_EQUATION = re.compile(r"^( *)\.\. math::[ \t]*(.*(?:\n(?:\1[ \t]+\S.*|[ \t]*(?=\n\1[ \t]+\S)))*)", re.MULTILINE)
_CODE = re.compile(r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +\S.*\n|[ \t]*\n(?=\1 +\S))+)", re.MULTILINE)
_ARITHMATEX = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs: files and the help of every command in place of comments."""
    mark = "<!-- commands -->"
    markdown = re.sub(r"<!-- file: (\S+\.py) -->", lambda match: _file(match[1]), markdown)
    return markdown.replace(mark, _commands()) if mark in markdown else markdown


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs: LaTeX -> MathML, which browsers draw without a script."""

    def equation(match: re.Match[str]) -> str:
        block = match[3] is not None
        latex, _, number = html.unescape(match[3] if block else match[2]).strip().partition(r"\tag")
        mathml = convert(latex, display="block" if block else "inline")
        return f'<div class="equation">{mathml}<span>{number.strip("{}")}</span></div>' if block else mathml

    return _ARITHMATEX.sub(equation, content)


def _file(name: str) -> str:
    code = (Path(__file__).parents[1] / name).read_text(encoding="utf-8")
    return f'```python title="{name}"\n{code}```'


def _commands() -> str:
    from cacl.cli import _parser

    actions = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    sections = []
    for name, parser in actions[0].choices.items():
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=76)
        sections.append(f"## cacl {name}\n\n```text\n{parser.format_help().strip()}\n```\n")
    return "\n".join(sections)


class Docstrings(Extension):
    """griffe: Sphinx's ``:func:`x``` becomes a link where x is on the site, ``.. math::`` an equation."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        objects: list[Object] = [pkg]
        while objects:
            one = objects.pop()
            objects += [member for member in one.members.values() if not member.is_alias]
            if one.docstring:
                one.docstring.value = _markdown(one.docstring.value, one)


def _markdown(text: str, scope: Object) -> str:
    def role(match: re.Match[str]) -> str:
        kind, short, name = match.groups()
        if kind == "math":
            return f"${name}$"
        shown = name.rsplit(".", 1)[-1] if short else name
        return f'<autoref optional identifier="{_path(name, scope)}"><code>{shown}</code></autoref>'

    def equation(match: re.Match[str]) -> str:
        indent, body = match[1], " ".join(textwrap.dedent(match[2]).split())
        return f"{indent}$$\n{indent}{body}\n{indent}$$"

    def code(match: re.Match[str]) -> str:
        indent, language, body = match.groups()
        return textwrap.indent(f"```{language}\n{textwrap.dedent(body)}```\n", indent)

    text = _ROLE.sub(role, _EQUATION.sub(equation, _CODE.sub(code, text)))
    # griffe knows the section "Examples" only, and takes what stands before a colon in "Returns" for a type.
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r"^((?:Returns|Yields):\n[^\n]*?): ", r"\1 – ", text, flags=re.MULTILINE)


def _path(name: str, scope: Object) -> str:
    """The full name of what ``name`` means in a docstring of ``scope``."""
    if name.split(".")[0] == "cacl":
        return name
    while True:
        try:
            return scope.resolve(name)
        except Exception:  # unknown here; griffe raises several kinds
            if name in scope.members:
                return f"{scope.path}.{name}"
            if scope.parent is None:
                return name
            scope = scope.parent
