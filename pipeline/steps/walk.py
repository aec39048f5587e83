"""The two ways of `capture` through a model, one result: block by block, or passes through the whole of it.

BlockWalk   one block in memory; hidden states and gradients between blocks are chains that go on where a killed
            run stopped
WholeWalk   the whole model in memory; serves what cannot be walked block by block. A killed run goes on with the
            group of blocks that it was at
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.sections import Capture
from pipeline.runtime.chain import Chain
from pipeline.runtime.store import LayerStore
from spectrim.compression.statistics import (
    LAST_HIDDEN,
    decompose,
    embedded,
    forward_block,
    gradient_statistics,
    input_statistics,
    inputs_of,
    loss_gradient,
)
from spectrim.compression.whole_statistics import Statistics, gradient_statistics_of, input_statistics_of
from spectrim.models.block_weights import BlockWeights
from spectrim.models.blocks import BlockModel
from spectrim.models.whole import WholeModel

GROUP_BYTES = 2**31
"""Of Grams that are summed in one pass through the whole model."""


class Walk(ABC):
    """Computes one block's files per call.

    Args:
        windows: (windows, seq) int64, for input Grams.
        settings: which part of ``windows`` gradient Grams use, and how many windows there are in a pass.
    """

    def __init__(self, model: BlockWeights, windows: Tensor, settings: Capture) -> None:
        self.windows, self.batch_size, self.depth = windows, settings.batch_size, len(model.names)
        self.graded = windows[: settings.gradient_windows, : settings.gradient_seq_len]
        self._weights, self._damping = model.weights, (settings.damping, settings.max_damping)

    @abstractmethod
    def inputs(self, index: int, folder: Path) -> None:
        """Write the input statistics of block ``index``; its metadata says which linear reads which input."""

    @abstractmethod
    def gradients(self, index: int, folder: Path) -> None:
        """Write the gradient statistics of block ``index``."""

    def factors(self, index: int, inputs: Path, gradients: Path, folder: Path) -> None:
        """Write the whitened factors of block ``index`` from its two files of statistics."""
        tensors = decompose(
            self._weights(index),
            load_file(inputs) | load_file(gradients),
            inputs_of(inputs),
            self.windows.numel(),
            self.graded.numel(),
            *self._damping,
        )
        save_file(tensors, folder / f"{index:03}.safetensors")

    @abstractmethod
    def clear(self) -> None:
        """Drop what only an unfinished run needs."""

    def _write_inputs(self, index: int, folder: Path, found: Statistics, leaving: Tensor) -> None:
        """``leaving``: what leaves the block, and is written if it is the last."""
        tensors, owners = found
        metadata = {"input_of": json.dumps(owners, sort_keys=True)}
        save_file(tensors, folder / f"{index:03}.safetensors", metadata=metadata)
        if index + 1 == self.depth:
            save_file({"hidden": leaving}, folder / LAST_HIDDEN)


class BlockWalk(Walk):
    """See above and ``Walk``.

    Causality makes the hidden states of a cut window the cut of the window's hidden states: no second forward pass.

    Args:
        name: identifies everything the chains depend on.
    """

    def __init__(self, model: BlockModel, windows: Tensor, settings: Capture, store: LayerStore, name: str) -> None:
        super().__init__(model, windows, settings)
        self.model = model
        cut = (slice(0, settings.gradient_windows), slice(0, settings.gradient_seq_len))
        self._forward = Chain(store, f"{name}/forward", self._embed, self._next, every=4)
        self._cut = Chain(
            store, f"{name}/cut", lambda: self._forward[0][cut], lambda i, _: self._forward[i + 1][cut], keep_all=True
        )
        self._backward = Chain(store, f"{name}/backward", self._loss_gradient, self._below)  # index = blocks walked

    def inputs(self, index: int, folder: Path) -> None:
        """See ``Walk``."""
        hidden = self._forward[index]
        self._cut[index] = hidden[: len(self.graded), : self.graded.shape[1]]
        tensors, owners, output = input_statistics(self.model, index, hidden, self.batch_size)
        self._forward[index + 1] = output
        if index + 1 == self.depth:
            self._cut[self.depth] = output[: len(self.graded), : self.graded.shape[1]]
        self._write_inputs(index, folder, (tensors, owners), output)

    def gradients(self, index: int, folder: Path) -> None:
        """See ``Walk``."""
        walked = self.depth - 1 - index
        gradient = self._backward[walked]
        tensors, below = gradient_statistics(self.model, index, self._cut[index], gradient, self.batch_size)
        save_file(tensors, folder / f"{index:03}.safetensors")
        self._backward[walked + 1] = below

    def clear(self) -> None:
        """Drop what only an unfinished run needs."""
        for chain in (self._forward, self._cut, self._backward):
            chain.clear(self.depth)

    def _embed(self) -> Tensor:
        return embedded(self.model, self.windows, self.batch_size)

    def _next(self, index: int, hidden: Tensor) -> Tensor:
        return forward_block(self.model, index, hidden, self.batch_size)

    def _loss_gradient(self) -> Tensor:
        return loss_gradient(self.model, self.graded, self._cut[self.depth])

    def _below(self, walked: int, gradient: Tensor) -> Tensor:
        index = self.depth - 1 - walked
        return gradient_statistics(self.model, index, self._cut[index], gradient, self.batch_size)[1]


class WholeWalk(Walk):
    """See above and ``Walk``; blocks whose Grams fit into GROUP_BYTES share their passes."""

    def __init__(self, model: WholeModel, windows: Tensor, settings: Capture) -> None:
        super().__init__(model, windows, settings)
        self.model = model
        self._inputs: dict[int, tuple[Statistics, Tensor]] = {}
        self._gradients: dict[int, dict[str, Tensor]] = {}

    def inputs(self, index: int, folder: Path) -> None:
        """See ``Walk``."""
        if index not in self._inputs:
            group = self._group(index, axis=1)
            found, leaving = input_statistics_of(self.model, group, self.windows, self.batch_size)
            self._inputs = {each: (statistics, leaving) for each, statistics in zip(group, found, strict=True)}
        self._write_inputs(index, folder, *self._inputs.pop(index))

    def gradients(self, index: int, folder: Path) -> None:
        """See ``Walk``."""
        if index not in self._gradients:
            group = self._group(index, axis=0)
            found = gradient_statistics_of(self.model, group, self.graded, self.batch_size)
            self._gradients = dict(zip(group, found, strict=True))
        save_file(self._gradients.pop(index), folder / f"{index:03}.safetensors")

    def clear(self) -> None:
        """See ``Walk``."""
        self._inputs.clear()
        self._gradients.clear()

    def _group(self, index: int, axis: int) -> range:
        """The blocks around ``index`` that are summed together; features along ``axis`` of a weight make a Gram."""
        largest = max(sum(8 * part.weight.shape[axis] ** 2 for part in each.values()) for each in self.model.linears)
        size = max(1, GROUP_BYTES // max(1, largest))
        start = index // size * size
        return range(start, min(start + size, self.depth))
