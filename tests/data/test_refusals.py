"""Model folders that are refused: by what they are, by what is missing or damaged, and what is then to be done."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto

from pipeline.data.model_kinds import KINDS, kind_of
from pipeline.data.originals import load_original, original_tokenizer
from spectrim.errors import ModelError, SourceError
from tests import tiny
from tests.data.folders import change_config, pickle_weights

Change = Callable[[Path], Any]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
CODE = {"AutoConfig": "configuration_unheard.Config", "AutoModelForCausalLM": "modeling_unheard.Model"}


def config(**values: Any) -> Change:
    return lambda folder: change_config(folder, **values)


def kind(model_type: str, *architectures: str) -> Change:
    written = json.dumps({"model_type": model_type, "architectures": architectures})
    return lambda folder: (folder / "config.json").write_text(written)


def compressed(**how: Any) -> Change:
    return config(quantization_config=how)


def cut(name: str, n_bytes: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n_bytes])


def instead(*names: str) -> Change:
    """Other files in place of the weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return change


def pickled(content: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return lambda folder: torch.save(content(pickle_weights(folder)), folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')


def without_a_shard(folder: Path) -> None:
    pickle_weights(folder, 3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()


def cut_bin(folder: Path) -> None:
    pickle_weights(folder)
    cut("pytorch_model.bin", -5_000)(folder)


OF_A_KIND: list[tuple[Change, str]] = [
    (compressed(quant_method="gptq", bits=4), "compressed with gptq; give the original weights"),
    (
        compressed(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "compressed with bitsandbytes; give the original weights",
    ),
    (compressed(quant_method="bitsandbytes", load_in_8bit=True), "compressed with bitsandbytes; give the original"),
    (compressed(quant_method="spectrim"), "compressed with spectrim; give the original weights"),
    (compressed(bits=4), "compressed with an unnamed method; give the original weights"),
    (
        kind("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        r"Qwen2VLForConditionalGeneration is a model of text with images or sound; .* \(AutoModelForCausalLM\)",
    ),
    (kind("gemma3", "Gemma3ForConditionalGeneration"), "Gemma3ForConditionalGeneration is a model of text with images"),
    (kind("whisper", "WhisperForConditionalGeneration"), "WhisperForConditionalGeneration is a speech model"),
    (kind("t5", "T5ForConditionalGeneration"), "T5ForConditionalGeneration is an encoder-decoder"),
    (kind("bart", "BartModel"), "BartModel is an encoder-decoder"),
    (kind("bert", "BertForMaskedLM"), "BertForMaskedLM is a masked language model"),
    (config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification is a classifier"),
    (kind("detr", "DetrForObjectDetection"), "DetrForObjectDetection is a model for object detection"),
    (kind("vit"), "vit is no language model"),
]
OF_ANOTHER_SOURCE: list[tuple[Change, str]] = [
    (adapter, r"an adapter, made for org/base; merge it into that model first \(merge_and_unload of PEFT\)"),
    (
        lambda folder: (folder / "config.json").unlink(),
        r"config\.json: not found; a model is a folder with config\.json",
    ),
    (config(hidden_size="wide"), r"not a configuration of llama .*hidden_size.*; correct it"),
    (config(model_type="unheard", auto_map=CODE), r"model_type 'unheard' .*configuration_unheard\.Config, is not run"),
    (config(model_type="unheard"), r"model_type 'unheard' is not one of .*install a newer transformers"),
    (config(model_type=None), "model_type None is not one of transformers"),
    (instead("a.Q4_0.gguf"), r"it has a\.Q4_0\.gguf; give that file itself, model\.source: .*/model/a\.Q4_0\.gguf"),
    (instead("tf_model.h5", "x.onnx"), r"it has tf_model\.h5, x\.onnx; save the model by save_pretrained"),
    (
        lambda folder: (folder / "model.safetensors").write_bytes(LFS),
        r"model\.safetensors: a pointer of Git LFS .*; run `git lfs pull` in .*/model",
    ),
    (
        pickled(lambda weights: {"model": weights}),
        r"pytorch_model\.bin: not one tensor per name, model is of type dict",
    ),
    (pickled(lambda _: tiny.model("llama")), r"pytorch_model\.bin: not tensors alone: it names transformers\."),
]
DAMAGED: list[tuple[Change, str]] = [
    (cut("config.json", 90), r"config\.json: not readable as JSON; get it whole"),
    (instead(), r"neither model\.safetensors nor pytorch_model\.bin, .*; get the folder whole"),
    (
        instead("model-00001-of-00002.safetensors"),
        r"model-00001-of-00002\.safetensors is a shard without its index; get",
    ),
    (without_a_shard, r"1 of the 3 shards that it names are missing, first pytorch_model-00002-of-00003\.bin; get"),
    (cut("model.safetensors", 100), r"model\.safetensors: 100 bytes, not a whole safetensors file .*; get it whole"),
    (cut("model.safetensors", -100), r"model\.safetensors: .* bytes, not a whole safetensors file .*; get it whole"),
    (cut_bin, r"pytorch_model\.bin: .* bytes, not a whole file of tensors; get it whole"),
]


@pytest.mark.parametrize(
    ("change", "words", "error"),
    [(*case, ModelError) for case in OF_A_KIND] + [(*case, SourceError) for case in OF_ANOTHER_SOURCE + DAMAGED],
)
def test_a_folder_is_refused_by_name(
    change: Change, words: str, error: type[Exception], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))
    change(folder)
    with pytest.raises(error, match=words) as caught:
        load_original(folder, torch.float32)
    assert str(folder) in str(caught.value)
    again = "get it whole" in str(caught.value) or "get the folder whole" in str(caught.value)
    assert again is ((change, words) in DAMAGED)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(error, match=words):  # rather than for want of a tokenizer
        original_tokenizer(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without its files that of Qwen2 has no words, and no error
def test_a_tokenizer_that_is_missing_or_damaged(family: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folders[family], tmp_path / "model"))
    cut("tokenizer.json", 500)(folder)
    with pytest.raises(SourceError, match=r"no tokenizer .*; tokenizer\.json is damaged, get it whole"):
        original_tokenizer(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SourceError, match=r"no tokenizer .*; give a folder with tokenizer\.json"):
        original_tokenizer(folder)


def test_every_causal_class_is_taken_but_those_that_see_or_hear() -> None:
    (supported,) = {kind.loader for kind in KINDS if kind.loader}
    more = set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    more |= set(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values())
    taken = 0
    for model_type, architecture in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found = kind_of(model_type, architecture)
        assert found.loader == (None if architecture in more else supported), architecture
        assert kind_of(model_type, None) == found
        taken += found.loader is not None
    assert taken > 100
