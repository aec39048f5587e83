"""A model in the Hugging Face layout or in a .gguf file -> the model and its tokenizer, whole or not at all.

transformers only warns about weights that a file lacks, and draws them at random: here that is an error. What a folder
holds is looked at first, in model_kinds.py and model_files.py, so that a refusal says what was found.
"""

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pipeline.data.fetching import first_line
from pipeline.data.model_files import weight_files
from pipeline.data.model_kinds import loader_of, quantization, read_config
from pipeline.runtime.artifacts import read_json, require_model
from spectrim.errors import DataError, ModelError, SourceError, StorageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# what transformers and gguf let through for files that are cut, damaged or something else, and for scales that do not
# fit their weights
UNREADABLE = (OSError, ValueError, KeyError, IndexError, RuntimeError, struct.error, SafetensorError)


def original_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or a .gguf file. Raises SourceError when there is none."""
    from transformers import AutoTokenizer

    location = _location(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location, trust_remote_code=False)
        if path.is_dir():
            _check_vocabulary_file(path, tokenizer)
        return tokenizer
    except Exception as error:  # tokenizers raises nothing more special
        if path.is_dir():
            _folder_options(path)  # where the model itself is refused, that says more
        raise SourceError(
            f"{path}: no tokenizer that transformers can read ({first_line(error)}); {_remedy(path, 'tokenizer.json')}"
        ) from error


def _check_vocabulary_file(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError without one: transformers makes a tokenizer with no words then, for some classes."""
    needed = sorted(set(tokenizer.vocab_files_names.values()))  # none: it reads bytes
    found = {
        file.name for pattern in (*needed, "tokenizer*.json", "*.model", "tekken.json") for file in folder.glob(pattern)
    }
    if needed and not found - {"tokenizer_config.json"}:
        raise ValueError(f"there is no {' or '.join(needed)}")


def load_original(path: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """The model of a folder (safetensors, or .bin files of tensors alone) or of a .gguf file, weights in ``dtype``.

    Weights in fp8 or mxfp4, and those of a .gguf file, are dequantized.

    Raises:
        SourceError: not a model that transformers can read, or not whole.
        ModelError: of a kind that is not supported, compressed by another method, weights missing from or unknown to
            the architecture, or not finite in ``dtype``.
    """
    import transformers

    options = _location(path)
    loader, more = _folder_options(path) if path.is_dir() else ("AutoModelForCausalLM", _gguf_options())
    try:
        loaded: Any = getattr(transformers, loader).from_pretrained(
            **options,
            **more,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the name
            weights_only=True,
            trust_remote_code=False,
        )
    except UNREADABLE as error:
        raise SourceError(
            f"{path}: not a model that transformers {transformers.__version__} can load ({first_line(error)}); "
            f"{_remedy(path, 'weights that fit config.json')}"
        ) from error
    model, info = loaded
    _check_complete(path, model, info)
    _check_finite(model)
    return model


def _gguf_options() -> dict[str, Any]:
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def _folder_options(folder: Path) -> tuple[str, dict[str, Any]]:
    """The auto class for the model in ``folder``, and what it is told besides; raises as ``load_original`` does."""
    from transformers import AutoConfig

    written = read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the classes of configurations check their values in ways of their own
        raise SourceError(
            f"{folder / 'config.json'}: not a configuration of {written['model_type']} "
            f"({' '.join(str(error).split())}); correct it"
        ) from error
    loader = loader_of(folder, config, written.get("architectures"))
    if plain := quantization(folder, config):
        from pipeline.data import fp8_blocks  # noqa: F401  (registers its method)

        config.quantization_config = plain
    safe = weight_files(folder)[0].suffix == ".safetensors"
    return loader, {"config": config, "use_safetensors": safe}


def _remedy(path: Path, required: str) -> str:
    """What to do about a model that transformers does not read: only what is damaged is had again."""
    from gguf import GGUFReader

    if path.is_dir():
        damaged = next((file.name for file in sorted(path.glob("*.json")) if not _is_json(file)), None)
        return f"{damaged} is damaged, get it whole" if damaged else f"give a folder with {required}"
    try:
        GGUFReader(path)
    except Exception:  # it reads the bytes as they come: anything may be raised
        return "it is not a whole GGUF file; get it whole"
    return "give a GGUF file of an architecture that it knows"


def _is_json(file: Path) -> bool:
    try:
        read_json(file)
    except StorageError:
        return False
    return True


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
        if weight.dtype.itemsize == 1:
            raise ModelError(f"{name}: stays in {weight.dtype}, its scales are not in the file; give a complete model")
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
