"""The model and its tokenizer as a Hugging Face folder of safetensors.

reads   model.source, artifacts/sources/model.json
writes  artifacts/prepare: config.json, model.safetensors, tokenizer and generation files, prepare.json
params  model, prepare
"""

from functools import partial

from pipeline.config.params import load
from pipeline.data.prepared import write_prepared
from pipeline.runtime.artifacts import artifact, fresh_folder, read_json
from pipeline.runtime.console import run
from pipeline.runtime.layers import keyed, run_layers
from pipeline.runtime.store import LayerStore, link_or_copy


def main() -> None:
    """Fetch the model and store it as safetensors."""
    params, store = load(), LayerStore()
    identity = read_json(artifact("sources", "model.json"))
    compute = partial(write_prepared, params.model, params.prepare, identity.get("commit"))
    task = keyed("prepare", "model", compute, params.model, params.prepare, identity)
    entries = run_layers("prepare", [task], params.runtime, store, ordered=True)
    with fresh_folder(artifact("prepare")) as out:
        link_or_copy(entries["model"], out)


if __name__ == "__main__":
    run(main)
