"""A coded weight whose steps are trained.

    y = ((x ⊙ c (1 + b)) Zᵀ) ⊙ r (1 + a) + bias

Z stays, and with it the length of its code; a and b start at zero. Between calls only integers are kept: they are made
floating point in the forward and again in the backward product, matrix by matrix.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.maths.two_sided_rounding import Stepped


class SteppedTraining(nn.Module):
    """Stands in for a linear while it is trained.

    Args:
        weight: values (out, in), rows (out,), columns (in,).
        bias: of the linear, or None.
    """

    values: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, weight: Stepped, bias: nn.Parameter | None) -> None:
        super().__init__()
        widths = (torch.int8, torch.int16, torch.int32)
        largest = int(weight.values.abs().max())
        width = next(dtype for dtype in widths if largest <= torch.iinfo(dtype).max)
        self.register_buffer("values", weight.values.to(width))
        self.register_buffer("rows", weight.rows.float())
        self.register_buffer("columns", weight.columns.float())
        # of two dimensions, as the scales of groups are: the vectors of a block are its norms and biases
        self.row_change = nn.Parameter(torch.zeros(len(self.rows), 1))
        self.column_change = nn.Parameter(torch.zeros(len(self.columns), 1))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        rows, columns = self._steps()
        y: Tensor = _IntegerProduct.apply(x * columns.to(x.dtype), self.values) * rows.to(x.dtype)
        return y if self.bias is None else y + self.bias

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained besides the bias."""
        return {"rows.change": self.row_change, "columns.change": self.column_change}

    def stored(self) -> tuple[Stepped, None]:
        """The weight with its steps as they are now, in float16; on the CPU."""
        steps = [step.detach().half().cpu() for step in self._steps()]
        return Stepped(self.values.int().cpu(), *steps), None

    def _steps(self) -> tuple[Tensor, Tensor]:
        return self.rows * (1 + self.row_change.flatten()), self.columns * (1 + self.column_change.flatten())


class _IntegerProduct(torch.autograd.Function):
    """x Zᵀ with Z (out, in) in integers; the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return functional.linear(x, values.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (values,) = gradients, ctx.saved_tensors
        return gradient @ values.to(gradient.dtype), None
