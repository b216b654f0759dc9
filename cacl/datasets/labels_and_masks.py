"""Two descriptions of the same photos, their labels and their masks, and whether they can both be meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from cacl.constants import IGNORE
from cacl.errors import quoted

MANY = 0.25
"""Share of a split's photos with other classes in the mask than in the labels from which on it is said. Real data have
some: objects that are void in the mask, too small, or behind others."""


def numbered(count: int, what: str) -> str:
    """A number of things."""
    return f"{count} {what}{'' if count == 1 else 's'}"


class LabelsAndMasks:
    """Counts, photo by photo, what the labels and the masks of a split say, of those masks that have a pixel to score.

    Sets of classes are integers with a bit for each mask value, so that masks that are one value off are a shift off.

    Args:
        classes: the K class names.
        drawn: whether the masks are drawn from the labels' own objects, so that their values cannot be another list's.
        whole: whether all photos of the split are counted; a class that none of some shows may be in others.
    """

    def __init__(self, classes: Sequence[str], *, drawn: bool = False, whole: bool = True) -> None:
        self._classes, self._drawn, self._whole = classes, drawn, whole
        self._tagged = [0] * len(classes)
        self._shown = self._photos = self._void = self._bare = self._labelled_bare = self._veiled = 0
        self._unlabelled = self._different = self._apart = self._labelled = 0
        self._low = self._high = 0

    def add(self, labels: Iterable[int], values: int) -> None:
        """Count a photo by its class indices and its mask's values."""
        tags = sum(1 << (k + 1) for k in labels)
        shown = values & ~(1 | 1 << IGNORE)
        if values == 1 << IGNORE:
            self._void += 1
            return
        self._photos += 1
        self._shown |= shown
        for k in range(len(self._tagged)):
            self._tagged[k] += tags >> (k + 1) & 1
        self._labelled += bool(tags)
        self._unlabelled += bool(shown and not tags)
        bare = not shown and bool(values >> IGNORE)
        self._bare += bare
        self._labelled_bare += bool(tags and bare)
        if shown and not shown & ~tags and values >> IGNORE:
            self._veiled |= tags & ~shown
        self._different += bool(tags and tags != shown)
        self._apart += bool(tags and shown and not tags & shown)
        self._low += bool(tags and tags != shown and shown << 1 | 2 == tags | 2)  # the first class would be 0
        self._high += bool(tags and shown >> 1 & ~1 == tags)

    def problem(self) -> str:
        """What cannot be meant, in one sentence; empty if there is nothing."""
        masks = numbered(self._photos, "mask")
        if self._labelled_bare > (self._labelled / 2 if self._shown else 0):
            ones = "1" if len(self._classes) == 1 else f"the classes' values, 1 to {len(self._classes)},"
            which = f"the {masks} of its photos" if self._bare == self._photos else f"{self._bare} of the {masks}"
            return (
                f"expected masks of 0 for the background and {ones} for objects, but {which} hold only 0 and 255, "
                f"which is void: write {ones.rstrip(',')} in place of 255"
            )
        wanted = "expected the masks to show what the photos are labelled with"
        shifted = max(self._low, self._high) > self._labelled / 2
        if self._missing and not (self._shown and (self._drawn or not self._whole)):
            return f"{wanted}, but {self._none_shows()}; {self._cause()}"
        if self._labelled and not self._drawn and (shifted or self._apart > self._labelled / 2):
            count = self._different if shifted else self._apart
            return f"{wanted}, but {count} of {self._photos} show other classes; {self._cause()}"
        return ""

    @property
    def _missing(self) -> list[int]:
        """The classes that are labels, and in no mask."""
        return [k for k, count in enumerate(self._tagged) if count and not self._shown >> (k + 1) & 1]

    def _none_shows(self) -> str:
        named = ", ".join(
            f"{quoted(self._classes[k])} (a label of {numbered(self._tagged[k], 'photo')})" for k in self._missing
        )
        return f"none of the {numbered(self._photos, 'mask')} shows {named}"

    def _cause(self) -> str:
        if not self._shown and self._drawn:
            return "the outlines draw nothing: are they in pixels, and inside of the images?"
        if not self._shown:
            return "the masks are all background: are they empty, or those of other photos?"
        if all(self._veiled >> (k + 1) & 1 for k in self._missing) and self._missing:
            return "if its objects are void (255) there, take the label away"
        if self._shown == 2 and self._apart and sum(map(bool, self._tagged)) > 1:
            return "every object has the value 1: write that of its class"
        first = quoted(self._classes[0])
        if self._low > self._labelled / 2:
            return f"all values seem to be one too small, as those of masks for a list without {first}, which is 1"
        if self._high > self._labelled / 2:
            return (
                f"all values seem to be one too large, as those of masks for a list with a name before {first}, which "
                f"is 1 (the background is 0 and has no name)"
            )
        return "are the masks made for this list of classes in this order, and are the labels right?"

    def notes(self) -> list[str]:
        """What may be meant, and gives other scores than one would think; a sentence each."""
        found, masks = [], numbered(self._photos, "mask")
        if self._drawn and (self._missing or self._different > MANY * self._labelled):
            what = self._none_shows() if self._missing else f"{self._different} of {masks} show not all of the labels"
            found.append(f"{what}: outlines draw nothing there, or are behind those of smaller objects")
        if self._missing and not self._drawn and not self._whole:
            found.append(f"{self._none_shows()}, of those that were opened; {self._cause()}")
        if self._bare and self._bare == self._photos:
            found.append(
                f"the {masks} hold only 0 and 255, which is void, so no class is scored: if 255 is the object, write "
                f"its class in place of it"
            )
        if self._void and not self._photos:
            found.append(f"the {numbered(self._void, 'mask')} are void (255) everywhere, so nothing is scored")
        if self._unlabelled:
            found.append(
                f"the masks of {self._unlabelled} of {numbered(self._photos, 'photo')} show classes, but the photos "
                f"have no labels: CAMs are scored there as if nothing could be found; give them their labels"
            )
        if self._different > MANY * self._labelled and not self._drawn:
            found.append(
                f"the masks of {self._different} of {numbered(self._photos, 'photo')} show other classes than the "
                f"labels say: CAMs are made for the labels only; are they complete, and the masks made for this list "
                f"of classes?"
            )
        return found


def problems_of_classes(classes: Sequence[str]) -> list[str]:
    """What is wrong with class names, a sentence each."""
    found = []
    known: dict[str, str] = {}
    for name in classes:
        plain = re.sub(r"[\W_]+", "", name.casefold())
        if plain in _NO_CLASSES:
            found.append(
                f"expected the names of classes, of which the first has mask value 1, but got {quoted(name)}: the "
                "background is 0 and void is 255, without a name; take it out of the list, or, if it is a class of "
                "objects, call it otherwise"
            )
        # As names of classes and of background words are compared.
        same = re.sub(r"[\s_-]+", "", name).casefold()
        if (other := known.setdefault(same, name)) != name:
            found.append(f"expected class names of different letters, but got {quoted(other)} and {quoted(name)}")
    return found


_NO_CLASSES = {
    "background", "backgrounds", "backgroundclass", "bg", "bkg", "bckg", "bgd",
    "hintergrund", "arrièreplan", "фон", "背景", "배경",
    "ignore", "ignored", "ignorelabel", "ignoreindex", "ignoreregion", "void", "voidclass", "noclass", "nolabel",
    "unlabeled", "unlabelled", "unlabel", "dontcare",
}  # fmt: skip
"""As labelling tools and other code bases call mask values that are no class."""
