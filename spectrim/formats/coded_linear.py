"""A coded weight in the place of an ``nn.Linear``: decoded once, when it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectrim.formats.coding import Integers, decode, encode, whole
from spectrim.formats.products import product
from spectrim.formats.stored_linear import StoredLinear
from spectrim.maths.budget import CODED


class CodedLinear(StoredLinear):
    """y = ((x ⊙ c) Zᵀ) ⊙ r + bias, see maths/storage_formats.py: Z in a byte a number, those beyond it apart.

    ``weight`` is the code as in the file, (n,), until ``lay_out`` has decoded it, and (out, in) int8 from then on.
    Every state_dict has the code. Where tensors come and go, as accelerate offloads them, each call decodes.
    """

    formats = CODED
    weight: nn.Parameter
    weight_scale: nn.Parameter
    input_scale: nn.Parameter
    places: Tensor
    beyond: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("places", "beyond"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int32, device=self.weight.device), persistent=False)

    @property
    def decoded(self) -> bool:
        """Whether ``weight`` is Z, not its code."""
        return self.weight.dim() == 2

    def expect(self, n_bytes: int) -> None:
        """Make room for a code of so many bytes."""
        code = torch.empty(n_bytes, dtype=torch.uint8, device=self.weight.device)
        self.weight = nn.Parameter(code, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        values, places, beyond = self._integers()
        scaled, rows = x * self.input_scale.to(x.dtype), self.weight_scale.float()
        y = product(scaled, values, rows, self.bias)
        if not len(places):
            return y
        row, column = places.long() // self.in_features, places.long() % self.in_features
        return y.index_add(-1, row, scaled[..., column] * (beyond * rows[row]).to(x.dtype))

    def lay_out(self, dtype: torch.dtype | None = None) -> None:
        if not self.decoded and not self.weight.is_meta and len(self.weight):
            values, self.places, self.beyond = self._integers()
            self.weight = nn.Parameter(values, requires_grad=False)

    def dense_weight(self) -> Tensor:
        return whole(self._integers()).float() * self.weight_scale.float()[:, None] * self.input_scale.float()

    def _integers(self) -> Integers:
        if self.decoded:
            return Integers(self.weight, self.places, self.beyond)
        found = decode(self.weight, self.out_features, self.in_features)
        return Integers(*(part.to(self.weight.device) for part in found))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.decoded:
            destination[f"{prefix}weight"] = encode(self._integers())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        code = state_dict.get(f"{prefix}weight")
        if code is not None and code.dim() == 1:
            self.expect(len(code))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.lay_out()
