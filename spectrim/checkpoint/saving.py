"""Packed matrices and a dense model's folder -> a Spectrim checkpoint, as layout.py specifies it."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from spectrim.checkpoint.layout import (
    CODES,
    METHOD,
    VERSION,
    Entry,
    Matrix,
    SpectrimConfig,
    check_matrix,
    headers,
    read_bytes,
    weight_files,
)
from spectrim.errors import CheckpointError
from spectrim.formats.packing import Packed
from spectrim.formats.stored_linear import narrow
from spectrim.maths.budget import dense_bytes
from spectrim.models.linearise import read_linearised, sources_of


def half_dtype(folder: Path) -> torch.dtype:
    """The 16-bit dtype in which a dense model's matrices are stored: its own, or float16 where it has none."""
    dtypes = {entry.dtype for entry in headers(weight_files(folder)).values()}
    return torch.bfloat16 if "BF16" in dtypes else torch.float16


def assemble(
    source: Path,
    destination: Path,
    packed: Mapping[str, Packed],
    matrices: Mapping[str, Matrix],
    *,
    ratio_target: float,
    provenance: Mapping[str, Any],
    max_shard_size: str = "2GB",
    skip: Iterable[str] = (),
    refined: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint of the dense model in ``source`` with ``matrices`` replaced into the folder ``destination``.

    Equal arguments give equal bytes.

    Args:
        source: Hugging Face folder of the dense model; its files are copied, its other tensors bit for bit.
        destination: an empty or new folder.
        packed: linear name -> every matrix that is not dense.
        matrices: every compressible linear, dense ones included.
        ratio_target: the ratio that was asked for; it is recorded only.
        provenance: JSON-able facts about sources, parameters and code, recorded in spectrim.json.
        max_shard_size: such as ``2GB``.
        skip: names of files in ``source`` that are not part of the model.
        refined: other tensors of the model, by name, in place of those in ``source``; stored in their dtype there.

    Returns:
        what ``read_bytes`` measures on the written files.

    Raises:
        CheckpointError: a matrix or a refined tensor is not in ``source``, the tensors of a matrix are not those of its
            format, or the size is no size.
    """
    half = half_dtype(source)
    files = {name: entry.file for name, entry in headers(weight_files(source)).items()}
    tensors = read_linearised(files, sources_of(source))
    for name, tensor in (refined or {}).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise CheckpointError(f"{name} {tuple(tensor.shape)}: not in {source}; rebuild it")
        tensors[name] = tensor.to(tensors[name].dtype)
    stored: dict[str, Packed] = {}
    for name, matrix in matrices.items():
        if f"{name}.weight" not in tensors:
            raise CheckpointError(f"{name}: {source} has no tensor {name}.weight; rebuild the prepared model")
        weight = tensors.pop(f"{name}.weight")
        dense = matrix.format == "dense"
        stored[name] = Packed({"weight": narrow(weight, half)}) if dense else packed.get(name, Packed({}))
        shape = check_matrix(name, matrix, _described(stored[name].tensors))
        if shape != weight.shape:
            raise CheckpointError(f"{name}: factors of a {shape} weight, the dense weight is {tuple(weight.shape)}")
    return write_checkpoint(
        source, destination, tensors, stored, matrices, half,
        ratio_target=ratio_target, provenance=provenance, max_shard_size=max_shard_size, skip=skip,
    )  # fmt: skip


def write_checkpoint(
    source: Path,
    destination: Path,
    others: Mapping[str, Tensor],
    stored: Mapping[str, Packed],
    matrices: Mapping[str, Matrix],
    half: torch.dtype,
    *,
    ratio_target: float,
    provenance: Mapping[str, Any],
    max_shard_size: str = "2GB",
    skip: Iterable[str] = (),
) -> dict[str, Any]:
    """Write a checkpoint of the stored tensors of every matrix and all ``others``; see ``assemble``.

    Args:
        source: folder whose config.json and other files are taken over.
        others: every tensor of the model that belongs to none of the matrices, by its name.
        stored: linear name -> every matrix, dense ones included.
        half: the 16-bit dtype of the checkpoint.

    Raises:
        CheckpointError: the tensors of a matrix are not those of its format, or the size is no size.
    """
    tensors, table, n_dense = dict(others), {}, 0
    for name, matrix in matrices.items():
        parts, facts = stored[name]
        n_dense += dense_bytes(*check_matrix(name, matrix, _described(parts)))
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
        table[name] = {**matrix._asdict(), "bytes": sum(part.nbytes for part in parts.values()), **facts}
    ratio = sum(row["bytes"] for row in table.values()) / n_dense
    destination.mkdir(parents=True, exist_ok=True)
    _save(tensors, destination, max_shard_size)
    _copy_rest(source, destination, {*skip, "config.json", "spectrim.json"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = SpectrimConfig(
        quant_method=METHOD,
        version=VERSION,
        ratio=ratio,
        stored_dtype=str(half).removeprefix("torch."),
        matrices={name: matrix._asdict() for name, matrix in matrices.items()},
    ).to_dict()
    _write_json(destination / "config.json", config)
    measured = read_bytes(destination)
    about = {"provenance": provenance, "ratio": {"target": ratio_target, "file": ratio}, "bytes": measured}
    _write_json(destination / "spectrim.json", {**about, "matrices": table})
    return measured


def read_tensor(entry: Entry, name: str) -> Tensor:
    """One tensor of a checkpoint's files."""
    with safe_open(entry.file, framework="pt") as opened:
        return opened.get_tensor(name)


def _described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """suffix -> dtype code and shape, as ``layout.headers`` has them."""
    codes = {dtype: code for code, dtype in CODES.items()}
    return {name: (codes.get(part.dtype, str(part.dtype)), tuple(part.shape)) for name, part in tensors.items()}


def _save(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: str) -> None:
    state = dict(sorted(tensors.items()))
    try:
        split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    except ValueError as error:
        raise CheckpointError(f"max_shard_size {max_shard_size!r}: {error}; give a number and KB, MB or GB") from error
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def _copy_rest(source: Path, destination: Path, skip: set[str]) -> None:
    for item in sorted(source.iterdir()):
        if item.name in skip or item.name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        copy = shutil.copytree if item.is_dir() else shutil.copyfile
        copy(item, destination / item.name)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
