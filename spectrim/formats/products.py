"""x Wᵀ with a weight that may be int8 and then stays so in memory.

What each call does was chosen by measurement (`benchmarks/inference.py`), on two cores with AVX2:

- Few rows of bfloat16 meet integers in torch's own kernel, which reads one byte a weight. It does not vectorise float32
  and float16, and takes 3 to 15 times as long there as expanding the integers for the length of the call does.
- Many rows of 16 bits are multiplied in float32 where the processor has no 16-bit products: an eighth of the time.
- Few rows of 16 bits on a GPU meet integers in the kernel of int8_kernel.py, where there is Triton.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

int8_product: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
if torch.cuda.is_available() and find_spec("triton"):
    from spectrim.formats.int8_kernel import int8_product

FEW, FEW_ON_GPU = 16, 64
"""Rows up to which reading the weights takes longer than multiplying them."""

CAPABILITY = torch.backends.cpu.get_cpu_capability()
"""Of this processor; asked once, for it is part of every product, and no graph can be compiled that asks."""

STEP = {"AVX2": 8, "AVX512": 32}
"""Inputs that torch's kernel takes at once; it reads beyond the end of a row that they do not divide."""


def product(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias, with W = weight · scale per row where there is a scale; in x's dtype.

    Args:
        x: (..., in), floating point.
        weight: (out, in), floating point without and int8 with a ``scale``.
        scale, bias: (out,), floating point.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if rows > FEW and _lacks_16_bit_products(x):
        return product(x.float(), weight, scale, None if bias is None else bias.float()).to(x.dtype)
    if scale is None:
        return functional.linear(x, weight.to(x.dtype), bias)
    if 0 < rows <= FEW and suits_kernels(x) and x.shape[-1] % STEP[CAPABILITY] == 0:
        y: Tensor = torch._weight_int8pack_mm(x.reshape(rows, -1).contiguous(), weight.contiguous(), scale.to(x.dtype))
        y = y.reshape(*x.shape[:-1], len(weight))
    elif 0 < rows <= FEW_ON_GPU and int8_product is not None and _suits_gpu_kernel(x):
        y = int8_product(x, weight, scale.float())
    elif x.dtype == torch.float16:  # whose largest number a sum over integers exceeds
        y = functional.linear(x, (weight.to(scale.dtype) * scale[:, None]).to(x.dtype))
    else:
        y = functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    return y if bias is None else y + bias


def suits_kernels(x: Tensor) -> bool:
    """Whether torch's CPU kernels for packed integers take ``x``: they are for bfloat16, and give no gradient."""
    return CAPABILITY in STEP and x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _recorded(x)


def _suits_gpu_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and not _recorded(x)


def _recorded(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _lacks_16_bit_products(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype.itemsize == 2 and CAPABILITY in ("DEFAULT", "AVX2")
