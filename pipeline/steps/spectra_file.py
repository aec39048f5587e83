"""artifacts/capture/spectra.safetensors: σ of every matrix in both metrics, and the numbers of tokens behind them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

NAME = "spectra.safetensors"


class Tokens(NamedTuple):
    """How many the input Grams and the gradient Grams are summed over."""

    inputs: int
    gradients: int


def write_spectra(captured: Path, spectra: Mapping[str, Tensor], tokens: Tokens) -> None:
    """Write ``two_sided.LINEAR`` and ``input.LINEAR`` of every linear, (min(out, in),) float64."""
    # one key: safetensors writes several in a random order, and equal captures are to be equal bytes
    save_file(dict(spectra), captured / NAME, metadata={"n_tokens": json.dumps(tokens)})


def read_tokens(captured: Path) -> Tokens:
    """The token counts of a capture."""
    with safe_open(captured / NAME, framework="pt") as opened:
        return Tokens(*json.loads(opened.metadata()["n_tokens"]))
