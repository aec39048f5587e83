"""The factors of every matrix at its rank, and their refinement.

reads   artifacts/prepare, artifacts/capture, artifacts/train_ranks/ranks.json, artifacts/calibrate
writes  artifacts/update_weights: one file of factors per block, rounded/ with one file of rounded weights per block,
        refinement.csv, summary.json (errors, variants)
params  update_weights, compression.{exclude,seed}, capture.{damping,max_damping}
"""

from functools import partial
from pathlib import Path

import torch

from pipeline.config.params import Params, load
from pipeline.runtime import chain
from pipeline.runtime.artifacts import artifact, fresh_folder, read_json, require_model, sha256_file, write_json
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.runtime.layers import LayerTask, run_layers
from pipeline.runtime.store import LayerStore, code_digest, key, link_or_copy
from pipeline.steps import factor_files, refinement_run, updates, variants
from pipeline.steps import rounded_blocks as rounding
from pipeline.steps.factor_files import read_facts
from pipeline.steps.updates import Variant
from spectrim.checkpoint.layout import Matrix
from spectrim.compression import block_refinement, prefix, refinement, statistics, weight_update
from spectrim.evaluation import perplexity as evaluation
from spectrim.formats import lowrank_linear, stored_linear
from spectrim.maths import anchoring, losses, lowrank, quantization, sampling, schedule, shrinkage, subspace, whitening
from spectrim.maths.budget import FACTORED
from spectrim.models import blocks, modules

UPDATES = (
    *(updates, chain, factor_files, block_refinement, blocks, statistics, modules, prefix, weight_update),
    *(anchoring, losses, lowrank, quantization, sampling, schedule, shrinkage, subspace, whitening),
)
REFINES = (
    *(refinement_run, factor_files, refinement, blocks, statistics, modules, lowrank_linear, stored_linear, evaluation),
    *(losses, quantization, sampling, schedule),
)


def main() -> None:
    """Compute the factors of every block, choose among the variants, then refine all factors together."""
    params, store, device = load(), LayerStore(), resolve(load().runtime.device)
    settings = params.update_weights
    require_model(artifact("prepare"))
    matrices = {
        name: Matrix(matrix["format"], matrix["rank"])
        for name, matrix in read_json(artifact("train_ranks") / "ranks.json")["matrices"].items()
    }
    ranks = {name: matrix.rank for name, matrix in matrices.items() if matrix.format in FACTORED}
    rounded = rounding.rounded_blocks(params, {matrix.format for matrix in matrices.values()}, device)
    choices = [Variant(alpha, share) for alpha in settings.anchor.alpha for share in settings.shrinkage]
    made = {variant.name: _factors(params, ranks, device, store, variant) for variant in choices}
    losses, chosen = {}, choices[0].name
    if len(made) > 1 and ranks:
        losses = variants.validation_losses(artifact("prepare"), artifact("calibrate"), device, made)
        chosen = min(losses, key=lambda name: losses[name])
    files = made[chosen]
    refined = _refined(params, device, files, store) if settings.refinement.steps and ranks else None
    with fresh_folder(artifact("update_weights")) as out:
        for folder in [refined] if refined else [file.parent for file in files]:
            link_or_copy(folder, out)
        rounding.write(rounded, matrices, out / "rounded")
        if refined is None:
            refinement_run.write_curve(out / refinement_run.CURVE, [])
        write_json(
            out / "summary.json",
            {
                "method": settings.method,
                "chosen": chosen,
                "validation_loss": losses,
                **_facts(files),
                "refinement": read_json(refined / refinement_run.SUMMARY) if refined else None,
            },
        )


def _factors(
    params: Params, ranks: dict[str, int], device: torch.device, store: LayerStore, variant: Variant
) -> list[Path]:
    """The store's files of one variant's factors, one per block."""
    settings, damping = params.update_weights, (params.capture.damping, params.capture.max_damping)
    model = blocks.BlockModel(artifact("prepare"), device, tuple(params.compression.exclude))
    tasks: list[LayerTask] = []

    def stored(index: int) -> Path:
        return store.path(tasks[index].key) / f"{index:03}.safetensors"

    folders, seed = (artifact("capture"), artifact("calibrate")), params.compression.seed
    update = updates.Update(model, *folders, settings, variant, damping, seed, stored)
    code = code_digest(*UPDATES)
    for index, block in enumerate(model.names):
        wanted = {name: ranks[name] for name in model.linears[index] if name in ranks}
        upstream = [sha256_file(file) for file in update.inputs(index)]
        before = tasks[-1].key if update.behind and tasks else ""  # the blocks before it decide its inputs
        identity = (code, wanted, upstream, str(device), before, *update.identity())
        tasks.append(LayerTask(block, key("update_weights", block, *identity), partial(update.factors, index, wanted)))
    run_layers("update_weights", tasks, params.runtime, store, ordered=update.in_order)
    return [stored(index) for index in range(len(tasks))]


def _refined(params: Params, device: torch.device, files: list[Path], store: LayerStore) -> Path:
    """The store entry of the refined factors, as one more layer of the stage."""
    settings, seed = params.update_weights.refinement, params.compression.seed
    calibrate, prepared = artifact("calibrate"), artifact("prepare")
    tokens = read_json(calibrate / "calibrate.json")
    name = key(
        "update_weights",
        "refinement",
        code_digest(*REFINES),
        read_json(prepared / "prepare.json")["model_sha256"],
        [tokens[part]["tokens_sha256"] for part in ("calibration", "validation")],
        [sha256_file(file) for file in files],
        settings,
        seed,
        str(device),
    )
    run = refinement_run.Refine(prepared, calibrate, artifact("capture"), device, files, settings, seed, store, name)
    entries = run_layers("refinement", [LayerTask("refinement", name, run)], params.runtime, store, ordered=True)
    run.clear()
    return entries["refinement"]


def _facts(files: list[Path]) -> dict[str, dict[str, float]]:
    """Relative output error and damping of every linear before refinement, and the errors of refined blocks."""
    facts: dict[str, dict[str, float]] = {"relative_error": {}, "damping": {}}
    for file in files:
        for fact, values in read_facts(file).items():
            facts.setdefault(fact, {}).update(values)
    return facts


if __name__ == "__main__":
    run(main)
