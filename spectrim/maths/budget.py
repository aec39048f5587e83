"""Ranks, bytes and ratios: what a matrix costs on disk in every storage format.

Bytes are those of the tensors that a format declares (storage_formats.py): scales and indices are counted, biases are
not. Those of a format with factors grow with the rank, so a rank and a byte count determine each other. A matrix whose
factors would cost as much as the dense weight or more is stored dense. The ratio of a set of matrices is
Σ stored_bytes / Σ dense_bytes, in (0, 1].
"""

from bisect import bisect_left
from collections.abc import Iterable
from fractions import Fraction
from math import gcd

from spectrim.errors import BudgetError
from spectrim.maths.storage_formats import FORMATS, Grid, Shape, named

Format = str
"""The name of a storage format, one of FORMATS."""

FACTORED: tuple[Format, ...] = tuple(named(lambda format: format.factored))
"""W ≈ left @ right; nothing else is kept."""

INT8_FACTORS: tuple[Format, ...] = tuple(named(lambda format: format.needs_gram))
"""Those of them whose factors are int8, in whole or in part."""

ROUNDED: dict[Format, Grid] = {name: format.grid for name, format in FORMATS.items() if format.grid is not None}
"""The formats that hold a rounded weight, and its grid."""

CODED: tuple[Format, ...] = tuple(named(lambda format: format.coded))
"""The formats whose bytes only their content says."""

RESIDUAL: tuple[Format, ...] = tuple(name for name in ROUNDED if FORMATS[name].has_factors)
"""Those of them with factors of W minus its rounded weight."""


def dense_bytes(out: int, in_: int) -> int:
    """2·out·in: the bytes of the weight in 16 bit."""
    return 2 * out * in_


def matrix_bytes(format: Format, out: int, in_: int, rank: float) -> int:
    """Bytes of a matrix stored in ``format`` at ``rank``, scales and indices included; dense ones ignore the rank.

    A fractional rank, as training has them, is interpolated and rounded down.

    Raises:
        BudgetError: the rank is not in (0, min(out, in)], the format is unknown or one of CODED, or it packs several
            inputs into a byte and their number fills no whole bytes.
    """
    if format not in FORMATS:
        raise BudgetError(f"format {format!r} is none of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    if chosen.coded:
        raise BudgetError(f"format {format}: its bytes are those of its code, which is to be made first")
    if chosen.grid is not None and not fills_bytes(chosen.grid, in_):
        raise BudgetError(
            f"int{chosen.grid.n_bits} of a ({out}, {in_}) matrix: to fill whole bytes, a number of inputs is required "
            f"that {8 // gcd(8, chosen.grid.n_bits)} divides; keep it dense"
        )
    if chosen.has_factors and not 0 < rank <= min(out, in_):
        raise BudgetError(f"rank {rank} of a ({out}, {in_}) matrix; it must lie in [1, {min(out, in_)}]")
    return chosen.n_bytes(out, in_, rank)


def fills_bytes(grid: Grid, in_: int) -> bool:
    """Whether the integers of a row of ``in_`` inputs fill whole bytes."""
    return grid.n_bits * in_ % 8 == 0


def resolve_format(format: Format, out: int, in_: int, rank: int) -> Format:
    """``format`` if it is cheaper than the 16-bit weight, else "dense".

    So are pivoted factors of full rank: a rounded weight is the same for less, and all rows of a square one would look
    like a dense weight.
    """
    n_bytes = matrix_bytes(format, out, in_, rank)
    everything = FORMATS[format].pivoted and rank == min(out, in_)
    return format if n_bytes < dense_bytes(out, in_) and not everything else "dense"


def stored_bytes(format: Format, out: int, in_: int, rank: int) -> int:
    """Bytes of what is really written for a matrix of that rank: of its ``resolve_format``."""
    return matrix_bytes(resolve_format(format, out, in_, rank), out, in_, rank)


def break_even_rank(format: Format, out: int, in_: int) -> int:
    """Largest rank that is not stored dense instead, in [0, min(out, in)]."""
    ranks = range(1, min(out, in_) + 1)
    return bisect_left(ranks, True, key=lambda rank: resolve_format(format, out, in_, rank) == "dense")


def budget_bytes(shapes: Iterable[Shape], ratio: float) -> int:
    """floor(ratio · Σ dense_bytes), in exact arithmetic on the decimal digits of ``ratio`` (0.29 of 100 is 29).

    Raises:
        BudgetError: ``ratio`` is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise BudgetError(f"ratio {ratio} is the fraction of bytes kept; it must lie in (0, 1]")
    return int(Fraction(str(ratio)) * sum(dense_bytes(out, in_) for out, in_ in shapes))
