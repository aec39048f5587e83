"""W ≈ left @ right in the place of an ``nn.Linear``, in every storage format that is factors and nothing else."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.maths.budget import FACTORED
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import dequantize_int8
from spectrim.stored_linear import StoredLinear


class LowRankLinear(StoredLinear):
    """y = (x rightᵀ) leftᵀ + bias, with W ≈ left @ right kept in its storage format.

    ``weight`` holds rightᵀ and ``left`` the left factor, see ``stored_tensors``; int8 factors stay int8 in memory and
    are expanded inside each call. Of ``pifa`` y is [z, z leftᵀ] with z = x weight, its columns put in order.
    """

    formats = FACTORED
    weight: nn.Parameter
    left: nn.Parameter
    order: nn.Parameter

    @classmethod
    def from_factors(cls, factors: Factors, bias: Tensor | None) -> Self:
        """The ``float16``-format module around ``factors``, in whatever dtype and on whatever device they are."""
        tensors = {"weight": factors.right.mT.contiguous(), "left": factors.left}
        return cls.from_tensors(tensors, "float16", factors.left.shape[0], factors.right.shape[1], bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        inner = x @ self.columns("weight", x.dtype)
        if self.format not in ("pifa", "pifa_int8"):
            return functional.linear(inner, self.columns("left", x.dtype), self.bias)
        others = functional.linear(inner, self._expanded("left", x.dtype))
        y = torch.cat([inner, others], -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def columns(self, side: str, dtype: torch.dtype) -> Tensor:
        """The whole factor ``weight`` (in, rank) or ``left`` (out, rank) in ``dtype``, expanded from its format."""
        expanded = self._expanded(side, dtype)
        if side == "left" and self.format in ("pifa", "pifa_int8"):
            identity = torch.eye(self.rank, dtype=dtype, device=expanded.device)
            return torch.cat([identity, expanded]).index_select(0, self.order)
        return expanded

    def dense_weight(self) -> Tensor:
        factors = factors_of(self)
        return factors.left @ factors.right

    def _expanded(self, side: str, dtype: torch.dtype) -> Tensor:
        """The stored rows of a factor: all of them, but for the pivots of a left factor, which are the identity."""
        head: Tensor = getattr(self, side)
        if head.is_floating_point():
            return head.to(dtype)
        expanded = dequantize_int8(head, getattr(self, f"{side}_scale"), dim=0 if side == "left" else 1, dtype=dtype)
        tail: Tensor | None = getattr(self, f"{side}_tail", None)
        return expanded if tail is None else torch.cat([expanded, tail.to(dtype)])


def factors_of(module: LowRankLinear) -> Factors:
    """``Factors(left (out, rank), right (rank, in))`` in float32, as the module multiplies with them."""
    left, right = (module.columns(side, torch.float32).detach() for side in ("left", "weight"))
    return Factors(left=left, right=right.mT)
