"""The quantization that a user would pick instead, by bitsandbytes; importing this file needs that package.

    bitsandbytes_nf4    4 bits a weight, on a grid made for normal numbers, blocks of 64 with an 8-bit maximum each:
                        QLoRA's settings, double quantization included
    bitsandbytes_int8   int8 weights with a scale per output channel; the inputs are rounded to int8 in every call, but
                        for the columns that hold a number above 6: the defaults of LLM.int8()

The library's own modules hold the weights and multiply, as behind transformers' ``BitsAndBytesConfig``. Which linears
they replace is decided here, so that all baselines are of the same ones.

Sources: QLoRA, Dettmers et al. 2023, arXiv:2305.14314; LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from spectrim.maths.budget import dense_bytes
from spectrim.models.modules import compressible_linears, replace

if TYPE_CHECKING:  # importing it takes seconds, and a result of the store needs no model
    from transformers import PreTrainedModel

OUTLIER = 6.0  # the threshold of LLM.int8(), as BitsAndBytesConfig sets it
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bitsandbytes_nf4": (Linear4bit, {"quant_type": "nf4", "compress_statistics": True}),
    "bitsandbytes_int8": (Linear8bitLt, {"has_fp16_weights": False, "threshold": OUTLIER}),
}


@torch.no_grad()
def quantize_by_library_(model: PreTrainedModel, kind: str, *, exclude: Iterable[str] = ()) -> dict[str, float]:
    """Put a linear of the library in the place of every compressible linear: the baseline that others would ship.

    Args:
        model: changed in place.
        kind: one of ``KINDS``.
        exclude: shell patterns of linears left alone, as in ``compressible_linears``.

    Returns:
        ``bytes`` of what the library saves for the replaced weights, ``dense_bytes`` of the same in 16 bit, and their
        ``ratio``: what ``quantize_model_`` returns.

    Raises:
        ModelError: the model has no linear to quantize.
    """
    # int8 warns in every call of every linear that it rounds float32 inputs to float16, which is what it is made for
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)
    stored = dense = 0
    for name, linear in compressible_linears(model, exclude).items():
        quantized = _quantized(linear, kind)
        replace(model, name, quantized)
        stored += saved_bytes(quantized)
        dense += dense_bytes(linear.out_features, linear.in_features)
    return {"bytes": stored, "dense_bytes": dense, "ratio": stored / dense}


def saved_bytes(module: nn.Module) -> int:
    """Bytes of every tensor in the module's state dict but the bias: packed weights, scales, code tables, layout."""
    return sum(tensor.nbytes for name, tensor in module.state_dict().items() if name != "bias")


def _quantized(linear: nn.Linear, kind: str) -> nn.Module:
    make, options = KINDS[kind]
    module = make(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta", **options)
    settings = module.weight  # a parameter of the library's; with numbers on the CPU it quantizes in the next move
    module.weight = type(settings)(linear.weight.detach().cpu(), requires_grad=False, **vars(settings))
    module.bias = linear.bias
    return module.to(linear.weight.device).train(linear.training)
