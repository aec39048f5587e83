"""One choice from every ladder under a hard byte budget: the multiple-choice knapsack.

A ladder lists the choices of one matrix, or of several that share a rank, by ascending bytes; a level is an index into
it. With b_lj and e_lj the bytes and the loss of choice j of ladder l

    cheapest    min Σ e_l,j(l)  subject to  Σ b_l,j(l) <= budget, and a proven lower bound of that minimum
    nearest     small Σ e_l,j(l), e the distance from a target, spending the budget until no next choice fits

Both fill what is left of the budget, so no single move that helps and fits is left over.
"""

import heapq
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from spectrim.errors import BudgetError

GAP = 1e-4
"""Relative gap at which a solution counts as optimal; HiGHS may need hours for the last hundred-thousandth."""


class Choice(NamedTuple):
    """One way to store the members of a ladder: their ``ranks``, all their ``bytes`` and the ``loss`` together."""

    ranks: tuple[int, ...]
    bytes: int
    loss: float


class Solution(NamedTuple):
    """A level per ladder, the total loss there, and a lower bound of what any levels within the budget lose."""

    levels: list[int]
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """(loss − bound) / loss, in [0, 1]: 0 is proven optimal."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


Ladder = list[Choice]

Step = Callable[[Ladder, int, int], tuple[float, int] | None]
"""(ladder, level, spare bytes) -> (key, next level) of the move wanted next, or None; the smallest key goes first."""


def cheapest(ladders: Sequence[Ladder], budget_bytes: int) -> Solution:
    """min Σ_l loss_l subject to Σ_l bytes_l <= budget, with bound <= minimum <= loss; mostly loss − bound <= GAP·loss.

    Lagrangian relaxation first: at a price λ per byte every ladder takes its choice of least loss + λ·bytes, a vertex
    of its lower convex hull, so lowering λ takes the hull edges in descending order of loss saved per byte; the first
    edge that does not fit gives λ and the bound of the linear relaxation, and the rest of the budget is filled. Where
    that is further than GAP from its bound, the choices that no better solution can hold are dropped (those whose
    loss + λ·bytes exceeds their ladder's least by more than loss − bound) and HiGHS solves what remains as an integer
    program to a relative gap of GAP. No time limit: equal arguments give equal levels.

    Raises:
        BudgetError: the first choices alone exceed the budget.

    Source: Sinha and Zoltners 1979, Operations Research 27(3): the relaxation and the reduction by reduced costs.
    """
    solution, price = _relaxed(ladders, budget_bytes)
    return solution if solution.gap <= GAP else _improved(ladders, budget_bytes, solution, price)


def nearest(ladders: Sequence[Ladder], budget_bytes: int) -> list[int]:
    """Levels of least total distance: each one's own minimum, then down to the budget, then up while anything fits.

    Raises:
        BudgetError: the first choices alone exceed the budget.
    """
    require_within(_bytes(ladders, [0] * len(ladders)), budget_bytes)
    level = [min(range(len(ladder)), key=lambda at: (ladder[at].loss, at)) for ladder in ladders]
    spent = _bytes(ladders, level)
    queue = [(_slope(ladders[index], at - 1, at), index) for index, at in enumerate(level) if at]
    heapq.heapify(queue)
    while spent > budget_bytes:
        _, index = heapq.heappop(queue)
        level[index] -= 1
        at = level[index]
        spent -= ladders[index][at + 1].bytes - ladders[index][at].bytes
        if at:
            heapq.heappush(queue, (_slope(ladders[index], at - 1, at), index))
    _fill(ladders, level, budget_bytes - spent, _next_step)
    return level


def require_within(needed: int, budget_bytes: int) -> None:
    """Raise BudgetError when the ``needed`` bytes of the smallest choices exceed the budget."""
    if needed > budget_bytes:
        raise BudgetError(
            f"the smallest aligned ranks need {needed} bytes, the budget is {budget_bytes}; "
            "raise compression.ratio or lower compression.align"
        )


def _relaxed(ladders: Sequence[Ladder], budget_bytes: int) -> tuple[Solution, float]:
    """The rounded linear relaxation, its optimum as the bound, and its price λ of a byte."""
    level = [0] * len(ladders)
    spare = budget_bytes - _bytes(ladders, level)
    require_within(_bytes(ladders, level), budget_bytes)
    edges = sorted(
        (-_slope(ladder, start, end), index, start, end)
        for index, ladder in enumerate(ladders)
        for start, end in pairwise(_hull(ladder))
    )
    price = 0.0
    for key, index, start, end in edges:  # those of one ladder come in order: the slopes of its hull descend
        cost = ladders[index][end].bytes - ladders[index][start].bytes
        if cost > spare:
            price = -key
            break
        spare -= cost
        level[index] = end
    bound = _loss(ladders, level) - price * spare
    _fill(ladders, level, spare, _best_step)
    loss = _loss(ladders, level)
    return Solution(level, loss, min(bound, loss)), price


def _improved(ladders: Sequence[Ladder], budget_bytes: int, known: Solution, price: float) -> Solution:
    """``known``, or what HiGHS finds better among the choices that a better solution can hold; the higher bound."""
    kept = [
        _core(ladder, at, price, known.loss - known.bound) for ladder, at in zip(ladders, known.levels, strict=True)
    ]
    owner = np.repeat(np.arange(len(kept)), [len(levels) for levels in kept])
    choice = [(ladders[index], at) for index, levels in enumerate(kept) for at in levels]
    least = np.array([ladders[index][levels[0]].bytes for index, levels in enumerate(kept)])
    extra = np.array([ladder[at].bytes for ladder, at in choice]) - least[owner]
    unit = np.gcd.reduce(extra)  # small exact numbers keep the solver's tolerances below one unit
    n, m = len(choice), len(kept)
    places = (np.r_[owner, np.full(n, m)], np.tile(np.arange(n), 2))
    rows = csr_array((np.r_[np.ones(n), extra // unit], places), shape=(m + 1, n))  # one choice each; the bytes
    room = (budget_bytes - int(least.sum())) // unit
    scale = 1e4 / known.loss  # HiGHS also stops at an absolute gap of 1e-6
    found = milp(
        np.array([ladder[at].loss for ladder, at in choice]) * scale,
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows, np.r_[np.ones(m), -np.inf], np.r_[np.ones(m), room]),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        return known
    level = [levels[int(np.argmax(found.x[owner == index]))] for index, levels in enumerate(kept)]
    spare = budget_bytes - _bytes(ladders, level)
    if spare >= 0:  # in exact arithmetic: the solver's own tolerance could hide a byte too many
        _fill(ladders, level, spare, _best_step)
    loss = _loss(ladders, level)
    if spare < 0 or loss >= known.loss:
        level, loss = known.levels, known.loss
    bound = max(known.bound, min(float(found.mip_dual_bound) / scale, loss))
    return Solution(level, loss, bound)


def _core(ladder: Ladder, now: int, price: float, slack: float) -> list[int]:
    """The levels that a solution better than the known one can take: reduced cost at most ``slack``; and ``now``."""
    reduced = [choice.loss + price * choice.bytes for choice in ladder]
    least = min(reduced)
    rounding = 1e-12 * abs(least)
    return [at for at, cost in enumerate(reduced) if at == now or cost - least <= slack + rounding]


def _fill(ladders: Sequence[Ladder], level: list[int], spare: int, step: Step) -> None:
    """Take the ``step`` of smallest key of any ladder until none fits into ``spare`` bytes; changes ``level``."""
    queue = [(found[0], i) for i, ladder in enumerate(ladders) if (found := step(ladder, level[i], spare))]
    heapq.heapify(queue)
    while queue:
        key, index = heapq.heappop(queue)
        found = step(ladders[index], level[index], spare)
        if found is not None and found[0] <= key:
            spare -= ladders[index][found[1]].bytes - ladders[index][level[index]].bytes
            level[index] = found[1]
            found = step(ladders[index], level[index], spare)
        if found is not None:  # its next step, or a lesser one because the spare bytes have shrunk since it was queued
            heapq.heappush(queue, (found[0], index))


def _best_step(ladder: Ladder, now: int, spare: int) -> tuple[float, int] | None:
    """Of the affordable higher choices that lower the loss, the one that saves most per byte."""
    higher = range(now + 1, len(ladder))
    fitting = (
        at for at in higher if ladder[at].bytes - ladder[now].bytes <= spare and ladder[at].loss < ladder[now].loss
    )
    return min(((-_slope(ladder, now, at), at) for at in fitting), default=None)


def _next_step(ladder: Ladder, now: int, spare: int) -> tuple[float, int] | None:
    """The next higher choice, if affordable, whatever it does to the loss."""
    if now + 1 == len(ladder) or ladder[now + 1].bytes - ladder[now].bytes > spare:
        return None
    return -_slope(ladder, now, now + 1), now + 1


def _slope(ladder: Ladder, start: int, end: int) -> float:
    """Loss saved per byte from choice ``start`` up to ``end``, and incurred per byte freed on the way down."""
    return (ladder[start].loss - ladder[end].loss) / (ladder[end].bytes - ladder[start].bytes)


def _hull(ladder: Ladder) -> list[int]:
    """Indices of the lower convex hull of (bytes, loss), from the cheapest choice on, while the loss still falls."""
    hull = [0]
    for at in range(1, len(ladder)):
        if ladder[at].loss >= ladder[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(ladder, hull[-2], hull[-1]) <= _slope(ladder, hull[-1], at):
            hull.pop()
        hull.append(at)
    return hull


def _bytes(ladders: Sequence[Ladder], level: Sequence[int]) -> int:
    return sum(ladder[at].bytes for ladder, at in zip(ladders, level, strict=True))


def _loss(ladders: Sequence[Ladder], level: Sequence[int]) -> float:
    return sum(ladder[at].loss for ladder, at in zip(ladders, level, strict=True))
