"""A weight rounded against its captured Gram, and the low-rank correction of what rounding lost.

    Q = argmin over the grid of ‖(W − Q) G^½‖, greedily (maths/compensation.py)
    L R = argmin over rank r of ‖D^½ (W − Q − L R) G^½‖ for every r at once (maths/lowrank.py, two_sided)

With G and D divided by their numbers of tokens, Σ_{i>r} σᵢ² / 2 of the second predicts what the loss gains, as that of
the weight's own decomposition does, so that rounded and factored weights compare.

Source: low-rank correction in the captured metric: LQER, Zhang et al. 2024, arXiv:2402.02446; QERA, Zhang et al. 2024,
arXiv:2410.06040 (both with the input's Gram alone).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.maths.compensation import compensated
from spectrim.maths.lowrank import Decomposition, Factors, smaller_root, two_sided
from spectrim.maths.quantization import Quantized, dequantize
from spectrim.maths.storage_formats import Grid
from spectrim.maths.two_sided_rounding import Stepped
from spectrim.maths.whitening import weighing

RoundedWeight = tuple[Quantized | Stepped, Factors | None]
"""A rounded weight, and the factors of what rounding lost where it has some."""


class Rounded(NamedTuple):
    """``weight`` Q on its grid, and the decomposition of W − Q, from which the factors of any rank are cut."""

    weight: Quantized
    residual: Decomposition


def lost(weight: Tensor, rounded: Quantized, gram: Tensor, gradient_gram: Tensor) -> float:
    """‖D^½ (W − Q) G^½‖² = Σ σᵢ² of ``rounded``'s decomposition without damping; a zero Gram counts as the identity."""
    error = weight.double() - dequantize(rounded, torch.float64)
    return float(torch.sum((weighing(gradient_gram.double()) @ error) * (error @ weighing(gram.double()))))


def rounded(
    weight: Tensor, gram: Tensor, gradient_gram: Tensor, grid: Grid, damping: float, max_damping: float
) -> Rounded:
    """W ≈ Q + L R.

    Args:
        weight: W, (out, in).
        gram, gradient_gram: G (in, in) and D (out, out), per token.
        grid: of the integers.
        damping, max_damping: of both Grams where the correction is decomposed; rounding damps on its own.

    Raises:
        NumericalError: shapes do not match, something is not finite, or a Gram cannot be repaired.
    """
    quantized = compensated(weight, gram, grid)
    error = weight.double() - dequantize(quantized).double()
    root = smaller_root(error, gram, gradient_gram, damping, max_damping)
    return Rounded(quantized, two_sided(error, gram, gradient_gram, damping, max_damping, **root))
