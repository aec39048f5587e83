"""The compressed checkpoint: factors in their storage format, everything else as in the dense model.

reads   artifacts/prepare, artifacts/capture, artifacts/train_ranks/ranks.json, artifacts/update_weights
writes  artifacts/remap: a Hugging Face folder, see spectrim/checkpoint/layout.py
params  remap
"""

from functools import partial

from safetensors.torch import load_file

from pipeline.config.params import load
from pipeline.runtime.artifacts import artifact, fresh_folder, provenance, read_json, require_model, sha256_file
from pipeline.runtime.console import run
from pipeline.runtime.layers import keyed, run_layers
from pipeline.runtime.store import LayerStore
from pipeline.steps import packed_blocks as packing
from pipeline.steps.factor_files import ROUNDED_FOLDER, VECTORS
from spectrim.checkpoint import saving
from spectrim.compression import statistics
from spectrim.maths import budget


def main() -> None:
    """Pack the factors of every block and write the checkpoint."""
    params, dense = load(), artifact("prepare")
    require_model(dense)
    ranks_file = artifact("train_ranks", "ranks.json")
    ranks = read_json(ranks_file)
    format = None if params.remap.format == "same" else params.remap.format
    captured = artifact("capture")
    matrices = {name: packing.choose(entry, format) for name, entry in ranks["matrices"].items()}
    packing.require_within(matrices, ranks, format)
    listed = {name: list(matrix) for name, matrix in matrices.items()}
    updated = artifact("update_weights")
    blocks = {file.stem: [file] for file in sorted(updated.glob("[0-9]*.safetensors"))}
    for file in (updated / ROUNDED_FOLDER).glob("*.safetensors"):
        blocks[file.stem].append(file)
    factors = {block: [sha256_file(file) for file in files] for block, files in blocks.items()}
    rounds = any(matrix.format in budget.INT8_FACTORS for matrix in matrices.values())
    read = {block: sha256_file(captured / "inputs" / f"{block}.safetensors") if rounds else None for block in blocks}
    tasks = [
        keyed(
            "remap",
            f"block {block}",
            partial(packing.pack_block, files, partial(statistics.gram_of, captured, int(block)), matrices),
            *(factors[block], read[block], listed),
        )
        for block, files in blocks.items()
    ]
    entries = run_layers("remap", tasks, params.runtime, LayerStore())
    refined = updated / VECTORS
    vectors = sha256_file(refined) if refined.exists() else None
    facts = {
        "model": read_json(dense / "prepare.json"),
        "inputs_sha256": {"ranks.json": sha256_file(ranks_file), "factors": factors, "vectors": vectors},
        "ranks": {name: value for name, value in ranks.items() if name != "matrices"},
        "versions": provenance()["versions"],  # not the commit: equal inputs are to give equal bytes
    }
    with fresh_folder(artifact("remap")) as out:
        packed = packing.load_packed(entries.values())
        saving.assemble(
            dense, out, packed, matrices, ratio_target=ranks["ratio"], provenance=facts,
            max_shard_size=params.remap.max_shard_size, skip=("prepare.json",),
            refined=load_file(refined) if vectors else None,
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
