"""The searched scale and zero point against all that are tried, the scale alone, and shifted and scaled weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.maths.quantization import Quantized, dequantize
from spectrim.maths.scale_search import RATIOS, searched_scale
from spectrim.maths.storage_formats import Grid
from spectrim.maths.zero_point_search import searched_zero_point
from tests import reference


def lost(weight, importance, scale, zero, grid):
    """Weighted rounding error of every group, (out, groups)."""
    grouped = weight.double().unflatten(1, (scale.shape[1], -1))
    step, zero = scale.double()[..., None], zero.double()[..., None]
    values = torch.where(step != 0, grouped / torch.where(step != 0, step, 1.0) + zero, 0.0).round().clamp(*grid.ends)
    size = grouped.shape[-1]
    kept = dequantize(Quantized(values.flatten(1), scale, zero.squeeze(-1), size), torch.float64)
    errors = (grouped - kept.unflatten(1, (scale.shape[1], -1))).square()
    return (errors * importance.double().view(scale.shape[1], -1)).sum(-1)


def found(weight, importance, grid):
    return lost(weight, importance, *searched_zero_point(weight, importance, grid), grid)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.sampled_from([2, 3, 4]), st.sampled_from([None, 4, 8]), st.sampled_from([0.0, 3.0]))
def test_no_range_cut_alike_at_both_ends_loses_less(seed, n_bits, group, shift):
    weight, _ = reference.draw(seed, 3, 16, 1)
    weight = weight + shift
    importance, grid = torch.linspace(0.1, 2, 16), Grid(n_bits, group, asymmetric=True)
    best = found(weight, importance, grid)
    size = grid.group_size(16)
    for row in range(3):
        for at in range(16 // size):
            part = slice(at * size, at * size + size)
            numbers, costs = weight[row, part].tolist(), importance[part].tolist()
            assert best[row, at] <= reference.best_cut(numbers, costs, n_bits, RATIOS) * 1.001 + 1e-9


@pytest.mark.parametrize(("n_bits", "gain"), [(4, 0.95), (3, 0.95)])
def test_zero_points_beat_scales_alone_on_normal_weights(n_bits, gain):
    weight, importance = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.ones(128)
    grid = Grid(n_bits, 64, asymmetric=True)
    scale = searched_scale(weight, importance, grid)
    alone = lost(weight, importance, scale, torch.zeros_like(scale), grid)
    assert float(found(weight, importance, grid).sum()) < gain * float(alone.sum())


def test_parts_of_a_step_beat_whole_steps():
    weight, importance = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.ones(128)
    grid = Grid(3, 64, asymmetric=True)
    scale, zero = searched_zero_point(weight, importance, grid)
    whole = lost(weight, importance, scale, zero.round(), grid)
    assert float(lost(weight, importance, scale, zero, grid).sum()) < 0.95 * float(whole.sum())


@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_the_error_goes_with_the_weight(factor):
    weight, importance, grid = reference.draw(1, 4, 32, 1)[0], torch.ones(32), Grid(4, 16, asymmetric=True)
    one, other = (found(w, importance, grid) for w in (weight, factor * weight))
    torch.testing.assert_close(other / factor**2, one, rtol=0.05, atol=0)


@pytest.mark.parametrize("number", [5.0, -5.0, 1e-3])
def test_equal_numbers_are_kept(number):
    """Their range reaches from zero to them."""
    weight, importance, grid = torch.full((2, 8), number), torch.ones(8), Grid(4, 8, asymmetric=True)
    assert found(weight, importance, grid).max() < 1e-5 * number**2


def test_zero_points_fit_a_byte_and_zeros_have_no_scale():
    weight = torch.cat([torch.rand(8, 16), -torch.rand(8, 16), torch.zeros(1, 16)])
    for n_bits in (3, 4):
        grid = Grid(n_bits, 8, asymmetric=True)
        scale, zero = searched_zero_point(weight, torch.ones(16), grid)
        stored = zero * grid.zero_steps
        assert torch.equal(stored, stored.round()) and -128 <= float(stored.min()) <= float(stored.max()) <= 127
        assert not scale[-1].any() and scale[:-1].all()
