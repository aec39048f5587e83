"""The Spectrim checkpoint, format version 1: a normal Hugging Face folder that plain ``from_pretrained`` loads.

    config.json          the dense model's, with the entry "quantization_config" below
    model.safetensors    or model-00001-of-0000N.safetensors and model.safetensors.index.json
    spectrim.json        provenance, ratios, bytes of every matrix; of pivoted ones the condition of their rows, and how
                         many were exchanged for it; not needed to load
    everything else      tokenizer, chat template and generation settings of the dense model, unchanged

    "quantization_config": {
        "quant_method": "spectrim",
        "version": 1,
        "ratio": 0.7996,              bytes of the matrices below / their bytes in 16 bit, measured
        "stored_dtype": "float16",    or "bfloat16": of dense matrices, and of all else in 16 bit
        "matrices": {"model.layers.0.self_attn.q_proj": {"format": "float16", "rank": 224}, ...}
    }

``matrices`` lists every linear that counts in the ratio by its module path. Its tensors are NAME.SUFFIX, with the
suffixes, shapes and dtypes that ``spectrim.maths.storage_formats`` declares for its format; the rank of a format
without factors is min(out, in).

Notes:
- Every other tensor, biases included, has the name and value it has in the dense model.
- ``NAME.weight`` never has the shape of the dense weight unless it is the dense weight, so that a load without
  ``import spectrim`` ends with a size mismatch instead of random weights.
- Every 16-bit tensor but scales and factors, listed or not, is of ``stored_dtype``.
- A tensor that is missing, unlisted or of another shape or dtype is an error; so is an unknown version, format or key.
- Weights are safetensors only. Nothing in the folder is executed.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.quantization_config import QuantizationConfigMixin

from spectrim.errors import CheckpointError
from spectrim.formats.coding import HEAD, content_size
from spectrim.formats.stored_linear import stored_tensors
from spectrim.maths.budget import Format, dense_bytes
from spectrim.maths.storage_formats import FORMATS, UNKNOWN

METHOD = "spectrim"
VERSION = 1
KEYS = {"quant_method", "version", "ratio", "stored_dtype", "matrices"}
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CODES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Matrix(NamedTuple):
    """How one linear is stored; the rank of one without factors is min(out, in)."""

    format: Format
    rank: int


class Entry(NamedTuple):
    """One tensor of a safetensors file, from the header: dtype code such as ``F16``, shape, file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


class SpectrimConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of config.json, checked.

    Attributes: ``version``, ``ratio`` (measured), ``stored_dtype`` (float16 | bfloat16), ``matrices`` as in the file.

    Raises:
        CheckpointError: unknown version, format or key; a missing key; a rank below 1. All problems at once.
    """

    def __init__(self, **fields: Any) -> None:
        if problems := list(_problems(fields)):
            raise CheckpointError(
                "config.json: quantization_config of a Spectrim checkpoint: "
                + "; ".join(problems)
                + f". This Spectrim reads version {VERSION}; upgrade Spectrim, or build the checkpoint again"
            )
        self.quant_method = METHOD  # type: ignore[assignment] # transformers lists only its own methods there
        self.version: int = fields["version"]
        self.ratio: float = fields["ratio"]
        self.stored_dtype: str = fields["stored_dtype"]
        self.matrices: dict[str, dict[str, Any]] = fields["matrices"]

    @property
    def listed(self) -> dict[str, Matrix]:
        """name -> Matrix of every linear that counts in the ratio."""
        return {name: Matrix(**matrix) for name, matrix in self.matrices.items()}


def _problems(fields: Mapping[str, Any]) -> Iterator[str]:
    version = fields.get("version")
    if version != VERSION:
        yield f"version is {version!r}"
        return  # nothing else can be judged
    for key in sorted(KEYS - fields.keys()):
        yield f"{key} is missing"
    for key in sorted(fields.keys() - KEYS):
        yield f"unknown key {key}"
    if fields.get("stored_dtype") not in list(HALF):  # a list: what stands in the file need not be hashable
        yield f"stored_dtype is {fields.get('stored_dtype')!r}, must be one of {', '.join(HALF)}"
    matrices = fields.get("matrices")
    if not isinstance(matrices, Mapping):
        yield "matrices must be a mapping of linear names"
        return
    for name, matrix in matrices.items():
        if not isinstance(matrix, Mapping) or set(matrix) != set(Matrix._fields):
            yield f"{name}: must have exactly {', '.join(Matrix._fields)}"
        elif matrix["format"] not in list(FORMATS):
            yield f"{name}: unknown format {matrix['format']!r}, must be one of {', '.join(FORMATS)}"
        elif type(matrix["rank"]) is not int or matrix["rank"] < 1:
            yield f"{name}: rank {matrix['rank']!r} must be an integer of at least 1"


def read_config(folder: Path) -> SpectrimConfig:
    """The checked ``quantization_config`` of a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}; a checkpoint's folder is required") from None
    if not isinstance(config, Mapping) or config.get("quant_method") != METHOD:
        raise CheckpointError(f"{folder}: config.json has no Spectrim quantization_config; a checkpoint is required")
    return SpectrimConfig(**config)


def headers(files: Iterable[Path]) -> dict[str, Entry]:
    """name -> Entry of every tensor in safetensors ``files``; no tensor is read.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or two files hold the same tensor.
    """
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    piece = opened.get_slice(name)
                    if name in entries:
                        raise CheckpointError(f"{name}: stored twice, in {entries[name].file} and {file}; remove one")
                    entries[name] = Entry(piece.get_dtype(), tuple(piece.get_shape()), file)
        except (SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{file}: missing, truncated or not safetensors ({error}); fetch or build it again"
            ) from error
    return entries


def check_half(entries: Mapping[str, Entry], config: SpectrimConfig) -> None:
    """Raise CheckpointError unless all 16-bit tensors have the dtype of the checkpoint, or that of their format.

    float16 and bfloat16 have one size: without this a changed header would give another model.
    """
    half = HALF[config.stored_dtype]
    declared = {
        f"{name}.{suffix}"
        for name, matrix in config.listed.items()
        for suffix, dtype in FORMATS[matrix.format].dtypes().items()
        if dtype is not None
    }  # what check_matrix compares
    for name, entry in entries.items():
        if CODES.get(entry.dtype) in {*HALF.values()} - {half} and name not in declared:
            raise CheckpointError(
                f"{name}: is {entry.dtype}, stored_dtype of the checkpoint is {str(half).removeprefix('torch.')}; "
                "build or fetch the checkpoint again"
            )


def check_matrix(name: str, matrix: Matrix, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[int, int]:
    """The dense shape (out, in) of a stored matrix, whose tensors must be exactly those of its format.

    Args:
        name: of the linear.
        matrix: format and rank it claims to have.
        found: suffix -> dtype code and shape of each tensor, the bias apart.

    Raises:
        CheckpointError: a tensor is missing, unlisted, or of another dtype or shape, or the rank above both sides.
    """
    shapes = {suffix: shape for suffix, (_, shape) in found.items()}
    sizes = FORMATS[matrix.format].shape_of(shapes, matrix.rank)
    out_features, in_features = (max(size, 1) for size in sizes)  # 0: what is missing is said below
    expected = stored_tensors(matrix.format, out_features, in_features, matrix.rank)
    for suffix in sorted(expected.keys() | found.keys()):
        if suffix not in found or suffix not in expected:
            state = "missing" if suffix not in found else "not part of the format"
            raise CheckpointError(f"{name}.{suffix}: {state} ({matrix.format}); build or fetch the checkpoint again")
        (code, shape), (wanted, dtype) = found[suffix], expected[suffix]
        if not _fits(shape, wanted) or CODES.get(code) not in ([dtype] if dtype else HALF.values()):
            kind = str(dtype or "16-bit").removeprefix("torch.")
            raise CheckpointError(
                f"{name}.{suffix}: is {code} {shape}, {matrix.format} of rank {matrix.rank} requires {kind} {wanted}; "
                "build or fetch the checkpoint again"
            )
    if matrix.rank > min(out_features, in_features):
        raise CheckpointError(
            f"{name}: rank {matrix.rank} of a ({out_features}, {in_features}) weight; must lie in 1..its shorter side; "
            "build or fetch the checkpoint again"
        )
    return out_features, in_features


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size in (found, UNKNOWN) for found, size in zip(shape, wanted, strict=True)
    )


def by_module(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """module name -> suffix -> Entry, biases left out."""
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        module, _, suffix = name.rpartition(".")
        if suffix != "bias":
            modules.setdefault(module, {})[suffix] = entry
    return modules


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted.

    Raises:
        CheckpointError: there is none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no .safetensors file; a model folder with safetensors is required")
    return files


def read_bytes(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint takes: bytes of the files, of the listed matrices in them, and of these in memory.

    From the headers alone, of the files and of coded weights; in memory other than these are what they are in the file.

    Returns:
        ``{"file": all safetensors files, "linears": tensors of the listed matrices without biases, "memory": those
        when loaded, "dense_linears_16bit": 2·Σ out·in of them, "ratio": linears / dense_linears_16bit, "memory_ratio":
        memory / dense_linears_16bit, "multiply_adds": of a token with the listed matrices}``

    Raises:
        CheckpointError: not a Spectrim checkpoint, or a tensor of it is missing.
    """
    folder = Path(folder)
    files, config = weight_files(folder), read_config(folder)
    entries = headers(files)
    check_half(entries, config)
    modules = by_module(entries)
    linears = memory = dense = multiply_adds = 0
    for name, matrix in config.listed.items():
        found = modules.get(name, {})
        shape = check_matrix(name, matrix, {suffix: entry[:2] for suffix, entry in found.items()})
        dense += dense_bytes(*shape)
        multiply_adds += FORMATS[matrix.format].multiply_adds(*shape, matrix.rank)
        n_bytes = {suffix: CODES[entry.dtype].itemsize * prod(entry.shape) for suffix, entry in found.items()}
        linears += sum(n_bytes.values())
        if FORMATS[matrix.format].coded:
            n_bytes["weight"] = _decoded_bytes(name, found["weight"])
        memory += sum(n_bytes.values())
    size = sum(file.stat().st_size for file in files)
    ratios = {"ratio": linears / dense, "memory_ratio": memory / dense, "multiply_adds": multiply_adds}
    return {"file": size, "linears": linears, "memory": memory, "dense_linears_16bit": dense, **ratios}


def _decoded_bytes(name: str, code: Entry) -> int:
    with safe_open(code.file, framework="pt") as opened:
        head = opened.get_slice(f"{name}.weight")[:HEAD]
    try:
        return content_size(head.numpy().tobytes())
    except CheckpointError as error:
        raise CheckpointError(f"{name}.weight: {error}; build or fetch the checkpoint again") from None
