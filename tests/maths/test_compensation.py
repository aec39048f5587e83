"""GPTQ's rounding against rounding to the nearest, a naive version, and the outputs it is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import NumericalError
from spectrim.maths.compensation import compensated
from spectrim.maths.quantization import dequantize, round_to_nearest
from tests import reference

DAMPING = 1e-2


def correlated(seed: int, out: int, in_: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram of inputs that share few directions."""
    weight, tokens = reference.draw(seed, out, in_, 4 * in_)
    mixing = torch.randn(in_, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weight, reference.gram(tokens @ mixing)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([(4, 2), (8, 4), (130, 65), (12, None), (70, None)]))
def test_equals_the_naive_version(seed, out, shape):
    (in_, size), n_bits = shape, 4
    weight, gram = correlated(seed, out, in_)
    found = compensated(weight, gram, n_bits, size, DAMPING)
    expected = reference.compensated(weight, gram, n_bits, size or in_, DAMPING)
    torch.testing.assert_close(dequantize(found, torch.float64), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n_bits", [4, 8])
@pytest.mark.parametrize("size", [None, 8, 64])
def test_a_diagonal_gram_rounds_to_the_nearest(n_bits, size):
    weight, _ = reference.draw(0, 9, 128, 1)
    gram = torch.diag(torch.linspace(0.1, 3, 128, dtype=torch.float64))
    found, nearest = compensated(weight, gram, n_bits, size), round_to_nearest(weight, n_bits, size)
    assert torch.equal(found.values, nearest.values) and torch.equal(found.scale, nearest.scale)


@pytest.mark.parametrize("size", [None, 16])
def test_outputs_err_much_less_than_after_rounding_to_the_nearest(size):
    weight, gram = correlated(1, 24, 64)

    def error(rounded):
        difference = weight - dequantize(rounded, torch.float64)
        return float((difference @ gram @ difference.T).trace())

    assert error(compensated(weight, gram, 4, size)) < 0.5 * error(round_to_nearest(weight, 4, size))


def test_integers_stay_on_their_grid_and_zeros_stay_zeros():
    weight, gram = correlated(2, 5, 32)
    weight[3] = 0
    found = compensated(weight, gram, 4, 16)
    assert found.values.dtype == torch.int8 and int(found.values.abs().max()) <= 7
    assert not found.values[3].any() and not found.scale[3].any()


def test_a_rank_deficient_gram_is_damped():
    weight, tokens = reference.draw(3, 4, 12, 5)
    found = compensated(weight, reference.gram(tokens), 8, None)
    assert dequantize(found).isfinite().all()


@pytest.mark.parametrize(
    ("in_", "size", "gram", "message"),
    [
        (8, 3, torch.eye(8), r"groups of 3"),
        (8, None, torch.eye(7), r"gram \(7, 7\)"),
        (8, None, torch.full((8, 8), torch.nan), "not finite"),
    ],
)
def test_errors_say_what_is_wrong(in_, size, gram, message):
    with pytest.raises(NumericalError, match=message):
        compensated(torch.ones(2, in_), gram, 4, size)
