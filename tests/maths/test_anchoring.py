"""Anchored weights: their least squares, what leaves them alone, and that they bring the outputs back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.anchoring import anchored
from spectrim.maths.lowrank import closed_form, truncate
from tests import reference


def prefix(seed: int, out: int, in_: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, X, and X' = X behind a lossy linear map with noise."""
    weight, x = reference.draw(seed, out, in_, tokens)
    generator = torch.Generator().manual_seed(seed + 1)
    map_ = torch.eye(in_, dtype=torch.float64) + 0.3 * torch.randn(in_, in_, generator=generator, dtype=torch.float64)
    return weight, x, x @ map_ + 0.01 * torch.randn(tokens, in_, generator=generator, dtype=torch.float64)


def of(weight: Tensor, x: Tensor, behind: Tensor, **options: float) -> Tensor:
    return anchored(weight, x.T @ behind, behind.T @ behind, **options)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 30),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1e-3, 1e-1]),
)
def test_equals_least_squares(seed: int, out: int, in_: int, tokens: int, alpha: float, damping: float) -> None:
    weight, x, behind = prefix(seed, out, in_, tokens)
    found = of(weight, x, behind, alpha=alpha, damping=damping)
    torch.testing.assert_close(
        found, reference.anchored(weight, x, behind, alpha, damping), rtol=1e-6, atol=1e-6 * float(weight.abs().max())
    )


@pytest.mark.parametrize("same", ["inputs", "alpha", "damping"])
def test_gives_the_weight_back(same: str) -> None:
    weight, x, behind = prefix(3, 5, 7, 40)
    options = {"alpha": {"alpha": 0.0}, "damping": {"damping": 1e9}}.get(same, {})
    found = of(weight, x, x if same == "inputs" else behind, **options)
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-7)


def test_what_nothing_enters_stays_as_it_was() -> None:
    weight, x, behind = prefix(4, 5, 7, 40)
    assert torch.equal(of(weight, x, 0 * behind), weight)


def test_brings_the_original_outputs_nearer() -> None:
    weight, x, behind = prefix(5, 12, 16, 200)
    outputs = x @ weight.T
    rank, gram = 6, behind.T @ behind

    def error(target: Tensor) -> float:
        left, right = truncate(closed_form(target, gram), rank)
        return float((outputs - behind @ (left @ right).T).norm())

    assert error(of(weight, x, behind, damping=1e-6)) < 0.8 * error(weight)
    assert error(of(weight, x, behind, alpha=0.5, damping=1e-6)) < error(weight)


def test_independent_of_how_tokens_are_batched() -> None:
    weight, x, behind = prefix(7, 4, 6, 60)
    halves = [(x[part], behind[part]) for part in (slice(0, 20), slice(20, 60))]
    summed = anchored(weight, sum(a.T @ b for a, b in halves), sum(b.T @ b for _, b in halves))
    torch.testing.assert_close(summed, of(weight, x, behind))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.1}, r"alpha 1\.1 .* must lie in \[0, 1\]"),
        ({"damping": 0.0}, "damping above 0"),
        ({"cross": torch.eye(3)}, r"cross \(3, 3\) .* both must be \(6, 6\)"),
        ({"cross": torch.full((6, 6), torch.nan)}, "cross: 36 of 36 entries"),
        ({"gram": torch.full((6, 6), torch.inf)}, "gram: 36 of 36 entries"),
        ({"weight": torch.full((4, 6), torch.nan)}, "weight: 24 of 24 entries"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    weight, x, behind = prefix(9, 4, 6, 60)
    arguments = {"weight": weight, "cross": x.T @ behind, "gram": behind.T @ behind} | change
    with pytest.raises(NumericalError, match=message):
        anchored(**arguments)
