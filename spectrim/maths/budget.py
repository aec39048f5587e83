"""Ranks, bytes and ratios: what a matrix costs on disk in every storage format.

A weight is (out, in); m = max(out, in), n = min(out, in), rank r <= n. Scales are counted, biases are not:

    dense    2 m n                                      the original weight, 16 bit
    float16  2 r (m + n)                                both factors, 16 bit
    int8     r (m + n) + s (r + out)                    both factors int8, a scale per direction of the right one and
                                                        per row of the left one
    remap    2 n r + 2 (m - n) r + s (r + n)            n rows of the longer factor and all of the shorter one int8,
             (Dobi-SVD, Wang et al. 2025,               the other m - n rows 16 bit
             arXiv:2502.02723, Algorithm 3)
    pifa     2 r (m + n - r) + i out                    r of the weight's rows, the others' coefficients, their order
             (PIFA, Zhao et al. 2025, arXiv:2501.19090)
    pifa_int8      r (m + n - r) + s out + i out        the same in int8, a scale per pivot and per other row
    dense_int8     m n + h out                          int8, one scale per row
    dense_int4     m n / 2 + h m n / g                  int4, one scale per row and group of g inputs
    int8_residual  dense_int8 + int8                    the rounded weight, and int8 factors of what rounding lost
    int4_residual  dense_int4 + int8

with s = SCALE_BYTES, i = INDEX_BYTES, h = GROUP_SCALE_BYTES, g = group_size(in). Those with factors grow with r, so a
rank and a byte count determine each other. A matrix whose factors would cost as much as the dense weight or more is
stored dense. The ratio of a set of matrices is Σ stored_bytes / Σ dense_bytes, in (0, 1].
"""

from bisect import bisect_left
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal, get_args

from spectrim.errors import BudgetError

Format = Literal[
    "float16",
    "pifa",
    "remap",
    "int8",
    "pifa_int8",
    "dense",
    "dense_int8",
    "dense_int4",
    "int8_residual",
    "int4_residual",
]
Shape = tuple[int, int]

FACTORED: tuple[Format, ...] = ("float16", "pifa", "remap", "int8", "pifa_int8")
"""W ≈ left @ right; nothing else is kept."""

INT8_FACTORS: tuple[Format, ...] = ("remap", "int8", "pifa_int8")
"""Those of them whose factors are int8, in whole or in part."""

ROUNDED: dict[Format, int] = {"dense_int8": 8, "dense_int4": 4, "int8_residual": 8, "int4_residual": 4}
"""The formats that hold a rounded weight, and its bits."""

RESIDUAL: tuple[Format, ...] = ("int8_residual", "int4_residual")
"""Those of them with int8 factors of W minus its rounded weight."""

SCALE_BYTES = 4
"""One float32 scale per direction of the right factor and per int8 row of the left one."""

INDEX_BYTES = 4
"""One int32 per row: where it stands among the pivots and the rows made from them."""

GROUP_SCALE_BYTES = 2
"""One float16 scale per row and group of a rounded weight."""

GROUP = 64
"""Inputs that share a scale in int4, where it divides their number."""


def group_size(n_bits: int, in_: int) -> int:
    """Inputs per scale of a rounded weight: GROUP in int4 if that divides ``in_``, otherwise the whole row."""
    return GROUP if n_bits == 4 and in_ % GROUP == 0 else in_


def rounded_weight_bytes(n_bits: int, out: int, in_: int) -> int:
    """Bytes of a rounded weight with its scales.

    Raises:
        BudgetError: int4 of an odd number of inputs, which fill no whole bytes.
    """
    if n_bits * in_ % 8:
        raise BudgetError(
            f"int{n_bits} of a ({out}, {in_}) matrix: an even number of inputs is required; keep it dense"
        )
    return out * in_ * n_bits // 8 + GROUP_SCALE_BYTES * out * (in_ // group_size(n_bits, in_))


def dense_bytes(out: int, in_: int) -> int:
    """2·out·in: the bytes of the weight in 16 bit."""
    return 2 * out * in_


def matrix_bytes(format: Format, out: int, in_: int, rank: float) -> int:
    """Bytes of a matrix stored in ``format`` at ``rank``, scales and indices included; dense ones ignore the rank.

    A fractional rank, as training has them, is interpolated and rounded down.

    Raises:
        BudgetError: the rank is not in (0, min(out, in)], or the format is unknown or cannot hold that shape.
    """
    if format == "dense":
        return dense_bytes(out, in_)
    rounded = rounded_weight_bytes(ROUNDED[format], out, in_) if format in ROUNDED else 0
    if rounded and format not in RESIDUAL:
        return rounded
    if not 0 < rank <= min(out, in_):
        raise BudgetError(f"rank {rank} of a ({out}, {in_}) matrix; it must lie in [1, {min(out, in_)}]")
    match format:
        case "float16":
            return int(2 * rank * (out + in_))
        case "pifa":
            return int(2 * rank * (out + in_ - rank)) + INDEX_BYTES * out
        case "remap":
            return int(rank * (2 * max(out, in_) + SCALE_BYTES)) + SCALE_BYTES * min(out, in_)
        case "pifa_int8":
            return int(rank * (out + in_ - rank)) + (SCALE_BYTES + INDEX_BYTES) * out
        case "int8" | "int8_residual" | "int4_residual":
            return rounded + int(rank * (out + in_ + SCALE_BYTES)) + SCALE_BYTES * out
        case _:
            raise BudgetError(f"format {format!r} is none of {', '.join(get_args(Format))}")


def resolve_format(format: Format, out: int, in_: int, rank: int) -> Format:
    """``format`` if it is cheaper than the 16-bit weight, else "dense".

    So is pifa_int8 of full rank: there dense_int8 is the same for less, and its rows would look like a dense weight.
    """
    if format == "pifa_int8" and rank == min(out, in_):
        return "dense"
    return format if matrix_bytes(format, out, in_, rank) < dense_bytes(out, in_) else "dense"


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
