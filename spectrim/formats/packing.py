"""Factors and rounded weights -> the tensors of a storage format, as maths/storage_formats.py declares them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.errors import CheckpointError
from spectrim.formats.coding import encode, split
from spectrim.formats.stored_linear import narrow, stored_tensors
from spectrim.maths import quantization
from spectrim.maths.budget import Format
from spectrim.maths.factor_rounding import round_factors
from spectrim.maths.lowrank import Factors
from spectrim.maths.pivoting import pivot
from spectrim.maths.quantization import Quantized, balance, principal
from spectrim.maths.storage_formats import FACTOR, FORMATS, StorageFormat
from spectrim.maths.two_sided_rounding import Stepped

PIVOTING = ("condition", "exchanges")
"""What ``maths.pivoting.Pivoted`` has to say of a choice of rows."""


class Packed(NamedTuple):
    """One matrix as it is stored.

    ``tensors``: suffix -> tensor, as ``stored_tensors`` lays them out. ``facts``: what spectrim.json is to say of it,
    PIVOTING of pivoted rows.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, float] = {}


def pack(factors: Factors, format: Format, gram: Tensor | None = None) -> Packed:
    """left @ right in ``format``.

    The norm of each direction is shared equally by both factors first, and directions that become integers are made
    orthogonal; neither changes the product.

    Args:
        factors: left (out, rank), right (rank, in), floating point.
        format: one of ``budget.FACTORED``.
        gram: of the inputs, (in, in); with it the left factor makes up for what int8 has changed in the right one.

    Raises:
        CheckpointError: a value does not fit float16.
        NumericalError: a value is not finite.
    """
    chosen, extra, facts = FORMATS[format], dict[str, Tensor](), dict[str, float]()
    rows = _int8_rows(format, factors)
    if chosen.pivoted:
        pivoted = pivot(factors)
        extra, facts = {"order": pivoted.order}, {name: getattr(pivoted, name) for name in PIVOTING}
        factors = Factors(pivoted.coefficients, pivoted.rows)
    else:
        factors = _even(factors, chosen)
    return Packed(_sides(factors, "weight", rows, gram) | extra, facts)


def pack_rounded(rounded: Quantized, format: Format, residual: Factors | None = None) -> Packed:
    """A rounded weight in ``format``, with factors of what rounding lost if it has them.

    Args:
        rounded: of the format's bits, in groups of the format's grid, with zero points if that has some.
        residual: left (out, rank), right (rank, in).

    Raises:
        CheckpointError: the groups are not the format's, or it has factors and there are none.
    """
    chosen = FORMATS[format]
    assert chosen.grid is not None
    size = chosen.grid.group_size(rounded.values.shape[1])
    as_declared = (size, chosen.grid.asymmetric, chosen.has_factors)
    if (rounded.group_size, rounded.zero_point is not None, residual is not None) != as_declared:
        raise CheckpointError(
            f"{format} of {rounded.values.shape[1]} inputs: groups of {rounded.group_size}, "
            f"{'no ' if rounded.zero_point is None else ''}zero points and {'no ' if residual is None else ''}factors; "
            f"required: groups of {size}, zero points in *_asym alone, factors in *_residual alone"
        )
    values = rounded.values.unflatten(1, (-1, size))
    packed = {
        "weight": values if chosen.grid.n_bits == 8 else quantization.pack(values, chosen.grid.n_bits),
        "weight_scale": rounded.scale,
    }
    if rounded.zero_point is not None:
        packed["weight_zero"] = (rounded.zero_point * chosen.grid.zero_steps).round().to(torch.int8)
    if residual is None:
        return Packed(packed)
    return Packed(packed | _sides(_even(residual, chosen), "right", _int8_rows(format, residual)))


def pack_coded(weight: Stepped) -> Packed:
    """A weight with a step per row and column, its integers entropy coded."""
    code = encode(split(weight.values))
    return Packed({"weight": code, "weight_scale": weight.rows, "input_scale": weight.columns})


def _even(factors: Factors, chosen: StorageFormat) -> Factors:
    """The same product with the norms and, for integers, the directions that lose least."""
    return principal(factors) if chosen.in_int8 else balance(factors)


def _int8_rows(format: Format, factors: Factors) -> tuple[int, int] | None:
    """How many rows of the left and of the right factor are int8; None where there are no such formats' tensors."""
    if not FORMATS[format].in_int8:
        return None
    out, in_ = len(factors.left), factors.right.shape[1]
    stored = stored_tensors(format, out, in_, len(factors.right))
    right = "right" if "right" in stored else "weight"
    return stored["left"].shape[0], stored[right].shape[0]


def _sides(
    factors: Factors, right: str, int8_rows: tuple[int, int] | None, gram: Tensor | None = None
) -> dict[str, Tensor]:
    """Both factors, their first ``int8_rows`` in int8 with scales; ``right`` names the right one."""
    if int8_rows is None:
        sides = {right: factors.right.mT, "left": factors.left}
        return {name: narrow(side, getattr(torch, FACTOR)).contiguous() for name, side in sides.items()}
    found = round_factors(factors, int8_rows, gram)
    packed: dict[str, Tensor] = {}
    for name, rounded in {"left": found.left, right: found.right}.items():
        packed |= {name: rounded.values.contiguous(), f"{name}_scale": rounded.scale}
        if len(rounded.tail):
            packed[f"{name}_tail"] = narrow(rounded.tail, getattr(torch, FACTOR)).contiguous()
    return packed
