"""The choice among several factors of the same ranks, by what the model loses with them on the validation windows."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline.console import progress
from pipeline.factor_files import read_factors
from pipeline.measure import load_model
from pipeline.texts import load_windows
from spectrim.evaluation import perplexity
from spectrim.refinement import attach


def validation_losses(
    prepared: Path, calibrate: Path, device: torch.device, candidates: Mapping[str, Sequence[Path]]
) -> dict[str, float]:
    """Nats per token on the validation windows of the dense model with each candidate's factors in it.

    Args:
        prepared, calibrate: folders of the dense model and of the windows.
        candidates: name -> its files of factors, the same linears in each.
    """
    model, windows = load_model(prepared, device), load_windows(calibrate / "validation.parquet")
    losses = {}
    for name, files in progress(candidates.items(), "update_weights: variants", len(candidates)):
        attach(model, read_factors(*files))
        losses[name] = math.log(perplexity(model, windows)["perplexity"])
    return losses
