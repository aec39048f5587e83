"""The model and its tokenizer as a Hugging Face folder of safetensors.

reads   model.source
writes  artifacts/prepare: config.json, model.safetensors, tokenizer and generation files, prepare.json
params  model, prepare
"""

import torch

from pipeline.config.params import load
from pipeline.data.fetching import fetch
from pipeline.data.originals import check_vocabulary, load_model, load_tokenizer
from pipeline.runtime.artifacts import artifact, digest, fresh_folder, read_json, sha256_file, write_json
from pipeline.runtime.console import run
from spectrim.models.modules import compressible_linears


def main() -> None:
    """Fetch the model and store it as safetensors."""
    params = load()
    source = fetch(params.model.source, params.model.sha256, "model")
    tokenizer = load_tokenizer(source.path)
    model = load_model(source.path, getattr(torch, params.prepare.stored_dtype))
    check_vocabulary(model, tokenizer)
    compressible_linears(model)  # raises now rather than two stages later

    with fresh_folder(artifact("prepare")) as out:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        # save_pretrained notes the dtype of the file; from_pretrained computes in the one noted here
        write_json(out / "config.json", read_json(out / "config.json") | {"dtype": params.prepare.load_dtype})
        hashes = {file.name: sha256_file(file) for file in sorted(out.iterdir())}
        weights = {name: value for name, value in hashes.items() if name.endswith(".safetensors")}
        write_json(
            out / "prepare.json",
            {
                "source": params.model.source,
                "sha256": source.sha256,
                "revision": source.revision,
                "stored_dtype": params.prepare.stored_dtype,
                "load_dtype": params.prepare.load_dtype,
                "n_parameters": model.num_parameters(),
                "files": hashes,
                "model_sha256": digest(weights),
            },
        )


if __name__ == "__main__":
    run(main)
