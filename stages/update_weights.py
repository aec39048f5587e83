"""The factors of every matrix at its rank, rounded weights, and the refinement of all.

reads   artifacts/prepare, artifacts/capture, artifacts/train_ranks/ranks.json, artifacts/calibrate
writes  artifacts/update_weights: one file of factors per block, rounded/ with one file of rounded weights per block,
        vectors.safetensors where norms and biases were refined, refinement.csv, summary.json (errors, variants)
params  update_weights, compression.{exclude,seed}, capture.{damping,max_damping}
"""

from pathlib import Path

import torch

from pipeline.config.params import Params, load
from pipeline.runtime.artifacts import artifact, fresh_folder, read_json, require_model, write_json
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.runtime.layers import run_layers
from pipeline.runtime.store import LayerStore, link_or_copy
from pipeline.steps import refinement_run, rounded_blocks, variants
from pipeline.steps.block_updates import facts_of, updated_blocks
from pipeline.steps.coded_blocks import CodedBlocks
from pipeline.steps.factor_files import ROUNDED_FOLDER
from pipeline.steps.updates import variants_of
from spectrim.checkpoint.layout import Matrix
from spectrim.maths.budget import FACTORED


def main() -> None:
    """Compute the factors of every block, choose among the variants, then refine all that is stored together."""
    params, store, device = load(), LayerStore(), resolve(load().runtime.device)
    settings = params.update_weights
    require_model(artifact("prepare"))
    chosen_ranks = read_json(artifact("train_ranks") / "ranks.json")
    matrices = {name: Matrix(matrix["format"], matrix["rank"]) for name, matrix in chosen_ranks["matrices"].items()}
    ranks = {name: matrix.rank for name, matrix in matrices.items() if matrix.format in FACTORED}
    rounded = rounded_blocks.rounded_blocks(params, {matrix.format for matrix in matrices.values()}, device)
    choices = variants_of(settings)
    made = {variant.name: updated_blocks(params, ranks, device, store, variant) for variant in choices}
    losses, chosen = {}, choices[0].name
    if len(made) > 1 and ranks:
        losses = variants.validation_losses(
            "update_weights", variants.with_factors, made, device, params.runtime, store
        )
        chosen = min(losses, key=lambda name: losses[name])
    files, kept = made[chosen], rounded_blocks.chosen(rounded, matrices, params, store)
    if coded := chosen_ranks["coded"]:
        kept = CodedBlocks(params, device, coded["row_damping"]).files(coded["steps"])
    refined = _refined(params, device, files, kept, store) if settings.refinement.steps and (ranks or kept) else None
    with fresh_folder(artifact("update_weights")) as out:
        if refined:
            link_or_copy(refined, out)
        else:
            for folder in [file.parent for file in files]:
                link_or_copy(folder, out)
            for folder in {file.parent for file in kept}:
                link_or_copy(folder, out / ROUNDED_FOLDER)
            refinement_run.write_curve(out / refinement_run.CURVE, [])
        write_json(
            out / "summary.json",
            {
                "method": settings.method,
                "chosen": chosen,
                "validation_loss": losses,
                **facts_of(files),
                "refinement": read_json(refined / refinement_run.SUMMARY) if refined else None,
            },
        )


def _refined(params: Params, device: torch.device, files: list[Path], rounded: list[Path], store: LayerStore) -> Path:
    """The store entry of what was refined, as one more layer of the stage."""
    folders = (artifact("prepare"), artifact("calibrate"), artifact("capture"))
    settings, seed = params.update_weights.refinement, params.compression.seed
    refinement = refinement_run.RefinementRun(*folders, device, files, rounded, settings, seed, store)
    entries = run_layers("refinement", [refinement.task()], params.runtime, store, ordered=True)
    refinement.clear()
    return entries["refinement"]


if __name__ == "__main__":
    run(main)
