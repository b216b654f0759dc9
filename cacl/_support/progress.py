"""Progress bars: where there is a terminal or a notebook, and in one of several processes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from cacl._support.distributed import rank


def watched(
    items: Iterable[Any] | None, *, total: int | None, desc: str, progress: bool, unit: str = "image", initial: int = 0
) -> Any:
    """``items`` with a progress bar, or a bar alone that is moved by ``update``; the only place that makes one."""
    wanted, notebook = progress and rank() == 0, _in_notebook()
    hidden = not wanted or (None if not notebook else False)  # None: where there is no terminal
    bar = _notebook_bar() if wanted and notebook else tqdm
    return bar(items, total=total, initial=initial, desc=desc, unit=unit, disable=hidden)


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter's runs this: what shows its output is no terminal, and shows bars all the same."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _notebook_bar() -> Any:
    """A widget, or text without ipywidgets, of which tqdm would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    return tqdm
