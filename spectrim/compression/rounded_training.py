"""A rounded weight whose scales are trained, and the factors of what rounding lost where it has some.

    y = x ((q − z) · s (1 + d))ᵀ + (x rightᵀ) leftᵀ + bias

q and z stay; d starts at zero, so that one learning rate suits scales of any size. Between calls only integers are
kept: the weight is expanded in the forward and again in the backward product, matrix by matrix, a small part of either.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import Quantized, balance


class RoundedTraining(nn.Module):
    """Stands in for a linear while it is trained.

    Args:
        rounded: values (out, in), scale (out, groups), and its zero point or None.
        residual: left (out, rank), right (rank, in), or None.
        bias: of the linear, or None.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, rounded: Quantized, residual: Factors | None, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("values", rounded.values.unflatten(1, (-1, rounded.group_size)))
        self.register_buffer("scale", rounded.scale.float())
        self.register_buffer("zero_point", rounded.zero_point)
        self.change = nn.Parameter(torch.zeros_like(self.scale))
        self.left = self.right = None
        if residual is not None:
            even = balance(Factors(*(part.float() for part in residual)))
            self.left, self.right = (nn.Parameter(part.contiguous()) for part in even)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        y: Tensor = _RoundedProduct.apply(x, self.values, self.zero_point, self._scale())
        y = y if self.bias is None else y + self.bias
        if self.left is None or self.right is None:
            return y
        return y + functional.linear(functional.linear(x, self.right), self.left)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained besides the bias."""
        factors = {"left": self.left, "right": self.right}
        return {"change": self.change} | {name: part for name, part in factors.items() if part is not None}

    def stored(self) -> tuple[Quantized, Factors | None]:
        """The rounded weight with its scales as they are now, in float16, and its factors; on the CPU."""
        values, zero_point = self.values.cpu(), None if self.zero_point is None else self.zero_point.cpu()
        weight = Quantized(values.flatten(1), self._scale().detach().half().cpu(), zero_point, values.shape[2])
        if self.left is None or self.right is None:
            return weight, None
        return weight, Factors(self.left.detach().cpu(), self.right.detach().cpu())

    def _scale(self) -> Tensor:
        return self.scale * (1 + self.change)


class _RoundedProduct(torch.autograd.Function):
    """x ((q − z) · s)ᵀ; gradients of x and s. q (out, groups, size), z and s (out, groups)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, zero_point: Tensor | None, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, zero_point, scale)
        return functional.linear(x, _expanded(_steps(values, zero_point), scale))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor]:
        (gradient,), (x, values, zero_point, scale) = gradients, ctx.saved_tensors
        steps = _steps(values, zero_point)
        of_x = gradient @ _expanded(steps, scale).to(gradient.dtype)
        of_weight = gradient.flatten(0, -2).mT @ x.flatten(0, -2).to(gradient.dtype)
        of_scale = torch.linalg.vecdot(of_weight.view(values.shape).float(), steps)
        return of_x.to(x.dtype), None, None, of_scale


def _steps(values: Tensor, zero_point: Tensor | None) -> Tensor:
    """q − z, (out, groups, size) float32."""
    return values.float() if zero_point is None else values.float() - zero_point[..., None]


def _expanded(steps: Tensor, scale: Tensor) -> Tensor:
    return (steps * scale[..., None]).flatten(1)
