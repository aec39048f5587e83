"""SVD-LLM V2's ratios: 1/log L inside a type, guarded, clipped, renormalised, and the budget kept exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import BudgetError, NumericalError
from spectrim.maths.allocation import FLOOR, removed_shares, svd_llm_v2, uniform
from spectrim.maths.budget import budget_bytes, stored_bytes
from spectrim.maths.energies import discarded
from tests import reference
from tests.maths.test_allocation import aligns, choices, draw_energies, formats, total

SAME = [(64, 64)] * 4


def scaled(losses, shape, ratio, format="float16"):
    """Spectra of one shape whose discarded energy at the uniform rank is L², everything else equal."""
    rank = uniform([shape], ratio, format)[0]
    base = torch.linspace(2, 1, min(shape), dtype=torch.float64)
    return [base * (loss**2 / float(discarded(base)[rank])) for loss in losses]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1.0), st.integers(1, 10**9)), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_shares_keep_the_ratio_and_are_proportional_where_they_are_not_clipped(rows, ratio):
    weights, sizes = zip(*rows, strict=True)
    removed = removed_shares(weights, sizes, ratio)
    kept = sum(size * (1 - share) for size, share in zip(sizes, removed, strict=True))
    assert kept == pytest.approx(ratio * sum(sizes), rel=1e-6)
    assert all(FLOOR * ratio - 1e-9 <= 1 - share <= 1 for share in removed)
    free = [share / weight for share, weight in zip(removed, weights, strict=True) if 1 - share > FLOOR * ratio + 1e-9]
    assert not free or max(free) == pytest.approx(min(free))
    if free and ratio < 1:
        clipped = [(1 - FLOOR * ratio) / w for s, w in zip(removed, weights, strict=True) if s / w < free[0] - 1e-9]
        assert all(limit <= free[0] + 1e-9 for limit in clipped), "clipped although its share was below the limit"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.floats(0.2, 0.95), st.floats(-2, 8))
def test_shares_equal_the_naive_loop(seed, ratio, log_scale):
    generator = torch.Generator().manual_seed(seed)
    losses = [float(loss) for loss in torch.rand(5, generator=generator) * math.exp(log_scale)]
    sizes = [int(size) for size in torch.randint(1, 1000, (5,), generator=generator)]
    weights = [1 / math.log(max(loss, math.e)) for loss in losses]
    expected = reference.svd_llm_v2_kept(losses, sizes, ratio, FLOOR)
    found = [1 - share for share in removed_shares(weights, sizes, ratio)]
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_kept_ratio_follows_one_over_log_of_the_loss():
    losses = [math.exp(2), math.exp(3), math.exp(4), math.exp(6)]
    ratio, shape = 0.6, (512, 512)
    ranks = svd_llm_v2(scaled(losses, shape, ratio, "remap"), [[0, 1, 2, 3]], [shape] * 4, ratio, "remap")
    removed = [1 - stored_bytes("remap", *shape, rank) / stored_bytes("dense", *shape, 1) for rank in ranks]
    products = [share * math.log(loss) for share, loss in zip(removed, losses, strict=True)]
    assert max(products) == pytest.approx(min(products), rel=0.02)  # one rank of 512 is 0.2 % of the bytes
    assert ranks == sorted(ranks)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.floats(0.2, 1), formats, aligns, st.floats(-4, 6))
def test_the_budget_is_kept_and_no_next_choice_fits(seed, n_layers, ratio, format, align, log_scale):
    shapes = [(24, 24), (8, 24), (40, 24)] * n_layers
    kinds = [list(range(kind, 3 * n_layers, 3)) for kind in range(3)]
    energies = [energy * math.exp(log_scale) for energy in draw_energies(seed, shapes)]
    budget = budget_bytes(shapes, ratio)
    try:
        ranks = svd_llm_v2(energies, kinds, shapes, ratio, format, align)
    except BudgetError:
        with pytest.raises(BudgetError):
            uniform(shapes, ratio, format, align)
        return
    spare = budget - total(format, shapes, ranks)
    assert spare >= 0
    for shape, rank in zip(shapes, ranks, strict=True):
        higher = [option for option in choices(shape, format, align) if option > rank]
        assert not higher or stored_bytes(format, *shape, higher[0]) - stored_bytes(format, *shape, rank) > spare


def test_losses_at_and_below_one_are_guarded():
    """Negative control: the published rule divides by log 1 = 0, and below 1 it would keep more of what loses less."""
    energies = scaled([0.01, 1.0, math.exp(1), math.exp(3)], (64, 64), 0.6)
    ranks = svd_llm_v2(energies, [[0, 1, 2, 3]], SAME, 0.6, "float16")
    assert max(ranks[:3]) - min(ranks[:3]) <= 1 and ranks[3] > ranks[0]
    same = [energies[0] * 0, energies[1], energies[2], energies[3]]
    assert svd_llm_v2(same, [[0, 1, 2, 3]], SAME, 0.6, "float16") == ranks


def test_no_matrix_falls_below_the_floor():
    energies = scaled([math.exp(1), math.exp(60), math.exp(60), math.exp(60)], (64, 64), 0.4)
    ranks = svd_llm_v2(energies, [[0, 1, 2, 3]], SAME, 0.4, "float16")
    kept = stored_bytes("float16", 64, 64, ranks[0]) / stored_bytes("dense", 64, 64, 1)
    assert FLOOR * 0.4 - 0.02 <= kept <= FLOOR * 0.4 + 0.02


def test_types_do_not_take_bytes_from_each_other():
    """The loss of one type may be a thousand times that of another: each keeps the ratio. One list mixes them."""
    energies = scaled([50.0, 60.0, 50000.0, 60000.0], (64, 64), 0.5)
    apart = svd_llm_v2(energies, [[0, 1], [2, 3]], SAME, 0.5, "float16")
    spent = [total("float16", SAME[:2], apart[:2]), total("float16", SAME[2:], apart[2:])]
    assert abs(spent[0] - spent[1]) <= 2 * stored_bytes("float16", 64, 64, 1)
    mixed = svd_llm_v2(energies, [[0, 1, 2, 3]], SAME, 0.5, "float16")
    assert sum(mixed[:2]) < sum(apart[:2]) - 4


def test_equal_losses_are_uniform_ranks_and_ratio_one_is_dense():
    energies = scaled([30.0] * 4, (64, 64), 0.5)
    assert svd_llm_v2(energies, [[0, 1, 2, 3]], SAME, 0.5, "float16") == uniform(SAME, 0.5, "float16")
    assert svd_llm_v2(energies, [[0, 1, 2, 3]], SAME, 1.0, "float16") == [64] * 4


def test_tied_members_share_a_rank():
    shapes = [(64, 64), (32, 64), (32, 64)] * 2
    energies = draw_energies(3, shapes)
    kinds, groups = [[0, 3], [1, 4], [2, 5]], [[0, 1, 2], [3, 4, 5]]
    ranks = svd_llm_v2(energies, kinds, shapes, 0.5, "float16", 1, groups)
    assert ranks[0] == ranks[1] == ranks[2] and ranks[3] == ranks[4] == ranks[5]
    assert total("float16", shapes, ranks) <= budget_bytes(shapes, 0.5)


def test_what_is_no_spectrum_or_no_partition_is_refused():
    with pytest.raises(NumericalError, match="not descending"):
        svd_llm_v2([torch.tensor([1.0, 2.0])], [[0]], [(2, 2)], 0.5, "float16")
    with pytest.raises(BudgetError, match="every matrix must stand in exactly one"):
        svd_llm_v2([torch.ones(8)] * 2, [[0]], [(8, 8)] * 2, 0.5, "float16")
