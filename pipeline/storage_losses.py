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

from pipeline.artifacts import artifact, sha256_file
from pipeline.layers import LayerTask, run_layers
from pipeline.params import Params
from pipeline.spectra_file import Tokens, read_tokens
from pipeline.store import LayerStore, code_digest, key
from spectrim import capture, lowrank_linear, saving, storage_loss
from spectrim.maths import compensation, factor_rounding, pivoting, quantization
from spectrim.maths.budget import INT8_FACTORS, Format
from spectrim.maths.lowrank import Factors

SHARE = 2  # the full rank over the rank it is measured at


def storage_losses(params: Params, formats: Iterable[Format], device: torch.device) -> dict[Format, dict[str, float]]:
    """Format -> linear -> its loss by rounding, for those of ``formats`` that have int8 factors."""
    return {format: _losses(params, format, device) for format in dict.fromkeys(formats) if format in INT8_FACTORS}


def _losses(params: Params, format: Format, device: torch.device) -> dict[str, float]:
    code = code_digest(
        capture, lowrank_linear, saving, storage_loss, compensation, factor_rounding, pivoting, quantization
    )
    tokens = read_tokens(artifact("capture"))
    tasks = []
    for index, file in enumerate(sorted((artifact("capture") / "factors").glob("*.safetensors"))):
        files = [artifact("capture") / kind / file.name for kind in ("inputs", "gradients", "factors")]
        name = key("storage loss", format, list(tokens), str(device), code, [sha256_file(part) for part in files])
        tasks.append(LayerTask(file.stem, name, partial(_write, index, format, tokens, device)))
    entries = run_layers(f"rounding to {format}", tasks, params.runtime, LayerStore())
    found: dict[str, float] = {}
    for folder in entries.values():
        found |= {name: float(loss) for name, loss in load_file(folder / "losses.safetensors").items()}
    return found


def _write(index: int, format: Format, tokens: Tokens, device: torch.device, folder: Path) -> None:
    captured = artifact("capture")
    stored = load_file(captured / "factors" / f"{index:03}.safetensors", device=str(device))
    losses = {}
    for name in [name.removeprefix("left.") for name in stored if name.startswith("left.")]:
        rank = max(1, stored[f"left.{name}"].shape[1] // SHARE)
        factors = Factors(stored[f"left.{name}"][:, :rank], stored[f"right.{name}"][:rank])
        gram = capture.gram_of(captured, index, name).to(device) / tokens.inputs
        gradient_gram = capture.gradient_gram_of(captured, index, name).to(device) / tokens.gradients
        loss = storage_loss.storage_loss(factors, format, gram, gradient_gram)
        losses[name] = torch.tensor([loss], dtype=torch.float64)
    save_file(losses, folder / "losses.safetensors")
