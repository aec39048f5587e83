"""One product for the first factors of linears that read the same input: q/k/v, and gate/up of an MLP.

    [z_1, z_2, ...] = x [right_1; right_2; ...]ᵀ

Batch-1 decoding reads every weight once a token, and pays for each call: fewer and larger products are faster. The
linears stay modules of their own, called by the model one after the other. The first one that is called with an input
computes the inner results of all; the others, called with the same tensor object, take theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.formats.lowrank_linear import LowRankLinear
from spectrim.formats.products import product


class SharedInput:
    """The right factors of ``members`` in one tensor, of which each member's ``weight`` is a part: no byte more.

    Whenever a member's weight has been replaced since (``to``, ``load_state_dict(assign=True)``), they are put together
    anew. Not used where gradients are recorded or a graph is compiled. While the members' weights are not all on one
    device, as accelerate offloads them, each multiplies by itself.
    """

    def __init__(self, members: Sequence[LowRankLinear]) -> None:
        self.members = list(members)
        self.weight: Tensor | None = None
        self.scale: Tensor | None = None
        self.places: list[int] = []
        # of the last input: itself, how often it had been changed in place, and what each member has not yet taken
        self.last: tuple[weakref.ref[Tensor], int, list[Tensor | None]] | None = None

    def inner(self, member: LowRankLinear, x: Tensor) -> Tensor:
        """x rightᵀ of ``member``, which takes it once: a second call with the same input computes again."""
        at = self.members.index(member)
        last, version = self.last, 0 if x.is_inference() else x._version
        if last is not None and last[0]() is x and last[1] == version:  # one tuple: another thread's is not of x
            mine, last[2][at] = last[2][at], None
            if mine is not None:
                return mine
        if self.places != self._places():
            if any(one.weight.device != x.device for one in self.members):
                self.weight, self.scale, self.places = None, None, []  # what is offloaded takes no memory here
                return product(x, member.weight.mT, member.weight_scale)
            self._join()
        assert self.weight is not None
        parts = product(x, self.weight, self.scale).split([one.rank for one in self.members], -1)
        self.last = (weakref.ref(x), version, [None if i == at else part for i, part in enumerate(parts)])
        return parts[at]

    @torch.inference_mode(False)  # the members' weights outlive the call, and may be trained after it
    @torch.no_grad()
    def _join(self) -> None:
        ranks = [one.rank for one in self.members]
        self.weight = torch.cat([one.weight.mT for one in self.members])  # (Σ rank, in)
        for one, rows in zip(self.members, self.weight.split(ranks), strict=True):
            one.weight.data = rows.mT
        scales: list[Tensor] = [one.weight_scale for one in self.members if one.weight_scale is not None]
        self.scale = torch.cat(scales) if scales else None
        if self.scale is not None:
            for scale, part in zip(scales, self.scale.split(ranks), strict=True):
                scale.data = part
        self.places = self._places()

    def _places(self) -> list[int]:
        tensors = [tensor for one in self.members for tensor in (one.weight, one.weight_scale) if tensor is not None]
        return [tensor.data_ptr() for tensor in tensors]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}  # a weak reference can be neither copied nor pickled


def share(groups: Iterable[Sequence[Any]]) -> None:
    """Let the factored linears of every group of modules with one input share their first product."""
    for group in groups:
        members = [one for one in group if isinstance(one, LowRankLinear) and one.weight_tail is None]
        kinds = {(one.weight_scale is None, one.weight.dtype, one.weight.device) for one in members}
        if len(members) > 1 and len(kinds) == 1:
            shared = SharedInput(members)
            for one in members:
                one.shared = shared
