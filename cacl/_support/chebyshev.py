"""Functions of a sparse matrix as short series of Chebyshev polynomials."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def applied(change: Tensor, x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Σ_k ``coefficients[k]`` T_k(M) @ ``x``, of a matrix M = I + ``change`` with real eigenvalues in [−1, 1].

    A power of it is then a short series: 84 products in float32 for 256 steps. The recurrence T_k+1 = 2 M T_k − T_k-1
    is, with the differences d_k+1 = T_k+1 − T_k, the same as d_k+1 = d_k + 2 (M − I) T_k, which rounds less.
    """
    result, current, difference = coefficients[0] * x, x.clone(), torch.zeros_like(x)
    for order, coefficient in enumerate(coefficients[1:], start=1):
        difference = torch.addmm(difference, change, current, alpha=1 if order == 1 else 2)
        current += difference
        if coefficient:
            result.add_(current, alpha=coefficient)
    return result


@lru_cache
def of_power(steps: int, tolerance: float) -> tuple[float, ...]:
    r"""The coefficients of T_0, T_1, … whose sum is x ** ``steps`` to ``tolerance``, on all of [−1, 1].

    :math:`x^n = 2^{1-n} \sum_k \binom{n}{(n-k)/2} T_k(x)` over the k ≤ n of n's parity, that of k = 0 halved. They
    fall like exp(−k²/2n). They are made to add up to 1, so that what is constant stays constant.
    """
    order = steps % 2
    terms = [1.0]  # each next to the first one
    while order < steps and terms[-1] > tolerance**2:
        terms.append(terms[-1] * (steps - order) / (steps + order + 2))
        order += 2
    if steps % 2 == 0:
        terms[0] /= 2
    left_out, allowed = 0.0, tolerance * sum(terms)
    while left_out + terms[-1] <= allowed:
        left_out += terms.pop()
    total = sum(terms)
    result = [0.0] * (steps % 2 + 2 * len(terms) - 1)
    result[steps % 2 :: 2] = [term / total for term in terms]
    return tuple(result)


@lru_cache
def of_restarts(restart: float, tolerance: float) -> tuple[float, ...]:
    r"""The coefficients of T_0, T_1, … whose sum is r / (1 − a x), a = 1 − r, to ``tolerance``, on all of [−1, 1].

    :math:`1 / (1 - a x) = (T_0 + 2 \sum_k q^k T_k(x)) / \sqrt{1 - a^2}` with :math:`q = (1 - \sqrt{1 - a^2}) / a`.
    They are made to add up to 1, so that what is constant stays constant.
    """
    going = 1 - restart
    root = math.sqrt(1 - going**2)
    ratio = going / (1 + root)
    terms, term = [1.0], 2 * ratio
    while term / (1 - ratio) > tolerance:  # all that is left out
        terms.append(term)
        term *= ratio
    total = sum(terms)
    return tuple(term / total for term in terms)
