"""Weights moved off the grid that they were once rounded to.

    W + share · s ⊙ N,   N ~ Normal(0, 1),   s = (max − min) / 15 of each group of ``GROUP`` inputs

A model that was published in 4 bits is known by its dequantized weights alone. Rounding those to 4 bits again loses
less than it would lose with the original weights, so that methods which round look better than they are. Noise of a
third of a step has the variance of the rounding error, uniform in a step: 1/12.
"""

import torch
from torch import Tensor

GROUP = 32
LEVELS = 15


def perturbed(weight: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """``weight`` (out, in) with noise, in its dtype.

    Args:
        share: standard deviation of the noise, in 4-bit steps.
        generator: of the noise, on the CPU.
    """
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    groups = weight.float().split(GROUP, dim=1)
    steps = [((part.amax(1) - part.amin(1)) / LEVELS)[:, None].expand_as(part) for part in groups]
    return (weight.float() + share * torch.cat(steps, 1) * noise).to(weight.dtype)
