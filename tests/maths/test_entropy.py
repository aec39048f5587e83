"""The entropy of integers against the sum that defines it, and the numbers that it has by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.maths.entropy import entropy


@given(st.lists(st.integers(-300, 300), min_size=1, max_size=60))
def test_it_is_the_sum_that_defines_it(numbers: list[int]) -> None:
    shares = [count / len(numbers) for count in Counter(numbers).values()]
    naive = -sum(share * math.log2(share) for share in shares)
    assert entropy(torch.tensor(numbers)) == pytest.approx(naive, abs=1e-12)


def test_equal_numbers_have_none_and_the_uniform_ones_have_the_most() -> None:
    assert entropy(torch.zeros(3, 4)) == 0
    assert entropy(torch.arange(256).view(16, 16)) == pytest.approx(8)
    assert entropy(torch.tensor([0.0, 0.0, 0.0, 7.0])) == pytest.approx(0.811278, abs=1e-6)
