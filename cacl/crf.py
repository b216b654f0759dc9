"""Fully connected CRF: labels drawn to the edges of the image (Krähenbühl and Koltun 2011), on any device."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacl._support.checks import as_array
from cacl._support.clock import timed
from cacl._support.permutohedral import GaussianFilter
from cacl._support.values import check_choice, check_integer, check_range
from cacl.constants import BILATERAL, GAUSSIAN, ITERATIONS, Backend
from cacl.errors import InputError, InputTypeError, expected

_SMALLEST = 1e-5
"""No probability counts as less than this."""


class CRFArguments(TypedDict):
    """What :class:`cacl.crf.DenseCRF` and its calls take."""

    gaussian: tuple[float, float]
    bilateral: tuple[float, float, float]
    iterations: int
    backend: Backend
    device: torch.device | str


class DenseCRF:
    """The CRF of one image: its filters are built once, and serve every set of labels.

    Args:
        image: ``(H, W, 3)`` uint8.
        gaussian: smoothness: standard deviation in pixels, weight.
        bilateral: appearance: standard deviations in pixels and in colour values (of 255), weight.
        backend: ``"pydensecrf"``, ``"torch"``, or ``"auto"`` for pydensecrf where it is installed. Both compute the
            same: mean field on a permutohedral lattice with symmetric normalisation.
        device: where ``"torch"`` computes.

    Raises:
        ValueError: if an argument is out of range.
        ImportError: if pydensecrf is asked for and not installed.
    """

    def __init__(
        self,
        image: NDArray[np.uint8],
        *,
        gaussian: tuple[float, float] = GAUSSIAN,
        bilateral: tuple[float, float, float] = BILATERAL,
        backend: Backend = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            hint = "; image.permute(1, 2, 0).numpy() makes one of (3, H, W)" if kind == "Tensor" else ""
            raise InputTypeError(f"Expected argument `image` to be a uint8 array (H, W, 3), but got {kind}{hint}.")
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise expected("image", "an array (H, W, 3)", f"shape {image.shape}")
        for name, values, count in (("gaussian", gaussian, 2), ("bilateral", bilateral, 3)):
            if not isinstance(values, tuple | list) or len(values) != count:
                raise expected(name, f"{count} numbers, the weight last", values)
            for sigma in values[:-1]:
                check_range(name, sigma, 1e-6, float("inf"))
            check_range(name, values[-1], 0, 1e6)
        self.backend = check_backend(backend)
        self.image = image.copy()  # contiguous and writable, which both backends ask for, and decoded photos are not
        self.gaussian, self.bilateral, self.device = gaussian, bilateral, device
        self._with_labels: dict[int, Any] = {}

    @timed("crf")
    def __call__(self, probabilities: NDArray[np.floating], *, iterations: int = ITERATIONS) -> NDArray[np.float32]:
        """Mean field.

        Args:
            probabilities: of L labels, ``(L, H, W)``, or of S sets of labels, ``(S, L, H, W)``. Labels that have 0
                everywhere cost nothing and keep 0; no other probability counts as less than 1e-5.
            iterations: of mean field; 0 gives the probabilities, normalised.

        Returns:
            Of the same shape, adding up to 1 over the labels.

        Raises:
            ValueError: if the shape or type does not fit, or a probability is NaN, infinite or negative.
        """
        check_integer("iterations", iterations, 0)
        given = as_array("probabilities", probabilities, numbers=True)
        size = self.image.shape[:2]
        if given.ndim not in (3, 4) or 0 in given.shape[:-2]:
            raise expected("probabilities", "an array (L, H, W) or (S, L, H, W)", f"shape {given.shape}")
        if given.shape[-2:] != size:
            raise expected("probabilities", f"of the image's size {size}", given.shape[-2:])
        low, high = given.min(), given.max()
        if not (low >= 0 and high <= np.finfo(np.float32).max):
            raise expected("probabilities", "finite and not negative", low if not low >= 0 else high)
        sets = given if given.ndim == 4 else given[None]
        present = sets.max((2, 3)) > 0
        if not present.any(1).all():
            raise expected("probabilities", "positive for some label", "0 everywhere")
        result = np.zeros(sets.shape, dtype=np.float32)
        result[present.sum(1) == 1] = present[present.sum(1) == 1, :, None, None]  # one label alone is certain
        open_ = np.flatnonzero(present.sum(1) > 1)
        chosen = [np.clip(sets[s][present[s]], _SMALLEST, None).astype(np.float32) for s in open_]
        if iterations == 0:
            found = [values / values.sum(0) for values in chosen]
        elif self.backend == "pydensecrf":
            found = self._pydensecrf(chosen, iterations)
        else:
            found = self._torch(chosen, iterations) if chosen else []
        for s, values in zip(open_, found, strict=True):
            result[s, present[s]] = values
        return result.reshape(given.shape)

    def _pydensecrf(self, sets: list[NDArray[np.float32]], iterations: int) -> list[NDArray[np.float32]]:
        from pydensecrf.densecrf import DenseCRF2D

        results = []
        for values in sets:
            labels, height, width = values.shape
            crf = self._with_labels.get(labels)
            if crf is None:  # it holds the filters, and takes one probability after the other
                crf = self._with_labels[labels] = DenseCRF2D(width, height, labels)
                crf.addPairwiseGaussian(sxy=self.gaussian[0], compat=self.gaussian[1])
                sxy, srgb, weight = self.bilateral
                crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=self.image, compat=weight)
            crf.setUnaryEnergy(np.ascontiguousarray(-np.log(values).reshape(labels, -1)))
            results.append(np.array(crf.inference(iterations), dtype=np.float32).reshape(values.shape))
        return results

    @torch.no_grad()
    def _torch(self, sets: list[NDArray[np.float32]], iterations: int) -> list[NDArray[np.float32]]:
        # All labels of all sets lie side by side, so that a filter is applied to all of them at once.
        values = torch.from_numpy(np.concatenate(sets).reshape(sum(map(len, sets)), -1)).to(self.device)
        unary = values.log_().t().contiguous()
        ends = np.cumsum([0, *map(len, sets)]).tolist()
        current, energy = _softmax(unary.clone(), ends), torch.empty_like(unary)
        with torch.autocast(unary.device.type, enabled=False):
            for _ in range(iterations):
                energy.copy_(unary)
                for smooth in self._filters:
                    smooth(current, add_to=energy)
                current, energy = _softmax(energy, ends), current
        maps = current.t().cpu().numpy()
        return [maps[i:j].reshape(x.shape) for (i, j), x in zip(pairwise(ends), sets, strict=True)]

    @cached_property
    def _filters(self) -> tuple[GaussianFilter, GaussianFilter]:
        height, width = self.image.shape[:2]
        rows = torch.arange(height, dtype=torch.float32, device=self.device).repeat_interleave(width)
        columns = torch.arange(width, dtype=torch.float32, device=self.device).repeat(height)
        places = torch.stack((columns, rows))
        pixels = torch.from_numpy(self.image).to(self.device)
        colours = pixels.view(-1, 3).t().float()
        sxy, srgb, weight = self.bilateral
        features = {"gaussian": places / self.gaussian[0], "bilateral": torch.cat((places / sxy, colours / srgb))}
        filters = []
        for name, strength in (("gaussian", self.gaussian[1]), ("bilateral", weight)):
            try:
                filters.append(GaussianFilter(features[name], strength))
            except InputError:
                size = f"an image of {width}×{height} pixels"
                raise expected(name, f"wider for {size} and the backend torch", getattr(self, name)) from None
        return filters[0], filters[1]


def dense_crf(
    image: NDArray[np.uint8],
    probabilities: NDArray[np.floating],
    *,
    iterations: int = ITERATIONS,
    gaussian: tuple[float, float] = GAUSSIAN,
    bilateral: tuple[float, float, float] = BILATERAL,
    backend: Backend = "auto",
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """One CRF of an image: :class:`DenseCRF`, built and called; the defaults are those of IRNet's label mining.

    Args:
        image: ``(H, W, 3)`` uint8.
        probabilities: of the labels, ``(L, H, W)``.
        iterations: of mean field.
        gaussian: smoothness: standard deviation in pixels, weight.
        bilateral: appearance: standard deviations in pixels and in colour values, weight.
        backend: ``"auto"``, ``"pydensecrf"`` or ``"torch"``.
        device: where ``"torch"`` computes.

    Returns:
        ``(L, H, W)``, adding up to 1 over the labels.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> image = np.zeros((4, 5, 3), np.uint8)
        >>> image[:, 2:] = 200
        >>> given = np.full((2, 4, 5), 0.5)
        >>> given[:, 1, 1], given[:, 1, 3] = (0.9, 0.1), (0.1, 0.9)
        >>> dense_crf(image, given, backend="torch").argmax(0)[3]
        array([0, 0, 1, 1, 1])
    """
    crf = DenseCRF(image, gaussian=gaussian, bilateral=bilateral, backend=backend, device=device)
    return crf(probabilities, iterations=iterations)


def check_backend(backend: str) -> Literal["pydensecrf", "torch"]:
    """The backend that a name stands for here.

    Raises:
        ValueError: if the name is unknown.
        ImportError: if pydensecrf is asked for and not installed.
    """
    check_choice("backend", backend, ("auto", "pydensecrf", "torch"))
    if backend == "torch":
        return "torch"
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        if backend == "auto":
            return "torch"
        raise ImportError(
            f"The backend pydensecrf needs a package: pip install pydensecrf2 ({error}); or take the backend torch"
        ) from None
    return "pydensecrf"


def _softmax(energy: Tensor, ends: list[int]) -> Tensor:
    """In place, over each set's labels."""
    sets = [energy[:, i:j] for i, j in pairwise(ends)]
    for part in sets:
        part -= part.amax(1, keepdim=True)
    energy.exp_()  # of all sets in one piece, as it is several times slower on a part of each row
    for part in sets:
        part /= part.sum(1, keepdim=True)
    return energy
