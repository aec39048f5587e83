"""A rounded weight whose columns make up for each other's rounding errors: GPTQ on a captured Gram.

    min over Q on the grid of  ‖(W − Q) S‖_F,  S Sᵀ = G + δ·mean(diag G)·I

greedily, one input after the other: with U upper triangular, UᵀU = (S Sᵀ)⁻¹, the error of input j is spread over the
inputs after it, w_k ← w_k − (w_j − q_j) U_jk / U_jj for k > j, which minimises the output error once q_j stands. A
group's scales are those of its weights when its turn comes. With a diagonal Gram this is rounding to the nearest.

Source: GPTQ, Frantar et al. 2022, arXiv:2210.17323.
"""

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.quantization import Quantized, round_to_nearest
from spectrim.maths.whitening import cholesky, require_finite

BLOCK = 64
"""Inputs whose corrections are applied at once to all inputs after them."""


def compensated(
    weight: Tensor,
    gram: Tensor,
    n_bits: int,
    group_size: int | None,
    damping: float = 1e-2,
    max_damping: float = 1e-1,
    scale: Tensor | None = None,
) -> Quantized:
    """W ≈ q s, symmetric, one float16 scale per row and group of inputs, as ``round_to_nearest`` returns it.

    float64, O(out in² + in³) time.

    Args:
        weight: W, (out, in).
        gram: G = XᵀX, (in, in).
        n_bits: 2 to 8.
        group_size: inputs per scale, None for the whole row; it must divide ``in``.
        damping, max_damping: first and largest relative damping of the Gram tried.
        scale: (out, in / group_size), instead of that of each group's weights; it is returned in its own dtype.

    Raises:
        NumericalError: W or G is not finite, shapes do not match, the Gram cannot be repaired, or ``group_size`` does
            not divide ``in``.
    """
    require_finite("weight", weight)
    rows, inputs = weight.shape
    size = group_size or inputs
    if gram.shape != (inputs, inputs) or inputs % size:
        raise NumericalError(
            f"weight {tuple(weight.shape)}, gram {tuple(gram.shape)}, groups of {size}: a gram ({inputs}, {inputs}) "
            f"and groups that divide {inputs} are required"
        )
    lower, _ = cholesky(gram, damping, max_damping)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    left = weight.double().clone()  # what is still to be rounded, corrected for what has been
    values = torch.empty(rows, inputs, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, inputs // size, dtype=torch.float16, device=weight.device) if scale is None else scale
    stop = 0
    while stop < inputs:
        start, stop = stop, min(stop + BLOCK, stop - stop % size + size)  # never across a group's end
        group = start // size
        if scale is None and start % size == 0:
            scales[:, group] = round_to_nearest(left[:, start : start + size], n_bits, None).scale[:, 0]
        errors = _round_block(left, values, scales[:, group].double(), upper, start, stop, 2 ** (n_bits - 1) - 1)
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return Quantized(values, scales, None, size)


def _round_block(left: Tensor, values: Tensor, scale: Tensor, upper: Tensor, start: int, stop: int, top: int) -> Tensor:
    """Round the inputs ``start``..``stop`` in turn; returns (w_j − q_j) / U_jj, (out, stop − start)."""
    step = torch.where(scale > 0, scale, 1.0)  # a group of zeros stays zeros
    errors = torch.empty(len(left), stop - start, dtype=left.dtype, device=left.device)
    for at in range(start, stop):
        rounded = (left[:, at] / step).round().clamp(-top, top)
        values[:, at] = torch.where(scale > 0, rounded, 0.0).to(torch.int8)
        errors[:, at - start] = (left[:, at] - values[:, at] * scale) / upper[at, at]
        left[:, at + 1 : stop] -= errors[:, at - start, None] * upper[at, at + 1 : stop]
    return errors
