"""What enters each block in the original model, and behind the compressed blocks before it.

In memory alone: a killed run walks again through the blocks whose factors it has.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.data.texts import load_windows
from pipeline.runtime.chain import Onward
from pipeline.steps.factor_files import read_factors
from spectrim.compression.block_refinement import Hidden
from spectrim.compression.prefix import prefix_moments
from spectrim.compression.statistics import embedded, forward_block
from spectrim.maths.anchoring import anchored
from spectrim.models.blocks import BlockModel


class HiddenStates:
    """Hidden states of the first ``windows`` calibration windows; where ``validated``, of the validation windows too.

    Args:
        calibrate: folder of the windows.
        stored: index of a block -> the file that its factors were written to.
    """

    def __init__(
        self, model: BlockModel, calibrate: Path, windows: int, validated: bool, stored: Callable[[int], Path]
    ) -> None:
        self._model, self._calibrate, self._windows, self._validated = model, calibrate, windows, validated
        self._original = Onward(self._embed, lambda at, hidden: forward_block(model, at, hidden, 1))
        self._prefix = Onward(
            self._embed, lambda at, hidden: forward_block(model, at, hidden, 1, read_factors(stored(at)))
        )

    def original(self, index: int) -> Tensor:
        """What enters block ``index`` of the original model, (windows, seq, hidden)."""
        return self._original[index][: self._windows]

    def anchored(
        self, index: int, weights: Mapping[str, Tensor], input_of: Mapping[str, str], alpha: float, damping: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights to factorise behind the compressed blocks, and the Grams of the inputs there (DESIGN 5.4)."""
        entering = (self._original[index][: self._windows], self._prefix[index][: self._windows])
        moments = prefix_moments(self._model, index, input_of, *entering)
        targets: dict[str, Tensor] = {}
        for owner, found in moments.items():  # one solution for all that read one input
            names = [name for name in weights if input_of[name] == owner]
            stacked = torch.cat([weights[name] for name in names])
            together = anchored(stacked, *found, alpha, damping)
            targets |= zip(names, together.split([len(weights[name]) for name in names]), strict=True)
        return targets, {owner: found.gram for owner, found in moments.items()}

    def around(self, index: int) -> tuple[Hidden, Hidden]:
        """What enters block ``index`` behind the compressed blocks and what left the original: training, validation."""
        entering, leaving, cut = self._prefix[index], self._original[index + 1], self._windows
        return Hidden(entering[:cut], leaving[:cut]), Hidden(entering[cut:], leaving[cut:])

    def _embed(self) -> Tensor:
        windows = load_windows(self._calibrate / "calibration.parquet")[: self._windows]
        if self._validated:
            windows = torch.cat([windows, load_windows(self._calibrate / "validation.parquet")])
        return embedded(self._model, windows)
