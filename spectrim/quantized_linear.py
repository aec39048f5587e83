"""A rounded weight in the place of an ``nn.Linear``, with or without low-rank factors of what rounding lost."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.maths.budget import RESIDUAL, ROUNDED
from spectrim.maths.quantization import dequantize_int8, unpack_int4
from spectrim.stored_linear import StoredLinear


class QuantizedLinear(StoredLinear):
    """y = x Qᵀ + (x right) leftᵀ + bias: Q = weight · weight_scale per row and group of inputs, see ``stored_tensors``.

    Integers stay packed in memory and are expanded inside each call.
    """

    formats = tuple(ROUNDED)
    weight: nn.Parameter
    weight_scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        y = functional.linear(x, self._rounded(x.dtype), self.bias)
        if self.format not in RESIDUAL:
            return y
        return y + functional.linear(x @ self._side("right", x.dtype), self._side("left", x.dtype))

    def dense_weight(self) -> Tensor:
        weight = self._rounded(torch.float32)
        if self.format not in RESIDUAL:
            return weight
        return weight + self._side("left", torch.float32) @ self._side("right", torch.float32).mT

    def _rounded(self, dtype: torch.dtype) -> Tensor:
        """Q (out, in) in ``dtype``."""
        values: Tensor = self.weight
        if values.dtype == torch.uint8:
            values = unpack_int4(values, 2 * values.shape[-1])
        return (values.to(dtype) * self.weight_scale.to(dtype).unsqueeze(-1)).flatten(1)

    def _side(self, side: str, dtype: torch.dtype) -> Tensor:
        scale, dim = getattr(self, f"{side}_scale"), 0 if side == "left" else 1
        return dequantize_int8(getattr(self, side), scale, dim, dtype)
