"""What int8 factors lose by rounding, linear by linear, computed once for all ratios: `train_ranks` weighs it.

It lies in the layer store alone, one file per block and format, with one number per linear. Measured at half the full
rank and taken for every rank: between 0.4 and 0.8 of the full rank it moved by less than three times, where what the
rank itself drops fell by 8 to 6,000.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.config.params import Params
from pipeline.runtime.artifacts import artifact, sha256_file
from pipeline.runtime.layers import keyed, run_layers
from pipeline.runtime.store import LayerStore
from pipeline.steps.spectra_file import Tokens, read_tokens
from spectrim.compression import statistics, storage_loss
from spectrim.errors import NumericalError
from spectrim.maths.budget import INT8_FACTORS, Format
from spectrim.maths.lowrank import Factors

SHARE = 2  # the full rank over the rank it is measured at


def storage_losses(params: Params, formats: Iterable[Format], device: torch.device) -> dict[Format, dict[str, float]]:
    """Format -> linear -> its loss by rounding, for those of ``formats`` that have int8 factors."""
    return {format: _losses(params, format, device) for format in dict.fromkeys(formats) if format in INT8_FACTORS}


def _losses(params: Params, format: Format, device: torch.device) -> dict[str, float]:
    tokens = read_tokens(artifact("capture"))
    tasks = []
    for index, file in enumerate(sorted((artifact("capture") / "factors").glob("*.safetensors"))):
        files = [artifact("capture") / kind / file.name for kind in ("inputs", "gradients", "factors")]
        identity = ([sha256_file(part) for part in files], list(tokens), str(device))
        compute = partial(_write, index, format, tokens, device)
        tasks.append(keyed("storage loss", f"block {file.stem}", compute, format, *identity))
    entries = run_layers(f"rounding to {format}", tasks, params.runtime, LayerStore())
    found: dict[str, float] = {}
    for folder in entries.values():
        found |= {name: float(loss) for name, loss in load_file(folder / "losses.safetensors").items()}
    return found


def _write(index: int, format: Format, tokens: Tokens, device: torch.device, folder: Path) -> None:
    captured, file = artifact("capture"), f"{index:03}.safetensors"
    stored = load_file(captured / "factors" / file, device=str(device))
    losses = {}
    for name in statistics.inputs_of(captured / "inputs" / file):
        rank = max(1, stored[f"left.{name}"].shape[1] // SHARE)
        factors = Factors(stored[f"left.{name}"][:, :rank], stored[f"right.{name}"][:rank])
        gram = statistics.gram_of(captured, index, name).to(device) / tokens.inputs
        gradient_gram = statistics.gradient_gram_of(captured, index, name).to(device) / tokens.gradients
        try:
            loss = storage_loss.storage_loss(factors, format, gram, gradient_gram)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None
        losses[name] = torch.tensor([loss], dtype=torch.float64)
    save_file(losses, folder / "losses.safetensors")
