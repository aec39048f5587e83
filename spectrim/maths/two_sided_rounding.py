"""A rounded weight with one step per row and one per column, whose errors make up for each other on both sides.

    min over integers Z of  ‖D^½ (W − Q) G^½‖²,   Q_ij = r_i Z_ij c_j,   at a given length of Z's entropy code

With G = R Δ Rᵀ and D = S Γ Sᵀ, R and S unit upper triangular, the loss of E = W − Q is Σ_ij Γ_i Δ_j (Sᵀ E R)_ij².
Taken in order, element (i, j) is rounded after all (k, l) with k <= i and l <= j. Their errors are known by then, so
that the rounding error of one number, at most r_i c_j / 2, is all of

    (Sᵀ E R)_ij = E_ij + Σ_{(k,l) ≠ (i,j)} S_ki E_kl R_lj

Every number then costs (r_i c_j)² Γ_i Δ_j / 12. At a given sum of code lengths, log2 of the steps, the loss is least
where all cost the same: r_i c_j = step / √(Γ_i Δ_j), water-filling in the two-sided metric. Integers are not bounded:
where feedback asks for a large one, clamping it would break all that follow. Rows and columns come in falling order of
the diagonals of D and G.

Elements on an anti-diagonal do not need each other. They are rounded together, first by blocks, then within the blocks.

Sources: error feedback on one side, GPTQ, Frantar et al. 2022, arXiv:2210.17323; on both sides, YAQA, Tseng et al.
2025, arXiv:2505.22988; rounding for an entropy code at high rate, Gish and Pierce 1968.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectrim.errors import NumericalError
from spectrim.maths.quantization import half
from spectrim.maths.whitening import cholesky, require_finite

BLOCK = 64
"""Rows and columns of a block."""

INPUT_DAMPING = 1e-2
MAX_DAMPING = 1.0


class Stepped(NamedTuple):
    """W ≈ rows ⊙ values ⊙ columns: ``values`` int32 (out, in), ``rows`` float16 (out,), ``columns`` float16 (in,)."""

    values: Tensor
    rows: Tensor
    columns: Tensor

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q (out, in)."""
        return (self.values.double() * self.rows.double()[:, None] * self.columns.double()).to(dtype)


class Side(NamedTuple):
    """One side's metric: the ``order`` of rounding, unit upper ``triangle`` in it, ``pivots`` in the weight's order."""

    order: Tensor
    triangle: Tensor
    pivots: Tensor


def side(gram: Tensor, damping: float) -> Side:
    """T and p with T diag(p) Tᵀ = G + δ·mean(diag G)·I, both put in falling order of G's diagonal; float64.

    Raises:
        NumericalError: the Gram is not finite, not symmetric, or cannot be repaired.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    last_first = order.flip(0)
    lower, _ = cholesky(gram[last_first][:, last_first], damping, MAX_DAMPING)
    diagonal = lower.diagonal()
    pivots = torch.empty_like(diagonal)
    pivots[last_first] = diagonal.square()
    return Side(order, (lower / diagonal).flip(0, 1), pivots)


def steps(row_pivots: Tensor, column_pivots: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """r (out,) and c (in,) float16, r_i c_j = step / √(Γ_i Δ_j), of equal geometric means.

    Raises:
        NumericalError: a step overflows float16.
    """
    logs = [-0.5 * pivots.log() for pivots in (row_pivots, column_pivots)]
    even = (logs[0].mean() + logs[1].mean() + math.log(step)) / 2
    rows, columns = (half((log - log.mean() + even).exp()) for log in logs)
    return rows, columns


def two_sided_rounded(weight: Tensor, rows: Side, columns: Side, step: float) -> Stepped:
    """W ≈ r ⊙ Z ⊙ c. O(out in (out + in)) time.

    Args:
        weight: W, (out, in), float32 or float64, in which errors are fed back.
        rows, columns: ``side`` of D (out, out) and of G (in, in), per token.
        step: of a number whose pivots are 1.

    Raises:
        NumericalError: W is not finite, or shapes do not match.
    """
    require_finite("weight", weight)
    if weight.shape != (len(rows.order), len(columns.order)):
        raise NumericalError(
            f"weight {tuple(weight.shape)}; required: ({len(rows.order)}, {len(columns.order)}), as the Grams are"
        )
    row_steps, column_steps = steps(rows.pivots, columns.pivots, step)
    ordered = weight[rows.order][:, columns.order]
    sizes = torch.outer(row_steps.to(weight.dtype)[rows.order], column_steps.to(weight.dtype)[columns.order])
    values = _wavefront(ordered, sizes, rows.triangle.to(weight.dtype), columns.triangle.to(weight.dtype))
    unordered = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    unordered[rows.order[:, None], columns.order] = values
    return Stepped(unordered, row_steps, column_steps)


def _wavefront(weight: Tensor, sizes: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Z of the weight in order, block by block along the anti-diagonals of blocks."""
    out, in_ = weight.shape
    n_rows, n_columns = -(-out // BLOCK), -(-in_ // BLOCK)
    space = (0, n_columns * BLOCK - in_, 0, n_rows * BLOCK - out)
    weight, sizes = _blocks(pad(weight, space)), _blocks(pad(sizes, space, value=1.0))
    left, right = _blocks(_extended(left, n_rows)), _blocks(_extended(right, n_columns))
    values = torch.zeros_like(weight, dtype=torch.int32)
    errors, behind = torch.zeros_like(weight), torch.zeros_like(weight)  # W − Q, and Sᵀ E in the rows that are done
    for diagonal in range(n_rows + n_columns - 1):
        row = torch.arange(max(0, diagonal - n_columns + 1), min(n_rows, diagonal + 1), device=weight.device)
        column = diagonal - row
        above, before = slice(int(row[-1]) + 1), slice(int(column[0]) + 1)  # what is beyond has zeros in the triangles
        target = weight[row, column] + torch.einsum("kmab,kmac->mbc", left[above, row], errors[above, column])
        given = torch.einsum("mkab,kmbc->mac", behind[row, before], right[before, column])
        values[row, column], errors[row, column], behind[row, column] = _round_blocks(
            weight[row, column], target, given, sizes[row, column], left[row, row], right[column, column]
        )
    whole = values.transpose(1, 2).reshape(n_rows * BLOCK, n_columns * BLOCK)
    return whole[:out, :in_]


def _round_blocks(
    weight: Tensor, target: Tensor, given: Tensor, sizes: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round blocks (m, b, b) by their anti-diagonals.

    Args:
        target: W + Σ_{k<i} S_ki E_k, of the rows before the block.
        given: what the columns before the block add.

    Returns:
        Z int32, E and Sᵀ E.
    """
    # With the columns in reverse a diagonal is every (b + 1)th element, and its rows and columns are slices.
    weight, target, given, sizes, right = (part.flip(-1).contiguous() for part in (weight, target, given, sizes, right))
    right, values = right.flip(-2), torch.zeros_like(weight)
    for diagonal in range(2 * BLOCK - 1):
        first, last = max(0, diagonal - BLOCK + 1), min(BLOCK, diagonal + 1)
        rows, columns = slice(first, last), slice(BLOCK - 1 - diagonal + first, BLOCK - 1 - diagonal + last)
        places = slice(first * BLOCK + columns.start, (last - 1) * BLOCK + columns.stop, BLOCK + 1)
        at, size = target.flatten(1)[:, places], sizes.flatten(1)[:, places]
        rounded = torch.div(at + given.flatten(1)[:, places], size).round_()
        values.flatten(1)[:, places] = rounded
        stored = rounded.mul_(size)
        seen, error = at - stored, weight.flatten(1)[:, places] - stored
        # what lies above and to the left of an element has zeros in the triangles
        target.mT[:, columns].addcmul_(left[:, rows], error.unsqueeze(-1))
        given[:, rows].addcmul_(seen.unsqueeze(-1), right[:, columns])
    # the diagonal of the unit triangle has added each element's own error to its target, too
    found = values, weight - values * sizes, target - weight
    values, errors, behind = (part.flip(-1) for part in found)
    return values.int(), errors, behind


def _blocks(matrix: Tensor) -> Tensor:
    """(rows, columns) -> (rows / b, columns / b, b, b)."""
    return matrix.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def _extended(triangle: Tensor, n_blocks: int) -> Tensor:
    """``triangle`` with the identity behind it, up to whole blocks."""
    whole = torch.eye(n_blocks * BLOCK, dtype=triangle.dtype, device=triangle.device)
    whole[: len(triangle), : len(triangle)] = triangle
    return whole
