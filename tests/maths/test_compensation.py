"""GPTQ's rounding against rounding to the nearest, a naive version, and the outputs it is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import NumericalError
from spectrim.maths.compensation import compensated
from spectrim.maths.quantization import dequantize, round_to_nearest
from spectrim.maths.scale_search import searched_scale
from spectrim.maths.storage_formats import Grid
from tests import reference

DAMPING = 1e-2


def correlated(seed: int, out: int, in_: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram of inputs that share few directions."""
    weight, tokens = reference.draw(seed, out, in_, 4 * in_)
    mixing = torch.randn(in_, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weight, reference.gram(tokens @ mixing)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 99), st.integers(1, 6), st.sampled_from([2, 3, 4]),
    st.sampled_from([(4, 2), (8, 4), (130, 65), (12, None), (70, None)]), st.booleans(),
)  # fmt: skip
def test_equals_the_naive_version(seed, out, n_bits, shape, asymmetric):
    in_, size = shape
    weight, gram = correlated(seed, out, in_)
    found = compensated(weight, gram, Grid(n_bits, size, asymmetric), DAMPING)
    assert (found.zero_point is not None) == asymmetric
    expected = reference.compensated(weight, gram, n_bits, found.scale, DAMPING, found.zero_point)
    torch.testing.assert_close(dequantize(found, torch.float64), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n_bits", [3, 4, 8])
@pytest.mark.parametrize("size", [None, 8, 64])
def test_a_diagonal_gram_rounds_to_the_nearest(n_bits, size):
    weight, _ = reference.draw(0, 9, 128, 1)
    gram, grid = torch.diag(torch.linspace(0.1, 3, 128, dtype=torch.float64)), Grid(n_bits, size)
    found = compensated(weight, gram, grid)
    scale = searched_scale(weight, gram.diagonal() + DAMPING * gram.diagonal().mean(), grid)
    steps = scale.double().repeat_interleave(128 // scale.shape[1], 1)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.values.double(), (weight / steps).round().clamp(*grid.ends))


def lost(weight, gram, rounded):
    difference = weight - dequantize(rounded, torch.float64)
    return float((difference @ gram @ difference.T).trace())


@pytest.mark.parametrize(("size", "n_bits"), [(None, 4), (16, 4), (16, 3)])
def test_outputs_err_much_less_than_after_rounding_to_the_nearest(size, n_bits):
    weight, gram = correlated(1, 24, 64)
    nearest = lost(weight, gram, round_to_nearest(weight, n_bits, size))
    assert lost(weight, gram, compensated(weight, gram, Grid(n_bits, size))) < 0.4 * nearest


def test_order_search_and_feedback_each_make_the_error_less():
    """What a user could do instead: GPTQ in the order of the file with scales of the largest numbers."""
    better = {"order": 0, "scale": 0}
    for seed in range(8):
        weight, gram = correlated(seed, 24, 64)
        found = lost(weight, gram, compensated(weight, gram, Grid(4, 16)))
        plain = round_to_nearest(weight, 4, 16).scale
        better["scale"] += found < lost(weight, gram, compensated(weight, gram, Grid(4, 16), scale=plain))
        searched = searched_scale(weight, gram.diagonal(), Grid(4, 16))
        cheapest_first = weight - reference.compensated(weight, -gram, 4, searched, DAMPING)
        better["order"] += found < float((cheapest_first @ gram @ cheapest_first.T).trace())
    assert better["scale"] == 8 and better["order"] >= 6


@pytest.mark.parametrize("n_bits", [3, 4])
def test_zero_points_make_the_error_of_lopsided_groups_less(n_bits):
    for seed in range(4):
        weight, gram = correlated(seed, 24, 128)
        weight = weight + weight.abs()  # half of the numbers are zero, the others positive
        plain, asymmetric = (
            lost(weight, gram, compensated(weight, gram, Grid(n_bits, 64, with_zero))) for with_zero in (False, True)
        )
        assert asymmetric < 0.6 * plain


@pytest.mark.parametrize("asymmetric", [False, True])
def test_integers_stay_on_their_grid_and_zeros_stay_zeros(asymmetric):
    weight, gram = correlated(2, 5, 32)
    weight[3] = 0
    found = compensated(weight, gram, Grid(4, 16, asymmetric))
    assert found.values.dtype == torch.int8 and -8 <= int(found.values.min()) <= int(found.values.max()) <= 7
    assert not dequantize(found)[3].any() and not found.scale[3].any()


def test_a_rank_deficient_gram_is_damped():
    weight, tokens = reference.draw(3, 4, 12, 5)
    found = compensated(weight, reference.gram(tokens), Grid(8))
    assert dequantize(found).isfinite().all()


@pytest.mark.parametrize(
    ("gram", "message"),
    [(torch.eye(7), r"gram \(7, 7\)"), (torch.full((8, 8), torch.nan), "not finite")],
)
def test_errors_say_what_is_wrong(gram, message):
    with pytest.raises(NumericalError, match=message):
        compensated(torch.ones(2, 8), gram, Grid(4))
