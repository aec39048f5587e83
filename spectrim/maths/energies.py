"""What cutting a decomposition at a rank drops, and what that is predicted to cost."""

import torch
from torch import Tensor


def discarded(energy: Tensor) -> Tensor:
    """E_r = Σ_{i>r} eᵢ for r = 0..k, eᵢ = σᵢ²: (k,) -> (k + 1,), float64, non-increasing, E_k = 0."""
    energy = energy.double()
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


def predicted_loss(sigma: Tensor, n_tokens: int) -> Tensor:
    """Σ_{i>r} σᵢ² / (2·n_tokens) for r = 0..k: (k,) -> (k + 1,), the second-order increase of the summed loss.

    ``sigma`` is that of ``lowrank.two_sided``, with G and D summed over the same ``n_tokens`` tokens and D of the
    summed loss. Another normalisation of the loss changes it by one factor common to all matrices: every comparison
    stays as it is.
    """
    return discarded(sigma.double().square()) / (2 * n_tokens)
