"""Tied ranks: one per group, the budget kept, and the best of all tied ranks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import BudgetError
from spectrim.maths.allocation import choices, fisher, project, uniform
from spectrim.maths.budget import break_even_rank, budget_bytes, resolve_format, stored_bytes
from spectrim.maths.energies import discarded
from spectrim.maths.knapsack import GAP
from tests import reference
from tests.maths.test_allocation import aligns, draw_energies, formats, total

BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
TIED = [[0, 1, 2], [3], [4, 5], [6]]
small_groups = st.lists(
    st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=3), min_size=1, max_size=3
)


def naive_choices(shapes, format, align):
    """Every common rank, each member dense where min(r, full rank) costs as much as dense."""
    found = []
    for rank in range(1, max(map(min, shapes)) + 1):
        ranks = []
        for shape in shapes:
            own = min(rank, min(shape))
            ranks.append(min(shape) if resolve_format(format, *shape, own) == "dense" else own)
        full = all(own == min(shape) for own, shape in zip(ranks, shapes, strict=True))
        if (rank % align == 0 or full) and tuple(ranks) not in found:
            found.append(tuple(ranks))
    return found


def numbered(groups):
    """Shapes one after the other, and the indices of each group."""
    shapes, start = [], 0
    indices = []
    for group in groups:
        shapes += group
        indices.append(list(range(start, start + len(group))))
        start += len(group)
    return shapes, indices


def is_tied(shapes, group, ranks, format):
    common = {ranks[index] for index in group if ranks[index] < min(shapes[index])}
    rank = max(common, default=None)
    fits = all(
        rank is None or ranks[i] == rank or rank > min(break_even_rank(format, *shapes[i]), min(shapes[i]) - 1)
        for i in group
    )
    return len(common) <= 1 and fits


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4), formats, aligns)
def test_choices_are_those_of_one_common_rank(shapes, format, align):
    found = choices(shapes, format, align)
    assert found == naive_choices(shapes, format, align)
    costs = [total(format, shapes, ranks) for ranks in found]
    assert costs == sorted(set(costs))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), small_groups, formats, st.data())
def test_fisher_is_the_best_of_all_tied_ranks(seed, groups, format, data):
    shapes, indices = numbered(groups)
    energies = draw_energies(seed, shapes)
    losses = [discarded(energy) for energy in energies]
    ladders = [
        [
            (ranks, total(format, group, ranks), sum(float(losses[i][r]) for i, r in zip(at, ranks, strict=True)))
            for ranks in naive_choices(group, format, 1)
        ]
        for group, at in zip(groups, indices, strict=True)
    ]
    least = sum(ladder[0][1] for ladder in ladders)
    budget = data.draw(st.integers(least, sum(ladder[-1][1] for ladder in ladders)))
    found = fisher(energies, shapes, budget, format, 1, indices)
    best, _ = reference.cheapest(ladders, budget)
    lost = sum(float(loss[rank]) for loss, rank in zip(losses, found.ranks, strict=True))
    assert total(format, shapes, found.ranks) <= budget
    assert all(is_tied(shapes, group, found.ranks, format) for group in indices)
    assert best - 1e-9 <= lost <= best / (1 - GAP) + 1e-9


@settings(max_examples=60, deadline=None)
@given(small_groups, formats, st.sampled_from([1, 2]), st.data())
def test_uniform_and_project_tie_and_keep_the_budget(groups, format, align, data):
    shapes, indices = numbered(groups)
    ratio = data.draw(st.floats(0.1, 1))
    budget = budget_bytes(shapes, ratio)
    truncations = [data.draw(st.floats(-2, min(shape) + 2)) for shape in shapes]
    for allocate in (
        lambda: uniform(shapes, ratio, format, align, indices),
        lambda: project(truncations, shapes, budget, format, align, indices),
    ):
        try:
            ranks = allocate()
        except BudgetError:
            continue
        assert total(format, shapes, ranks) <= budget
        assert all(is_tied(shapes, group, ranks, format) for group in indices)
        if allocate() != ranks:
            raise AssertionError("equal arguments, other ranks")


def test_a_common_rank_beyond_a_members_break_even_makes_that_member_dense():
    options = choices(BLOCK[:3], "float16", 8)
    assert (144, 144, 144) not in options, "at rank 144 the factors of (192, 576) cost as much as the weight"
    assert (136, 136, 136) in options and (144, 192, 192) in options and (280, 192, 192) in options
    assert options[-1] == (576, 192, 192)
    assert stored_bytes("float16", 192, 576, 192) == 2 * 192 * 576


@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.4])
def test_uniform_keeps_the_ratio_of_every_group(ratio):
    ranks = uniform(BLOCK, ratio, "float16", 8, TIED)
    for group in TIED:
        shapes = [BLOCK[index] for index in group]
        spent = total("float16", shapes, [ranks[index] for index in group])
        assert ratio - 0.05 < spent / total("dense", shapes, [1] * len(group)) <= ratio
        assert is_tied(BLOCK, group, ranks, "float16")


def test_groups_of_one_change_nothing_and_tying_costs_loss():
    """Negative control: the free ranks of these spectra are not tied, and do better."""
    energies, budget = draw_energies(2, BLOCK), budget_bytes(BLOCK, 0.6)
    free = fisher(energies, BLOCK, budget, "float16", 8)
    assert fisher(energies, BLOCK, budget, "float16", 8, [[index] for index in range(7)]) == free
    assert not all(is_tied(BLOCK, group, free.ranks, "float16") for group in TIED)
    tied = fisher(energies, BLOCK, budget, "float16", 8, TIED)

    def loss(ranks):
        return sum(float(discarded(energy)[rank]) for energy, rank in zip(energies, ranks, strict=True))

    assert loss(free.ranks) < loss(tied.ranks)


def test_groups_need_not_be_in_order():
    energies, budget = draw_energies(4, BLOCK), budget_bytes(BLOCK, 0.6)
    expected = fisher(energies, BLOCK, budget, "float16", 8, TIED).ranks
    for order in itertools.islice(itertools.permutations(range(7)), 0, 5040, 1259):
        shuffled = [[order.index(index) for index in group] for group in TIED]
        found = fisher(
            [energies[i] for i in order], [BLOCK[i] for i in order], budget, "float16", 8, shuffled
        ).ranks  # fmt: skip
        assert found == [expected[i] for i in order]


@pytest.mark.parametrize("groups", [[[0]], [[0, 1], [1]], [[0, 2]], [[0, 1], []]])
def test_groups_that_are_no_partition_are_refused(groups):
    with pytest.raises(BudgetError, match="every matrix must stand in exactly one"):
        fisher([torch.ones(4)] * 2, [(4, 4)] * 2, 64, "float16", 1, groups)
