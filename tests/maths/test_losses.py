"""Losses against their sums written out, one position at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.maths.losses import distillation_loss
from tests import reference


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(2, 5), st.floats(0, 1))
def test_loss_is_the_mean_of_divergence_and_cross_entropy(seed: int, windows: int, seq: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, expected = (3 * torch.randn(windows, seq, 7, generator=generator) for _ in range(2))
    tokens = torch.randint(0, 7, (windows, seq), generator=generator)
    found = distillation_loss(logits, expected, tokens, weight)
    assert float(found) == pytest.approx(reference.distillation_loss(logits, expected, tokens, weight), abs=1e-5)


def test_nothing_is_learned_from_oneself() -> None:
    """The divergence of a model from itself is zero, and so is its gradient; the text still teaches."""
    logits = torch.randn(2, 5, 9, requires_grad=True)
    tokens = torch.randint(0, 9, (2, 5))
    for weight, taught in ((1.0, False), (0.5, True)):
        loss = distillation_loss(logits, logits.detach(), tokens, weight)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (float(gradient.abs().max()) > 1e-3) == taught
        assert taught or abs(float(loss)) < 1e-5
