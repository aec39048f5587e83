"""The walk of `update_weights` behind the blocks it has compressed already."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from pipeline.chain import Onward
from pipeline.factor_files import read_factors
from spectrim.blocks import BlockModel
from spectrim.capture import embedded, forward_block
from spectrim.prefix import Moments, prefix_moments


class Prefix:
    """Hidden states before each block, in the original model and behind the compressed blocks; only walks forward.

    They are in memory alone: a killed run walks again through the blocks whose factors it has.

    Args:
        windows: (windows, seq) int64.
        stored: index of a block -> the file with its factors, which is there once the block is done.
    """

    def __init__(self, model: BlockModel, windows: Tensor, stored: Callable[[int], Path]) -> None:
        self.model, self.windows, self.stored = model, windows, stored
        self._entering = Onward(self._embed, self._next)
        self._left: Tensor | None = None  # what leaves the newest block in the original model, where it was seen

    def moments(self, index: int, input_of: Mapping[str, str]) -> dict[str, Moments]:
        """Input name -> moments of block ``index``."""
        original, behind = self._entering[index]
        moments, self._left = prefix_moments(self.model, index, input_of, original, behind)
        return moments

    def _embed(self) -> tuple[Tensor, Tensor]:
        self._left = None
        hidden = embedded(self.model, self.windows)
        return hidden, hidden

    def _next(self, at: int, entering: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        original, behind = entering
        left = forward_block(self.model, at, original, 1) if self._left is None else self._left
        self._left = None
        return left, forward_block(self.model, at, behind, 1, read_factors(self.stored(at)))
