"""A rounded weight in the place of an ``nn.Linear``, with or without low-rank factors of what rounding lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from spectrim.formats.int4_kernel import file_order, int4_product, kernel_order, suits
from spectrim.formats.products import product, suits_kernels
from spectrim.formats.stored_linear import StoredLinear, expanded
from spectrim.maths.budget import ROUNDED
from spectrim.maths.quantization import unpack
from spectrim.maths.storage_formats import Grid


class QuantizedLinear(StoredLinear):
    """y = x Qᵀ + (x right) leftᵀ + bias: Q = (weight − zero point) · weight_scale, see maths/storage_formats.py.

    Integers stay packed in memory. Those of four bits lie as the kernel of int4_kernel.py reads them where it suits the
    model's dtype, and as in the file in every state_dict and pickle; elsewhere each call expands them.
    """

    formats = tuple(ROUNDED)
    optional = ("weight_zero", "left", "left_scale", "right", "right_scale")
    transposed = ("right",)
    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero: nn.Parameter | None
    left: nn.Parameter
    left_scale: nn.Parameter | None
    right: nn.Parameter | None
    right_scale: nn.Parameter | None
    input_dtype: torch.dtype | None = None  # of the inputs to come

    @property
    def grid(self) -> Grid:
        """Of the integers."""
        return ROUNDED[self.format]

    @property
    def reordered(self) -> bool:
        """Whether ``weight`` lies as the kernel reads it."""
        return self.weight.dtype == torch.uint8 and self.weight.dim() == 2

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        if self.reordered and suits_kernels(x):
            y = int4_product(x, self.weight, self.weight_scale, self.weight_zero)
            y = y if self.bias is None else y + self.bias
        else:
            y = product(x, *self._rows(x.dtype), self.bias)
        if self.right is None:
            return y
        return y + product(product(x, self.right.mT, self.right_scale), self.left, self.left_scale)

    def lay_out(self, dtype: torch.dtype | None = None) -> None:
        super().lay_out(dtype)
        self.input_dtype = dtype
        if self.grid.n_bits == 4 and not self.reordered and suits(self.weight, dtype):
            self.weight.data = kernel_order(self.weight.data)

    def dense_weight(self) -> Tensor:
        weight = self._rounded(torch.float32)
        if self.right is None:
            return weight
        left = expanded(self.left, self.left_scale, dim=0, dtype=torch.float32)
        return weight + left @ expanded(self.right, self.right_scale, dim=1, dtype=torch.float32).mT

    def _rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Q as ``product`` takes it: integers and a scale per row, or expanded where a row has several scales."""
        if self.weight_scale.shape[1] > 1 or self.weight.dtype == torch.uint8:
            return self._rounded(dtype), None
        return self.weight.flatten(1), self.weight_scale.flatten().float()

    def _rounded(self, dtype: torch.dtype) -> Tensor:
        """Q (out, in) in ``dtype``."""
        values = self._in_file_order()
        if values.dtype == torch.uint8:
            values = unpack(values, self.grid.n_bits)
        zero_point = self._zero_point(dtype)
        steps = values.to(dtype) if zero_point is None else values.to(dtype) - zero_point.unsqueeze(-1)
        return (steps * self.weight_scale.to(dtype).unsqueeze(-1)).flatten(1)

    def _zero_point(self, dtype: torch.dtype) -> Tensor | None:
        """(out, groups) in steps, exact in every 16-bit dtype."""
        return None if self.weight_zero is None else self.weight_zero.to(dtype) / self.grid.zero_steps

    def _in_file_order(self) -> Tensor:
        return file_order(self.weight.data, self.weight_scale.shape[1]) if self.reordered else self.weight

    def _restore(self) -> None:
        self.weight.data = self._in_file_order()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.input_dtype is None:
            return super()._apply(fn, recurse)
        before = torch.empty(0, dtype=self.input_dtype, device=self.weight.device)
        after = fn(before)
        if (after.dtype, after.device) == (before.dtype, before.device):
            return super()._apply(fn, recurse)
        self._restore()
        super()._apply(fn, recurse)
        self.lay_out(after.dtype)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._in_file_order()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._restore()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.input_dtype is not None:
            self.lay_out(self.input_dtype)

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        if not self.reordered:
            return state
        parameters = {**self._parameters, "weight": nn.Parameter(self._in_file_order(), requires_grad=False)}
        return {**state, "_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.input_dtype is not None:
            self.lay_out(self.input_dtype)
