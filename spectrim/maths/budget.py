"""Ranks, bytes and ratios: what a matrix costs on disk in every storage format.

A weight is (out, in); m = max(out, in), n = min(out, in), rank r <= n. Scales are counted, biases are not:

    dense    2 m n                                      the original weight, 16 bit
    float16  2 r (m + n)                                both factors, 16 bit
    int8     r (m + n) + 2 r s                          both factors int8, one scale per direction and side
    remap    2 n r + 2 (m - n) r + 2 r s = 2 m r + 2 r s
             n rows of the longer factor and all of the shorter one int8, the other m - n rows 16 bit
             (Dobi-SVD, Wang et al. 2025, arXiv:2502.02723, Algorithm 3)
    pifa     2 r (m + n - r) + i out                    r of the weight's rows, the others' coefficients, their order
             (PIFA, Zhao et al. 2025, arXiv:2501.19090)

with s = SCALE_BYTES and i = INDEX_BYTES. All of them grow with r, so a rank and a byte count determine each other. A
matrix whose factors would cost as much as the dense weight or more is stored dense. The ratio of a set of matrices is
Σ stored_bytes / Σ dense_bytes, in (0, 1].
"""

from bisect import bisect_left
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

from spectrim.errors import BudgetError

Format = Literal["float16", "pifa", "remap", "int8", "dense"]
Shape = tuple[int, int]

SCALE_BYTES = 4
"""One float32 scale per direction and side of a quantized pair of factors."""

INDEX_BYTES = 4
"""One int32 per row: where it stands among the pivots and the rows made from them."""


def dense_bytes(out: int, in_: int) -> int:
    """2·out·in: the bytes of the weight in 16 bit."""
    return 2 * out * in_


def matrix_bytes(format: Format, out: int, in_: int, rank: float) -> int:
    """Bytes of a matrix stored in ``format`` at ``rank``, scales and indices included; a rank is ignored for "dense".

    A fractional rank, as training has them, is interpolated and rounded down.

    Raises:
        BudgetError: the rank is not in (0, min(out, in)], or the format is unknown.
    """
    if format == "dense":
        return dense_bytes(out, in_)
    if not 0 < rank <= min(out, in_):
        raise BudgetError(f"rank {rank} of a ({out}, {in_}) matrix; it must lie in [1, {min(out, in_)}]")
    match format:
        case "float16":
            return int(2 * rank * (out + in_))
        case "pifa":
            return int(2 * rank * (out + in_ - rank)) + INDEX_BYTES * out
        case "remap":
            return int(2 * rank * (max(out, in_) + SCALE_BYTES))
        case "int8":
            return int(rank * (out + in_ + 2 * SCALE_BYTES))
        case _:
            raise BudgetError(f"format {format!r} stores no factors; use one of float16, pifa, remap, int8")


def resolve_format(format: Format, out: int, in_: int, rank: int) -> Format:
    """``format`` if the factors are cheaper than the 16-bit weight, else "dense"."""
    return format if matrix_bytes(format, out, in_, rank) < dense_bytes(out, in_) else "dense"


def stored_bytes(format: Format, out: int, in_: int, rank: int) -> int:
    """min(matrix_bytes, dense_bytes): what is really written for a matrix of that rank."""
    return min(matrix_bytes(format, out, in_, rank), dense_bytes(out, in_))


def break_even_rank(format: Format, out: int, in_: int) -> int:
    """Largest rank whose factors are strictly cheaper than the dense weight, in [0, min(out, in)]."""
    ranks = range(1, min(out, in_) + 1)
    return bisect_left(ranks, dense_bytes(out, in_), key=lambda rank: matrix_bytes(format, out, in_, rank))


def budget_bytes(shapes: Iterable[Shape], ratio: float) -> int:
    """floor(ratio · Σ dense_bytes), in exact arithmetic on the decimal digits of ``ratio`` (0.29 of 100 is 29).

    Raises:
        BudgetError: ``ratio`` is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise BudgetError(f"ratio {ratio} is the fraction of bytes kept; it must lie in (0, 1]")
    return int(Fraction(str(ratio)) * sum(dense_bytes(out, in_) for out, in_ in shapes))
