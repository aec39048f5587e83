"""Round-to-nearest integers: factors in int8, weights in groups, and their packing.

Symmetric: q = round(x / s), s = max|x| / q_max, q_max = 2^(n_bits − 1) − 1; x ≈ q s with |x − q s| <= s/2.
Asymmetric: q = round(x / s) + z in [0, 2^n_bits − 1], x ≈ (q − z) s, with a range that always contains 0.
A zero row has scale 0 and comes back as zeros.
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.lowrank import Factors
from spectrim.maths.whitening import require_finite

INT8_MAX = 127


class Quantized(NamedTuple):
    """W ≈ (values − zero_point) · scale, with one of each per row and group of ``group_size`` inputs."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int


def balance(factors: Factors) -> Factors:
    """The same product with ‖left_i‖ = ‖right_i‖ for every direction i; a direction with a zero side is left alone.

    √σ on each side: the 16-bit rows of the factors stay in range, and neither side's scale carries the whole spectrum.
    """
    left, right = factors.left.double(), factors.right.double()
    left_norm, right_norm = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    usable = (left_norm > 0) & (right_norm > 0)
    scale = torch.where(usable, right_norm / torch.where(usable, left_norm, 1.0), 1.0).sqrt()
    return Factors((left * scale).to(factors.left.dtype), (right / scale[:, None]).to(factors.right.dtype))


def principal(factors: Factors) -> Factors:
    """The same product with orthogonal directions in falling order, left = U √Σ and right = √Σ Vᵀ; in float64.

    Integers of both sides then err least: factors that share directions, such as the identity and the coefficients
    of pivoted rows, magnify each other's rounding.

    Raises:
        NumericalError: a factor is not finite.
    """
    require_finite("left", factors.left)
    require_finite("right", factors.right)
    left_basis, left = torch.linalg.qr(factors.left.double())
    right_basis, right = torch.linalg.qr(factors.right.double().mT)
    u, sigma, vt = torch.linalg.svd(left @ right.mT)
    root = sigma.sqrt()
    return Factors(left_basis @ (u * root), (root[:, None] * vt) @ right_basis.mT)


def quantize_int8(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(q, s) with x ≈ q s, int8, symmetric, one float32 scale per index along ``dim``.

    Args:
        matrix: a factor (rows, rank); ``dim`` = 1 for a scale per direction, 0 for one per row.

    Returns:
        q int8 (the matrix's shape), s float32 (its size along ``dim``,).

    Raises:
        NumericalError: the matrix is not finite.
    """
    require_finite("factor", matrix)
    matrix = matrix.double()
    peak = matrix.abs().amax(dim=1 - dim, keepdim=True)
    scale = (peak / INT8_MAX).float()
    return _nearest(matrix, scale, -INT8_MAX, INT8_MAX), scale.flatten()


def dequantize_int8(values: Tensor, scale: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """q s, the inverse of ``quantize_int8`` up to half a scale per entry."""
    return (values.to(scale.dtype) * scale.unsqueeze(1 - dim)).to(dtype)


def round_to_nearest(weight: Tensor, n_bits: int, group_size: int | None, symmetric: bool = True) -> Quantized:
    """W ≈ (q − z) s, one float16 scale (and zero point) per row and group of ``group_size`` inputs: the RTN baseline.

    Args:
        weight: W, (out, in).
        n_bits: 2 to 8.
        group_size: inputs per scale, None for the whole row; the last group may be shorter.
        symmetric: z = 0 and q in [−q_max, q_max]; otherwise q in [0, 2^n_bits − 1].

    Returns:
        values (out, in) int8, or uint8 if asymmetric; scale (out, groups) float16; zero_point (out, groups) uint8, or
        None if symmetric; group_size, in for whole rows.

    Raises:
        NumericalError: W is not finite or too large for a 16-bit scale, or n_bits or group_size is out of range.
    """
    require_finite("weight", weight)
    if not 2 <= n_bits <= 8 or (group_size is not None and group_size < 1):
        raise NumericalError(f"n_bits {n_bits}, group_size {group_size}; required: n_bits in [2, 8], group_size >= 1")
    size = min(group_size or weight.shape[1], weight.shape[1])
    groups = -(-weight.shape[1] // size)
    padded = torch.nn.functional.pad(weight.double(), (0, groups * size - weight.shape[1]))
    grouped = padded.unflatten(1, (groups, size))  # (out, groups, size); a zero is in every range, so padding is free
    if symmetric:
        top = 2 ** (n_bits - 1) - 1
        scale = half(grouped.abs().amax(-1, keepdim=True) / top)
        values = _nearest(grouped, scale, -top, top)
        return Quantized(values.flatten(1)[:, : weight.shape[1]], scale.squeeze(-1), None, size)
    top = 2**n_bits - 1
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    scale = half((high - low) / top)
    zero_point = _divide(-low, scale).round().clamp(0, top)
    values = (_divide(grouped, scale).round() + zero_point).clamp(0, top).to(torch.uint8)
    zero_point = zero_point.squeeze(-1).to(torch.uint8)
    return Quantized(values.flatten(1)[:, : weight.shape[1]], scale.squeeze(-1), zero_point, size)


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """(q − z) s, (out, in): the inverse of ``round_to_nearest`` up to about half a scale per entry."""
    index = torch.arange(quantized.values.shape[1], device=quantized.values.device) // quantized.group_size
    values = quantized.values.float()
    if quantized.zero_point is not None:
        values = values - quantized.zero_point.float()[:, index]
    return (values * quantized.scale.float()[:, index]).to(dtype)


def rounded_bytes(out: int, in_: int, n_bits: int, group_size: int | None, symmetric: bool = True) -> int:
    """out·⌈in·n_bits/8⌉ + a 16-bit scale (and an n_bits zero point) per row and group: the RTN baseline's bytes."""
    groups = -(-in_ // min(group_size or in_, in_))
    zero_points = 0 if symmetric else -(-out * groups * n_bits // 8)
    return out * -(-in_ * n_bits // 8) + 2 * out * groups + zero_points


def half(values: Tensor) -> Tensor:
    """Scales in float16: none but zero becomes zero, and none overflows.

    Raises:
        NumericalError: a scale is beyond 65504.
    """
    rounded = torch.where(values != 0, values.abs().half().clamp(min=2.0**-24) * values.sign(), 0.0).half()
    if not bool(torch.isfinite(rounded).all()):
        raise NumericalError(
            f"a scale of {float(values.abs().max()):.3g} overflows float16 (65504); the weight is too large for it"
        )
    return rounded


def pack(values: Tensor, n_bits: int) -> Tensor:
    """Two's complement of ``n_bits`` bits each: int8 (..., n) -> uint8 (..., n_bits·n/8).

    The first number is in the lowest bits. Two numbers fill a byte at 4 bits, eight fill three bytes at 3.

    Raises:
        NumericalError: a value does not fit, or n of them do not fill whole bytes.
    """
    low, high = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    if values.numel() and not low <= int(values.min()) <= int(values.max()) <= high:
        raise NumericalError(
            f"int{n_bits} values lie in [{low}, {high}], found [{int(values.min())}, {int(values.max())}]"
        )
    count, n_bytes = _unit(n_bits)
    if values.shape[-1] % count:
        raise NumericalError(f"{values.shape[-1]} numbers of {n_bits} bits do not fill bytes; {count} fill {n_bytes}")
    shifts = n_bits * torch.arange(count, dtype=torch.int64, device=values.device)
    digits = (values.unflatten(-1, (-1, count)).long() & (2**n_bits - 1)) << shifts
    whole = digits.sum(-1, keepdim=True, dtype=torch.int64)
    return (whole >> 8 * torch.arange(n_bytes, dtype=torch.int64, device=values.device)).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, n_bits: int) -> Tensor:
    """The inverse of ``pack`` for 3 and 4 bits, bit for bit: uint8 (..., n_bits·n/8) -> int8 (..., n)."""
    if n_bits == 3:  # looked up by fours: a sixth of the time that shifts in wide integers take
        first, second, third = packed.unflatten(-1, (-1, 3)).int().unbind(-1)
        fours = torch.stack([first | (second & 15) << 8, second >> 4 | third << 4], dim=-1)
        values = _threes(packed.device).index_select(0, fours.flatten()).view(torch.int8)
        return values.view(*packed.shape[:-1], -1)
    digits = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8)
    return (digits ^ 8) - 8


def _threes(device: torch.device) -> Tensor:
    """Each 12 bits as four numbers of 3 bits: (4096,) int32, four int8 each. Made in less time than copied."""
    digits = torch.arange(2**12, device=device).unsqueeze(1) >> torch.arange(0, 12, 3, device=device) & 7
    return ((digits ^ 4) - 4).to(torch.int8).view(torch.int32).flatten()


def _unit(n_bits: int) -> tuple[int, int]:
    """The fewest numbers that fill whole bytes, and those bytes."""
    count = 8 // gcd(8, n_bits)
    return count, count * n_bits // 8


def _nearest(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return _divide(values, scale).round().clamp(low, high).to(torch.int8)


def _divide(values: Tensor, scale: Tensor) -> Tensor:
    scale = scale.double()
    return torch.where(scale > 0, values / torch.where(scale > 0, scale, 1.0), 0.0)
