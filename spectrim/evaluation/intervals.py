"""How sure a difference of two perplexities is that were measured on the same windows.

    p' / p = exp( mean over windows of d_w ),   d_w = the loss of one model in window w − that of the other

Windows differ far more from each other than two models do in one window: the difference is taken first, and then the
windows are drawn anew, with replacement (the paired bootstrap).

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (the percentile interval).
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999


def paired_interval(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, float] | None:
    """The interval of CONFIDENCE for p' / p; None where there are fewer than two windows.

    Args:
        losses, reference: mean loss in nats of each window, in the same order, of both models.
    """
    differences = np.subtract(losses, reference)
    if len(differences) < 2:
        return None
    found = stats.bootstrap(
        (differences,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return float(np.exp(found.low)), float(np.exp(found.high))
