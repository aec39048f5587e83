"""A rounded weight whose columns make up for each other's rounding errors: GPTQ on a captured Gram.

    min over Q on the grid of  ‖(W − Q) S‖_F,  S Sᵀ = G + δ·mean(diag G)·I

greedily, one input after the other: with U upper triangular, UᵀU = (S Sᵀ)⁻¹, the error of input j is spread over the
inputs after it, w_k ← w_k − (w_j − q_j) U_jk / U_jj for k > j, which minimises the output error once q_j stands. Inputs
come in falling order of G_jj, so that those that cost most meet the least error of others; each keeps the scale of the
group it has in the file. Scales, and the zero points of an asymmetric grid, are those of the weight as it was
(scale_search.py, zero_point_search.py): error feedback moves what is left to be rounded, and a scale that follows it
grows with every group. With a diagonal Gram this is rounding to the nearest.

Source: GPTQ, Frantar et al. 2022, arXiv:2210.17323.
"""

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.quantization import Quantized
from spectrim.maths.scale_search import searched_scale
from spectrim.maths.storage_formats import Grid
from spectrim.maths.whitening import cholesky, damped, require_finite, weighing
from spectrim.maths.zero_point_search import searched_zero_point

BLOCK = 64
"""Inputs whose corrections are applied at once to all inputs after them."""


def compensated(
    weight: Tensor,
    gram: Tensor,
    grid: Grid,
    damping: float = 1e-2,
    max_damping: float = 1e-1,
    scale: Tensor | None = None,
) -> Quantized:
    """W ≈ (q − z) s, s float16 and z float32 per row and group of inputs; s may be negative where there is no z.

    float64, O(out in² + in³) time.

    Args:
        weight: W, (out, in).
        gram: G = XᵀX, (in, in).
        grid: 2 to 8 bits; its group must divide ``in``.
        damping, max_damping: first and largest relative damping of the Gram tried.
        scale: (out, in / group), instead of the searched one and of a zero point; it is returned in its own dtype.

    Raises:
        NumericalError: W or G is not finite, shapes do not match, the Gram cannot be repaired, or the group does not
            divide ``in``.
    """
    require_finite("weight", weight)
    require_finite("gram", gram)
    rows, inputs = weight.shape
    size = grid.group_size(inputs)
    if gram.shape != (inputs, inputs):
        raise NumericalError(f"weight {tuple(weight.shape)}, gram {tuple(gram.shape)}; required: ({inputs}, {inputs})")
    zero_point = None
    if scale is None:
        # damped, so that inputs that were silent in the windows keep their numbers, too
        importance = damped(weighing(gram.double()), damping).diagonal()
        if grid.asymmetric:
            scale, zero_point = searched_zero_point(weight, importance, grid)
        else:
            scale = searched_scale(weight, importance, grid)
    order = gram.diagonal().argsort(descending=True, stable=True)
    lower, _ = cholesky(gram[order][:, order], damping, max_damping)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    left = weight.double().mT[order]  # what is still to be rounded, corrected for what has been; (in, out)
    steps = scale.double().mT[order // size]
    zeros = torch.zeros_like(steps) if zero_point is None else zero_point.double().mT[order // size]
    values = torch.empty(inputs, rows, dtype=torch.int8, device=weight.device)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        part = slice(start, stop)
        errors = _round_block(left[part], steps[part], zeros[part], values[part], upper[part, start:], grid)
        left[stop:] -= upper[start:stop, stop:].mT @ errors
    unordered = torch.empty_like(values)
    unordered[order] = values
    return Quantized(unordered.mT.contiguous(), scale, zero_point, size)


def _round_block(left: Tensor, steps: Tensor, zeros: Tensor, values: Tensor, upper: Tensor, grid: Grid) -> Tensor:
    """Round some inputs in turn into ``values``; returns (w_j − q_j) / U_jj, (inputs, out)."""
    errors = torch.empty_like(left)
    divisors = torch.where(steps != 0, steps, torch.inf)  # a group of zeros stays zeros
    for at in range(len(left)):
        rounded = (left[at] / divisors[at]).add_(zeros[at]).round_().clamp_(*grid.ends)
        values[at] = rounded
        row = upper[at]
        torch.div(left[at] - rounded.sub_(zeros[at]).mul_(steps[at]), row[at], out=errors[at])
        left[at + 1 :].addr_(row[at + 1 : len(left)], errors[at], alpha=-1)
    return errors
