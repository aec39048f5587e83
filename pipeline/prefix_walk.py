"""The walk of `update_weights` behind the blocks it has compressed already."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.factor_files import read_factors
from spectrim.blocks import BlockModel
from spectrim.capture import forward_block
from spectrim.prefix import Moments, forward_factored, prefix_moments


class Prefix:
    """Hidden states before each block, in the original model and behind the compressed blocks; only walks forward.

    They are in memory alone: a killed run walks again through the blocks whose factors it has.

    Args:
        windows: (windows, seq) int64.
        stored: index of a block -> the file with its factors, which is there once the block is done.
    """

    def __init__(self, model: BlockModel, windows: Tensor, stored: Callable[[int], Path]) -> None:
        self.model, self.windows, self.stored = model, windows, stored
        self._at: tuple[int, Tensor, Tensor] | None = None
        self._left: Tensor | None = None  # what leaves that block in the original model

    def moments(self, index: int, input_of: Mapping[str, str]) -> dict[str, Moments]:
        """Input name -> moments of block ``index``."""
        original, behind = self._entering(index)
        moments, self._left = prefix_moments(self.model, index, input_of, original, behind)
        return moments

    def _entering(self, index: int) -> tuple[Tensor, Tensor]:
        if self._at is None or self._at[0] > index:
            hidden = torch.cat([self.model.embed(window[None]).cpu() for window in self.windows])
            self._at, self._left = (0, hidden, hidden), None
        while self._at[0] < index:
            at, original, behind = self._at
            left = forward_block(self.model, at, original, 1) if self._left is None else self._left
            behind = forward_factored(self.model, at, read_factors(self.stored(at)), behind)
            self._at, self._left = (at + 1, left, behind), None
        return self._at[1:]
