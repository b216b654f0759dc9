"""The background words of a run's classes."""

from __future__ import annotations

from cacl.datasets import FORMATS
from cacl.prompts import BackgroundSet, words_for
from cacl.settings import Backgrounds, Data
from cacl.stages.stage import Context


def known_words(run: Context) -> BackgroundSet:
    """The background words of a run's classes, from the configuration, beside the data, or built in.

    Raises:
        ValueError: if there are none for a class.
    """
    words, data = run.table(Backgrounds), run.table(Data)
    beside = data.root / "backgrounds.json"
    file = words.file or (beside if FORMATS[data.format].brings_words and beside.is_file() else None)
    classes = run.train.classes
    if file is None:
        return BackgroundSet.built_in(classes, words.n or 5)
    return words_for(classes, file, words.n)
