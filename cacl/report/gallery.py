"""Pictures of some images side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from cacl.constants import IGNORE
from cacl.datasets import Dataset
from cacl.images import Mask, Pixels
from cacl.pictures import overlay, sheet


@dataclass
class Row:
    """One image of a gallery."""

    id: str
    names: str
    """Its labels."""
    pictures: list[Pixels | None]
    score: str = ""
    """What this image alone has: its mean IoU, or its agreement."""


@dataclass
class Gallery:
    """Pictures of some images side by side."""

    dataset: Dataset
    titles: list[str]
    rows: list[Row] = field(default_factory=list)
    shown: set[int] = field(default_factory=set)
    """Mask values that occur in the masks, without background."""

    def add(self, index: int, pictures: Sequence[Pixels | Mask | None], score: str = "") -> None:
        """An image: its photo, then pictures ``(H, W, 3)``, or masks ``(H, W)`` that are drawn over the photo."""
        photo, entry = pictures[0], self.dataset.entries[index]
        assert photo is not None
        names = ", ".join(self.dataset.classes[k] for k in entry.labels)
        row = Row(entry.id, names, [], score)
        for picture in pictures:
            if picture is not None and picture.ndim == 2:
                self.shown |= {int(value) for value in np.unique(picture)} - {0}
                picture = overlay(photo.astype(np.uint8), picture)
            row.pictures.append(None if picture is None else picture.astype(np.uint8))
        self.rows.append(row)

    @property
    def legend(self) -> dict[int, str]:
        """Mask value -> name, of what occurs; what is ignored comes last."""
        classes = {k + 1: name for k, name in enumerate(self.dataset.classes)}
        return {value: {**classes, IGNORE: "ignored"}[value] for value in sorted(self.shown)}

    def sheet(self) -> Image.Image:
        """As one picture, black where something is missing."""
        rows = []
        for row in self.rows:
            photo = row.pictures[0]
            assert photo is not None
            pictures = [np.zeros_like(photo) if picture is None else picture for picture in row.pictures]
            rows.append((f"{row.id}: {row.names}", pictures))
        return sheet(self.titles, rows)
