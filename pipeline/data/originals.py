"""A model in the Hugging Face layout or in a .gguf file -> the model and its tokenizer, whole or not at all.

transformers only warns about weights that a file lacks, and draws them at random: here that is an error.
"""

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pipeline.config.sections import Model, Prepare
from pipeline.data.fetching import fetch, first_line
from pipeline.runtime.artifacts import digest, files_sha256, read_json, require_model, write_json
from spectrim.compression.probe import probe
from spectrim.errors import DataError, ModelError, SourceError
from spectrim.maths.perturbation import perturbed
from spectrim.models.linearise import matrices_of
from spectrim.models.modules import UNCALLED, decoder_blocks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# what transformers and gguf let through for files that are cut, damaged or something else
UNREADABLE = (OSError, ValueError, KeyError, IndexError, NotImplementedError, struct.error, SafetensorError)

def original_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or a .gguf file. Raises SourceError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**_location(path), trust_remote_code=False)
    except UNREADABLE as error:
        raise SourceError(
            f"{path}: no tokenizer that transformers can read ({first_line(error)}); get it whole"
        ) from error


def load_original(path: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """The causal language model of a folder (safetensors) or a .gguf file (dequantized), all weights in ``dtype``.

    Raises:
        SourceError: not a model that transformers can read.
        ModelError: weights missing from or unknown to the architecture, already quantized, or not finite in ``dtype``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    location: dict[str, Any] = _location(path)
    try:
        if "gguf_file" in location:
            location["quantization_config"] = GgufConfig(dequantize=True)
        elif quantized := getattr(
            AutoConfig.from_pretrained(path, trust_remote_code=False), "quantization_config", None
        ):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
            raise ModelError(f"{path}: already compressed with {method}; give the original weights")
        else:
            location["use_safetensors"] = True
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **location,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the name
            trust_remote_code=False,
        )
    except UNREADABLE as error:
        raise SourceError(
            f"{path}: not a language model that transformers can read ({first_line(error)}); get it whole"
        ) from error
    model, info = loaded
    _check_complete(path, model, info)
    _check_finite(model)
    return model


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
    uncalled = probe(folder)
    if uncalled:
        write_json(folder / "config.json", config | {UNCALLED: uncalled})
    hashes = files_sha256(folder)
    facts = {
        "source": source.source,
        "sha256": fetched.sha256,
        "revision": fetched.revision,
        "stored_dtype": settings.stored_dtype,
        "load_dtype": settings.load_dtype,
        "perturb": settings.perturb,
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


def check_context(folder: Path, seq_len: int) -> None:
    """Raise DataError when the model in ``folder`` has fewer than ``seq_len`` positions, StorageError without it."""
    from transformers import AutoConfig

    require_model(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise DataError(
            f"calibrate.seq_len: {seq_len:,} tokens per window, but the model has {positions:,} positions; "
            f"set calibrate.seq_len to at most {positions:,}"
        )


def _check_complete(path: Path, model: "PreTrainedModel", info: dict[str, Any]) -> None:
    for problem, what in (
        ("missing_keys", "missing from"),
        ("mismatched_keys", "of another shape in"),
        ("unexpected_keys", "unknown to the architecture but present in"),
    ):
        if names := sorted(map(str, info.get(problem) or ())):
            raise ModelError(
                f"{path}: {len(names)} weights of {type(model).__name__} are {what} the file, first {names[0]}; "
                "give a complete model of one architecture"
            )


def _check_finite(model: "PreTrainedModel") -> None:
    import torch

    for name, weight in model.named_parameters():
        finite = torch.isfinite(weight)
        if not finite.all():
            bad = weight.numel() - int(finite.sum())
            raise ModelError(
                f"{name}: {bad:,} of {weight.numel():,} weights are not finite in {weight.dtype}; "
                "use prepare.stored_dtype: bfloat16, or repair the model"
            )


def _location(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    raise SourceError(f"{path}: a model is a folder in the Hugging Face layout or a .gguf file")
