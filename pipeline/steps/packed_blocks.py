"""One block of `remap`: from ranks, factors and rounded weights to the tensors of the storage formats."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.steps.chosen_format import stored_format, stored_size
from pipeline.steps.factor_files import read_factors, read_facts, read_rounded
from spectrim.checkpoint.layout import Matrix
from spectrim.errors import BudgetError
from spectrim.formats.packing import Packed, pack, pack_coded, pack_rounded
from spectrim.maths.budget import INT8_FACTORS, Format
from spectrim.maths.two_sided_rounding import Stepped

PACKED = "packed.safetensors"


def choose(entry: Mapping[str, Any], format: Format | None) -> Matrix:
    """The format and rank that were chosen, or ``format`` at that rank, or dense where its factors would cost more."""
    stored = stored_format(entry, format)
    return Matrix(stored, min(entry["out_features"], entry["in_features"]) if stored == "dense" else entry["rank"])


def require_within(matrices: Mapping[str, Matrix], ranks: Mapping[str, Any], format: Format | None) -> None:
    """Raise BudgetError when the matrices as stored take more bytes than their ranks were chosen under."""
    needed = sum(
        stored_size(entry, matrix.format)
        for matrix, entry in zip(matrices.values(), ranks["matrices"].values(), strict=True)
    )
    if needed > ranks["budget_bytes"]:
        raise BudgetError(
            f"remap.format: {format} takes {needed:,} bytes at ranks chosen for {ranks['format']}, the budget of ratio "
            f"{ranks['ratio']} is {ranks['budget_bytes']:,}; set compression.format to {format} or remap.format to same"
        )


def pack_block(
    files: Sequence[Path],
    grams: Callable[[str], Tensor],
    matrices: Mapping[str, Matrix],
    folder: Path,
) -> None:
    """Write the packed tensors of the block whose factors are in the first of ``files``, rounded weights in others.

    ``grams`` gives the input Gram of a linear, which factors in int8 are rounded against.
    """
    packed: dict[str, Packed] = {}
    for name, factors in read_factors(files[0]).items():
        format = matrices[name].format
        if format != "dense":
            packed[name] = pack(factors, format, grams(name) if format in INT8_FACTORS else None)
    for file in files[1:]:
        for name, (weight, residual) in read_rounded(file).items():
            packed[name] = (
                pack_coded(weight)
                if isinstance(weight, Stepped)
                else pack_rounded(weight, matrices[name].format, residual)
            )
    tensors = {f"{name}.{suffix}": tensor for name in sorted(packed) for suffix, tensor in packed[name].tensors.items()}
    facts = {name: matrix.facts for name, matrix in sorted(packed.items())}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / PACKED, metadata={"facts": json.dumps(facts)})


def load_packed(folders: Iterable[Path]) -> dict[str, Packed]:
    """linear name -> the matrix as packed, of every block that ``pack_block`` wrote."""
    packed: dict[str, Packed] = {}
    for folder in folders:
        tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for tensor_name, tensor in load_file(folder / PACKED).items():
            name, _, suffix = tensor_name.rpartition(".")
            tensors[name][suffix] = tensor
        facts = read_facts(folder / PACKED)
        packed |= {name: Packed(parts, facts[name]) for name, parts in tensors.items()}
    return packed
