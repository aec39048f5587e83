"""The course of the learning rate: up, then down, whatever the number of steps."""

import pytest

from spectrim.maths.schedule import FLOOR, course


def test_the_rate_rises_then_falls() -> None:
    rates = [course(step, 100) for step in range(100)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.95 < max(rates) <= 1 and rates[-1] == pytest.approx(FLOOR, abs=0.01) and 0 < rates[0] < 0.2


def test_one_step_takes_the_whole_rate() -> None:
    assert course(0, 1) == 1.0
