"""The joint choice of format and rank against trying every combination."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import BudgetError
from spectrim.maths.budget import RESIDUAL, ROUNDED, matrix_bytes
from spectrim.maths.joint_allocation import Option, dense_option, factored_options, joint, rounded_options
from spectrim.maths.knapsack import GAP

options = st.lists(
    st.builds(Option, st.just("pifa"), st.integers(1, 9), st.integers(1, 40), st.integers(0, 30).map(float)),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 100))
def test_no_combination_within_the_budget_loses_less(offered, spare):
    budget = sum(min(option.bytes for option in of) for of in offered) + spare
    chosen, gap = joint(offered, budget)
    assert all(option in of for option, of in zip(chosen, offered, strict=True))
    assert sum(option.bytes for option in chosen) <= budget
    fitting = [picked for picked in product(*offered) if sum(option.bytes for option in picked) <= budget]
    best = min(sum(option.loss for option in picked) for picked in fitting)
    loss = sum(option.loss for option in chosen)
    assert best <= loss <= best * (1 + 2 * GAP) + 1e-9 and 0 <= gap <= 1


def test_a_budget_below_the_cheapest_options_is_refused():
    with pytest.raises(BudgetError, match="the smallest"):
        joint([[Option("pifa", 1, 10, 1.0)]], 9)


def test_options_cost_and_lose_what_their_format_says():
    sigma = torch.linspace(4, 1, 16, dtype=torch.float64)
    tails = [float(sigma[rank:].square().sum()) for rank in range(17)]
    assert dense_option((16, 64)) == Option("dense", 16, 2048, 0.0)
    for format, rounding in (("pifa", 0.0), ("pifa_int8", 0.5)):
        found = factored_options(format, sigma, (16, 64), 4, rounding)
        assert found
        for option in found:
            assert option.bytes == matrix_bytes(format, 16, 64, option.rank) < 2048 and option.rank % 4 == 0
            assert option.loss == pytest.approx(tails[option.rank] + rounding)
    for format in ROUNDED:
        found = rounded_options(format, sigma, (16, 64), 2, largest=4)
        ranks = [2, 4] if format in RESIDUAL else [16]
        assert [option.rank for option in found] == ranks
        for option in found:
            assert option.bytes == matrix_bytes(format, 16, 64, option.rank)
            assert option.loss == pytest.approx(tails[option.rank if len(ranks) > 1 else 0])


def test_a_format_that_is_beaten_is_not_taken():
    cheap, worse, dense = Option("dense_int8", 4, 10, 1.0), Option("pifa", 2, 12, 2.0), Option("dense", 4, 20, 0.0)
    assert joint([[worse, dense, cheap]], 15)[0] == [cheap]
    assert joint([[worse, dense, cheap]], 20)[0] == [dense]
