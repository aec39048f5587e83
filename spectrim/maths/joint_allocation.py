"""A format and a rank for every matrix under one hard byte budget.

    min Σ_l loss(f_l, r_l)  subject to  Σ_l matrix_bytes(f_l, r_l) <= budget

The losses are those that the two-sided metric predicts: of factors what their rank drops, of a rounded weight what
rounding moved, of a residual what its rank leaves of that. What rounding factors to int8 adds is counted, but for those
of a residual. ``knapsack.cheapest`` solves it and proves how far from the optimum the result can be.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from spectrim.maths.allocation import choices
from spectrim.maths.budget import FACTORED, RESIDUAL, Format, Shape, dense_bytes, matrix_bytes
from spectrim.maths.energies import discarded
from spectrim.maths.knapsack import Choice, Ladder, cheapest


class Option(NamedTuple):
    """One way to store a matrix; ``rank`` is min(out, in) where the format has no factors."""

    format: Format
    rank: int
    bytes: int
    loss: float


def dense_option(shape: Shape) -> Option:
    """The weight as it is: no loss."""
    return Option("dense", min(shape), dense_bytes(*shape), 0.0)


def factored_options(format: Format, sigma: Tensor, shape: Shape, align: int, rounding: float) -> list[Option]:
    """Every aligned rank of a format in FACTORED that is cheaper than the dense weight.

    Args:
        sigma: (min(out, in),) of ``two_sided(W)``.
        rounding: what storing factors in ``format`` loses at any rank, in the unit of σ².
    """
    assert format in FACTORED
    tails = discarded(sigma.double().square()) + rounding
    ranks = [rank for (rank,) in choices([shape], format, align) if rank < min(shape)]
    return [Option(format, rank, matrix_bytes(format, *shape, rank), float(tails[rank])) for rank in ranks]


def rounded_options(format: Format, sigma: Tensor, shape: Shape, align: int, largest: int) -> list[Option]:
    """The rounded weight, or with factors of what rounding lost at every aligned rank up to ``largest``.

    Args:
        sigma: (min(out, in),) of ``two_sided(W − Q)``; without factors, its norm (1,) will do.
    """
    tails = discarded(sigma.double().square())
    if format not in RESIDUAL:
        return [Option(format, min(shape), matrix_bytes(format, *shape, min(shape)), float(tails[0]))]
    return [
        Option(format, rank, matrix_bytes(format, *shape, rank), float(tails[rank]))
        for rank in range(align, largest + 1, align)
    ]


def joint(options: Sequence[Sequence[Option]], budget_bytes: int) -> tuple[list[Option], float]:
    """One option per matrix, and the proven relative gap to the optimum; options that another one beats are left out.

    Raises:
        BudgetError: the cheapest options together exceed the budget.
    """
    kept = [_undominated(offered) for offered in options]
    ladders: list[Ladder] = [
        [Choice((at,), option.bytes, option.loss) for at, option in enumerate(ladder)] for ladder in kept
    ]
    found = cheapest(ladders, budget_bytes)
    return [ladder[at] for ladder, at in zip(kept, found.levels, strict=True)], found.gap


def _undominated(options: Sequence[Option]) -> list[Option]:
    """By ascending bytes, each with less loss than all before it."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept
