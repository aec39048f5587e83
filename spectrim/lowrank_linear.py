"""The module that takes the place of an ``nn.Linear``: W ≈ left @ right, kept in its storage format.

The tensors of each format are listed here; ``checkpoint.py`` says how they lie in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.errors import ModelError
from spectrim.maths.budget import Format
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import dequantize_directions


class Stored(NamedTuple):
    """One tensor of a stored matrix: its shape, and its dtype or None for the 16-bit dtype of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def stored_tensors(format: Format, out_features: int, in_features: int, rank: int) -> dict[str, Stored]:
    """The tensors that hold W ≈ left @ right: suffix -> shape and dtype, for every storage format.

    Both factors are stored with one column per direction: ``weight`` = rightᵀ (in, rank) and ``left`` (out, rank), so
    ``weight`` never has the shape of the dense (out, in) weight. In the 8-bit formats a factor is ``head`` rows of int8
    with one float32 scale per column, ``X_scale`` (rank,), followed by the rest of its rows in 16 bits, ``X_tail``:

        float16  head = 0: the factor itself is 16-bit, without a scale
        int8     head = all rows
        remap    head = min(out, in) rows; only the longer factor has a tail (Wang et al., 2025, arXiv 2502.02723)
        pifa     ``weight`` holds r of the matrix's own rows, ``left`` (out - r, r) the coefficients of the others, both
                 16-bit, and ``order`` (out,) int32 where each row stands among the two
        dense    ``weight`` (out, in) in 16 bits, no factors
    """
    if format == "dense":
        return {"weight": Stored((out_features, in_features), None)}
    if format == "pifa":
        return {
            "weight": Stored((in_features, rank), None),
            "left": Stored((out_features - rank, rank), None),
            "order": Stored((out_features,), torch.int32),
        }
    tensors: dict[str, Stored] = {}
    for side, rows in (("weight", in_features), ("left", out_features)):
        head = {"float16": 0, "int8": rows, "remap": min(in_features, out_features)}[format]
        if head == 0:
            tensors[side] = Stored((rows, rank), None)
            continue
        tensors[side] = Stored((head, rank), torch.int8)
        tensors[f"{side}_scale"] = Stored((rank,), torch.float32)
        if rows > head:
            tensors[f"{side}_tail"] = Stored((rows - head, rank), None)
    return tensors


class LowRankLinear(nn.Module):
    """y = (x rightᵀ) leftᵀ + bias, with W ≈ left @ right kept in its storage format.

    ``weight`` holds rightᵀ and ``left`` the left factor, see ``stored_tensors``; int8 factors stay int8 in memory and
    are expanded inside each call. Of ``pifa`` y is [z, z leftᵀ] with z = x weight, its columns put in order.
    ``to(dtype)`` and ``half()`` change the 16-bit tensors and the bias only: int8 values and their float32 scales keep
    their bits. The tensors are uninitialised until they are loaded or assigned.

    Args:
        in_features, out_features: of the dense linear.
        rank: number of directions, at least 1.
        format: ``float16`` | ``pifa`` | ``remap`` | ``int8``; 16-bit factors take on the model's dtype.
        bias: whether there is a bias (out,).

    Raises:
        ModelError: the rank is not in 1..min(in, out), or the format holds no factors.
    """

    weight: nn.Parameter
    left: nn.Parameter
    order: nn.Parameter
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
        if format not in ("float16", "pifa", "remap", "int8"):
            raise ModelError(f"format {format!r} holds no factors; use float16, pifa, remap or int8")
        if not 1 <= rank <= min(in_features, out_features):
            raise ModelError(
                f"rank {rank} of a ({out_features}, {in_features}) weight; must lie in 1..its shorter side"
            )
        self.in_features, self.out_features, self.rank, self.format = in_features, out_features, rank, format
        for suffix, stored in stored_tensors(format, out_features, in_features, rank).items():
            tensor = torch.empty(stored.shape, dtype=stored.dtype or dtype, device=device)
            self.register_parameter(suffix, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        empty_bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", empty_bias)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], format: Format, out_features: int, in_features: int, bias: Tensor | None
    ) -> Self:
        """The module around the given stored tensors and bias, which are used as they are, not copied."""
        rank = tensors["left"].shape[1]
        module = cls(in_features, out_features, rank, format, bias is not None, device="meta")
        state = dict(tensors) if bias is None else {**tensors, "bias": bias}
        module.load_state_dict(state, assign=True)
        return module

    @classmethod
    def from_factors(cls, factors: Factors, bias: Tensor | None) -> Self:
        """The ``float16``-format module around ``factors``, in whatever dtype and on whatever device they are."""
        tensors = {"weight": factors.right.mT.contiguous(), "left": factors.left}
        return cls.from_tensors(tensors, "float16", factors.left.shape[0], factors.right.shape[1], bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        if self.format == "pifa":
            pivots = x @ self.weight.to(x.dtype)
            y = torch.cat([pivots, functional.linear(pivots, self.left.to(x.dtype))], -1).index_select(-1, self.order)
            return y if self.bias is None else y + self.bias
        return functional.linear(x @ self.columns("weight", x.dtype), self.columns("left", x.dtype), self.bias)

    def columns(self, side: str, dtype: torch.dtype) -> Tensor:
        """The whole factor ``weight`` (in, rank) or ``left`` (out, rank) in ``dtype``, expanded from its format."""
        head: Tensor = getattr(self, side)
        if self.format == "pifa" and side == "left":
            identity = torch.eye(self.rank, dtype=dtype, device=head.device)
            return torch.cat([identity, head.to(dtype)]).index_select(0, self.order)
        if head.is_floating_point():
            return head.to(dtype)
        expanded = dequantize_directions(head, getattr(self, f"{side}_scale"), dim=1, dtype=dtype)
        tail: Tensor | None = getattr(self, f"{side}_tail", None)
        return expanded if tail is None else torch.cat([expanded, tail.to(dtype)])

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


def factors_of(module: LowRankLinear) -> Factors:
    """``Factors(left (out, rank), right (rank, in))`` in float32, as the module multiplies with them."""
    left, right = (module.columns(side, torch.float32).detach() for side in ("left", "weight"))
    return Factors(left=left, right=right.mT)
