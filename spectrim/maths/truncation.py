"""Differentiable truncation: a smooth gate over directions, and an SVD whose gradient stays finite.

The gate replaces "keep the first τ directions" by weights T_i(τ) in (0, 1), so that the position τ itself can be
learned. Dobi-SVD (Wang et al. 2025, arXiv:2502.02723) truncates activations, y = U diag(σ∘T) Vᵀ, which
needs the gradient of an SVD. That gradient contains 1/(σᵢ² − σⱼ²) and 1/σᵢ, infinite at equal and at zero singular
values; ``stable_svd`` bounds both, with thresholds relative to the singular values, so that they act in float32 too.
"""

from typing import Any

import torch
from torch import Tensor

from spectrim.maths.whitening import require_finite


def smooth_gate(truncation: Tensor, rank: int, beta: float | Tensor) -> Tensor:
    """T_i = ½ tanh(β(τ − i)) + ½, i = 1..rank: 1 well below τ, ½ at i = τ, 0 well above; Σ T ≈ τ − ½ inside the range.

    Args:
        truncation: τ, (...,), in directions.
        rank: number of gates r.
        beta: steepness β per direction, a number or (...,); 2/β directions see most of the slope.

    Returns:
        (..., rank), dtype and device of ``truncation``; differentiable in τ and β.

    Source: Dobi-SVD, Wang et al. 2025, arXiv:2502.02723.
    """
    index = torch.arange(1, rank + 1, dtype=truncation.dtype, device=truncation.device)
    steepness = beta.unsqueeze(-1) if isinstance(beta, Tensor) else beta
    return 0.5 * torch.tanh(steepness * (truncation.unsqueeze(-1) - index)) + 0.5


class StableSVD(torch.autograd.Function):
    """A = U diag(σ) Vᵀ (thin, batched) with a bounded gradient; call it through ``stable_svd``."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, terms: int, threshold: float, floor: float) -> tuple[Tensor, Tensor, Tensor]:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        ctx.save_for_backward(left, sigma, right)
        ctx.terms, ctx.threshold, ctx.floor = terms, threshold, floor
        return left, sigma, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        left, sigma, right = ctx.saved_tensors  # (..., m, k), (..., k), (..., k, n)
        left_gradient, sigma_gradient, right_gradient = gradients
        inverse_gap = _inverse_gap(sigma, ctx.terms, ctx.threshold, ctx.floor)  # (..., k, k), antisymmetric
        left_part = left.mT @ left_gradient  # Uᵀ gU
        right_part = right @ right_gradient.mT  # Vᵀ gV
        core = (
            (inverse_gap * (left_part - left_part.mT)) * sigma.unsqueeze(-2)
            + sigma.unsqueeze(-1) * (inverse_gap * (right_part - right_part.mT))
            + torch.diag_embed(sigma_gradient)
        )
        inverse = 1 / sigma.clamp(min=_floor(sigma, ctx.floor))
        outside_left = (left_gradient - left @ left_part) * inverse.unsqueeze(-2)  # (I − U Uᵀ) gU Σ⁻¹
        outside_right = inverse.unsqueeze(-1) * (right_gradient - right_part.mT @ right)  # Σ⁻¹ gVᵀ (I − V Vᵀ)
        return (left @ core + outside_left) @ right + left @ outside_right, None, None, None


def stable_svd(
    matrix: Tensor, terms: int = 10, threshold: float = 1e-2, floor: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(U, σ, Vᵀ) with A = U diag(σ) Vᵀ, thin; the gradient is exact at separated singular values and finite elsewhere.

    With F_ij = 1/(σ_j² − σ_i²) and F_ii = 0 the gradient is
    U[(F∘(UᵀgU − gUᵀU))Σ + Σ(F∘(VᵀgV − gVᵀV)) + diag(gσ)]Vᵀ + (I − UUᵀ)gUΣ⁻¹Vᵀ + UΣ⁻¹gVᵀ(I − VVᵀ);
    for σ_i >= σ_j
      * relative gap (σ_i − σ_j)/σ_i below ``threshold``: 1/(σ_i² − σ_j²) becomes the first ``terms`` of its series
        σ_i⁻² Σ_t (σ_j/σ_i)^(2t), at most terms/σ_i²;
      * both below floor·σ₁: the constant terms/(floor·σ₁)², the bound of the series at the floor;
      * Σ⁻¹ is cut at 1/(floor·σ₁).
    Only losses that do not depend on the signs of the singular vectors have a meaningful gradient.

    Args:
        matrix: A, (..., m, n), float32 or float64.
        terms: number of terms of the series.
        threshold: relative gap below which the series is used, in (0, 1).
        floor: singular values below floor·σ₁ count as zero; default: machine epsilon · max(m, n).

    Returns:
        U (..., m, k), σ (..., k) descending, Vᵀ (..., k, n) with k = min(m, n), in A's dtype.

    Raises:
        NumericalError: A is not finite.

    Source: Dobi-SVD, arXiv:2502.02723; the Taylor form is that of Wang et al. 2021, arXiv:2104.03821.
    """
    require_finite("matrix", matrix)
    if floor is None:
        floor = torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:])
    left, sigma, right = StableSVD.apply(matrix, terms, threshold, floor)
    return left, sigma, right


def truncated_activation(
    output: Tensor,
    truncation: Tensor,
    beta: float | Tensor,
    terms: int = 10,
    threshold: float = 1e-2,
    rank: int | None = None,
) -> Tensor:
    """y' = U diag(σ∘T(τ)) Vᵀ of y = U diag(σ) Vᵀ: the activation with its directions beyond τ faded out.

    Args:
        output: y, (tokens, out).
        truncation: τ, scalar, in directions.
        beta: steepness of the gate per direction.
        terms: see ``stable_svd``.
        threshold: see ``stable_svd``.
        rank: largest rank y can have, min(in, out) of its linear; directions beyond are rounding noise and dropped.

    Returns:
        (tokens, out); differentiable in y, τ and β. τ far above min(tokens, out) gives y back.

    Raises:
        NumericalError: y is not finite.

    Source: Dobi-SVD, Wang et al. 2025, arXiv:2502.02723.
    """
    left, sigma, right = stable_svd(output, terms, threshold)
    left, sigma, right = left[..., :rank], sigma[..., :rank], right[..., :rank, :]
    gate = smooth_gate(truncation.to(sigma.dtype), sigma.shape[-1], beta)
    return (left * (sigma * gate).unsqueeze(-2)) @ right


def _floor(sigma: Tensor, floor: float) -> Tensor:
    """floor·σ₁, (..., 1), kept above zero so that the gradient of a zero matrix is finite."""
    smallest = torch.finfo(sigma.dtype).tiny ** 0.25
    return (floor * sigma[..., :1]).clamp(min=smallest)


def _inverse_gap(sigma: Tensor, terms: int, threshold: float, floor: float) -> Tensor:
    """F, (..., k, k), antisymmetric: F_ij = −1/(σ_i² − σ_j²) for i < j, bounded as ``stable_svd`` says."""
    cut = _floor(sigma, floor)
    larger = sigma.clamp(min=cut).unsqueeze(-1)  # (..., k, 1): σ_i of the upper triangle, σ is descending
    smaller = sigma.unsqueeze(-2)  # (..., 1, k)
    ratio = (smaller / larger).clamp(max=1.0)
    squared = ratio.square()
    series = torch.ones_like(squared)
    for _ in range(terms - 1):
        series = 1 + squared * series
    exact = 1 / ((1 - ratio) * (1 + ratio)).clamp(min=threshold)
    bounded = torch.where(1 - ratio < threshold, series, exact) / larger.square()
    both_tiny = sigma.unsqueeze(-1) < cut.unsqueeze(-1)
    bounded = torch.where(both_tiny, terms / cut.unsqueeze(-1).square(), bounded)
    upper = bounded.triu(diagonal=1)
    return upper.mT - upper
