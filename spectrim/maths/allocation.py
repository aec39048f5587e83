"""Ranks of many matrices under one hard byte budget.

A matrix may take the ranks of ``choices``: the multiples of ``align`` whose factors are cheaper than its dense weight,
then full rank min(out, in), which is the dense weight itself unless full-rank factors are cheaper still (int8 of a very
flat matrix). So dense is the last choice, and a returned rank r is stored as resolve_format(format, out, in, r).
Every list returned here satisfies Σ stored_bytes <= budget.

``groups`` are lists of indices, every matrix in exactly one: the members of a group, such as q/k/v, share one rank r.
A member that has no r directions, or whose factors at r would cost as much as its dense weight, is dense instead.
Without groups every matrix stands alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scipy.optimize import brentq
from torch import Tensor

from spectrim.errors import BudgetError, NumericalError
from spectrim.maths.budget import Format, Shape, break_even_rank, dense_bytes, matrix_bytes, stored_bytes
from spectrim.maths.budget import budget_bytes as bytes_at_ratio
from spectrim.maths.energies import discarded
from spectrim.maths.knapsack import Choice, Ladder, cheapest, nearest, require_within
from spectrim.maths.whitening import require_finite

Groups = Sequence[Sequence[int]]

FLOOR = 0.5
"""svd_llm_v2 leaves every matrix at least this part of the ratio asked for."""

NO_RANK = 1e-9
"""Below every rank: what a learned truncation at or under zero counts as."""


class Optimum(NamedTuple):
    """Ranks, and ``gap`` = (their loss − a proven lower bound of any loss within the budget) / their loss."""

    ranks: list[int]
    gap: float


def choices(shapes: Sequence[Shape], format: Format, align: int) -> list[tuple[int, ...]]:
    """The ranks that matrices tied to one rank r may take, r = align, 2·align, ..., then all of them full, ascending.

    A member is at r while r <= break_even_rank and r < min(out, in), at min(out, in) from there on.

    Raises:
        BudgetError: ``align`` is below 1, or the format has no factors.
    """
    if align < 1:
        raise BudgetError(f"align {align}: ranks are multiples of it; it must be at least 1")
    ends = [min(break_even_rank(format, *shape), min(shape) - 1) for shape in shapes]
    members = list(zip(shapes, ends, strict=True))
    partial = [
        tuple(rank if rank <= end else min(shape) for shape, end in members)
        for rank in range(align, max(ends) + 1, align)
    ]
    return [*partial, tuple(min(shape) for shape in shapes)]


def uniform(
    shapes: Sequence[Shape], ratio: float, format: Format, align: int = 1, groups: Groups | None = None
) -> list[int]:
    """The largest choice with bytes <= ratio · dense bytes; for float16: rank = int(ratio·m·n/(m + n)).

    Every matrix (every group) keeps its own ``ratio``; one too small for ``align`` directions gets its smallest choice.

    Raises:
        BudgetError: those smallest choices exceed floor(ratio · Σ dense bytes), or ``ratio`` is not in (0, 1].
    """
    parts = _parts(groups, len(shapes))
    ladders = _ladders(parts, shapes, format, align, lambda index, rank: 0.0)
    levels = []
    for part, ladder in zip(parts, ladders, strict=True):
        allowed = bytes_at_ratio([shapes[index] for index in part], ratio)
        levels.append(max((at for at, choice in enumerate(ladder) if choice.bytes <= allowed), default=0))
    needed = sum(ladder[at].bytes for ladder, at in zip(ladders, levels, strict=True))
    require_within(needed, bytes_at_ratio(shapes, ratio))
    return _ranks(parts, ladders, levels)


def fisher(
    energies: Sequence[Tensor],
    shapes: Sequence[Shape],
    budget_bytes: int,
    format: Format,
    align: int = 1,
    groups: Groups | None = None,
) -> Optimum:
    """min Σ_l Σ_{i>r_l} e_{l,i}, e = σ², subject to Σ stored_bytes(r_l) <= budget_bytes and r_l one of its choices.

    A multiple-choice knapsack; ``knapsack.cheapest`` solves it and proves how far from the optimum the result can be.
    Without the dense choice it is water-filling by σ² per byte.

    Args:
        energies: one (min(out, in),) σ² per matrix, descending, in a metric that compares across matrices:
            ``two_sided(...).sigma`` squared. Output energies, of ``closed_form``, do not compare.
        shapes: (out, in) per matrix.
        budget_bytes: bytes for all matrices together.
        format: storage format of the factors.
        align: ranks are multiples of it.
        groups: matrices that share a rank.

    Returns:
        One rank per matrix; min(out, in) where the matrix is dense. A matrix without energy keeps its smallest choice.

    Raises:
        BudgetError: the smallest choices alone exceed the budget.
        NumericalError: energies are not finite, negative, not descending, or of the wrong length.
    """
    tails = _tails(energies, shapes)
    parts = _parts(groups, len(shapes))
    ladders = _ladders(parts, shapes, format, align, lambda index, rank: tails[index][rank])
    found = cheapest(ladders, budget_bytes)
    return Optimum(_ranks(parts, ladders, found.levels), found.gap)


def svd_llm_v2(
    energies: Sequence[Tensor],
    kinds: Groups,
    shapes: Sequence[Shape],
    ratio: float,
    format: Format,
    align: int = 1,
    groups: Groups | None = None,
) -> list[int]:
    """1 − kept_l = c / log L_l inside each kind, c such that Σ dense_l·kept_l = ratio · Σ dense_l.

    L_l = √Σ_{i>r_l} e_{l,i} at the rank r_l of ``uniform`` is what cutting every matrix alike loses in its outputs: the
    more a matrix loses, the more of it is kept. The published rule is undefined at L = 1 and negative below; here

    * guard: log L_l is at least 1, so every loss below e counts as e and none is cut more than those;
    * clip and floor: kept_l lies in [FLOOR·ratio, 1];
    * renormalisation: c is found with the clipping in place, so that each kind keeps ``ratio`` of its bytes.

    The byte targets kept_l·dense_l then go onto the exact budget as in ``project``.

    Args:
        energies: one (min(out, in),) σ² per matrix, descending, of ``closed_form`` with the Gram summed over the
            calibration tokens: √Σ σ² = ‖X (W − W')ᵀ‖_F. The unit matters, since log L is not homogeneous.
        kinds: lists of indices, every matrix in exactly one: all q_proj, all k_proj, ...
        shapes, format, align, groups: see ``fisher``.
        ratio: bytes kept / dense bytes, in (0, 1].

    Raises:
        BudgetError, NumericalError: see ``fisher``.

    Source: SVD-LLM V2, Wang et al. 2025, arXiv:2503.12340.
    """
    tails = _tails(energies, shapes)
    cut = uniform(shapes, ratio, format, align)
    targets = [0.0] * len(shapes)
    for kind in _parts(kinds, len(shapes)):
        weights = [1 / math.log(max(math.sqrt(tails[index][cut[index]]), math.e)) for index in kind]
        dense = [dense_bytes(*shapes[index]) for index in kind]
        for index, size, removed in zip(kind, dense, removed_shares(weights, dense, ratio), strict=True):
            targets[index] = (1 - removed) * size
    return _near(targets, shapes, bytes_at_ratio(shapes, ratio), format, align, groups)


def removed_shares(weights: Sequence[float], sizes: Sequence[int], ratio: float) -> list[float]:
    """min(c·w_l, 1 − FLOOR·ratio) with c >= 0 such that Σ size_l·share_l = (1 − ratio)·Σ size_l."""
    most, wanted = 1 - FLOOR * ratio, (1 - ratio) * sum(sizes)

    def surplus(scale: float) -> float:
        shares = (min(scale * weight, most) for weight in weights)
        return sum(size * share for size, share in zip(sizes, shares, strict=True)) - wanted

    scale = brentq(surplus, 0.0, most / min(weights)) if ratio < 1 else 0.0
    return [min(scale * weight, most) for weight in weights]


def project(
    truncations: Sequence[float],
    shapes: Sequence[Shape],
    budget_bytes: int,
    format: Format,
    align: int = 1,
    groups: Groups | None = None,
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
        groups: matrices that share a rank, the one nearest to all their truncations.

    Returns:
        One rank per matrix; min(out, in) where the matrix is dense.

    Raises:
        BudgetError: every matrix at its smallest choice is above the budget.
        NumericalError: a truncation is not finite.
    """
    targets = []
    for index, (truncation, shape) in enumerate(zip(truncations, shapes, strict=True)):
        if not math.isfinite(truncation):
            raise NumericalError(f"truncation {index} is {truncation}; rank training diverged, lower its learning rate")
        inside = min(max(truncation, NO_RANK), min(shape))
        targets.append(min(matrix_bytes(format, *shape, inside), stored_bytes(format, *shape, min(shape))))
    return _near(targets, shapes, budget_bytes, format, align, groups)


def _near(
    targets: Sequence[float],
    shapes: Sequence[Shape],
    budget_bytes: int,
    format: Format,
    align: int,
    groups: Groups | None,
) -> list[int]:
    """Ranks whose bytes are near ``targets``, as ``project`` says."""
    parts = _parts(groups, len(shapes))

    def distance(index: int, rank: int) -> float:
        return (stored_bytes(format, *shapes[index], rank) - targets[index]) ** 2 / dense_bytes(*shapes[index])

    ladders = _ladders(parts, shapes, format, align, distance)
    return _ranks(parts, ladders, nearest(ladders, budget_bytes))


def _parts(groups: Groups | None, count: int) -> Groups:
    """``groups``, or every one of ``count`` matrices alone."""
    if groups is None:
        return [[index] for index in range(count)]
    if sorted(index for group in groups for index in group) != list(range(count)) or not all(groups):
        raise BudgetError(f"groups {groups} of {count} matrices; every matrix must stand in exactly one")
    return groups


def _ladders(
    parts: Groups, shapes: Sequence[Shape], format: Format, align: int, loss: Callable[[int, int], float]
) -> list[Ladder]:
    """One ladder per group; ``loss`` of (index, rank) is summed over the members."""
    ladders = []
    for part in parts:
        options = choices([shapes[index] for index in part], format, align)
        ladders.append(
            [
                Choice(
                    ranks,
                    sum(stored_bytes(format, *shapes[index], rank) for index, rank in zip(part, ranks, strict=True)),
                    sum(loss(index, rank) for index, rank in zip(part, ranks, strict=True)),
                )
                for ranks in options
            ]
        )
    return ladders


def _ranks(parts: Groups, ladders: Sequence[Ladder], levels: Sequence[int]) -> list[int]:
    """The rank of every matrix, in the order of their indices."""
    chosen = {
        index: rank
        for part, ladder, at in zip(parts, ladders, levels, strict=True)
        for index, rank in zip(part, ladder[at].ranks, strict=True)
    }
    return [chosen[index] for index in range(len(chosen))]


def _tails(energies: Sequence[Tensor], shapes: Sequence[Shape]) -> list[list[float]]:
    """Σ_{i>r} e_i for r = 0..k of every matrix, its energies checked."""
    for index, (energy, shape) in enumerate(zip(energies, shapes, strict=True)):
        _require_spectrum(index, energy, shape)
    return [discarded(energy).tolist() for energy in energies]


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
