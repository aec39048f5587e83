"""The entropy of integers: what no code of one table can be shorter than."""

import math

import torch
from torch import Tensor


def entropy(integers: Tensor) -> float:
    """−Σ p log2 p over the shares p of each number, in bits per number.

    Args:
        integers: any shape and dtype.
    """
    counts = integers.flatten().unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(torch.special.entr(shares).sum()) / math.log(2)
