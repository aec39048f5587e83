"""The two walks of `capture` through the blocks, forward and backward, that go on where a killed run stopped."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

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
from spectrim.models.blocks import BlockModel


class Walk:
    """Computes one block's files per call; the hidden states and gradients between blocks are resumable chains.

    Args:
        windows: (windows, seq) int64, for input Grams.
        gradient_windows, gradient_seq_len: the part of ``windows`` that gradient Grams use. Causality makes the hidden
            states of a cut window the cut of the window's hidden states: no second forward pass.
        name: identifies everything the chains depend on.
    """

    def __init__(
        self,
        model: BlockModel,
        windows: Tensor,
        gradient_windows: int,
        gradient_seq_len: int,
        batch_size: int,
        store: LayerStore,
        name: str,
    ) -> None:
        self.model, self.windows, self.batch_size, self.depth = model, windows, batch_size, len(model.names)
        self.graded = windows[:gradient_windows, :gradient_seq_len]
        cut = (slice(0, gradient_windows), slice(0, gradient_seq_len))
        self._forward = Chain(store, f"{name}/forward", self._embed, self._next, every=4)
        self._cut = Chain(
            store, f"{name}/cut", lambda: self._forward[0][cut], lambda i, _: self._forward[i + 1][cut], keep_all=True
        )
        self._backward = Chain(store, f"{name}/backward", self._loss_gradient, self._below)  # index = blocks walked

    def inputs(self, index: int, folder: Path) -> None:
        """Write the input statistics of block ``index``; its metadata says which linear reads which input."""
        hidden = self._forward[index]
        self._cut[index] = hidden[: len(self.graded), : self.graded.shape[1]]
        tensors, owners, output = input_statistics(self.model, index, hidden, self.batch_size)
        save_file(
            tensors, folder / f"{index:03}.safetensors", metadata={"input_of": json.dumps(owners, sort_keys=True)}
        )
        self._forward[index + 1] = output
        if index + 1 == self.depth:
            self._cut[self.depth] = output[: len(self.graded), : self.graded.shape[1]]
            save_file({"hidden": output}, folder / LAST_HIDDEN)

    def gradients(self, index: int, folder: Path) -> None:
        """Write the gradient statistics of block ``index``."""
        walked = self.depth - 1 - index
        gradient = self._backward[walked]
        tensors, below = gradient_statistics(self.model, index, self._cut[index], gradient, self.batch_size)
        save_file(tensors, folder / f"{index:03}.safetensors")
        self._backward[walked + 1] = below

    def factors(
        self, index: int, inputs: Path, gradients: Path, damping: float, max_damping: float, folder: Path
    ) -> None:
        """Write the whitened factors of block ``index`` from its two files of statistics."""
        tensors = decompose(
            self.model.weights(index),
            load_file(inputs) | load_file(gradients),
            inputs_of(inputs),
            self.windows.numel(),
            self.graded.numel(),
            damping,
            max_damping,
        )
        save_file(tensors, folder / f"{index:03}.safetensors")

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
