"""Coded weights of every block, and the step whose code fills the byte budget.

They lie in the layer store alone. The step is found in three rounds: by the entropy of the weights divided by their
steps, without feedback, which takes seconds; by what the code of every ``SAMPLED``th block says of that estimate; by
the code of all blocks. What that is off by, half a percent, the sampled blocks make up for by a step of their own,
until the code is within the budget and leaves no more of it than ``SLACK``.

The damping of the rows' Grams is given: what is better for the model depends on the bits that are left to a number.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import log2
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import brentq
from torch import Tensor

from pipeline.config.params import Params
from pipeline.runtime.artifacts import artifact, read_json, sha256_file
from pipeline.runtime.layers import keyed, run_layers
from pipeline.runtime.store import LayerStore
from pipeline.steps.factor_files import read_facts, write_rounded
from pipeline.steps.spectra_file import Tokens, read_tokens
from spectrim.compression import statistics
from spectrim.errors import BudgetError, NumericalError
from spectrim.formats.packing import pack_coded
from spectrim.maths.entropy import entropy
from spectrim.maths.two_sided_rounding import INPUT_DAMPING, Side, side, steps, two_sided_rounded
from spectrim.models import blocks

PIVOTS = "pivots.safetensors"
SAMPLED = 6
NUMBERS = 2**14  # of a matrix, whose entropy stands for that of all
SLACK = 0.002
ROUNDS = 4  # in which the step is corrected
MOST_BITS = 7  # a number: what is finer loses nothing to speak of, and no longer fits a byte


class CodedBlocks:
    """The coded weights of the prepared model, as the section `compression` of ``params`` names its linears.

    Args:
        row_damping: added to the diagonals of the gradients' Grams, relative to their means.
    """

    def __init__(self, params: Params, device: torch.device, row_damping: float) -> None:
        self.runtime, self.device, self.row_damping = params.runtime, device, row_damping
        self.model = blocks.BlockModel(artifact("prepare"), device, tuple(params.compression.exclude))
        self.shapes = {
            name: (weight.shape[0], weight.shape[1])
            for index in range(len(self.model.names))
            for name, weight in self.model.weights(index).items()
        }

    def files(self, steps: Sequence[float]) -> list[Path]:
        """The file of every block at its step; what is said in it are the bytes of each linear."""
        return list(self._coded(dict(enumerate(steps))).values())

    def fill(self, budget: int) -> tuple[list[float], list[Path]]:
        """The step of every block, and ``files`` of these.

        Together their code takes ``budget`` bytes or hardly less, or MOST_BITS a number.

        Raises:
            BudgetError: the steps of rows and columns alone take more.
        """
        estimates = self._estimates()
        count = sum(out * in_ for out, in_ in self.shapes.values())
        budget = min(budget, MOST_BITS * count // 8)
        first = _solve(lambda step: sum(estimate(step) for estimate in estimates), budget)
        sample = range(len(estimates) // SAMPLED // 2, len(estimates), SAMPLED)
        coded = sum(bytes_by_name(self._coded(dict.fromkeys(sample, first)).values()).values())
        excess = coded / sum(estimates[index](first) for index in sample)
        aim = budget * (1 - SLACK / 2)
        found = [_solve(lambda step: excess * sum(estimate(step) for estimate in estimates), aim)] * len(estimates)
        sampled = sum(weight.numel() for index in sample for weight in self.model.weights(index).values())
        for left in reversed(range(ROUNDS + 1)):
            files = self.files(found)
            used = sum(bytes_by_name(files).values())
            if not left or budget * (1 - SLACK) <= used <= budget:
                break
            for index in sample:  # twice the step is a bit a number less
                found[index] *= 2 ** (8 * (used - aim) / sampled)
        return found, files

    def _coded(self, steps: Mapping[int, float]) -> dict[int, Path]:
        made = self._run("coding", _write_coded, steps)
        return {index: folder / f"{index:03}.safetensors" for index, folder in made.items()}

    def _estimates(self) -> list[Callable[[float], float]]:
        """Of every block, step -> about the bytes of its code."""
        found: list[Callable[[float], float]] = []
        everything = dict.fromkeys(range(len(self.model.names)))
        for index, folder in self._run("pivots", _write_pivots, everything).items():
            pivots, parts = load_file(folder / PIVOTS), list[tuple[Tensor, int, int]]()
            for name, weight in self.model.weights(index).items():
                rows, columns = steps(pivots[f"{name}.rows"], pivots[f"{name}.columns"], 1.0)
                every = -(-weight.numel() // NUMBERS)
                scaled = weight[::every].cpu() / rows.float()[::every, None] / columns.float()
                parts.append((scaled, weight.numel(), 2 * sum(weight.shape)))
            found.append(partial(_estimated, parts))
        return found

    def _run(self, what: str, compute: Callable[..., None], steps: Mapping[int, float | None]) -> dict[int, Path]:
        weights = read_json(artifact("prepare") / "prepare.json")["model_sha256"]
        tokens, tasks = read_tokens(artifact("capture")), []
        for index, step in steps.items():
            moments = [artifact("capture") / kind / f"{index:03}.safetensors" for kind in ("inputs", "gradients")]
            identity = (weights, [sha256_file(file) for file in moments], list(tokens), str(self.device))
            bound = partial(compute, self.model, index, tokens, self.row_damping, step)
            tasks.append(keyed("coding", self.model.names[index], bound, *identity, self.row_damping, step))
        entries = run_layers(what, tasks, self.runtime, LayerStore())
        return {index: entries[self.model.names[index]] for index in steps}


def bytes_by_name(files: Iterable[Path]) -> dict[str, int]:
    """Linear -> the bytes of its code and its steps."""
    return {name: n_bytes for file in files for name, n_bytes in read_facts(file).items()}


def _write_pivots(
    model: blocks.BlockModel, index: int, tokens: Tokens, row_damping: float, _: None, folder: Path
) -> None:
    found: dict[str, Tensor] = {}
    for name, (rows, columns) in _sides(model, index, tokens, row_damping):
        found |= {f"{name}.rows": rows.pivots.cpu(), f"{name}.columns": columns.pivots.cpu().clone()}
    save_file(found, folder / PIVOTS)


def _write_coded(
    model: blocks.BlockModel, index: int, tokens: Tokens, row_damping: float, step: float, folder: Path
) -> None:
    made, n_bytes, weights = {}, {}, model.weights(index)
    for name, sides in _sides(model, index, tokens, row_damping):
        try:
            made[name] = (two_sided_rounded(weights[name].float(), *sides, step), None)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None
        n_bytes[name] = sum(tensor.nbytes for tensor in pack_coded(made[name][0]).tensors.values())
    write_rounded(folder / f"{index:03}.safetensors", made, n_bytes)


def _sides(
    model: blocks.BlockModel, index: int, tokens: Tokens, row_damping: float
) -> Iterator[tuple[str, tuple[Side, Side]]]:
    """Linear and its sides, one after the other; those of an input that several linears read are made once."""
    captured = artifact("capture")
    input_of = statistics.inputs_of(captured / "inputs" / f"{index:03}.safetensors")
    names = sorted(model.weights(index), key=lambda name: input_of[name])
    gram_of = partial(_gram, partial(statistics.gram_of, captured, index), names, tokens.inputs)
    gradient_gram_of = partial(_gram, partial(statistics.gradient_gram_of, captured, index), names, tokens.gradients)
    known: tuple[str, Side] | None = None
    for name in names:
        try:
            if known is None or known[0] != input_of[name]:
                known = (input_of[name], side(gram_of(name).to(model.device), INPUT_DAMPING))
            rows = side(gradient_gram_of(name).to(model.device), row_damping)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None
        yield name, (rows, known[1])


def _gram(of: Callable[[str], Tensor], names: Sequence[str], count: int, name: str) -> Tensor:
    """A Gram per token; of zeros, with which any step would do, a multiple of the identity as large as the others'.

    Args:
        of: linear -> its Gram, summed over ``count`` tokens.
        names: of the block.
    """
    gram = of(name) / count
    if gram.any():
        return gram
    means = [float(of(other).diagonal().mean()) / count for other in names]
    return torch.eye(len(gram), dtype=gram.dtype) * fmean([mean for mean in means if mean] or [1.0])


def _estimated(parts: Iterable[tuple[Tensor, int, int]], step: float) -> float:
    return sum(entropy((scaled / step).round_()) * count / 8 + others for scaled, count, others in parts)


def _solve(n_bytes: Callable[[float], float], budget: float) -> float:
    """The step whose ``n_bytes``, which fall with it, are ``budget``.

    Raises:
        BudgetError: those of the largest step are more.
    """
    low, high = 1.0, 1.0
    while n_bytes(high) > budget:
        low, high = high, 4 * high
        if high > 2.0**60:
            raise BudgetError(
                f"{budget:,.0f} bytes: the steps of rows and columns alone take {n_bytes(high):,.0f}; raise "
                "compression.ratio"
            )
    while n_bytes(low) <= budget and low > 2.0**-60:
        low /= 4
    if n_bytes(low) <= budget:  # so few numbers that they are all different
        return low
    return float(2 ** brentq(lambda log: n_bytes(2**log) - budget, log2(low), log2(high), xtol=1e-4))
