"""The knapsack: exhaustive optimum within a proven gap, never above the budget, the same levels every time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from spectrim.errors import BudgetError
from spectrim.maths import knapsack
from spectrim.maths.knapsack import GAP, Choice, cheapest
from tests import reference

# Any ladders, not only those of spectra: losses may rise, stay or jump.
one_ladder = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=5)
ladder_lists = st.lists(one_ladder, min_size=1, max_size=5).map(
    lambda drawn: [
        [
            Choice((at,), sum(step for step, _ in steps[: at + 1]), float(loss))
            for at, (_, loss) in enumerate(steps)
        ]
        for steps in drawn
    ]
)  # fmt: skip
GREEDY_FAILS = [
    [Choice((1,), 1, 10.0), Choice((2,), 6, 4.0)],  # saves 6 for 5 bytes
    [Choice((1,), 1, 10.0), Choice((2,), 5, 5.5)],  # saves 4.5 for 4 bytes; both would save 9 in 8
    [Choice((1,), 1, 10.0), Choice((2,), 5, 5.5)],
]


def spent(ladders, levels):
    return sum(ladder[at].bytes for ladder, at in zip(ladders, levels, strict=True))


def draw_budget(data, ladders):
    least = spent(ladders, [0] * len(ladders))
    return data.draw(st.integers(least, spent(ladders, [len(ladder) - 1 for ladder in ladders])))


@settings(max_examples=150, deadline=None)
@given(ladder_lists, st.data())
def test_loss_and_bound_enclose_the_exhaustive_optimum(ladders, data):
    budget = draw_budget(data, ladders)
    found = cheapest(ladders, budget)
    best, _ = reference.cheapest(ladders, budget)
    assert spent(ladders, found.levels) <= budget
    assert found.loss == pytest.approx(sum(ladder[at].loss for ladder, at in zip(ladders, found.levels, strict=True)))
    assert found.bound - 1e-9 <= best <= found.loss + 1e-9
    assert found.loss - found.bound <= GAP * found.loss + 1e-9


@settings(max_examples=60, deadline=None)
@given(ladder_lists, st.data())
def test_the_first_bound_is_the_linear_relaxation(ladders, data):
    """scipy's linear program is the reference; the price is its multiplier, so the bound holds at that price."""
    budget = draw_budget(data, ladders)
    solution, price = knapsack._relaxed(ladders, budget)
    owner = np.repeat(np.arange(len(ladders)), [len(ladder) for ladder in ladders])
    flat = [choice for ladder in ladders for choice in ladder]
    relaxed = linprog(
        [choice.loss for choice in flat],
        A_ub=[[choice.bytes for choice in flat]],
        b_ub=[budget],
        A_eq=(owner == np.arange(len(ladders))[:, None]).astype(float),
        b_eq=np.ones(len(ladders)),
        bounds=(0, 1),
    )
    assert solution.bound == pytest.approx(relaxed.fun, abs=1e-7)
    at_price = sum(min(choice.loss + price * choice.bytes for choice in ladder) for ladder in ladders)
    assert solution.bound == pytest.approx(at_price - price * budget, abs=1e-7)


def test_the_relaxation_alone_can_miss_the_optimum():
    """Negative control: by loss saved per byte the first ladder goes first and blocks the better pair."""
    rounded, _ = knapsack._relaxed(GREEDY_FAILS, 11)
    found = cheapest(GREEDY_FAILS, 11)
    assert rounded.levels == [1, 0, 0] and rounded.loss == 24.0
    assert found.levels == [0, 1, 1] and found.loss == 21.0 and found.gap <= GAP


@settings(max_examples=60, deadline=None)
@given(ladder_lists, st.data())
def test_no_choice_of_an_optimum_is_dropped_before_the_integer_program(ladders, data):
    budget = draw_budget(data, ladders)
    solution, price = knapsack._relaxed(ladders, budget)
    best, ranks = reference.cheapest(ladders, budget)
    if best >= solution.loss:
        return
    for ladder, now, (at,) in zip(ladders, solution.levels, ranks, strict=True):
        assert at in knapsack._core(ladder, now, price, solution.loss - solution.bound)


def test_equal_arguments_give_equal_levels():
    noise = np.random.default_rng(0)
    ladders = [
        [Choice((at,), 7 * at + 1, float(loss)) for at, loss in enumerate(-np.sort(-noise.random(30)))]
        for _ in range(40)
    ]
    first = cheapest(ladders, 3000)
    assert knapsack._relaxed(ladders, 3000)[0].gap > GAP, "HiGHS had nothing to do"
    assert all(cheapest(ladders, 3000) == first for _ in range(3))


@pytest.mark.parametrize("budget", [3, 4, 10**12])
def test_one_choice_per_ladder_is_taken(budget):
    found = cheapest([[Choice((1,), 1, 0.0)], [Choice((1,), 2, 5.0)]], budget)
    assert found.levels == [0, 0] and found.gap == 0


def test_losses_of_zero_are_optimal():
    found = cheapest([[Choice((1,), 1, 0.0), Choice((2,), 2, 0.0)]] * 2, 3)
    assert (found.loss, found.bound, found.gap) == (0.0, 0.0, 0.0)


def test_a_budget_below_the_first_choices_is_refused():
    with pytest.raises(BudgetError, match="need 3 bytes, the budget is 2; raise"):
        cheapest(GREEDY_FAILS, 2)
