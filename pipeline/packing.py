"""One block of `remap`: from ranks and factors to the tensors of the storage format."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.factor_files import read_factors
from pipeline.matrices import stored_format
from spectrim.checkpoint import Matrix
from spectrim.errors import BudgetError
from spectrim.maths.budget import Format, matrix_bytes
from spectrim.saving import pack

PACKED = "packed.safetensors"


def choose(entry: Mapping[str, Any], format: Format) -> Matrix:
    """``format`` at the rank that was chosen, or dense where the factors would cost more."""
    if stored_format(entry, format) == "dense":
        return Matrix("dense", min(entry["out_features"], entry["in_features"]))
    return Matrix(format, entry["rank"])


def require_within(matrices: Mapping[str, Matrix], ranks: Mapping[str, Any], format: Format) -> None:
    """Raise BudgetError when the matrices in ``format`` take more bytes than their ranks were chosen under."""
    needed = sum(
        matrix_bytes(matrix.format, entry["out_features"], entry["in_features"], matrix.rank)
        for matrix, entry in zip(matrices.values(), ranks["matrices"].values(), strict=True)
    )
    if needed > ranks["budget_bytes"]:
        raise BudgetError(
            f"remap.format: {format} takes {needed:,} bytes at ranks chosen for {ranks['format']}, the budget of ratio "
            f"{ranks['ratio']} is {ranks['budget_bytes']:,}; set compression.format to {format} or remap.format to same"
        )


def pack_block(file: Path, matrices: Mapping[str, Matrix], half: torch.dtype, folder: Path) -> None:
    """Write the packed tensors of the block whose factors are in ``file``."""
    packed = {}
    for name, factors in sorted(read_factors(file).items()):
        if matrices[name].format != "dense":
            tensors = pack(factors, matrices[name].format, half)
            packed.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
    save_file(packed, folder / PACKED)


def load_packed(folders: Iterable[Path]) -> dict[str, dict[str, Tensor]]:
    """linear name -> suffix -> tensor of every block that ``pack_block`` wrote."""
    packed: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for folder in folders:
        for tensor_name, tensor in load_file(folder / PACKED).items():
            name, _, suffix = tensor_name.rpartition(".")
            packed[name][suffix] = tensor
    return dict(packed)
