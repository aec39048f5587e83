"""x Wᵀ with W in int8 on a GPU, by one Triton kernel: every weight is read once, as one byte.

    y = (x qᵀ) · scale, summed in float32

Few rows are bound by how fast weights are read, and nothing that torch keeps for this comes close. Microseconds of one
row / 16 rows by a weight of 4096 x 4096, on an H200 in bfloat16 (`benchmarks/products.py`): `torch._weight_int8pack_mm`
163 / 624, expanded in the call 59 / 61, expanded in compiled code 26 / 26, this kernel 13.4 / 13.2, dense bfloat16
13.7 / 14.4. At 64 rows it takes a third of expanding's time, at 256 as long.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"ROWS": 16, "OUTPUTS": 32, "INPUTS": 128}
"""What one program multiplies at once: the fastest of four tiles tried, at three shapes."""


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """y (..., out) = x Wᵀ in x's dtype, W = weight · scale per row; it records no gradient.

    Args:
        x: (..., in) float16 or bfloat16.
        weight: (out, in) int8, in any order in memory.
        scale: (out,) float32.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(len(rows), len(weight))
    grid = (triton.cdiv(len(weight), TILE["OUTPUTS"]), triton.cdiv(len(rows), TILE["ROWS"]))
    arguments = (rows, weight, scale.contiguous(), y, len(rows), *weight.shape, *weight.stride())
    with torch.cuda.device_of(rows):  # the kernel runs on torch's current device, which need not be that of the tensors
        _kernel[grid](*arguments, **TILE, num_warps=4, num_stages=4)
    return y.view(*x.shape[:-1], len(weight))


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, y, n_rows, n_outputs, n_inputs, by_output, by_input,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    weights = weight + output[:, None].to(tl.int64) * by_output
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, n_inputs, INPUTS):
        at = (start + tl.arange(0, INPUTS))[None, :]
        left = tl.load(x + row[:, None] * n_inputs + at, mask=(row[:, None] < n_rows) & (at < n_inputs), other=0.0)
        right = tl.load(weights + at * by_input, mask=(output[:, None] < n_outputs) & (at < n_inputs), other=0)
        total = tl.dot(left, tl.trans(right.to(left.dtype)), total)
    total *= tl.load(scale + output, mask=output < n_outputs, other=0.0)[None, :]
    inside = (row[:, None] < n_rows) & (output[None, :] < n_outputs)
    tl.store(y + row[:, None] * n_outputs + output[None, :], total.to(y.dtype.element_ty), mask=inside)
