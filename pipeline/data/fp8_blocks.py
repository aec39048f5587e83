"""Weights in fp8 with a scale per block -> plain weights, as transformers loads them; the last block may be cut.

transformers shares a matrix evenly among its scales: it takes 192 rows in blocks of 128 for two times 96, silently,
and fails at 576 rows (DeepSeek-V3's kv_a_proj). Importing this module registers ``fp8_blocks``, where the last block is
the short one.
"""

from math import ceil, gcd
from typing import Any

import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer


def even_scales(scales: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """The scales of smaller blocks, which fill ``shape`` evenly, with the value of the block that each lies in.

    Args:
        scales: (..., ceil(rows / block rows), ceil(columns / block columns)); an axis of another length is not per
            block, and stays as it is.
    """
    for axis, length, size in zip((-2, -1), shape, block, strict=True):
        if length % size and scales.shape[axis] == ceil(length / size):
            fine = gcd(length, size)
            numbers = scales if scales.dtype == torch.uint8 else scales.float()  # bytes are exponents
            scales = numbers.repeat_interleave(size // fine, axis).narrow(axis, 0, length // fine)
    return scales


def _in_dtype(value: Any, dtype: torch.dtype | None) -> Any:
    """Tensors without scales as those of any other model; fp8 without scales stays as it is, to be refused."""
    if isinstance(value, list):
        return [_in_dtype(part, dtype) for part in value]
    return value.to(dtype) if value.is_floating_point() and value.dtype.itemsize > 1 else value


class _Dequantize(Fp8Dequantize):
    def convert(self, input_dict: dict[str, Any], *how: Any, **more: Any) -> dict[str, Any]:
        found = super().convert(input_dict, *how, **more)
        dtype = self._get_target_dtype(more.get("model"), more.get("full_layer_name"))
        return {name: _in_dtype(value, dtype) for name, value in found.items()}

    def _dequantize_one(self, quantized: torch.Tensor, scales: torch.Tensor, *how: Any, **more: Any) -> torch.Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if block and scales.ndim >= 2 and quantized.is_floating_point():  # else packed in fp4, in blocks of its own
            rows, columns = quantized.shape[-2:]
            scales = even_scales(scales, (rows, columns), block)
        return super()._dequantize_one(quantized, scales, *how, **more)


@register_quantizer("fp8_blocks")
class _Quantizer(FineGrainedFP8HfQuantizer):
    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": _Dequantize}


register_quantization_config("fp8_blocks")(FineGrainedFP8Config)
