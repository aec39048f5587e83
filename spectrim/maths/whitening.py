"""Whiteners of a Gram: S with S Sᵀ = G + δ·mean(diag G)·I, and their inverses.

With G = XᵀX the output error of a changed weight is ‖X (W − W')ᵀ‖_F = ‖(W − W') S‖_F for every such S, which turns a
problem about activations into one about matrices (SVD-LLM, Wang et al. 2024, arXiv:2403.07378). Damping δ is relative
to the mean of the diagonal; where the asked δ cannot make the Gram positive it grows tenfold up to a stated bound, and
the value used is returned, never hidden. Everything is computed in float64.

A Gram of zeros weighs no error at all: whatever W' is, it is a best one. The identity takes its place (``weighing``),
whose best W' is that of the plain SVD. Zero inputs come behind a matrix of zeros, zero output gradients before one, as
where a model was grown by layers that change nothing yet.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.errors import NumericalError

FIRST_DAMPING = 1e-8
"""Where repair starts when the asked damping is zero."""


class Whitener(NamedTuple):
    """``root`` S (n, n), ``inverse`` S⁺ (n, n), both float64, and the relative ``damping`` that was used."""

    root: Tensor
    inverse: Tensor
    damping: float


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise NumericalError, with counts, unless every entry of ``tensor`` is finite."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise NumericalError(
            f"{name}: {bad} of {tensor.numel()} entries of the {tuple(tensor.shape)} matrix are not finite; "
            "find the window and layer that produce them, or compute in float32"
        )


def weighing(gram: Tensor) -> Tensor:
    """G, or the identity where G is zero."""
    return gram if bool(gram.any()) else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def damped(gram: Tensor, damping: float) -> Tensor:
    """G + δ·mean(diag G)·I, float64; G itself, symmetrised, when δ = 0.

    Args:
        gram: G, (n, n), symmetric.
        damping: δ >= 0, relative to the mean diagonal.

    Raises:
        NumericalError: G is not square, not symmetric or not finite, or δ is negative.
    """
    gram = _checked(gram)
    if damping < 0:
        raise NumericalError(f"damping {damping} is negative; it must be at least 0")
    shift = damping * gram.diagonal().mean()
    return gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def sqrt_and_inverse(gram: Tensor, damping: float = 0.0, max_damping: float = 1e-2) -> Whitener:
    """S = (G + δ·mean(diag G)·I)^½, symmetric, and its pseudo-inverse S⁺; of ``weighing(G)``.

    S S = the damped Gram; S S⁺ is the projector on its range (the identity when δ > 0). O(n³) time.

    Args:
        gram: G, (n, n), symmetric positive semidefinite up to rounding.
        damping: first δ tried.
        max_damping: largest δ tried; each step is ten times the one before.

    Raises:
        NumericalError: G is not finite, not symmetric, or has an eigenvalue that no δ <= max_damping outweighs.
    """
    values, vectors, used = _damped_eigen(gram, damping, max_damping)
    return Whitener((vectors * values.sqrt()) @ vectors.T, (vectors * _inverse_sqrt(values)) @ vectors.T, used)


def eigen_whitener(gram: Tensor, damping: float = 0.0, max_damping: float = 1e-2) -> Whitener:
    """S = Q Λ^½ and S⁺ = Λ^(−½) Qᵀ from G + δ·mean(diag G)·I = Q Λ Qᵀ, G zero being I: the whitener of SVD-LLM V2.

    Same arguments, edge behaviour and errors as ``sqrt_and_inverse``; S is not symmetric.
    Source: SVD-LLM V2, Wang et al. 2025, arXiv:2503.12340.
    """
    values, vectors, used = _damped_eigen(gram, damping, max_damping)
    return Whitener(vectors * values.sqrt(), _inverse_sqrt(values)[:, None] * vectors.T, used)


def cholesky(gram: Tensor, damping: float = 0.0, max_damping: float = 1e-2) -> tuple[Tensor, float]:
    """(L, δ) with L lower triangular and L Lᵀ = G + δ·mean(diag G)·I; of ``weighing(G)``.

    δ starts at ``damping`` and grows tenfold until the factorisation succeeds. Unlike ``sqrt_and_inverse`` it needs a
    strictly positive definite matrix: a rank-deficient Gram (fewer tokens than features) is always damped.

    Raises:
        NumericalError: G is not finite or not symmetric, or no δ <= max_damping works.
    """
    gram = weighing(_checked(gram))
    # A pivot at rounding level "succeeds" and then blows up L⁻¹, so positive definite means: above that level.
    floor = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().max()
    for used in _damping_steps(damping, max_damping):
        factor, info = torch.linalg.cholesky_ex(damped(gram, used))
        if int(info) == 0 and bool((factor.diagonal().square() > floor).all()):
            return factor, used
    raise _indefinite(gram, float(torch.linalg.eigvalsh(gram)[0]), max_damping)


def _damped_eigen(gram: Tensor, damping: float, max_damping: float) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues (ascending, zero where they are rounding noise) and eigenvectors of the damped Gram, and δ."""
    gram = weighing(_checked(gram))
    values, vectors = torch.linalg.eigh(gram)
    mean = values.mean()
    tolerance = len(gram) * torch.finfo(values.dtype).eps * values.abs().max()
    for used in _damping_steps(damping, max_damping):
        # An eigenvalue of −δ·mean would become an arbitrary tiny one; half of that keeps the inverse bounded.
        if values[0] >= -torch.maximum(tolerance, used * mean / 2):
            shifted = values + used * mean
            return torch.where(shifted > tolerance, shifted, 0.0), vectors, used
    raise _indefinite(gram, float(values[0]), max_damping)


def _inverse_sqrt(values: Tensor) -> Tensor:
    return torch.where(values > 0, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)


def _damping_steps(damping: float, max_damping: float) -> list[float]:
    if damping < 0:
        raise NumericalError(f"damping {damping} is negative; it must be at least 0")
    steps = [damping]
    while (following := max(10 * steps[-1], FIRST_DAMPING)) <= max_damping * (1 + 1e-9):
        steps.append(following)
    return steps


def _checked(gram: Tensor) -> Tensor:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise NumericalError(f"gram has shape {tuple(gram.shape)}; a square matrix (features, features) is required")
    require_finite("gram", gram)
    gram = gram.double()
    asymmetry = float((gram - gram.T).abs().max())
    if asymmetry > 1e-5 * float(gram.abs().max()):
        raise NumericalError(
            f"gram {tuple(gram.shape)} is not symmetric: entries differ from their mirror by up to {asymmetry:.3g}; "
            "accumulate XᵀX of one and the same X"
        )
    return (gram + gram.T) / 2


def _indefinite(gram: Tensor, smallest: float, max_damping: float) -> NumericalError:
    return NumericalError(
        f"gram {tuple(gram.shape)} is not positive definite even with damping {max_damping:.0e}: "
        f"smallest eigenvalue {smallest:.3g}, mean diagonal {float(gram.diagonal().mean()):.3g}; "
        "calibrate on more tokens or raise max_damping"
    )
