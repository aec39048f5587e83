"""A Spectrim checkpoint in another storage format, from its own files alone: no pipeline, no dense model."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim.checkpoint import HALF, Matrix, by_module, check_half, check_matrix, headers, read_config, weight_files
from spectrim.errors import CheckpointError
from spectrim.lowrank_linear import LowRankLinear, factors_of
from spectrim.maths.budget import FACTORED, Format, resolve_format
from spectrim.saving import narrow, pack, read_tensor, write_checkpoint


def convert(folder: Path, destination: Path, format: Format, max_shard_size: str = "2GB") -> dict[str, Any]:
    """Write the checkpoint in ``folder`` into ``destination``, every factored matrix in ``format`` at its rank.

    A matrix whose factors would cost as much as its dense weight is stored dense, and so are all for ``format`` dense;
    dense and rounded weights stay as they are. Factors are exact up to the rounding of the formats involved: what int8
    has lost stays lost.

    Args:
        destination: an empty or new folder.
        format: one of ``budget.FACTORED``, or dense.

    Returns:
        what ``read_bytes`` measures on the written files.

    Raises:
        CheckpointError: ``folder`` is no Spectrim checkpoint or ``destination`` is not empty.
    """
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination}: not empty; name a new folder")
    config = read_config(folder)
    half = HALF[config.stored_dtype]
    entries = headers(weight_files(folder))
    check_half(entries, half)
    modules = by_module(entries)
    matrices, stored = dict(config.listed), dict[str, dict[str, Tensor]]()
    for name, matrix in config.listed.items():
        found = modules.get(name, {})
        out, in_ = check_matrix(name, matrix, {suffix: entry[:2] for suffix, entry in found.items()})
        stored[name] = {suffix: read_tensor(entries.pop(f"{name}.{suffix}"), f"{name}.{suffix}") for suffix in found}
        if matrix.format not in FACTORED or matrix.format == format:
            continue
        factors = factors_of(LowRankLinear.from_tensors(stored[name], matrix.format, out, in_, None))
        wanted = "dense" if format == "dense" else resolve_format(format, out, in_, matrix.rank)
        if wanted == "dense":
            matrices[name] = Matrix("dense", min(out, in_))
            stored[name] = {"weight": narrow(factors.left @ factors.right, half)}
        else:
            matrices[name] = Matrix(wanted, matrix.rank)
            stored[name] = pack(factors, wanted, half)
    facts = json.loads((folder / "spectrim.json").read_text(encoding="utf-8"))
    provenance = {"converted_from": facts["provenance"], "format": format}
    others = {name: read_tensor(entry, name) for name, entry in entries.items()}
    return write_checkpoint(
        folder, destination, others, stored, matrices, half,
        ratio_target=facts["ratio"]["target"], provenance=provenance, max_shard_size=max_shard_size,
    )  # fmt: skip
