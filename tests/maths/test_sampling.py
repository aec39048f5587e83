"""Draws in rounds: every index once before any comes again, reproducibly."""

from hypothesis import given
from hypothesis import strategies as st

from spectrim.maths.sampling import in_rounds


@given(st.integers(1, 20), st.integers(1, 70), st.integers(0, 99))
def test_every_round_is_a_permutation(n_items: int, n_draws: int, seed: int) -> None:
    found = in_rounds(n_items, n_draws, seed).tolist()
    assert len(found) == n_draws
    rounds = [found[start : start + n_items] for start in range(0, n_draws, n_items)]
    assert all(sorted(full) == list(range(n_items)) for full in rounds[: n_draws // n_items])
    assert len(set(rounds[-1])) == len(rounds[-1])
    assert in_rounds(n_items, n_draws + 5, seed).tolist()[:n_draws] == found


def test_another_seed_is_another_order() -> None:
    assert in_rounds(30, 30, 0).tolist() == in_rounds(30, 30, 0).tolist() != in_rounds(30, 30, 1).tolist()
