"""Rounded weights of every block, computed once for all ratios: `train_ranks` weighs them, `update_weights` takes them.

They lie in the layer store alone, one file per block and grid: LINEAR.values, LINEAR.scale, of an asymmetric grid
LINEAR.zero_point, and LINEAR.sigma, whose squares sum to what rounding lost. Where an alternative corrects it by
factors, LINEAR.sigma is its spectrum, and LINEAR.left and LINEAR.right are its first directions.
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
from spectrim.maths.budget import RESIDUAL, ROUNDED, Format, fills_bytes
from spectrim.maths.compensation import compensated
from spectrim.maths.lowrank import Factors, truncate
from spectrim.maths.quantization import Quantized
from spectrim.maths.storage_formats import Grid
from spectrim.models import blocks

SHARE = 4  # residual factors have at most this part of the full rank: beyond it they cost more than twice the bits


def largest_rank(shape: tuple[int, int]) -> int:
    """Of a residual."""
    return min(shape) // SHARE


def rounded_blocks(params: Params, formats: Iterable[Format], device: torch.device) -> dict[Grid, list[Path]]:
    """Grid -> the store's file of every block, for those that ``formats`` need."""
    wanted = sorted({ROUNDED[format] for format in formats if format in ROUNDED}, key=str)
    return {grid: blocks_on(params, grid, device) for grid in wanted}


def blocks_on(params: Params, grid: Grid, device: torch.device) -> list[Path]:
    """The store's file of every block, rounded to one grid."""
    corrected = grid in {ROUNDED[format] for format in params.compression.alternatives if format in RESIDUAL}
    settings = params.capture
    model = blocks.BlockModel(artifact("prepare"), device, tuple(params.compression.exclude))
    weights = read_json(artifact("prepare") / "prepare.json")["model_sha256"]
    tokens = read_tokens(artifact("capture"))
    tasks = []
    for index, block in enumerate(model.names):
        moments = [artifact("capture") / kind / f"{index:03}.safetensors" for kind in ("inputs", "gradients")]
        identity = (weights, [sha256_file(file) for file in moments], settings.damping, settings.max_damping)
        compute = partial(_write, model, index, grid, corrected, tokens, settings.damping, settings.max_damping)
        tasks.append(keyed("rounding", block, compute, list(grid), corrected, list(tokens), str(device), *identity))
    name = f"int{grid.n_bits}" + (f" in groups of {grid.group}" if grid.group else "") + " asymmetric" * grid.asymmetric
    entries = run_layers(f"rounding to {name}", tasks, params.runtime, LayerStore())
    return [entries[block] / f"{index:03}.safetensors" for index, block in enumerate(model.names)]


def _write(
    model: blocks.BlockModel,
    index: int,
    grid: Grid,
    corrected: bool,
    tokens: Tokens,
    damping: float,
    max_damping: float,
    folder: Path,
) -> None:
    captured, tensors = artifact("capture"), dict[str, Tensor]()
    for name, weight in model.weights(index).items():
        if not fills_bytes(grid, weight.shape[1]):
            continue
        gram = statistics.gram_of(captured, index, name).to(model.device) / tokens.inputs
        gradient_gram = statistics.gradient_gram_of(captured, index, name).to(model.device) / tokens.gradients
        try:
            tensors |= _rounded(name, weight, gram, gradient_gram, grid, (damping, max_damping) if corrected else None)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / f"{index:03}.safetensors")


def _rounded(
    name: str, weight: Tensor, gram: Tensor, gradient_gram: Tensor, grid: Grid, damping: tuple[float, float] | None
) -> dict[str, Tensor]:
    """What the file says of one linear; with ``damping`` what rounding lost is decomposed, else it is one number."""
    if damping is None:
        quantized = compensated(weight, gram, grid)
        loss = rounding.lost(weight, quantized, gram, gradient_gram)
        correction = {f"{name}.sigma": torch.tensor([loss], dtype=torch.float64).sqrt()}
    else:
        quantized, residual = rounding.rounded(weight, gram, gradient_gram, grid, *damping)
        factors = truncate(residual, max(1, largest_rank((weight.shape[0], weight.shape[1]))))
        correction = {
            f"{name}.sigma": residual.sigma,
            f"{name}.left": factors.left.float(),
            f"{name}.right": factors.right.float(),
        }
    zero = {} if quantized.zero_point is None else {f"{name}.zero_point": quantized.zero_point}
    return {f"{name}.values": quantized.values, f"{name}.scale": quantized.scale, **zero, **correction}


def spectra(files: Iterable[Path]) -> dict[str, Tensor]:
    """Linear -> LINEAR.sigma."""
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.endswith(".sigma")]  # noqa: SIM118 - not a mapping
            found |= {name.removesuffix(".sigma"): opened.get_tensor(name) for name in names}
    return found


def chosen(
    files: Mapping[Grid, Sequence[Path]], matrices: Mapping[str, Matrix], params: Params, store: LayerStore
) -> list[Path]:
    """One file per block with those of ``matrices`` that are rounded, their factors cut; none where none is rounded.

    Args:
        files: grid -> the file of every block.
        matrices: every linear.
    """
    if not files:
        return []
    read = {str(grid): [file.parent.name for file in of_grid] for grid, of_grid in files.items()}
    listed = {name: list(matrix) for name, matrix in matrices.items()}
    task = keyed("update_weights", "rounded weights", partial(_write_chosen, files, matrices), read, listed)
    entries = run_layers("rounded weights", [task], params.runtime, store)
    return sorted(entries["rounded weights"].glob("*.safetensors"))


def _write_chosen(files: Mapping[Grid, Sequence[Path]], matrices: Mapping[str, Matrix], folder: Path) -> None:
    for of_block in zip(*files.values(), strict=True):
        by_grid = dict(zip(files, of_block, strict=True))
        wanted = {name: matrices[name] for name in spectra(of_block) if matrices[name].format in ROUNDED}
        write_rounded(folder / of_block[0].name, {name: _cut(by_grid, name, *wanted[name]) for name in wanted})


def _cut(files: Mapping[Grid, Path], name: str, format: Format, rank: int) -> tuple[Quantized, Factors | None]:
    """A rounded weight, with the factors of its rank where its format has some."""
    grid = ROUNDED[format]
    with safe_open(files[grid], framework="pt") as opened:
        values, scale = (opened.get_tensor(f"{name}.{part}") for part in ("values", "scale"))
        zero_point = opened.get_tensor(f"{name}.zero_point") if grid.asymmetric else None
        weight = Quantized(values, scale, zero_point, grid.group_size(values.shape[1]))
        if format not in RESIDUAL:
            return weight, None
        return weight, Factors(opened.get_tensor(f"{name}.left")[:, :rank], opened.get_tensor(f"{name}.right")[:rank])
