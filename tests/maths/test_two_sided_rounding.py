"""Rounding with error feedback on both sides: the naive version, the bound that it promises, what else costs more."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.entropy import entropy
from spectrim.maths.two_sided_rounding import BLOCK, Side, Stepped, side, two_sided_rounded
from tests import reference

DAMPING = 0.02


def problem(seed: int, out: int, in_: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, and Grams of few directions on both sides."""
    weight, tokens = reference.draw(seed, out, in_, 4 * in_)
    _, gradients = reference.draw(seed + 1, in_, out, 4 * out)
    return weight, reference.gram(tokens), reference.gram(gradients)


def solved(seed: int, out: int, in_: int, step: float) -> tuple[Tensor, Stepped, Side, Side]:
    weight, gram, gradient_gram = problem(seed, out, in_)
    rows, columns = side(gradient_gram, DAMPING), side(gram, DAMPING)
    return weight, two_sided_rounded(weight, rows, columns, step), rows, columns


def lost(error: Tensor, gram: Tensor, gradient_gram: Tensor) -> float:
    return float(torch.sum((gradient_gram @ error) * (error @ gram)))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.integers(1, 7), st.integers(1, 9), st.sampled_from([0.1, 1.0, 10.0]))
def test_equals_the_naive_version(seed: int, out: int, in_: int, step: float) -> None:
    weight, found, rows, columns = solved(seed, out, in_, step)
    expected = reference.two_sided_rounded(
        weight[rows.order][:, columns.order], found.rows.double()[rows.order], found.columns.double()[columns.order],
        rows.triangle, columns.triangle,
    )  # fmt: skip
    assert torch.equal(found.values[rows.order][:, columns.order].double(), expected)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99), st.sampled_from([1, BLOCK - 1, BLOCK, 2 * BLOCK + 5]), st.sampled_from([1, BLOCK + 1, 100]))
def test_every_number_errs_by_half_its_step_once_the_others_are_known(seed: int, out: int, in_: int) -> None:
    weight, found, rows, columns = solved(seed, out, in_, 1.0)
    error = (weight - found.dense(torch.float64))[rows.order][:, columns.order]
    steps = torch.outer(found.rows.double()[rows.order], found.columns.double()[columns.order])
    seen = rows.triangle.mT @ error @ columns.triangle
    assert (seen.abs() <= steps * (0.5 + 1e-6)).all()
    # and all cost the same: what float16 makes of the steps apart
    costs = steps.square() * rows.pivots[rows.order][:, None] * columns.pivots[columns.order]
    torch.testing.assert_close(costs, torch.ones_like(costs), rtol=5e-3, atol=0)


def test_a_side_is_its_damped_gram_in_falling_order() -> None:
    _, gram, _ = problem(3, 5, 40)
    order, triangle, pivots = side(gram, DAMPING)
    damped = reference.damped(gram, DAMPING)[order][:, order]
    torch.testing.assert_close(triangle @ pivots[order].diag() @ triangle.mT, damped)
    assert torch.equal(triangle, triangle.triu()) and (triangle.diagonal() == 1).all()
    assert (gram.diagonal()[order].diff() <= 0).all()


@pytest.mark.parametrize("step", [1.0, 6.0])
def test_at_equal_bits_the_cheaper_ways_lose_more(step: float) -> None:
    """Rounding to the nearest on one step for all, on the same steps without feedback, with feedback on one side."""
    weight, gram, gradient_gram = problem(1, 96, 128)
    rows, columns = side(gradient_gram, DAMPING), side(gram, DAMPING)
    found = two_sided_rounded(weight, rows, columns, step)
    ours, bits = lost(weight - found.dense(torch.float64), gram, gradient_gram), entropy(found.values)

    plain = float(weight.std()) * 2 ** (0.5 * math.log2(2 * math.pi * math.e) - bits)  # a step of about equal bits
    while entropy((weight / plain).round()) > bits:
        plain *= 1.01
    nearest = lost(weight - (weight / plain).round() * plain, gram, gradient_gram)
    steps = torch.outer(found.rows.double(), found.columns.double())
    unfed = lost(weight - (weight / steps).round() * steps, gram, gradient_gram)
    alone = side(torch.eye(96, dtype=torch.float64), 0.0)
    one_sided = two_sided_rounded(weight, alone, columns, step)
    while entropy(one_sided.values) > bits:
        step *= 1.02
        one_sided = two_sided_rounded(weight, alone, columns, step)
    of_one_side = lost(weight - one_sided.dense(torch.float64), gram, gradient_gram)
    assert ours < 0.75 * of_one_side and ours < 0.5 * unfed and ours < 0.2 * nearest


def test_twice_the_step_is_a_bit_less_and_four_times_the_loss() -> None:
    weight, gram, gradient_gram = problem(2, 96, 128)
    for damping in (0.0, DAMPING):
        rows, columns = side(gradient_gram, damping), side(gram, damping)
        fine, coarse = (two_sided_rounded(weight, rows, columns, step) for step in (3.2, 6.4))
        losses = [lost(weight - found.dense(torch.float64), gram, gradient_gram) for found in (fine, coarse)]
        assert losses[1] / losses[0] == pytest.approx(4, rel=0.08)
    assert entropy(fine.values) - entropy(coarse.values) == pytest.approx(1, abs=0.1)


def test_without_damping_the_loss_is_that_of_uniform_errors() -> None:
    weight, gram, gradient_gram = problem(2, 96, 128)
    found = two_sided_rounded(weight, side(gradient_gram, 0.0), side(gram, 0.0), 3.0)
    loss = lost(weight - found.dense(torch.float64), gram, gradient_gram)
    assert loss == pytest.approx(weight.numel() * 3.0**2 / 12, rel=0.05)


def test_clamping_an_integer_breaks_what_follows() -> None:
    """Why integers have no bound."""
    weight, gram, gradient_gram = problem(4, 64, 64)
    _, found, *_ = solved(4, 64, 64, 0.05)
    limit = int(found.values.abs().max()) // 3
    clamped = found._replace(values=found.values.clamp(-limit, limit))
    losses = [lost(weight - one.dense(torch.float64), gram, gradient_gram) for one in (found, clamped)]
    assert losses[1] > 100 * losses[0]


def test_zeros_stay_zeros_and_zero_grams_round_to_the_nearest() -> None:
    flat = side(torch.zeros(9, 9), DAMPING), side(torch.zeros(7, 7), DAMPING)
    assert not two_sided_rounded(torch.zeros(9, 7), *flat, 0.1).values.any()
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = two_sided_rounded(weight, *flat, 0.1)
    steps = torch.outer(found.rows.double(), found.columns.double())
    assert torch.equal(found.values.double(), (weight / steps).round())
    torch.testing.assert_close(steps, torch.full_like(steps, float(steps[0, 0])), rtol=1e-3, atol=0)


def test_wrong_arguments_are_named() -> None:
    rows, columns = side(torch.eye(4), 0.0), side(torch.eye(6), 0.0)
    with pytest.raises(NumericalError, match=r"weight \(6, 4\); required: \(4, 6\)"):
        two_sided_rounded(torch.ones(6, 4), rows, columns, 1.0)
    with pytest.raises(NumericalError, match="weight: 24 of 24 entries"):
        two_sided_rounded(torch.full((4, 6), torch.nan), rows, columns, 1.0)
    with pytest.raises(NumericalError, match="overflows float16"):
        two_sided_rounded(torch.ones(4, 6), rows, columns, 1e12)
