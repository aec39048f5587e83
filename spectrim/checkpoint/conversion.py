"""A Spectrim checkpoint in another storage format, from its own files alone: no pipeline, no dense model."""

import json
from pathlib import Path
from typing import Any

from spectrim.checkpoint.layout import (
    HALF,
    Matrix,
    by_module,
    check_half,
    check_matrix,
    headers,
    read_config,
    weight_files,
)
from spectrim.checkpoint.saving import read_tensor, write_checkpoint
from spectrim.errors import CheckpointError
from spectrim.formats.lowrank_linear import LowRankLinear, factors_of
from spectrim.formats.packing import PIVOTING, Packed, pack
from spectrim.formats.stored_linear import narrow
from spectrim.maths.budget import FACTORED, Format, resolve_format


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
    check_half(entries, config)
    modules = by_module(entries)
    about = _about(folder)
    matrices, stored = dict(config.listed), dict[str, Packed]()
    for name, matrix in config.listed.items():
        found = modules.get(name, {})
        out, in_ = check_matrix(name, matrix, {suffix: entry[:2] for suffix, entry in found.items()})
        parts = {suffix: read_tensor(entries.pop(f"{name}.{suffix}"), f"{name}.{suffix}") for suffix in found}
        row = about["matrices"].get(name, {})
        stored[name] = Packed(parts, {key: row[key] for key in PIVOTING if key in row})
        if matrix.format not in FACTORED or matrix.format == format:
            continue
        factors = factors_of(LowRankLinear.from_tensors(parts, matrix.format, out, in_, None))
        wanted = "dense" if format == "dense" else resolve_format(format, out, in_, matrix.rank)
        if wanted == "dense":
            matrices[name] = Matrix("dense", min(out, in_))
            stored[name] = Packed({"weight": narrow(factors.left @ factors.right, half)})
        else:
            matrices[name] = Matrix(wanted, matrix.rank)
            stored[name] = pack(factors, wanted)
    provenance = {"converted_from": about["provenance"], "format": format}
    others = {name: read_tensor(entry, name) for name, entry in entries.items()}
    return write_checkpoint(
        folder, destination, others, stored, matrices, half,
        ratio_target=about["ratio"].get("target", config.ratio), provenance=provenance, max_shard_size=max_shard_size,
    )  # fmt: skip


def _about(folder: Path) -> dict[str, Any]:
    """spectrim.json, or what stands for it in a folder that ``save_pretrained`` has written, which has none."""
    file = folder / "spectrim.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {"provenance": None, "ratio": {}, "matrices": {}} | known
