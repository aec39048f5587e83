"""W ≈ left @ right in the place of an ``nn.Linear``, in every storage format that is factors and nothing else."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor, nn

from spectrim.formats.products import product
from spectrim.formats.stored_linear import StoredLinear, expanded
from spectrim.maths.budget import FACTORED
from spectrim.maths.lowrank import Factors


class FirstProducts(Protocol):
    """What computes z for several modules at once: ``SharedInput``."""

    def inner(self, member: LowRankLinear, x: Tensor) -> Tensor:
        """x rightᵀ of ``member``."""


class LowRankLinear(StoredLinear):
    """y = (x rightᵀ) leftᵀ + bias, with W ≈ left @ right kept in its storage format.

    ``weight`` holds rightᵀ and ``left`` the left factor, see maths/storage_formats.py; int8 factors stay int8 in
    memory. Of pivoted factors y is [z, z leftᵀ] with z = x weight, its columns put in order. ``shared`` computes z
    together with that of the linears that read the same input, see shared_input.py.
    """

    formats = FACTORED
    optional = ("weight_scale", "weight_tail", "left_scale", "left_tail", "order")
    transposed = ("weight", "weight_tail")
    weight: nn.Parameter
    weight_scale: nn.Parameter | None
    weight_tail: nn.Parameter | None
    left: nn.Parameter
    left_scale: nn.Parameter | None
    left_tail: nn.Parameter | None
    order: nn.Parameter | None
    shared: FirstProducts | None = None

    @classmethod
    def from_factors(cls, factors: Factors, bias: Tensor | None) -> Self:
        """The ``float16``-format module around ``factors``, in whatever dtype and on whatever device they are."""
        tensors = {"weight": factors.right.mT, "left": factors.left}
        return cls.from_tensors(tensors, "float16", factors.left.shape[0], factors.right.shape[1], bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        return self.outputs(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        """z = x rightᵀ, (..., rank)."""
        if self.shared is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.shared.inner(self, x)
        weight, tail = self.weight, self.weight_tail
        if tail is None:
            return product(x, weight.mT, self.weight_scale)
        return product(x[..., : len(weight)], weight.mT, self.weight_scale) + product(x[..., len(weight) :], tail.mT)

    def outputs(self, z: Tensor) -> Tensor:
        """z leftᵀ + bias, (..., out)."""
        order, tail, bias = self.order, self.left_tail, self.bias
        if order is None and tail is None:
            return product(z, self.left, self.left_scale, bias)
        y = product(z, self.left, self.left_scale)
        if tail is not None:
            y = torch.cat([y, product(z, tail)], -1)
        if order is not None:
            y = torch.cat([z, y], -1).index_select(-1, order)
        return y if bias is None else y + bias

    def dense_weight(self) -> Tensor:
        factors = factors_of(self)
        return factors.left @ factors.right

    def stored_rows(self, side: str, dtype: torch.dtype) -> Tensor:
        """``weight`` (in, rank) or ``left`` as stored, expanded: the rows of a left factor that are no pivots."""
        head = expanded(getattr(self, side), getattr(self, f"{side}_scale"), 0 if side == "left" else 1, dtype)
        tail: Tensor | None = getattr(self, f"{side}_tail")
        return head if tail is None else torch.cat([head, tail.to(dtype)])


def factors_of(module: LowRankLinear) -> Factors:
    """``Factors(left (out, rank), right (rank, in))`` in float32, as the module multiplies with them."""
    left, right = (module.stored_rows(side, torch.float32).detach() for side in ("left", "weight"))
    if module.order is not None:
        identity = torch.eye(module.rank, device=left.device)
        left = torch.cat([identity, left]).index_select(0, module.order)
    return Factors(left=left, right=right.mT)
