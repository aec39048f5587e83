"""The files between `update_weights` and `remap`: one per block, LINEAR.left and LINEAR.right in float32.

Those of rounded weights, in a folder of their own, hold LINEAR.values int8 and LINEAR.scale float16 besides, and
factors only where the format has some.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import Quantized

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
    # one key: safetensors writes several in a random order, and equal layers are to be equal bytes
    metadata = None if facts is None else {"facts": json.dumps(facts, sort_keys=True)}
    save_file({name: side.float().cpu().contiguous() for name, side in sides.items()}, file, metadata=metadata)


def read_facts(file: Path) -> dict[str, Any]:
    """What was said about the factors in ``file``."""
    with safe_open(file, framework="pt") as handle:
        return json.loads(handle.metadata()["facts"])


def write_rounded(file: Path, rounded: Mapping[str, tuple[Quantized, Factors | None]]) -> None:
    """Write rounded weights, and the factors of what rounding lost."""
    tensors: dict[str, Tensor] = {}
    for name, (weight, factors) in rounded.items():
        sides = {} if factors is None else factors._asdict()
        parts = {"values": weight.values, "scale": weight.scale, **sides}
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, file)


def read_rounded(file: Path) -> dict[str, tuple[Quantized, Factors | None]]:
    """Linear name -> its rounded weight and its factors, or None."""
    tensors = load_file(file)
    found = {}
    for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        values, scale = tensors[f"{name}.values"], tensors[f"{name}.scale"]
        factors = Factors(tensors[f"{name}.left"], tensors[f"{name}.right"]) if f"{name}.left" in tensors else None
        found[name] = (Quantized(values, scale, None, values.shape[1] // scale.shape[1]), factors)
    return found
