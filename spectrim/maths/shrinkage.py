"""A Gram pulled towards a multiple of the identity, for when its tokens are few."""

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.whitening import damped


def shrunk(gram: Tensor, share: float) -> Tensor:
    """(1 − s) G + s (tr G / n) I, float64: the trace stays, the eigenvalues draw together.

    s = 0 gives G, and s = 1 a metric in which all directions count the same.

    The eigenvalues of a Gram of few tokens lie further apart than those of all tokens: its small ones are too small,
    and a metric that trusts them spends no rank there. Unlike damping, which makes a Gram positive, the share is a
    choice about the data: larger for fewer tokens.

    Args:
        gram: G, (n, n), symmetric.
        share: s in [0, 1].

    Raises:
        NumericalError: s outside [0, 1]; G not square, not symmetric or not finite.

    Source: Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices.
    """
    if not 0 <= share <= 1:
        raise NumericalError(f"share {share} of the identity; it must lie in [0, 1]")
    gram = damped(gram, 0.0)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (1 - share) * gram + share * gram.diagonal().mean() * identity
