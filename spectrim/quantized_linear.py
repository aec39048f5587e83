"""A rounded weight in the place of an ``nn.Linear``, with or without low-rank factors of what rounding lost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectrim.maths.budget import ROUNDED
from spectrim.maths.quantization import dequantize_int8, unpack_int4
from spectrim.products import product
from spectrim.stored_linear import StoredLinear


class QuantizedLinear(StoredLinear):
    """y = x Qᵀ + (x right) leftᵀ + bias: Q = weight · weight_scale per row and group of inputs, see ``stored_tensors``.

    Integers stay packed in memory; those of four bits are expanded inside each call.
    """

    formats = tuple(ROUNDED)
    optional = ("left", "left_scale", "right", "right_scale")
    transposed = ("right",)
    weight: nn.Parameter
    weight_scale: nn.Parameter
    left: nn.Parameter
    left_scale: nn.Parameter
    right: nn.Parameter | None
    right_scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        y = product(x, *self._rows(x.dtype), self.bias)
        if self.right is None:
            return y
        return y + product(product(x, self.right.mT, self.right_scale), self.left, self.left_scale)

    def dense_weight(self) -> Tensor:
        weight = self._rounded(torch.float32)
        if self.right is None:
            return weight
        left = dequantize_int8(self.left, self.left_scale, dim=0)
        return weight + left @ dequantize_int8(self.right, self.right_scale, dim=1).mT

    def _rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Q as ``product`` takes it: integers and a scale per row, or expanded where a row has several scales."""
        if self.weight_scale.shape[1] > 1 or self.weight.dtype == torch.uint8:
            return self._rounded(dtype), None
        return self.weight.flatten(1), self.weight_scale.flatten().float()

    def _rounded(self, dtype: torch.dtype) -> Tensor:
        """Q (out, in) in ``dtype``."""
        values: Tensor = self.weight
        if values.dtype == torch.uint8:
            values = unpack_int4(values, 2 * values.shape[-1])
        return (values.to(dtype) * self.weight_scale.to(dtype).unsqueeze(-1)).flatten(1)
