"""Rounding to integers and back: error bounds, the naive version, packing without loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import NumericalError
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import (
    balance,
    dequantize,
    dequantize_int8,
    pack,
    principal,
    quantize_int8,
    round_to_nearest,
    rounded_bytes,
    unpack,
)
from tests import reference

close = torch.testing.assert_close
seeds = st.integers(0, 2**16)
sizes = st.integers(1, 20)


def draw(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@settings(deadline=None)
@given(seeds, sizes, sizes, st.sampled_from([0, 1]))
def test_directions_come_back_within_half_a_scale(seed, rows, columns, dim):
    matrix = draw(seed, rows, columns)
    values, scale = quantize_int8(matrix, dim)
    assert (values.dtype, values.shape) == (torch.int8, matrix.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (matrix.shape[dim],))
    error = (dequantize_int8(values, scale, dim, torch.float64) - matrix).abs()
    assert bool((error <= 0.5001 * scale.double().unsqueeze(1 - dim)).all())
    assert bool((values.abs().amax(1 - dim) == 127).all())
    for direction in range(matrix.shape[dim]):
        one = matrix.select(dim, direction)
        expected = [round(float(x) / float(scale[direction])) for x in one]
        assert values.select(dim, direction).tolist() == expected


def test_negating_and_scaling_a_direction_negates_and_scales_its_numbers():
    matrix = draw(0, 6, 4)
    values, scale = quantize_int8(matrix, 1)
    other, other_scale = quantize_int8(-8 * matrix, 1)
    close(other, -values)
    close(other_scale, 8 * scale)


def test_one_scale_for_all_directions_is_much_worse():
    """Negative control: the spectrum of the directions does not fit into one absolute maximum."""
    matrix = draw(1, 40, 12) * torch.logspace(0, -4, 12)
    values, scale = quantize_int8(matrix, 1)
    single = matrix.abs().max() / 127

    def worst(candidate):
        return float(((candidate - matrix).norm(dim=0) / matrix.norm(dim=0)).max())

    assert worst(dequantize_int8(values, scale, 1, torch.float64)) < 0.02
    assert worst((matrix / single).round() * single) > 0.9


def test_a_zero_direction_comes_back_as_zeros():
    matrix = draw(0, 5, 3)
    matrix[:, 1] = 0
    values, scale = quantize_int8(matrix, 1)
    assert float(scale[1]) == 0
    assert not bool(dequantize_int8(values, scale, 1)[:, 1].any())


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 6), sizes, st.sampled_from([2, 3, 4, 8]), st.sampled_from([None, 1, 4, 7]), st.booleans())
def test_rounding_equals_the_naive_version(seed, out, in_, n_bits, group_size, symmetric):
    weight = draw(seed, out, in_)
    quantized = round_to_nearest(weight, n_bits, group_size, symmetric)
    found = dequantize(quantized, torch.float64)
    close(found, reference.round_to_nearest(weight, n_bits, group_size, symmetric), rtol=1e-6, atol=1e-9)
    groups = -(-in_ // min(group_size or in_, in_))
    assert quantized.scale.shape == (out, groups)
    assert quantized.scale.dtype == torch.float16
    top = 2 ** (n_bits - 1) - 1 if symmetric else 2**n_bits - 1
    assert -top * symmetric <= int(quantized.values.min()) <= int(quantized.values.max()) <= top
    assert (quantized.zero_point is None) == symmetric
    scale = quantized.scale.double().repeat_interleave(quantized.group_size, dim=1)[:, :in_]
    # half a step of rounding, for asymmetric ranges another half of the zero point, and the scale's own in float16:
    # relative, below its normal range half its smallest number
    bound = (0.51 if symmetric else 1.01) * scale + 1e-3 * weight.abs() + top * 2.0**-25
    assert bool(((found - weight).abs() <= bound).all())


@settings(deadline=None)
@given(seeds, st.sampled_from([2, 4, 8]), st.sampled_from([None, 4]))
def test_rounding_symmetrically_twice_is_rounding_once(seed, n_bits, group_size):
    once = dequantize(round_to_nearest(draw(seed, 3, 9), n_bits, group_size))
    assert torch.equal(dequantize(round_to_nearest(once, n_bits, group_size)), once)


def test_smaller_groups_and_more_bits_are_more_accurate():
    weight = draw(3, 16, 64) * torch.logspace(0, -2, 64)

    def error(n_bits, group_size, symmetric=True):
        return float(
            (dequantize(round_to_nearest(weight, n_bits, group_size, symmetric), torch.float64) - weight).norm()
        )

    assert error(8, None) < 0.2 * error(4, None)
    assert error(4, 8) < 0.6 * error(4, None)
    assert error(4, 8, symmetric=False) < error(4, 8)


def test_zero_rows_tiny_rows_and_one_column_survive_rounding():
    weight = torch.tensor([[0.0, 0.0], [1e-7, -2e-7], [3.0, 3.0]])
    for symmetric in (True, False):
        found = dequantize(round_to_nearest(weight, 8, None, symmetric))
        assert not bool(found[0].any())
        close(found[1:], weight[1:], rtol=1e-3, atol=2e-7)
    close(dequantize(round_to_nearest(torch.tensor([[5.0]]), 4, 64)), torch.tensor([[5.0]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("n_bits", "group_size", "symmetric", "ratio"),
    [
        (8, None, True, 0.5009),
        (4, None, True, 0.2509),
        (4, 64, True, 0.2656),
        (4, 64, False, 0.2695),
        (4, 32, False, 0.2891),
    ],
)
def test_bytes_count_scales_and_zero_points(n_bits, group_size, symmetric, ratio):
    """The ratios of the table in the design: 0.50, 0.25, 0.266, 0.270 and 0.289 of the 16-bit bytes."""
    stored = rounded_bytes(576, 1152, n_bits, group_size, symmetric)
    assert stored / (2 * 576 * 1152) == pytest.approx(ratio, abs=5e-5)
    quantized = round_to_nearest(draw(0, 576, 1152), n_bits, group_size, symmetric)
    values = (
        quantized.values.numel()
        if n_bits == 8
        else pack(quantized.values.to(torch.int8) - 8 * (not symmetric), 4).numel()
    )
    zeros = 0 if symmetric else quantized.zero_point.numel() // 2
    assert stored == values + 2 * quantized.scale.numel() + zeros


@settings(deadline=None)
@given(st.sampled_from([3, 4]), st.integers(1, 4), st.integers(0, 5), seeds)
def test_packed_integers_come_back_bit_for_bit(n_bits, rows, units, seed):
    shape, end = (rows, 8 * units), 2 ** (n_bits - 1)
    values = torch.randint(-end, end, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(values, n_bits)
    assert packed.dtype == torch.uint8 and packed.numel() == values.numel() * n_bits // 8
    assert packed.tolist() == [reference.pack(row, n_bits) for row in values.tolist()]
    assert torch.equal(unpack(packed, n_bits), values)


@pytest.mark.parametrize(("n_bits", "value"), [(4, -9), (4, 8), (4, 127), (3, 4), (3, -5)])
def test_what_does_not_fit_into_the_bits_is_refused(n_bits, value):
    with pytest.raises(NumericalError, match=rf"int{n_bits} values lie in .* found \[{value}, {value}\]"):
        pack(torch.full((1, 8), value, dtype=torch.int8), n_bits)


@pytest.mark.parametrize(("n_bits", "count", "message"), [(4, 3, "2 fill 1"), (3, 12, "8 fill 3")])
def test_numbers_that_fill_no_bytes_are_refused(n_bits, count, message):
    with pytest.raises(NumericalError, match=message):
        pack(torch.zeros(1, count, dtype=torch.int8), n_bits)


@settings(deadline=None)
@given(seeds, sizes, st.integers(1, 5), sizes)
def test_balancing_keeps_the_product_and_equalises_the_norms(seed, out, rank, in_):
    left, right = draw(seed, out, rank) * torch.logspace(0, 6, rank), draw(seed + 1, rank, in_)
    balanced = balance(Factors(left, right))
    close(balanced.left @ balanced.right, left @ right, rtol=1e-9, atol=1e-6)
    close(balanced.left.norm(dim=0), balanced.right.norm(dim=1), rtol=1e-9, atol=1e-12)


def test_balancing_leaves_a_zero_direction_and_the_dtype_alone():
    left, right = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[4.0, 4.0], [1.0, 3.0]])
    balanced = balance(Factors(left, right))
    assert balanced.left.dtype == balanced.right.dtype == torch.float32
    close(balanced.right[1], right[1])
    close(balanced.left @ balanced.right, left @ right)


def test_bad_input_is_named():
    broken = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(NumericalError, match="factor: 1 of 2"):
        quantize_int8(broken, 1)
    with pytest.raises(NumericalError, match="weight: 1 of 2"):
        round_to_nearest(broken, 8, None)
    with pytest.raises(NumericalError, match="overflows float16"):
        round_to_nearest(torch.tensor([[1e9]]), 4, None)
    for n_bits, group_size in ((1, None), (9, None), (4, 0)):
        with pytest.raises(NumericalError, match=f"n_bits {n_bits}, group_size {group_size}"):
            round_to_nearest(torch.ones(2, 2), n_bits, group_size)


@pytest.mark.parametrize("shape", [(9, 14, 5), (14, 9, 5), (6, 6, 6), (8, 5, 1)])
def test_principal_directions_are_orthogonal_and_change_no_product(shape):
    out, in_, rank = shape
    factors = Factors(draw(0, out, rank), draw(1, rank, in_))
    left, right = principal(factors)
    close(left @ right, factors.left @ factors.right)
    sigma = torch.linalg.svdvals(factors.left @ factors.right)[:rank]
    close(left.T @ left, torch.diag(sigma))
    close(right @ right.T, torch.diag(sigma))


def test_integers_of_directions_that_overlap_err_much_more():
    """Negative control: pivoted rows as two factors, the identity above coefficients."""
    rows = draw(2, 24, 40) * torch.logspace(0, -2, 24, dtype=torch.float64)[:, None] + draw(3, 1, 40)
    factors = Factors(torch.cat([torch.eye(24, dtype=torch.float64), draw(4, 40, 24)]), rows)

    def error(left, right):
        left, right = (dequantize_int8(*quantize_int8(side, 0), 0, torch.float64) for side in (left, right))
        return float((left @ right - factors.left @ factors.right).norm())

    assert error(*principal(factors)) < 0.8 * error(*balance(factors))
