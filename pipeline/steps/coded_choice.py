"""The choice of `train_ranks` where all weights are coded: no ranks, but the step that fills the byte budget.

Where ``train_ranks.row_dampings`` has several, the weights are coded with each, and the validation windows choose.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.config.params import Params
from pipeline.runtime.store import LayerStore
from pipeline.steps.coded_blocks import CodedBlocks, bytes_by_name
from pipeline.steps.factor_files import read_rounded
from pipeline.steps.ranks_table import described
from pipeline.steps.variants import validation_losses, with_rounded
from spectrim.checkpoint.layout import Matrix
from spectrim.errors import BudgetError
from spectrim.formats.coding import split
from spectrim.maths.budget import Shape, budget_bytes


class _Candidate(NamedTuple):
    """The steps of one damping of the rows, and the files that are made with them."""

    row_damping: float
    steps: Sequence[float]
    files: Sequence[Path]


def coded_choice(params: Params, device: torch.device, store: LayerStore) -> dict[str, Any]:
    """ranks.json: every matrix coded, at the step that fills the byte budget."""
    shared, dampings = params.compression, params.train_ranks.row_dampings
    coded = {f"{damping:g}": CodedBlocks(params, device, damping) for damping in dampings}
    shapes = next(iter(coded.values())).shapes
    budget = budget_bytes(shapes.values(), shared.ratio)
    candidates = {name: _candidate(blocks, budget) for name, blocks in coded.items()}
    losses = dict[str, float]()
    if len(candidates) > 1:
        files = {name: candidate.files for name, candidate in candidates.items()}
        losses = validation_losses("train_ranks", with_rounded, files, device, params.runtime, store)
    best = candidates[min(losses, key=lambda name: losses[name]) if losses else next(iter(candidates))]
    _require_memory(best.files, shapes, shared.memory_ratio)
    found = described(
        shared,
        params.train_ranks.method,
        {name: Matrix(shared.format, min(shape)) for name, shape in shapes.items()},
        shapes,
        bytes_by_name(best.files),
        coded={"row_damping": best.row_damping, "steps": best.steps, "validation_loss": losses},
    )
    return found | {"chosen": params.train_ranks.method, "validation_loss": {}}


def _candidate(coded: CodedBlocks, budget: int) -> _Candidate:
    return _Candidate(coded.row_damping, *coded.fill(budget))


def _require_memory(files: Iterable[Path], shapes: Mapping[str, Shape], ratio: float | None) -> None:
    """Raise BudgetError when what is decoded takes more than ``ratio`` of the 16-bit bytes."""
    integers = (split(weight.values) for file in files for weight, _ in read_rounded(file).values()) if ratio else ()
    needed = sum(part.nbytes for parts in integers for part in parts) + sum(2 * sum(shape) for shape in shapes.values())
    if ratio and needed > budget_bytes(shapes.values(), ratio):
        raise BudgetError(
            f"compression.memory_ratio: {ratio}; coded weights take a byte a number in memory, here {needed:,} bytes; "
            "raise it, set it to null, or take another compression.format"
        )
