"""The order in which training takes its windows."""

import torch
from torch import Tensor


def in_rounds(n_items: int, n_draws: int, seed: int) -> Tensor:
    """``n_draws`` indices below ``n_items``, (n_draws,) int64: every index once, in a drawn order, before any again.

    The same for the same ``seed``; a longer run begins as a shorter one does.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(n_items, generator=generator) for _ in range(-(-n_draws // n_items))]
    return torch.cat(rounds)[:n_draws]
