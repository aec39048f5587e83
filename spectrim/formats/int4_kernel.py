"""x Qᵀ with Q in four bits, by torch's own CPU kernel: the order of the bytes that it reads, and the way back.

    Q = (q − zero) · scale per row and group of g inputs,  q in [-8, 7]

In a file two neighbouring inputs share a byte. The kernel interleaves rows instead, differently on every kind of
processor, and counts from 0 to 15. Both orders take the same bytes, and the shape says which one it is, wherever a
tensor is carried: (out, groups, g / 2) as in a file, (out, in / 2) as the kernel reads it.
Measured on two cores with AVX2, (1536, 576), one row of bfloat16: 79 us; expanded in the call 5 ms; dense bfloat16 120.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from spectrim.errors import ModelError
from spectrim.formats.products import CAPABILITY, STEP
from spectrim.maths.quantization import pack, unpack

GROUPS = (32, 64, 128, 256)
"""Inputs per scale that the kernel takes."""

ROWS = 16
"""What it requires the number of outputs to be a multiple of."""

BLOCK = 64
"""Rows that it interleaves: 64, or 32 with AVX2."""


def suits(weight: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether the kernel takes a ``weight`` (out, groups, g / 2) uint8 with inputs in ``dtype``.

    Of float32 and float16 it makes scalar code, up to a hundred times slower than in bfloat16.
    """
    return (
        dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and CAPABILITY in STEP
        and 2 * weight.shape[2] in GROUPS
        and weight.shape[0] % ROWS == 0
    )


def kernel_order(weight: Tensor) -> Tensor:
    """``weight`` (out, groups, g / 2) uint8 as in a file -> (out, in / 2) uint8 as the kernel reads it."""
    values = unpack(weight, 4).flatten(1)
    return _reordered(values.int() + 8)


def file_order(weight: Tensor, groups: int) -> Tensor:
    """Inverse of ``kernel_order``, on the device of ``weight``.

    Raises:
        ModelError: this processor's order is not one of blocks of at most BLOCK rows.
    """
    ordered, out = weight.cpu(), len(weight)
    whole = out - out % BLOCK
    parts = [part for part in (ordered[:whole], ordered[whole:]) if len(part)]
    found = torch.cat([_in_place(part, min(len(part), BLOCK)) for part in parts])
    restored = pack(found.view(out, groups, -1), 4)
    if not torch.equal(kernel_order(restored), ordered):
        raise ModelError(
            f"a four-bit weight {tuple(weight.shape)} cannot be brought back into a file's order on this processor "
            f"({CAPABILITY}); load the model in float32"
        )
    return restored.to(weight.device)


def int4_product(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """y (..., out) = x Qᵀ in bfloat16.

    Args:
        x: (..., in) bfloat16.
        weight: (out, in / 2) uint8 in ``kernel_order``.
        scale: (out, groups); the kernel reads it in bfloat16, each with a number to be added.
        zero: (out, groups) int8, in sixteenths of a step, or None for zeros.
    """
    steps = scale.to(x.dtype)
    if zero is None:
        scale_and_added = functional.pad(steps.mT.unsqueeze(-1), (0, 1))  # (groups, out, 2)
    else:  # few operations: this is done for every token
        scale_and_added = torch.stack([steps.mT, (zero * (steps * (-1 / 16))).mT], -1)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    group = x.shape[-1] // scale.shape[1]
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, group, scale_and_added)
    return y.view(*x.shape[:-1], len(weight))


def _in_place(packed: Tensor, n_rows: int) -> Tensor:
    """(rows, bytes) in the kernel's order -> values (rows, 2 · bytes) int8 in [-8, 7], block after block of ``n_rows``.

    The kernel's order is not documented and differs between processors, so it is asked for: where the digits of every
    number's position go, to the base of 16, there the numbers went.
    """
    shape, total = (n_rows, 2 * packed.shape[1]), 2 * n_rows * packed.shape[1]
    positions, origin = torch.arange(total), torch.zeros(total, dtype=torch.long)
    for digit in range(math.ceil(math.log(total, 16))):
        origin += _nibbles(_reordered(((positions >> 4 * digit) & 15).int().view(shape))).long() << 4 * digit
    values = torch.empty(len(packed) // n_rows, total, dtype=torch.int8)
    values[:, origin] = _nibbles(packed).view(len(values), -1).to(torch.int8) - 8
    return values.view(len(packed), -1)


def _reordered(values: Tensor) -> Tensor:
    """(out, in) int32 in [0, 15] -> (out, in / 2) uint8 in the kernel's order."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    return packed


def _nibbles(packed: Tensor) -> Tensor:
    """Two numbers in [0, 15] for each byte, the lower bits first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten()
