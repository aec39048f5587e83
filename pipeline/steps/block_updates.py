"""The factors of every block, one variant at a time, as layers of `update_weights`."""

from functools import partial
from pathlib import Path

import torch

from pipeline.config.params import Params
from pipeline.runtime.artifacts import artifact, sha256_file
from pipeline.runtime.layers import LayerTask, keyed, run_layers
from pipeline.runtime.store import LayerStore
from pipeline.steps.factor_files import read_facts
from pipeline.steps.updates import Update, Variant
from spectrim.models.blocks import BlockModel


def updated_blocks(
    params: Params, ranks: dict[str, int], device: torch.device, store: LayerStore, variant: Variant
) -> list[Path]:
    """The store's files of one variant's factors, one per block."""
    settings, damping = params.update_weights, (params.capture.damping, params.capture.max_damping)
    model = BlockModel(artifact("prepare"), device, tuple(params.compression.exclude))
    written: list[Path] = []
    folders, seed = (artifact("capture"), artifact("calibrate")), params.compression.seed
    update = Update(model, *folders, settings, variant, damping, seed, written.__getitem__)
    tasks: list[LayerTask] = []
    for index, block in enumerate(model.names):
        wanted = {name: ranks[name] for name in model.linears[index] if name in ranks}
        upstream = [sha256_file(file) for file in update.inputs(index)]
        before = tasks[-1].key if update.behind and tasks else ""  # the blocks before it decide its inputs
        compute = partial(update.factors, index, wanted)
        tasks.append(keyed("update_weights", block, compute, wanted, upstream, str(device), before, *update.identity()))
        written.append(store.path(tasks[-1].key) / f"{index:03}.safetensors")
    run_layers("update_weights", tasks, params.runtime, store, ordered=update.in_order)
    return written


def facts_of(files: list[Path]) -> dict[str, dict[str, float]]:
    """Relative output error and damping of every linear before refinement, and the errors of refined blocks."""
    facts: dict[str, dict[str, float]] = {"relative_error": {}, "damping": {}}
    for file in files:
        for fact, values in read_facts(file).items():
            facts.setdefault(fact, {}).update(values)
    return facts
