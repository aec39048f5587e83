"""The factors of every matrix at its rank.

reads   artifacts/prepare, artifacts/capture, artifacts/train_ranks/ranks.json, artifacts/calibrate (ipca)
writes  artifacts/update_weights: one file of factors per block, summary.json
params  update_weights, compression.exclude
"""

import json
from functools import partial

from safetensors import safe_open

from pipeline import updates
from pipeline.artifacts import artifact, fresh_folder, read_json, sha256_file, write_json
from pipeline.console import run
from pipeline.devices import resolve
from pipeline.layers import LayerTask, run_layers
from pipeline.params import load
from pipeline.store import LayerStore, code_digest, key, link_or_copy
from pipeline.texts import load_windows
from spectrim import blocks, modules, weight_update
from spectrim.maths import lowrank, subspace


def main() -> None:
    """Compute the factors of every block."""
    params, store = load(), LayerStore()
    settings = params.update_weights
    model = blocks.BlockModel(artifact("prepare"), resolve(params.runtime.device), tuple(params.compression.exclude))
    windows = load_windows(artifact("calibrate") / "calibration.parquet")[: settings.ipca_windows]
    ranks = {
        name: matrix["rank"]
        for name, matrix in read_json(artifact("train_ranks") / "ranks.json")["matrices"].items()
        if matrix["format"] != "dense"
    }
    update = updates.Update(model, artifact("capture"), windows, settings)
    code = code_digest(updates, blocks, modules, weight_update, lowrank, subspace)
    tasks = []
    for index, block in enumerate(model.names):
        wanted = {name: ranks[name] for name in model.linears[index] if name in ranks}
        upstream = [sha256_file(file) for file in update.inputs(index)]
        identity = (code, wanted, upstream, str(model.device), *update.identity())
        tasks.append(LayerTask(block, key("update_weights", block, *identity), partial(update.factors, index, wanted)))
    entries = run_layers("update_weights", tasks, params.runtime, store, ordered=settings.method == "ipca")
    with fresh_folder(artifact("update_weights")) as out:
        errors: dict[str, float] = {}
        for index, block in enumerate(model.names):
            link_or_copy(entries[block], out)
            with safe_open(out / f"{index:03}.safetensors", framework="pt") as file:
                errors |= json.loads(file.metadata()["relative_error"])
        write_json(out / "summary.json", {"method": settings.method, "relative_error": errors})


if __name__ == "__main__":
    run(main)
