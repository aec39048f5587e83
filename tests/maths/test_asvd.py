"""ASVD: the discarded energy is the error in its own metric, and its metric is worth something, but not the optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import NumericalError
from spectrim.maths.energies import discarded
from spectrim.maths.lowrank import asvd, closed_form, output_error, plain_svd, truncate
from tests import reference

SHAPES = [(12, 5), (5, 12), (7, 7), (1, 4), (4, 1), (1, 1)]


def draw(seed, out, in_, tokens, skew=2.0):
    """W and X, X's channels independent and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -skew, in_, dtype=torch.float64)
    return weight, torch.randn(tokens, in_, generator=generator, dtype=torch.float64) * scale


def product(decomposition, rank):
    factors = truncate(decomposition, rank)
    return factors.left @ factors.right


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.25, 0.5, 1.0]), st.data())
def test_the_error_in_the_scaled_metric_is_the_discarded_energy(seed, out, in_, exponent, data):
    """‖(W − W') S‖_F² = Σ_{i>r} σᵢ², S = diag(mean |x_j|)^α."""
    weight, x = draw(seed, out, in_, 4 * in_)
    rank = data.draw(st.integers(1, min(out, in_)))
    decomposition = asvd(weight, x.abs().mean(0), exponent)
    error = torch.linalg.norm((weight - product(decomposition, rank)) * x.abs().mean(0) ** exponent)
    expected = discarded(decomposition.sigma**2)[rank].sqrt()
    torch.testing.assert_close(error, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_asvd_equals_the_naive_version_and_full_rank_the_weight(out, in_, tokens):
    weight, x = draw(3, out, in_, tokens)
    decomposition = asvd(weight, x.abs().mean(0))
    assert decomposition.left.shape == (out, min(out, in_)) and decomposition.right.shape == (min(out, in_), in_)
    assert {part.dtype for part in decomposition} == {torch.float64}
    for rank in range(1, min(out, in_) + 1):
        torch.testing.assert_close(product(decomposition, rank), reference.asvd(weight, x, rank), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(product(decomposition, min(out, in_)), weight, rtol=1e-8, atol=1e-8)


def test_exponent_zero_and_equal_channels_are_the_plain_svd():
    weight, x = draw(0, 8, 6, 30)
    plain = product(plain_svd(weight), 2)
    torch.testing.assert_close(product(asvd(weight, x.abs().mean(0), 0.0), 2), plain)
    torch.testing.assert_close(product(asvd(weight, torch.full((6,), 7.0)), 2), plain)


def test_the_order_of_the_channels_and_their_common_unit_do_not_matter():
    weight, x = draw(1, 9, 6, 30)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    expected = product(asvd(weight, x.abs().mean(0)), 3)
    permuted = product(asvd(weight[:, order], x.abs().mean(0)[order]), 3)
    torch.testing.assert_close(permuted, expected[:, order])
    torch.testing.assert_close(product(asvd(weight, 1e5 * x.abs().mean(0)), 3), expected)


@pytest.mark.parametrize("seed", range(5))
def test_asvd_knows_channels_but_not_their_correlations(seed):
    """Negative controls: of independent channels plain SVD is far worse, of mixed ones ASVD is far from the optimum."""

    def error(method, weight, x):
        return output_error(weight, truncate(method, 4), reference.gram(x))

    weight, x = draw(seed, 16, 12, 60)
    assert error(plain_svd(weight), weight, x) > 1.5 * error(asvd(weight, x.abs().mean(0)), weight, x)
    weight, x = reference.draw(seed, 16, 12, 60, skew=2.0)
    best = error(closed_form(weight, reference.gram(x)), weight, x)
    assert error(asvd(weight, x.abs().mean(0)), weight, x) > 1.5 * best


def test_a_silent_channel_stays_finite_and_full_rank_gives_the_weight_back():
    weight, x = draw(2, 6, 5, 20)
    x[:, 2] = 0
    decomposition = asvd(weight, x.abs().mean(0))
    torch.testing.assert_close(product(decomposition, 5), weight, rtol=0, atol=1e-8)
    zero = asvd(torch.zeros(6, 5), x.abs().mean(0))
    assert all(bool(torch.isfinite(part).all()) for part in zero)


def test_where_every_channel_is_silent_the_plain_svd_is_taken_and_nothing_is_lost():
    weight, x = draw(3, 6, 5, 20)
    found = asvd(weight, 0 * x.abs().mean(0))
    torch.testing.assert_close(product(found, 2), product(plain_svd(weight), 2))
    assert not found.sigma.any()


def test_bad_input_is_named():
    weight = torch.ones(3, 2)
    with pytest.raises(NumericalError, match=r"abs_mean has shape \(3,\); this weight requires \(2,\)"):
        asvd(weight, torch.ones(3))
    with pytest.raises(NumericalError, match="abs_mean: 1 of 2 entries"):
        asvd(weight, torch.tensor([1.0, float("nan")]))
    with pytest.raises(NumericalError, match=r"means of \|x\| are required"):
        asvd(weight, torch.tensor([1.0, -1.0]))
    with pytest.raises(NumericalError, match="weight: 6 of 6 entries"):
        asvd(weight * float("inf"), torch.ones(2))
