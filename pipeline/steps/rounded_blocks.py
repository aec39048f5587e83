"""Rounded weights of every block, computed once for all ratios: `train_ranks` weighs them, `update_weights` takes them.

They lie in the layer store alone, one file per block and number of bits: LINEAR.values, LINEAR.scale, LINEAR.sigma (the
spectrum of what rounding lost) and, for the first directions of it, LINEAR.left and LINEAR.right.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config.params import Params
from pipeline.runtime.artifacts import artifact, read_json, sha256_file
from pipeline.runtime.layers import keyed, run_layers
from pipeline.runtime.store import LayerStore
from pipeline.steps.factor_files import write_rounded
from pipeline.steps.spectra_file import Tokens, read_tokens
from spectrim.checkpoint.layout import Matrix
from spectrim.compression import statistics
from spectrim.errors import NumericalError
from spectrim.maths import residual as rounding
from spectrim.maths.budget import RESIDUAL, ROUNDED, Format
from spectrim.maths.lowrank import Factors, truncate
from spectrim.maths.quantization import Quantized
from spectrim.maths.storage_formats import group_size
from spectrim.models import blocks

SHARE = 4  # residual factors have at most this part of the full rank: beyond it they cost more than twice the bits


def largest_rank(shape: tuple[int, int]) -> int:
    """Of a residual."""
    return min(shape) // SHARE


def rounded_blocks(params: Params, formats: Iterable[Format], device: torch.device) -> dict[int, list[Path]]:
    """Number of bits -> the store's file of every block, for those that ``formats`` need."""
    found: dict[int, list[Path]] = {}
    for n_bits in sorted({ROUNDED[format] for format in formats if format in ROUNDED}):
        found[n_bits] = _blocks(params, n_bits, device)
    return found


def _blocks(params: Params, n_bits: int, device: torch.device) -> list[Path]:
    settings = params.capture
    model = blocks.BlockModel(artifact("prepare"), device, tuple(params.compression.exclude))
    weights = read_json(artifact("prepare") / "prepare.json")["model_sha256"]
    tokens = read_tokens(artifact("capture"))
    tasks = []
    for index, block in enumerate(model.names):
        moments = [artifact("capture") / kind / f"{index:03}.safetensors" for kind in ("inputs", "gradients")]
        identity = (weights, [sha256_file(file) for file in moments], settings.damping, settings.max_damping)
        compute = partial(_write, model, index, n_bits, tokens, settings.damping, settings.max_damping)
        tasks.append(keyed("rounding", block, compute, n_bits, list(tokens), str(device), *identity))
    entries = run_layers(f"rounding to int{n_bits}", tasks, params.runtime, LayerStore())
    return [entries[block] / f"{index:03}.safetensors" for index, block in enumerate(model.names)]


def _write(
    model: blocks.BlockModel,
    index: int,
    n_bits: int,
    tokens: Tokens,
    damping: float,
    max_damping: float,
    folder: Path,
) -> None:
    captured, tensors = artifact("capture"), dict[str, Tensor]()
    for name, weight in model.weights(index).items():
        if weight.shape[1] % 2:
            continue  # no int4 of an odd number of inputs
        gram = statistics.gram_of(captured, index, name).to(model.device) / tokens.inputs
        gradient_gram = statistics.gradient_gram_of(captured, index, name).to(model.device) / tokens.gradients
        try:
            quantized, residual = rounding.rounded(weight, gram, gradient_gram, n_bits, damping, max_damping)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None
        factors = truncate(residual, max(1, largest_rank((weight.shape[0], weight.shape[1]))))
        tensors |= {
            f"{name}.values": quantized.values,
            f"{name}.scale": quantized.scale,
            f"{name}.sigma": residual.sigma,
            f"{name}.left": factors.left.float(),
            f"{name}.right": factors.right.float(),
        }
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / f"{index:03}.safetensors")


def spectra(files: Iterable[Path]) -> dict[str, Tensor]:
    """Linear -> the spectrum of what rounding lost."""
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.endswith(".sigma")]  # noqa: SIM118 - not a mapping
            found |= {name.removesuffix(".sigma"): opened.get_tensor(name) for name in names}
    return found


def write(files: Mapping[int, Sequence[Path]], matrices: Mapping[str, Matrix], folder: Path) -> None:
    """Write into ``folder`` one file per block with those of ``matrices`` that are rounded, their factors cut.

    Args:
        files: number of bits -> the file of every block.
        matrices: every linear; ``folder`` is not made where none is rounded.
    """
    for of_block in zip(*files.values(), strict=True):
        by_bits = dict(zip(files, of_block, strict=True))
        wanted = {name: matrices[name] for name in spectra(of_block) if matrices[name].format in ROUNDED}
        folder.mkdir(exist_ok=True)
        write_rounded(folder / of_block[0].name, {name: _cut(by_bits, name, *wanted[name]) for name in wanted})


def _cut(files: Mapping[int, Path], name: str, format: Format, rank: int) -> tuple[Quantized, Factors | None]:
    """A rounded weight, with the factors of its rank where its format has some."""
    with safe_open(files[ROUNDED[format]], framework="pt") as opened:
        values, scale = (opened.get_tensor(f"{name}.{part}") for part in ("values", "scale"))
        weight = Quantized(values, scale, None, group_size(ROUNDED[format], values.shape[1]))
        if format not in RESIDUAL:
            return weight, None
        return weight, Factors(opened.get_tensor(f"{name}.left")[:, :rank], opened.get_tensor(f"{name}.right")[:rank])
