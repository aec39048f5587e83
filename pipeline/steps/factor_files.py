"""The files between `update_weights` and `remap`: one per block, LINEAR.left and LINEAR.right in float32.

Those of rounded weights, in a folder of their own, hold LINEAR.values int8 and LINEAR.scale float16 besides, and
LINEAR.zero_point float32 and factors only where the format has some. Of coded weights they hold what ``coding.split``
makes of the integers, values, places and beyond, and LINEAR.rows and LINEAR.columns in float16.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectrim.formats.coding import Integers, split, whole
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import Quantized
from spectrim.maths.residual import RoundedWeight
from spectrim.maths.two_sided_rounding import Stepped

ROUNDED_FOLDER = "rounded"
"""The folder of rounded weights."""

VECTORS = "vectors.safetensors"
"""Norms and biases as refined, by their names in the model; not there where they stay."""


def read_factors(*files: Path) -> dict[str, Factors]:
    """Linear name -> its factors, of one block or of several."""
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {name: Factors(tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}


def write_factors(file: Path, factors: Mapping[str, Factors], facts: Mapping[str, Any] | None = None) -> None:
    """Write them, and what is to be said about them."""
    sides = {f"{name}.{side}": tensor for name, pair in factors.items() for side, tensor in pair._asdict().items()}
    _save({name: side.float().cpu().contiguous() for name, side in sides.items()}, file, facts)


def read_facts(file: Path) -> dict[str, Any]:
    """What was said about what is in ``file``."""
    with safe_open(file, framework="pt") as handle:
        return json.loads(handle.metadata()["facts"])


def write_rounded(file: Path, rounded: Mapping[str, RoundedWeight], facts: Mapping[str, Any] | None = None) -> None:
    """Write rounded weights, the factors of what rounding lost, and what is to be said about them."""
    tensors: dict[str, Tensor] = {}
    for name, (weight, factors) in rounded.items():
        sides = {} if factors is None else factors._asdict()
        if isinstance(weight, Stepped):
            parts = {**split(weight.values)._asdict(), "rows": weight.rows, "columns": weight.columns}
        else:
            zero = {} if weight.zero_point is None else {"zero_point": weight.zero_point}
            parts = {"values": weight.values, "scale": weight.scale, **zero, **sides}
        tensors |= {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
    _save(tensors, file, facts)


def read_rounded(file: Path) -> dict[str, RoundedWeight]:
    """Linear name -> its rounded weight and its factors, or None."""
    tensors, found = load_file(file), dict[str, RoundedWeight]()
    for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        values = tensors[f"{name}.values"]
        if f"{name}.rows" in tensors:
            numbers = whole(Integers(values, tensors[f"{name}.places"], tensors[f"{name}.beyond"]))
            found[name] = (Stepped(numbers, tensors[f"{name}.rows"], tensors[f"{name}.columns"]), None)
            continue
        scale, zero_point = tensors[f"{name}.scale"], tensors.get(f"{name}.zero_point")
        factors = Factors(tensors[f"{name}.left"], tensors[f"{name}.right"]) if f"{name}.left" in tensors else None
        found[name] = (Quantized(values, scale, zero_point, values.shape[1] // scale.shape[1]), factors)
    return found


def _save(tensors: Mapping[str, Tensor], file: Path, facts: Mapping[str, Any] | None) -> None:
    # one key: safetensors writes several in a random order, and equal layers are to be equal bytes
    metadata = None if facts is None else {"facts": json.dumps(facts, sort_keys=True)}
    save_file(dict(tensors), file, metadata=metadata)
