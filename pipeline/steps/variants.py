"""The choice among several weights of the same size, by what the model loses with them on the validation windows."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import artifact, read_json, sha256_file, write_json
from pipeline.runtime.layers import Workers, keyed, run_layers
from pipeline.runtime.store import LayerStore
from pipeline.steps.factor_files import read_factors, read_rounded
from pipeline.steps.measure import HELD, VALUE, Load
from pipeline.steps.subjects import dense_subject
from spectrim.compression.refinement import attach_factors, attach_rounded
from spectrim.evaluation.perplexity import perplexity

Attach = Callable[[nn.Module, Sequence[Path]], None]


def with_factors(model: nn.Module, files: Sequence[Path]) -> None:
    """Put the factors in ``files`` into ``model``."""
    attach_factors(model, read_factors(*files))


def with_rounded(model: nn.Module, files: Sequence[Path]) -> None:
    """Put the rounded weights in ``files`` into ``model``."""
    for file in files:
        attach_rounded(model, read_rounded(file))


def validation_losses(
    stage: str,
    attach: Attach,
    candidates: Mapping[str, Sequence[Path]],
    device: torch.device,
    workers: Workers,
    store: LayerStore,
) -> dict[str, float]:
    """Nats per token on the validation windows of the dense model with each candidate's weights in it.

    Args:
        attach: puts the weights in files into a model.
        candidates: name -> its files, the same linears in each.
    """
    dense = read_json(artifact("prepare", "prepare.json"))["model_sha256"]
    tokens = read_json(artifact("calibrate", "calibrate.json"))["validation"]["tokens_sha256"]
    write = partial(write_loss, partial(dense_subject, artifact("prepare"), device), attach)
    tasks = [
        keyed("variant", name, partial(write, files), dense, tokens, list(map(sha256_file, files)), str(device))
        for name, files in candidates.items()
    ]
    entries = run_layers(f"{stage}: variants", tasks, workers, store, ordered=True)
    HELD.release()
    return {name: float(read_json(entries[name] / VALUE)) for name in candidates}


def write_loss(load: Load, attach: Attach, files: Sequence[Path], folder: Path) -> None:
    """Write the loss of the model with the weights in ``files``."""
    model = HELD(load).model
    attach(model, files)
    windows = load_windows(artifact("calibrate", "validation.parquet"))
    write_json(folder / VALUE, math.log(perplexity(model, windows)["perplexity"]))
