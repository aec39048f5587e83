"""The choice among several factors of the same ranks, by what the model loses with them on the validation windows."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import artifact, read_json, sha256_file, write_json
from pipeline.runtime.layers import Workers, keyed, run_layers
from pipeline.runtime.store import LayerStore
from pipeline.steps.factor_files import read_factors
from pipeline.steps.measure import HELD, VALUE, Load
from pipeline.steps.subjects import dense_subject
from spectrim.compression.refinement import attach_factors
from spectrim.evaluation.perplexity import perplexity


def validation_losses(
    candidates: Mapping[str, Sequence[Path]], device: torch.device, workers: Workers, store: LayerStore
) -> dict[str, float]:
    """Nats per token on the validation windows of the dense model with each candidate's factors in it.

    Args:
        candidates: name -> its files of factors, the same linears in each.
    """
    dense = read_json(artifact("prepare", "prepare.json"))["model_sha256"]
    tokens = read_json(artifact("calibrate", "calibrate.json"))["validation"]["tokens_sha256"]
    load = partial(dense_subject, artifact("prepare"), device)
    tasks = [
        keyed(
            "variant", name, partial(write_loss, load, files), dense, tokens, list(map(sha256_file, files)), str(device)
        )
        for name, files in candidates.items()
    ]
    entries = run_layers("update_weights: variants", tasks, workers, store, ordered=True)
    HELD.release()
    return {name: float(read_json(entries[name] / VALUE)) for name in candidates}


def write_loss(load: Load, files: Sequence[Path], folder: Path) -> None:
    """Write the loss of the model with the factors in ``files``."""
    model = HELD(load).model
    attach_factors(model, read_factors(*files))
    windows = load_windows(artifact("calibrate", "validation.parquet"))
    write_json(folder / VALUE, math.log(perplexity(model, windows)["perplexity"]))
