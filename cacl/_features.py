"""Features as every loss here takes them: unit length, float32."""

from __future__ import annotations

from torch import Tensor


def full(x: Tensor) -> Tensor:
    """float32 arithmetic, whatever comes in; float64 stays, so that gradients can be checked."""
    return x if x.element_size() >= 8 else x.float()


def unit(x: Tensor) -> Tensor:
    """``(…, D)`` -> the same at length 1; zeros stay zeros."""
    x = full(x)
    # The length of zeros is taken as 1: 1 / eps as their gradient would be infinite in half precision.
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length < 1e-12, 1)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the last dimension. A product and a sum: matmul would fall to half precision under autocast."""
    return (unit(x) * unit(y)).sum(-1)
