"""The choice of `train_ranks` where all weights are coded: no ranks, but the step that fills the byte budget."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.config.params import Params
from pipeline.steps.coded_blocks import CodedBlocks, bytes_by_name
from pipeline.steps.factor_files import read_rounded
from pipeline.steps.ranks_table import described
from spectrim.checkpoint.layout import Matrix
from spectrim.errors import BudgetError
from spectrim.formats.coding import split
from spectrim.maths.budget import Shape, budget_bytes


def coded_choice(params: Params, device: torch.device) -> dict[str, Any]:
    """ranks.json: every matrix coded, at the step that fills the byte budget."""
    coded, shared = CodedBlocks(params, device), params.compression
    steps = coded.steps(budget_bytes(coded.shapes.values(), shared.ratio))
    matrices = {name: Matrix(shared.format, min(shape)) for name, shape in coded.shapes.items()}
    files = coded.files(steps)
    n_bytes = bytes_by_name(files)
    _require_memory(files, coded.shapes, shared.memory_ratio)
    found = described(shared, params.train_ranks.method, matrices, coded.shapes, n_bytes, steps=steps)
    return found | {"chosen": params.train_ranks.method, "validation_loss": {}}


def _require_memory(files: Iterable[Path], shapes: Mapping[str, Shape], ratio: float | None) -> None:
    """Raise BudgetError when what is decoded takes more than ``ratio`` of the 16-bit bytes."""
    integers = (split(weight.values) for file in files for weight, _ in read_rounded(file).values()) if ratio else ()
    needed = sum(part.nbytes for parts in integers for part in parts) + sum(2 * sum(shape) for shape in shapes.values())
    if ratio and needed > budget_bytes(shapes.values(), ratio):
        raise BudgetError(
            f"compression.memory_ratio: {ratio}; coded weights take a byte a number in memory, here {needed:,} bytes; "
            "raise it, set it to null, or take another compression.format"
        )
