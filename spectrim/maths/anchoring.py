"""The weight to factorise where the inputs come from a compressed prefix and the outputs are those of the original.

Notation: X (tokens, n) what enters the linear in the original model, X' what enters it behind compressed blocks,
cross C = XᵀX', gram G' = X'ᵀX', weight W (m, n).
"""

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.whitening import damped, require_finite


def anchored(weight: Tensor, cross: Tensor, gram: Tensor, alpha: float = 1.0, damping: float = 1e-2) -> Tensor:
    """M = α W (C + δI)(G' + δI)⁻¹ + (1 − α) W; for α = 1 it minimises ‖X Wᵀ − X' Mᵀ‖²_F + δ ‖M − W‖²_F.

    With α the targets are α X Wᵀ + (1 − α) X' Wᵀ. The best rank-r W' for them on the inputs X' is the best rank-r
    approximation of M in the metric of G', δ aside. X' = X gives W back, and so do α = 0 and a large δ: what the tokens
    do not determine stays as it was, everything where G' is zero. O(n³ + m n²) time.

    Args:
        weight: W, (m, n).
        cross: C = XᵀX', (n, n), not symmetric.
        gram: G' = X'ᵀX', (n, n), of the same tokens.
        alpha: α in [0, 1].
        damping: δ relative to the mean diagonal of G', positive.

    Returns:
        (m, n) float64.

    Raises:
        NumericalError: wrong shapes, non-finite entries, α outside [0, 1], δ not positive.

    Source: anchoring of the targets, AA-SVD 2026, arXiv:2604.02119.
    """
    if not 0 <= alpha <= 1 or not damping > 0:
        raise NumericalError(f"alpha {alpha} and damping {damping}; alpha must lie in [0, 1], damping above 0")
    shape = (weight.shape[-1],) * 2
    if weight.ndim != 2 or tuple(cross.shape) != shape or tuple(gram.shape) != shape:
        raise NumericalError(
            f"cross {tuple(cross.shape)} and gram {tuple(gram.shape)} of a weight {tuple(weight.shape)}; both must be "
            f"{shape}: pass its own layer's"
        )
    require_finite("weight", weight)
    require_finite("cross", cross)
    weight, matrix = weight.double(), damped(gram, damping)
    if not bool(matrix.any()):
        return weight
    shift = float(damping * gram.double().diagonal().mean())
    towards = weight @ cross.double() + shift * weight
    return alpha * torch.linalg.solve(matrix, towards.T).T + (1 - alpha) * weight
