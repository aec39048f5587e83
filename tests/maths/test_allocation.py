"""Ranks under a hard budget: never above it, near the optimum, dense where that is the better buy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import BudgetError, NumericalError
from spectrim.maths import allocation
from spectrim.maths.allocation import fisher, project, uniform
from spectrim.maths.budget import break_even_rank, budget_bytes, matrix_bytes, resolve_format, stored_bytes
from spectrim.maths.energies import discarded
from spectrim.maths.knapsack import GAP
from tests import reference

LLAMA = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
FORMATS = ["float16", "pifa", "remap", "int8"]
formats = st.sampled_from(FORMATS)
aligns = st.sampled_from([1, 2, 8])
shape_lists = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)
small_shape_lists = st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=4)


def choices(shape, format, align):
    """The ranks of a matrix that stands alone."""
    return [rank for (rank,) in allocation.choices([shape], format, align)]


def total(format, shapes, ranks):
    return sum(stored_bytes(format, *shape, rank) for shape, rank in zip(shapes, ranks, strict=True))


def smallest(format, shapes, align):
    return [choices(shape, format, align)[0] for shape in shapes]


def draw_energies(seed, shapes):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(min(shape), generator=generator, dtype=torch.float64).pow(3).sort(descending=True).values
        * float(torch.rand((), generator=generator) * 10)
        for shape in shapes
    ]


def draw_budget(data, format, shapes, align):
    least = total(format, shapes, smallest(format, shapes, align))
    return data.draw(st.integers(least, max(least, total(format, shapes, [min(shape) for shape in shapes]))))


@settings(deadline=None)
@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), formats, aligns)
def test_choices_are_aligned_cheaper_than_dense_and_end_with_full_rank(shape, format, align):
    ranks = choices(shape, format, align)
    *partial, full = ranks
    assert full == min(shape)
    assert ranks == sorted(set(ranks))
    assert all(rank % align == 0 and resolve_format(format, *shape, rank) == format for rank in partial)
    following = (partial[-1] if partial else 0) + align
    assert following > break_even_rank(format, *shape) or following >= full
    costs = [stored_bytes(format, *shape, rank) for rank in ranks]
    assert costs == sorted(set(costs))


@settings(deadline=None)
@given(shape_lists, st.floats(0.05, 1), formats, aligns)
def test_uniform_gives_every_matrix_the_ratio(shapes, ratio, format, align):
    budget = budget_bytes(shapes, ratio)
    try:
        ranks = uniform(shapes, ratio, format, align)
    except BudgetError:
        least = smallest(format, shapes, align)
        assert any(stored_bytes(format, *s, r) > budget_bytes([s], ratio) for s, r in zip(shapes, least, strict=True))
        return
    assert total(format, shapes, ranks) <= budget
    for shape, rank in zip(shapes, ranks, strict=True):
        options = choices(shape, format, align)
        assert rank in options
        own = budget_bytes([shape], ratio)
        higher = [option for option in options if option > rank]
        assert not higher or stored_bytes(format, *shape, higher[0]) > own


@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.6, 0.4])
def test_uniform_float16_ranks_are_the_textbook_ones(ratio):
    assert uniform(LLAMA, ratio, "float16") == [int(ratio * out * in_ / (out + in_)) for out, in_ in LLAMA]


def test_uniform_at_ratio_one_is_dense():
    assert uniform(LLAMA, 1.0, "float16", 8) == [min(shape) for shape in LLAMA]


def test_uniform_remap_ranks_are_the_ratio_of_the_full_rank():
    assert uniform(LLAMA, 0.5, "remap", 8) == [280, 88, 88, 280, 280, 280, 280]  # scales cost one step of 8


def test_uniform_refuses_what_alignment_makes_too_large():
    with pytest.raises(BudgetError, match=r"need 128 bytes, the budget is 64; raise compression.ratio or lower"):
        uniform([(8, 8)], 0.5, "float16", 8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), shape_lists, formats, aligns, st.data())
def test_fisher_never_exceeds_the_budget_and_leaves_no_bargain(seed, shapes, format, align, data):
    energies = draw_energies(seed, shapes)
    budget = draw_budget(data, format, shapes, align)
    ranks = fisher(energies, shapes, budget, format, align).ranks
    spare = budget - total(format, shapes, ranks)
    assert spare >= 0
    for energy, shape, rank in zip(energies, shapes, ranks, strict=True):
        options = choices(shape, format, align)
        assert rank in options
        loss = discarded(energy)
        for higher in options[options.index(rank) + 1 :]:
            extra = stored_bytes(format, *shape, higher) - stored_bytes(format, *shape, rank)
            assert extra > spare or loss[higher] >= loss[rank]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), small_shape_lists, formats, st.data())
def test_fisher_is_the_exhaustive_optimum_within_its_gap(seed, shapes, format, data):
    energies = draw_energies(seed, shapes)
    budget = draw_budget(data, format, shapes, 1)
    found = fisher(energies, shapes, budget, format)
    losses = [discarded(energy) for energy in energies]
    ladders = [
        [(r, stored_bytes(format, *shape, r), float(loss[r])) for r in choices(shape, format, 1)]
        for shape, loss in zip(shapes, losses, strict=True)
    ]
    best, _ = reference.cheapest(ladders, budget)
    lost = sum(float(loss[rank]) for loss, rank in zip(losses, found.ranks, strict=True))
    assert 0 <= found.gap <= GAP
    assert lost * (1 - found.gap) - 1e-9 <= best <= lost + 1e-9


def test_fisher_gives_dense_to_a_flat_important_matrix():
    shapes = [(64, 64), (64, 64)]
    flat = torch.full((64,), 10.0)
    steep = torch.exp(-torch.arange(64.0))
    ranks = fisher([flat, steep], shapes, budget_bytes(shapes, 0.7), "float16", 8).ranks
    assert ranks[0] == 64
    assert resolve_format("float16", 64, 64, ranks[0]) == "dense"
    assert ranks[1] < 32


def test_fisher_beats_uniform_ranks_in_predicted_loss():
    """Negative control: at equal bytes the allocation is what lowers the loss."""
    energies = draw_energies(1, LLAMA)
    ranks = fisher(energies, LLAMA, budget_bytes(LLAMA, 0.6), "float16", 8).ranks
    plain = uniform(LLAMA, 0.6, "float16", 8)

    def loss(found):
        return sum(float(discarded(energy)[rank]) for energy, rank in zip(energies, found, strict=True))

    assert loss(ranks) < 0.9 * loss(plain)


def test_fisher_depends_only_on_relative_energies_and_not_on_the_order():
    energies, budget = draw_energies(5, LLAMA), budget_bytes(LLAMA, 0.6)
    ranks = fisher(energies, LLAMA, budget, "remap", 8).ranks
    assert fisher([4 * energy for energy in energies], LLAMA, budget, "remap", 8).ranks == ranks
    assert fisher(energies[::-1], LLAMA[::-1], budget, "remap", 8).ranks == ranks[::-1]


def test_fisher_leaves_a_matrix_without_energy_at_its_smallest_choice():
    shapes = [(32, 32), (32, 32)]
    ranks = fisher([torch.zeros(32), torch.ones(32)], shapes, budget_bytes(shapes, 1.0), "float16", 4).ranks
    assert ranks == [4, 32]


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (torch.ones(5), "shape"),
        (torch.tensor([1.0, float("nan"), 0, 0]), "not finite"),
        (torch.tensor([1.0, 2.0, 0.5, 0.1]), "not descending"),
        (torch.tensor([1.0, 0.5, 0.1, -0.1]), "negative"),
    ],
)
def test_fisher_refuses_what_is_no_spectrum(energy, message):
    with pytest.raises(NumericalError, match=message):
        fisher([energy], [(4, 6)], 1000, "float16")


@pytest.mark.parametrize(
    "allocate", [lambda *rest: fisher([torch.ones(8)], *rest), lambda *rest: project([3.0], *rest)]
)
def test_a_budget_below_the_smallest_choices_is_refused(allocate):
    allocate([(8, 8)], 32, "float16", 1)
    with pytest.raises(BudgetError, match="need 32 bytes, the budget is 31"):
        allocate([(8, 8)], 31, "float16", 1)


@settings(max_examples=80, deadline=None)
@given(shape_lists, formats, aligns, st.data())
def test_project_fills_the_budget_up_to_one_step(shapes, format, align, data):
    truncations = [data.draw(st.floats(-5, min(shape) + 5)) for shape in shapes]
    budget = draw_budget(data, format, shapes, align)
    ranks = project(truncations, shapes, budget, format, align)
    spare = budget - total(format, shapes, ranks)
    assert spare >= 0
    for shape, rank in zip(shapes, ranks, strict=True):
        options = choices(shape, format, align)
        at = options.index(rank)
        if at + 1 < len(options):
            assert stored_bytes(format, *shape, options[at + 1]) - stored_bytes(format, *shape, rank) > spare
    assert project([float(rank) for rank in ranks], shapes, budget, format, align) == ranks


@settings(max_examples=60, deadline=None)
@given(shape_lists, formats, aligns, st.data())
def test_project_keeps_ranks_that_spend_the_budget_exactly(shapes, format, align, data):
    ranks = [data.draw(st.sampled_from(choices(shape, format, align))) for shape in shapes]
    budget = total(format, shapes, ranks)
    assert project([float(rank) for rank in ranks], shapes, budget, format, align) == ranks


@settings(max_examples=40, deadline=None)
@given(small_shape_lists, st.data())
def test_project_is_near_the_nearest_ranks(shapes, data):
    """No list of ranks that fits is much nearer: at most one step of each matrix away from the exhaustive minimum."""
    truncations = [data.draw(st.floats(1, min(shape))) for shape in shapes]
    budget = draw_budget(data, "remap", shapes, 1)
    wanted = [
        min(matrix_bytes("remap", *shape, min(tau, min(shape))), stored_bytes("remap", *shape, min(shape)))
        for tau, shape in zip(truncations, shapes, strict=True)
    ]
    if sum(wanted) < budget:  # then filling the budget moves the ranks away on purpose
        return
    ladders = [
        [(r, cost := stored_bytes("remap", *s, r), (cost - w) ** 2 / (2 * s[0] * s[1])) for r in choices(s, "remap", 1)]
        for s, w in zip(shapes, wanted, strict=True)
    ]
    best, _ = reference.cheapest(ladders, budget)
    ranks = project(truncations, shapes, budget, "remap", 1)
    found = sum(next(d for r, _, d in ladder if r == rank) for ladder, rank in zip(ladders, ranks, strict=True))
    steps = sum(matrix_bytes("remap", *shape, 1) ** 2 / (2 * shape[0] * shape[1]) for shape in shapes)
    assert found**0.5 <= best**0.5 + 2 * steps**0.5


def test_project_shrinks_every_matrix_by_about_the_same_ratio():
    truncations = [0.8 * min(shape) for shape in LLAMA]
    ranks = project(truncations, LLAMA, budget_bytes(LLAMA, 0.5), "remap", 1)
    assert all(abs(rank / min(shape) - 0.5) < 0.03 for rank, shape in zip(ranks, LLAMA, strict=True))


def test_project_keeps_the_order_that_was_learned():
    shapes = [(64, 64)] * 3
    ranks = project([10.0, 20.0, 31.0], shapes, budget_bytes(shapes, 0.4), "float16", 1)
    assert ranks[0] < ranks[1] < ranks[2]


def test_project_makes_a_truncation_beyond_break_even_dense():
    shapes = [(64, 64), (64, 64)]
    assert project([50.0, 8.0], shapes, budget_bytes(shapes, 0.75), "float16", 8) == [64, 16]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_project_refuses_a_diverged_truncation(bad):
    with pytest.raises(NumericalError, match="truncation 1 is"):
        project([3.0, bad], [(8, 8), (8, 8)], 1000, "float16")


def test_every_function_refuses_align_zero():
    with pytest.raises(BudgetError, match="align 0"):
        uniform([(8, 8)], 0.5, "float16", 0)
