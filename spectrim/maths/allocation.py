"""Ranks of many matrices under one hard byte budget.

A matrix may take the ranks of ``choices``: the multiples of ``align`` whose factors are cheaper than its dense weight,
then full rank min(out, in), which is the dense weight itself unless full-rank factors are cheaper still (int8 of a very
flat matrix). So dense is the last choice, and a returned rank r is stored as resolve_format(format, out, in, r).
Every list returned here satisfies Σ stored_bytes <= budget.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from spectrim.errors import BudgetError, NumericalError
from spectrim.maths.budget import Format, Shape, break_even_rank, dense_bytes, matrix_bytes, max_rank, stored_bytes
from spectrim.maths.budget import budget_bytes as bytes_at_ratio
from spectrim.maths.lowrank import discarded
from spectrim.maths.whitening import require_finite

NO_RANK = 1e-9
"""Below every rank: what a learned truncation at or under zero counts as."""

Ladder = list[tuple[int, int, float]]
"""The choices of one matrix, ascending: (rank, bytes, loss)."""

Step = Callable[[Ladder, int, int], tuple[float, int] | None]
"""(ladder, level, spare bytes) -> (key, next level) of the move wanted next, or None; the smallest key goes first."""


def choices(shape: Shape, format: Format, align: int) -> list[int]:
    """align, 2·align, ... <= break_even_rank, then min(out, in): the ranks a matrix may take, ascending.

    Raises:
        BudgetError: ``align`` is below 1, or the format has no factors.
    """
    if align < 1:
        raise BudgetError(f"align {align}: ranks are multiples of it; it must be at least 1")
    full = min(shape)
    return [*(rank for rank in range(align, break_even_rank(format, *shape) + 1, align) if rank < full), full]


def uniform(shapes: Sequence[Shape], ratio: float, format: Format, align: int = 1) -> list[int]:
    """rank = max_rank(ratio · dense bytes), down to a multiple of align; for float16: int(ratio·m·n/(m + n)).

    Every matrix keeps its own ``ratio``; one too small for ``align`` directions gets its smallest choice.

    Raises:
        BudgetError: those smallest choices exceed floor(ratio · Σ dense bytes), or ``ratio`` is not in (0, 1].
    """
    ranks = []
    for shape in shapes:
        allowed = max_rank(format, *shape, bytes_at_ratio([shape], ratio))
        options = choices(shape, format, align)
        ranks.append(max((rank for rank in options if rank <= allowed), default=options[0]))
    needed = sum(stored_bytes(format, *shape, rank) for shape, rank in zip(shapes, ranks, strict=True))
    _require_within(needed, bytes_at_ratio(shapes, ratio))
    return ranks


def fisher(
    energies: Sequence[Tensor], shapes: Sequence[Shape], budget_bytes: int, format: Format, align: int = 1
) -> list[int]:
    """min Σ_l Σ_{i>r_l} e_{l,i}, e = σ², subject to Σ stored_bytes(r_l) <= budget_bytes and r_l one of its choices.

    A multiple-choice knapsack, solved by Lagrangian relaxation: at a price λ per byte every matrix takes the choice of
    least loss + λ·bytes, a vertex of its lower convex hull, so lowering λ takes the hull edges in descending order of
    energy per byte. Without the dense choice this is water-filling by σ² per byte. What remains of the budget where an
    edge does not fit is filled greedily by energy per byte. The loss exceeds the optimum by less than the drop of the
    first edge that did not fit. O(N log N) for N choices in total.

    Args:
        energies: one (min(out, in),) σ² per matrix, descending, in a metric that compares across matrices:
            ``two_sided(...).sigma`` squared. Output energies, of ``closed_form``, do not compare.
        shapes: (out, in) per matrix.
        budget_bytes: bytes for all matrices together.
        format: storage format of the factors.
        align: ranks are multiples of it.

    Returns:
        One rank per matrix; min(out, in) where the matrix is dense. A matrix without energy keeps its smallest choice.

    Raises:
        BudgetError: the smallest choices alone exceed the budget.
        NumericalError: energies are not finite, negative, not descending, or of the wrong length.

    Source: SVD-LLM V2, Wang et al. 2025, arXiv:2503.12340 (unequal ranks from predicted loss); Sinha and Zoltners 1979,
    Operations Research 27(3) (the knapsack).
    """
    ladders: list[Ladder] = []
    for index, (energy, shape) in enumerate(zip(energies, shapes, strict=True)):
        _require_spectrum(index, energy, shape)
        loss = discarded(energy).tolist()
        ranks = choices(shape, format, align)
        ladders.append([(rank, stored_bytes(format, *shape, rank), loss[rank]) for rank in ranks])
    return _ranks(ladders, _cheapest(ladders, budget_bytes))


def project(
    truncations: Sequence[float], shapes: Sequence[Shape], budget_bytes: int, format: Format, align: int = 1
) -> list[int]:
    """Ranks near ``truncations`` with Σ stored_bytes <= budget_bytes, and no matrix left whose next choice would fit.

    Near means small Σ_l (bytes_l − target_l)² / dense_l; the target is the byte cost of the fractional truncation, and
    dense from the break-even rank on: every matrix's own ratio moves by about the same amount. Each truncation is
    rounded to its nearest choice; while the total is above the budget the step down that costs least per byte is taken,
    then the steps up that fit, cheapest first. Ranks that satisfy both conditions already are returned unchanged.

    Args:
        truncations: learned truncation position per matrix, in directions; may be below 0 or above full rank.
        shapes: (out, in) per matrix.
        budget_bytes: bytes for all matrices together.
        format: storage format of the factors.
        align: ranks are multiples of it.

    Returns:
        One rank per matrix; min(out, in) where the matrix is dense.

    Raises:
        BudgetError: every matrix at its smallest choice is above the budget.
        NumericalError: a truncation is not finite.
    """
    ladders: list[Ladder] = []
    for index, (truncation, shape) in enumerate(zip(truncations, shapes, strict=True)):
        if not math.isfinite(truncation):
            raise NumericalError(f"truncation {index} is {truncation}; rank training diverged, lower its learning rate")
        inside = min(max(truncation, NO_RANK), min(shape))
        target = min(matrix_bytes(format, *shape, inside), stored_bytes(format, *shape, min(shape)))
        costs = [(rank, stored_bytes(format, *shape, rank)) for rank in choices(shape, format, align)]
        ladders.append([(rank, cost, (cost - target) ** 2 / dense_bytes(*shape)) for rank, cost in costs])
    return _ranks(ladders, _nearest(ladders, budget_bytes))


def _cheapest(ladders: list[Ladder], budget_bytes: int) -> list[int]:
    """Levels of least total loss: hull edges by loss saved per byte, then the best single moves that still fit."""
    level = [0] * len(ladders)
    spare = budget_bytes - _bytes(ladders, level)
    _require_within(_bytes(ladders, level), budget_bytes)
    edges = sorted(
        (-_slope(ladder, start, end), index, start, end)
        for index, ladder in enumerate(ladders)
        for start, end in pairwise(_hull(ladder))
    )
    for _, index, start, end in edges:  # those of one matrix come in order: the slopes of its hull descend
        cost = ladders[index][end][1] - ladders[index][start][1]
        if cost > spare:
            break
        spare -= cost
        level[index] = end
    _fill(ladders, level, spare, _best_step)
    return level


def _nearest(ladders: list[Ladder], budget_bytes: int) -> list[int]:
    """Levels of least total distance: each one's own minimum, then down to the budget, then up while anything fits."""
    _require_within(_bytes(ladders, [0] * len(ladders)), budget_bytes)
    level = [min(range(len(ladder)), key=lambda at: (ladder[at][2], at)) for ladder in ladders]
    spent = _bytes(ladders, level)
    queue = [(_slope(ladders[index], at - 1, at), index) for index, at in enumerate(level) if at]
    heapq.heapify(queue)
    while spent > budget_bytes:
        _, index = heapq.heappop(queue)
        level[index] -= 1
        at = level[index]
        spent -= ladders[index][at + 1][1] - ladders[index][at][1]
        if at:
            heapq.heappush(queue, (_slope(ladders[index], at - 1, at), index))
    _fill(ladders, level, budget_bytes - spent, _next_step)
    return level


def _fill(ladders: list[Ladder], level: list[int], spare: int, step: Step) -> None:
    """Take the ``step`` of smallest key of any matrix until none fits into ``spare`` bytes; changes ``level``."""
    queue = [(found[0], i) for i, ladder in enumerate(ladders) if (found := step(ladder, level[i], spare))]
    heapq.heapify(queue)
    while queue:
        key, index = heapq.heappop(queue)
        found = step(ladders[index], level[index], spare)
        if found is not None and found[0] <= key:
            spare -= ladders[index][found[1]][1] - ladders[index][level[index]][1]
            level[index] = found[1]
            found = step(ladders[index], level[index], spare)
        if found is not None:  # its next step, or a lesser one because the spare bytes have shrunk since it was queued
            heapq.heappush(queue, (found[0], index))


def _best_step(ladder: Ladder, now: int, spare: int) -> tuple[float, int] | None:
    """Of the affordable higher choices that lower the loss, the one that saves most per byte."""
    higher = range(now + 1, len(ladder))
    fitting = (at for at in higher if ladder[at][1] - ladder[now][1] <= spare and ladder[at][2] < ladder[now][2])
    return min(((-_slope(ladder, now, at), at) for at in fitting), default=None)


def _next_step(ladder: Ladder, now: int, spare: int) -> tuple[float, int] | None:
    """The next higher choice, if affordable, whatever it does to the loss."""
    if now + 1 == len(ladder) or ladder[now + 1][1] - ladder[now][1] > spare:
        return None
    return -_slope(ladder, now, now + 1), now + 1


def _slope(ladder: Ladder, start: int, end: int) -> float:
    """Loss saved per byte from choice ``start`` up to ``end``, and incurred per byte freed on the way down."""
    return (ladder[start][2] - ladder[end][2]) / (ladder[end][1] - ladder[start][1])


def _hull(ladder: Ladder) -> list[int]:
    """Indices of the lower convex hull of (bytes, loss), from the cheapest choice on, while the loss still falls."""
    hull = [0]
    for at in range(1, len(ladder)):
        if ladder[at][2] >= ladder[hull[-1]][2]:
            continue
        while len(hull) > 1 and _slope(ladder, hull[-2], hull[-1]) <= _slope(ladder, hull[-1], at):
            hull.pop()
        hull.append(at)
    return hull


def _ranks(ladders: list[Ladder], level: list[int]) -> list[int]:
    return [ladder[at][0] for ladder, at in zip(ladders, level, strict=True)]


def _bytes(ladders: list[Ladder], level: list[int]) -> int:
    return sum(ladder[at][1] for ladder, at in zip(ladders, level, strict=True))


def _require_spectrum(index: int, energy: Tensor, shape: Shape) -> None:
    if energy.shape != (min(shape),):
        raise NumericalError(
            f"energies {index}: shape {tuple(energy.shape)}; a {shape} matrix has {min(shape)} directions"
        )
    require_finite(f"energies {index}", energy)
    if bool((energy < 0).any()) or bool((energy.diff() > 0).any()):
        raise NumericalError(
            f"energies {index} of a {shape} matrix are negative or not descending; pass σ² as decomposed"
        )


def _require_within(needed: int, budget_bytes: int) -> None:
    if needed > budget_bytes:
        raise BudgetError(
            f"the smallest aligned ranks need {needed} bytes, the budget is {budget_bytes}; "
            "raise compression.ratio or lower compression.align"
        )
