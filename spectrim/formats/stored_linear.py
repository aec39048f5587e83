"""A linear kept in its storage format: its tensors, and what all kinds of modules share.

maths/storage_formats.py says what the tensors are; ``LowRankLinear`` and ``QuantizedLinear`` multiply with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from spectrim.errors import CheckpointError, ModelError
from spectrim.maths.budget import Format
from spectrim.maths.quantization import dequantize_int8
from spectrim.maths.storage_formats import FORMATS, UNKNOWN


class Stored(NamedTuple):
    """One tensor of a stored matrix: its shape, and its dtype or None for the 16-bit dtype of the checkpoint.

    A size may be UNKNOWN.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def stored_tensors(format: Format, out_features: int, in_features: int, rank: int) -> dict[str, Stored]:
    """The tensors that hold W (out, in) in ``format``: suffix -> shape and dtype, as storage_formats.py has them."""
    layouts = FORMATS[format].tensors(out_features, in_features, rank)
    return {
        suffix: Stored(shape, None if dtype is None else getattr(torch, dtype))
        for suffix, (shape, dtype) in layouts.items()
    }


def expanded(factor: Tensor, scale: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    """A factor in ``dtype``, multiplied with its ``scale`` along ``dim`` where it has one and is int8."""
    return factor.to(dtype) if scale is None else dequantize_int8(factor, scale, dim, dtype)


def narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in a 16-bit dtype.

    Raises:
        CheckpointError: a value does not fit.
    """
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all():
        raise CheckpointError(
            f"a weight of {tensor.abs().max():.3g} does not fit {dtype}, whose largest number is "
            f"{torch.finfo(dtype).max:.3g}; set prepare.stored_dtype to "
            "bfloat16, or leave the linear out by compression.exclude"
        )
    return rounded


class StoredLinear(nn.Module):
    """The module that takes the place of an ``nn.Linear`` whose weight is in one of ``formats``.

    ``to(dtype)`` and ``half()`` change factors in 16 bit and the bias only: integers and their scales keep their bits.
    The tensors are uninitialised until they are loaded or assigned.

    Args:
        in_features, out_features: of the dense linear.
        rank: number of directions, at least 1; ignored where the format has no factors.
        format: one of ``formats``.
        bias: whether there is a bias (out,).
        dtype: of the model, which factors and the bias take on.

    Raises:
        ModelError: the rank is not in 1..min(in, out), or the format is none of this module's.
    """

    formats: ClassVar[tuple[Format, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    """Tensors that some of the formats have and others have not; they are None there."""
    transposed: ClassVar[tuple[str, ...]] = ()
    """Tensors (in, rank) that a product reads as (rank, in)."""
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        format: Format,
        bias: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if format not in self.formats:
            raise ModelError(f"format {format!r} is not one of {type(self).__name__}: {', '.join(self.formats)}")
        if not 1 <= rank <= min(in_features, out_features):
            raise ModelError(
                f"rank {rank} of a ({out_features}, {in_features}) weight; must lie in 1..its shorter side"
            )
        self.in_features, self.out_features, self.rank, self.format = in_features, out_features, rank, format
        for suffix in self.optional:
            self.register_parameter(suffix, None)
        for suffix, stored in stored_tensors(format, out_features, in_features, rank).items():
            shape = [0 if size == UNKNOWN else size for size in stored.shape]
            fixed = stored.dtype is not None and (not stored.dtype.is_floating_point or suffix.endswith("_scale"))
            tensor = torch.empty(shape, dtype=stored.dtype if fixed else dtype, device=device)
            self.register_parameter(suffix, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        empty_bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", empty_bias)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], format: Format, out_features: int, in_features: int, bias: Tensor | None
    ) -> Self:
        """The module around the given stored tensors and bias, copied only where ``lay_out`` changes their order."""
        rank = tensors["left"].shape[1] if "left" in tensors else min(out_features, in_features)
        module = cls(in_features, out_features, rank, format, bias is not None, device="meta")
        state = dict(tensors) if bias is None else {**tensors, "bias": bias}
        module.load_state_dict(state, assign=True)
        module.lay_out()
        return module

    def lay_out(self, dtype: torch.dtype | None = None) -> None:
        """Put the factors into the order in memory that products are fastest with; values and shapes stay.

        torch's int8 kernel reads a weight (out, in) row by row. A float product of one row is fastest along the longer
        side: by columns where out > in, as left factors have it (measured: 1.3 to 1.8 times).

        Args:
            dtype: of the inputs to come, None where it is not known.
        """
        for name, tensor in self.named_parameters():
            if tensor.dim() != 2 or name.endswith("_scale"):
                continue
            weight = tensor.data.mT if name in self.transposed else tensor.data
            by_columns = weight.is_floating_point() and weight.shape[0] > weight.shape[1]
            weight = weight.mT.contiguous().mT if by_columns else weight.contiguous()
            tensor.data = weight.mT if name in self.transposed else weight

    def dense_weight(self) -> Tensor:
        """W (out, in) in float32, as the module multiplies with it."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = {id(tensor) for name, tensor in self.named_parameters() if name.endswith("_scale")}

        def keep_scales(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in scales and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(keep_scales, recurse)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"format={self.format}, bias={self.bias is not None}"
        )
