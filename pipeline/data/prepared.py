"""The model that params.yaml names -> artifacts/prepare: fetched, loaded whole, written as safetensors, tried out."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.sections import Model, Prepare
from pipeline.data.fetching import fetch
from pipeline.data.originals import load_original, original_tokenizer
from pipeline.runtime.artifacts import digest, files_sha256, read_json, write_json
from spectrim.compression.probe import probe
from spectrim.errors import ModelError
from spectrim.maths.perturbation import perturbed
from spectrim.models.linearise import matrices_of
from spectrim.models.modules import UNREACHED, WHOLE, decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_prepared(source: Model, settings: Prepare, commit: str | None, folder: Path) -> None:
    """Fetch the model that ``source`` names and write it into ``folder``, as `prepare` describes it.

    Args:
        commit: of a hub repository, in place of the revision that ``source`` names.

    Raises:
        SourceError, ModelError, StorageError: see ``fetch``, ``load_original``, ``check_vocabulary``.
    """
    import torch

    fetched = fetch(source.source, source.sha256, "model", commit)
    tokenizer = original_tokenizer(fetched.path)
    model = load_original(fetched.path, getattr(torch, settings.stored_dtype))
    check_vocabulary(model, tokenizer)
    matrices = matrices_of(model)  # raises here rather than two stages later
    if settings.perturb:
        generator = torch.Generator().manual_seed(0)
        for place in matrices.values():
            weight = place.of(model.get_parameter(place.name).data)
            weight.copy_(perturbed(weight, settings.perturb, generator))
    model.save_pretrained(folder, save_original_format=False)  # under the names that its modules have
    tokenizer.save_pretrained(folder)
    # save_pretrained notes the dtype of the file; from_pretrained computes in the one noted here
    config = read_json(folder / "config.json") | {"dtype": settings.load_dtype}
    write_json(folder / "config.json", config)
    unreached, obstacle = probe(folder)
    found = {UNREACHED: unreached, WHOLE: obstacle}
    write_json(folder / "config.json", config | {key: value for key, value in found.items() if value})
    hashes = files_sha256(folder)
    facts = {
        "source": source.source,
        "sha256": fetched.sha256,
        "revision": fetched.revision,
        "stored_dtype": settings.stored_dtype,
        "load_dtype": settings.load_dtype,
        "perturb": settings.perturb,
        "walk": "whole" if obstacle else "blocks",
        "n_parameters": model.num_parameters(),
        "n_block_parameters": sum(part.numel() for part in decoder_blocks(model)[1].parameters()),
        "files": hashes,
        # of what says what the model computes: the weights, and the configuration with its dtype
        "model_sha256": digest({n: h for n, h in hashes.items() if n == "config.json" or n.endswith(".safetensors")}),
    }
    write_json(folder / "prepare.json", facts)


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ModelError when the tokenizer knows tokens that the model has no embedding for."""
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index, arg-type]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model embeds {rows:,}; "
            "give the tokenizer that the model was trained with"
        )
