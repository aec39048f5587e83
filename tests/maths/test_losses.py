"""Losses against their sums written out, one position at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.maths.losses import divergence, next_token_loss
from tests import reference


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(2, 5), st.sampled_from([0, 1]))
def test_losses_are_means_over_positions(seed: int, windows: int, seq: int, weight: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, expected = (3 * torch.randn(windows, seq, 7, generator=generator) for _ in range(2))
    tokens = torch.randint(0, 7, (windows, seq), generator=generator)
    found = divergence(logits, expected) if weight else next_token_loss(logits, tokens)
    assert float(found) == pytest.approx(reference.distillation_loss(logits, expected, tokens, weight), abs=1e-5)


def test_nothing_is_learned_from_oneself() -> None:
    """The divergence of a model from itself is zero, and so is its gradient; the text still teaches."""
    logits = torch.randn(2, 5, 9, requires_grad=True)
    loss = divergence(logits, logits.detach())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-5 and float(gradient.abs().max()) < 1e-5
    (gradient,) = torch.autograd.grad(next_token_loss(logits, torch.randint(0, 9, (2, 5))), logits)
    assert float(gradient.abs().max()) > 1e-3
