"""What the model in a folder is, by its config.json, and what loads it; everything else is refused by its name.

``KINDS`` is the one place that says what is supported.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime.artifacts import read_json
from spectrim.errors import ModelError, SourceError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# quantization that transformers takes back at loading -> the method that it does so by
DEQUANTIZED = {"fp8": "fp8_blocks", "mxfp4": "mxfp4"}


@dataclass(frozen=True)
class Kind:
    """Models of one kind: what they are called, and where transformers lists their classes."""

    name: str
    tables: tuple[str, ...]
    """MODEL_FOR_…_MAPPING_NAMES of transformers' auto classes"""
    loader: str | None = None
    """the auto class that loads them; None: not supported"""


# The first that lists a class has it: transformers counts some that take images among the causal ones.
KINDS = (
    Kind("a model of text with images or sound", ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")),
    Kind("a decoder-only language model", ("CAUSAL_LM",), "AutoModelForCausalLM"),
    Kind("a speech model", ("SPEECH_SEQ_2_SEQ", "CTC", "RNNT", "TDT", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM")),
    Kind("an encoder-decoder", ("SEQ_TO_SEQ_CAUSAL_LM",)),
    Kind("a masked language model", ("MASKED_LM", "PRETRAINING")),
    Kind("a classifier", ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE")),
)
SUPPORTED = " or ".join(f"{kind.name} ({kind.loader})" for kind in KINDS if kind.loader)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder whose model_type transformers has.

    Raises:
        SourceError: an adapter, no config.json or a damaged one, or a model that brings code of its own.
    """
    if (adapter := folder / "adapter_config.json").is_file():
        base = _json(adapter).get("base_model_name_or_path") or "a model that it does not name"
        raise SourceError(
            f"{adapter}: an adapter, made for {base}; merge it into that model first (merge_and_unload of PEFT), save "
            "the result, and give that folder"
        )
    config = _json(folder / "config.json")
    from transformers import CONFIG_MAPPING, __version__

    if (model_type := config.get("model_type")) not in CONFIG_MAPPING:
        unknown = f"{folder / 'config.json'}: model_type {model_type!r} is not one of transformers {__version__}"
        if code := config.get("auto_map"):
            raise SourceError(
                f"{unknown}, and the code that auto_map brings, {next(iter(code.values()))}, is not run; give a model "
                "that transformers has a class for"
            )
        raise SourceError(f"{unknown}; give a model that it has, or install a newer transformers")
    return config


def loader_of(folder: Path, config: "PreTrainedConfig", architectures: Iterable[str] | None) -> str:
    """The name of the auto class that loads a model. Raises ModelError when it is of no kind that is supported.

    Args:
        architectures: in config.json; None or empty: the class that transformers chooses by the type.
    """
    names = [str(name) for name in architectures or ()]
    kind = kind_of(config.model_type, names[0] if names else None, bool(getattr(config, "is_encoder_decoder", False)))
    if kind.loader is None:
        raise ModelError(
            f"{folder}: {names[0] if names else config.model_type} is {kind.name}; Spectrim compresses {SUPPORTED}: "
            "give such a model"
        )
    return kind.loader


def kind_of(model_type: str, architecture: str | None, is_encoder_decoder: bool = False) -> Kind:
    """The kind of a model whose class is ``architecture``, or is the one that transformers chooses for its type."""
    chosen = _table("CAUSAL_LM").get(model_type)
    for name in (architecture, chosen):
        for kind in KINDS:
            if name and any(name in _classes(table) for table in kind.tables):
                return kind
        if name == architecture and (task := _task(architecture)):
            return Kind(f"a model for {task}", ())
        if is_encoder_decoder:
            return Kind("an encoder-decoder", ())
    return Kind("no language model", ())


def quantization(folder: Path, config: "PreTrainedConfig") -> dict[str, Any] | None:
    """The quantization_config by which transformers loads plain weights; None where the weights are plain.

    Raises:
        ModelError: compressed by a method that is not taken back.
    """
    parts = (config, config.get_text_config(decoder=True))  # transformers looks at both
    found = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    of_bitsandbytes = any(key.startswith(("load_in_", "bnb_")) for key in found)
    method = found.get("quant_method") or ("bitsandbytes" if of_bitsandbytes else "an unnamed method")
    if method not in DEQUANTIZED:
        raise ModelError(
            f"{folder}: compressed with {method}; give the original weights, or such in {' or '.join(DEQUANTIZED)}"
        )
    return {**found, "quant_method": DEQUANTIZED[method], "dequantize": True}


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SourceError(f"{file}: not found; a model is a folder with config.json, its weights and its tokenizer")
    try:
        found = read_json(file)
    except StorageError as error:
        raise SourceError(f"{file}: not readable as JSON; get it whole") from error
    if not isinstance(found, dict):
        raise SourceError(f"{file}: a JSON {type(found).__name__} where an object is required; get it whole")
    return found


def _table(name: str) -> dict[str, Any]:
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES"))


def _classes(table: str) -> set[str]:
    return {name for names in _table(table).values() for name in ([names] if isinstance(names, str) else names)}


def _task(architecture: str | None) -> str | None:
    """What transformers lists a class for, in words."""
    from transformers.models.auto import modeling_auto

    for table in dir(modeling_auto):
        if table.startswith("MODEL_FOR_") and table.endswith("_MAPPING_NAMES"):
            task = table.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES")
            if architecture in _classes(task):
                return task.lower().replace("_", " ")
    return None
