"""Factors W = left @ right in int8, where the left one makes up for what rounding the right one has changed.

    right ≈ R = q_R · s_R     rounded to the nearest, one scale per direction
    left  ≈ L = q_L · s_L     rounded with one scale per row, from
                              L* = argmin_L ‖(left right − L R) G^½‖_F = left + left (right − R) G Rᵀ (R G Rᵀ)⁻¹
                              so that its columns make up for each other, too (compensation.py, on R G Rᵀ)

A scale per row of the left factor and per direction of the right one are the scales of the outputs of the two products
x Rᵀ and (x Rᵀ) Lᵀ, which is what integer kernels take. Where no Gram is known both are rounded to the nearest.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.compensation import compensated
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import dequantize_int8, quantize_int8
from spectrim.maths.storage_formats import Grid
from spectrim.maths.whitening import cholesky

DAMPING, MAX_DAMPING = 1e-8, 1e-2
"""Of R G Rᵀ, relative to its mean diagonal: a direction that no input has is left as it is."""


class RoundedSide(NamedTuple):
    """The first rows of a factor as ``values`` (head, rank) int8 times ``scale`` float32, and the ``tail`` as it is.

    ``scale`` is (rank,) for the right factor, whose rows here are its inputs, and (head,) for the left one.
    """

    values: Tensor
    scale: Tensor
    tail: Tensor


class RoundedFactors(NamedTuple):
    """``left`` (out, rank) and ``right``ᵀ (in, rank)."""

    left: RoundedSide
    right: RoundedSide


def round_factors(factors: Factors, heads: tuple[int, int], gram: Tensor | None = None) -> RoundedFactors:
    """left @ right with the first ``heads`` rows of left and of rightᵀ in int8; float64, O(in² rank + out rank²) time.

    Args:
        factors: left (out, rank), right (rank, in), balanced.
        heads: how many rows (of left, of rightᵀ) are int8; the others keep their dtype.
        gram: G = XᵀX of the inputs, (in, in), or None.

    Raises:
        NumericalError: something is not finite, the Gram's shape is another, or it cannot be repaired.
    """
    left, columns = factors.left, factors.right.mT
    if gram is not None and gram.shape != (len(columns), len(columns)):
        raise NumericalError(f"gram {tuple(gram.shape)}; required: ({len(columns)}, {len(columns)})")
    values, scale = quantize_int8(columns[: heads[1]], dim=1)
    right = RoundedSide(values, scale, columns[heads[1] :])
    if gram is None:
        return RoundedFactors(RoundedSide(*quantize_int8(left[: heads[0]], dim=0), left[heads[0] :]), right)
    rounded = torch.cat([dequantize_int8(values, scale, 1, torch.float64), right.tail.double()])  # (in, rank)
    projected = gram.double() @ rounded  # G Rᵀ
    inner = rounded.mT @ projected  # R G Rᵀ, (rank, rank)
    lower, _ = cholesky(inner, DAMPING, MAX_DAMPING)
    change = torch.cholesky_solve(((columns.double() - rounded).mT @ projected).mT, lower).mT
    refitted = left.double() + left.double() @ change
    row_scale = quantize_int8(refitted[: heads[0]], dim=0)[1]
    done = compensated(refitted[: heads[0]], inner, Grid(8), scale=row_scale[:, None])
    return RoundedFactors(RoundedSide(done.values, row_scale, refitted[heads[0] :].to(left.dtype)), right)
