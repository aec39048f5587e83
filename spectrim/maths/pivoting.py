"""A rank-r matrix as r of its own rows and the coefficients of the others: exact, and smaller than two factors.

    W = left @ right,  left (out, r), right (r, in)
    rows = W[pivots] (r, in);  W[rest] = coefficients @ rows,  coefficients = left[rest] left[pivots]⁻¹ (out − r, r)

The gauge freedom of a factorization, r² numbers, is used up: r (out + in − r) numbers instead of r (out + in), equal to
the dense weight's at full rank. Any r independent rows will do; those that QR with column pivoting picks from an
orthonormal basis of the columns keep the coefficients small, which is what rounding them to 16 bit needs. Where one is
still larger than BOUND, rows are exchanged until none is, each exchange enlarging the pivots' determinant by that
factor (a strong rank-revealing choice).

A matrix with fewer than r independent rows, such as one of zeros, has pivots that no other row needs: any will do, and
their coefficients are 0.

Sources: PIFA, Zhao et al. 2025, arXiv:2501.19090; Gu and Eisenstat 1996, SIAM J. Sci. Comput. 17(4) (strong
rank-revealing factorizations); LAPACK's geqp3 through scipy.
"""

import math
from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.lowrank import Factors
from spectrim.maths.whitening import require_finite

BOUND = 4.0
"""Largest coefficient that the plain pivoting may leave; beyond it rows are exchanged."""


class Pivoted(NamedTuple):
    """``W = [rows; coefficients @ rows][order]``.

    ``rows`` (r, in) and ``coefficients`` C (out − r, r) in the dtype of the factors, ``order`` (out,) int32;
    ``exchanges`` counts the rows that the stronger pivoting had to exchange, 0 as a rule; ``condition`` = ‖[I; C]‖₂,
    at least 1 and at most √(1 + BOUND² r (out − r)): how much larger an error of the rows can be in the matrix.
    """

    rows: Tensor
    coefficients: Tensor
    order: Tensor
    exchanges: int
    condition: float


def pivot(factors: Factors) -> Pivoted:
    """``[rows; coefficients @ rows][order] = left @ right``, every |coefficient| <= BOUND; computed in float64.

    O(out r²) time. Pivots and the other rows keep their order among themselves, so equal inputs give equal bytes. Where
    left has fewer than r independent columns, the first of the rows that are left over fill up the pivots.

    Args:
        factors: left (out, r), right (r, in), r <= min(out, in).

    Raises:
        NumericalError: not finite, or r above out.
    """
    left, right = factors.left.double(), factors.right.double()
    require_finite("left", left)
    require_finite("right", right)
    out, rank = left.shape
    if not 1 <= rank <= out:
        raise NumericalError(f"left has shape {tuple(left.shape)}; at least as many rows as directions are required")
    basis = _basis(left)  # (out, q), q <= r
    needed, exchanges = _independent_rows(basis)
    pivots = torch.cat([needed, _others(needed, out)[: rank - len(needed)]]).sort().values
    rest = _others(pivots, out)
    coefficients = left.new_zeros(len(rest), rank)
    coefficients[:, torch.isin(pivots, needed)] = _coefficients(basis, needed, rest)
    order = torch.argsort(torch.cat([pivots, rest]))
    if len(needed) == rank:  # basis = [I; C] basis[pivots], orthonormal
        condition = 1 / float(torch.linalg.matrix_norm(basis[needed], ord=-2))
    else:
        condition = math.hypot(1, float(torch.linalg.svdvals(coefficients).max())) if len(rest) else 1.0
    dtype = factors.left.dtype
    return Pivoted((left[pivots] @ right).to(dtype), coefficients.to(dtype), order.int(), exchanges, condition)


def _basis(left: Tensor) -> Tensor:
    """An orthonormal basis of the columns, (out, q), q of them above rounding."""
    basis, mixing = torch.linalg.qr(left)
    diagonal, rounding = mixing.diagonal().abs(), len(left) * torch.finfo(left.dtype).eps
    if float(diagonal.min()) > rounding * float(diagonal.max()):
        return basis
    vectors, sigma, _ = torch.linalg.svd(left, full_matrices=False)
    return vectors[:, sigma > rounding * sigma[0]]


def _independent_rows(basis: Tensor) -> tuple[Tensor, int]:
    """As many rows as there are columns, ascending, that bound the others, and how many were exchanged for that."""
    columns = basis.shape[1]
    if columns == 0:
        return torch.zeros(0, dtype=torch.long, device=basis.device), 0
    order = scipy.linalg.qr(basis.T.cpu().numpy(), mode="r", pivoting=True)[1]
    return _strengthened(basis, torch.from_numpy(order[:columns].copy()).long().to(basis.device))


def _strengthened(basis: Tensor, pivots: Tensor) -> tuple[Tensor, int]:
    """Pivots, ascending, with no coefficient above BOUND, and how many rows were exchanged for that."""
    pivots = pivots.sort().values
    for exchanges in range(len(basis)):
        rest = _others(pivots, len(basis))
        if not len(rest):
            return pivots, exchanges
        coefficients = _coefficients(basis, pivots, rest).abs()
        at = int(coefficients.argmax())
        if float(coefficients.flatten()[at]) <= BOUND:
            return pivots, exchanges
        pivots[at % len(pivots)] = rest[at // len(pivots)]
        pivots = pivots.sort().values
    raise NumericalError(f"no {len(pivots)} of {len(basis)} rows bound the others by {BOUND}; lower this matrix's rank")


def _coefficients(basis: Tensor, pivots: Tensor, rest: Tensor) -> Tensor:
    return torch.linalg.solve(basis[pivots], basis[rest], left=False)


def _others(pivots: Tensor, out: int) -> Tensor:
    free = torch.ones(out, dtype=torch.bool, device=pivots.device)
    free[pivots] = False
    return free.nonzero().flatten()
