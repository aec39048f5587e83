"""The searched scale against every scale that is tried, plain rounding, and weights of any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import NumericalError
from spectrim.maths.scale_search import RATIOS, searched_scale
from spectrim.maths.storage_formats import Grid
from spectrim.maths.zero_point_search import searched_zero_point
from tests import reference


def lost(weight, importance, scale, grid):
    """Weighted rounding error of every group, (out, groups)."""
    grouped = weight.double().unflatten(1, (scale.shape[1], -1))
    step = scale.double()[..., None]
    kept = torch.where(step != 0, grouped / torch.where(step != 0, step, 1.0), 0.0).round().clamp(*grid.ends) * step
    return ((grouped - kept).square() * importance.double().view(scale.shape[1], -1)).sum(-1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.sampled_from([2, 3, 4]), st.sampled_from([None, 4, 8]))
def test_no_scale_that_is_tried_loses_less(seed, n_bits, group):
    weight, _ = reference.draw(seed, 3, 16, 1)
    importance, grid = torch.linspace(0.1, 2, 16), Grid(n_bits, group)
    found = lost(weight, importance, searched_scale(weight, importance, grid), grid)
    size = grid.group_size(16)
    for row in range(3):
        for at in range(16 // size):
            part = slice(at * size, at * size + size)
            numbers, costs = weight[row, part].tolist(), importance[part].tolist()
            extreme = max(numbers, key=abs)
            tried = [float(torch.tensor(extreme * ratio / end).half()) for ratio in RATIOS for end in grid.ends]
            assert found[row, at] <= reference.best_scale(numbers, costs, n_bits, tried) * 1.001 + 1e-9


@pytest.mark.parametrize(("n_bits", "gain"), [(4, 0.9), (3, 0.85), (2, 0.8)])
def test_the_search_beats_the_scale_of_the_largest_number(n_bits, gain):
    """The cheapest thing to do instead; for normal weights, on average over groups."""
    weight, importance = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.ones(128)
    grid = Grid(n_bits, 64)
    largest = (weight.abs().unflatten(1, (2, 64)).amax(-1) / grid.ends[1]).half()
    found = lost(weight, importance, searched_scale(weight, importance, grid), grid)
    assert float(found.sum()) < gain * float(lost(weight, importance, largest, grid).sum())


def test_importance_moves_the_scale_to_what_costs():
    weight, grid = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), Grid(3, 64)
    tilted = torch.tensor([1.0] * 8 + [1e-3] * 56)
    with_it, without = (
        float(lost(weight, tilted, searched_scale(weight, costs, grid), grid).sum())
        for costs in (tilted, torch.ones(64))
    )
    assert with_it < 0.7 * without


@pytest.mark.parametrize("factor", [1e-2, 1.0, 1e3, -1.0])
def test_the_scale_goes_with_the_weight(factor):
    weight, importance, grid = reference.draw(1, 4, 32, 1)[0], torch.ones(32), Grid(4, 16)
    one, other = (lost(w, importance, searched_scale(w, importance, grid), grid) for w in (weight, factor * weight))
    torch.testing.assert_close(other / factor**2, one, rtol=0.05, atol=0)


def test_the_longer_end_is_taken_by_the_largest_number():
    weight = torch.tensor([[-8.0, 3, 1, 2], [8.0, -3, 1, 2]])
    scale = searched_scale(weight, torch.ones(4), Grid(4, 4)).flatten()
    assert scale.tolist() == [1, -1]


def test_zeros_have_no_scale():
    assert not searched_scale(torch.zeros(2, 8), torch.ones(8), Grid(4, 4)).any()


@pytest.mark.parametrize(
    ("weight", "importance", "message"),
    [
        (torch.full((1, 8), torch.nan), torch.ones(8), "weight"),
        (torch.ones(1, 8), torch.full((8,), torch.inf), "importance"),
        (torch.ones(1, 8), torch.ones(7), r"importance \(7,\)"),
        (torch.full((1, 8), 1e9), torch.ones(8), "overflows float16"),
    ],
)
@pytest.mark.parametrize("search", [searched_scale, searched_zero_point])
def test_errors_say_what_is_wrong(search, weight, importance, message):
    with pytest.raises(NumericalError, match=message):
        search(weight, importance, Grid(4, 4, asymmetric=search is searched_zero_point))
