"""What `capture` knows of one block, read from its files when a method asks for it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from spectrim.compression import statistics
from spectrim.compression.weight_update import Damping
from spectrim.maths.lowrank import Factors
from spectrim.maths.shrinkage import shrunk
from spectrim.models.blocks import BlockModel


class BlockStatistics:
    """The weights to factorise and the metric to do it in, as ``weight_update`` takes them.

    Args:
        captured: the folder of `capture`.
        names: the linears to factorise.
        shrinkage: share of the identity in the Grams.
        damping: first and largest relative damping of a Gram, where one is decomposed.
        hidden: what enters the block, (windows, seq, hidden), for methods that read activations.
        exact_ipca: the form of IPCA.
    """

    def __init__(
        self,
        model: BlockModel,
        index: int,
        captured: Path,
        names: Iterable[str],
        *,
        shrinkage: float,
        damping: Damping,
        hidden: Callable[[], Tensor],
        exact_ipca: bool,
    ) -> None:
        self.model, self.index, self.damping, self.exact_ipca = model, index, damping, exact_ipca
        self._hidden = hidden
        self._captured, self._shrinkage = captured, shrinkage
        self.weights: Mapping[str, Tensor] = model.weights(index)
        self.input_of = statistics.inputs_of(captured / "inputs" / f"{index:03}.safetensors")
        owners = sorted({self.input_of[name] for name in names})
        self.captured_grams = {owner: statistics.gram_of(captured, index, owner).to(self.device) for owner in owners}
        self.grams = {owner: shrunk(gram, shrinkage) for owner, gram in self.captured_grams.items()}

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.model.device

    def hidden(self) -> Tensor:
        """What enters the block in the original model, (windows, seq, hidden)."""
        return self._hidden()

    def replace(self, targets: Mapping[str, Tensor], grams: Mapping[str, Tensor]) -> None:
        """Factorise ``targets`` in the metric of ``grams`` (input -> Gram) instead of what was captured."""
        self.weights = targets
        self.grams = {owner: shrunk(gram, self._shrinkage) for owner, gram in grams.items()}

    def gram(self, name: str) -> Tensor:
        """G = XᵀX of what the linear ``name`` reads, (in, in) float64."""
        return self.grams[self.input_of[name]]

    def captured_gram(self, name: str) -> Tensor:
        """The same as captured, in which errors are reported."""
        return self.captured_grams[self.input_of[name]]

    def gradient_gram(self, name: str) -> Tensor:
        """D = Σ g gᵀ of the linear's output gradients, (out, out) float64."""
        gram = statistics.gradient_gram_of(self._captured, self.index, name).to(self.device)
        return shrunk(gram, self._shrinkage)

    def abs_mean(self, name: str) -> Tensor:
        """Mean |x| per input channel, (in,) float64."""
        return statistics.abs_mean_of(self._captured, self.index, name).to(self.device)

    def captured_factors(self, names: Iterable[str]) -> tuple[dict[str, Factors], dict[str, float]]:
        """The two-sided factors of full rank that `capture` made, and the damping of the side it decomposed."""
        file = self._captured / "factors" / f"{self.index:03}.safetensors"
        stored = load_file(file, device=str(self.device))
        full = {name: Factors(stored[f"left.{name}"], stored[f"right.{name}"]) for name in names}
        return full, {name: float(stored[f"damping.{name}"]) for name in full}
