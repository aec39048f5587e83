"""The choice among several factors of the same ranks, by what the model loses with them on the validation windows."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline.data.texts import load_windows
from pipeline.runtime.progress import progress
from pipeline.steps.factor_files import read_factors
from pipeline.steps.measure import load_model
from spectrim.compression.refinement import attach
from spectrim.evaluation.perplexity import perplexity


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
