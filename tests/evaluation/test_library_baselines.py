"""Baselines of bitsandbytes against what transformers makes of the same model; skipped where the extra is missing."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from spectrim.errors import ModelError
from spectrim.evaluation.perplexity import perplexity
from spectrim.models.modules import compressible_linears
from tests import tiny

pytest.importorskip("bitsandbytes")
from spectrim.evaluation.library_baselines import KINDS, quantize_by_library_, saved_bytes

CONFIGS = {
    "bitsandbytes_nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "bitsandbytes_int8": {"load_in_8bit": True},
}
BLOB = 200  # bytes of JSON at most, which 4-bit weights carry: shape, dtype, block sizes, offset


def by_transformers(folder: Path, kind: str) -> PreTrainedModel:
    config = BitsAndBytesConfig(**CONFIGS[kind])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()


def by_us(folder: Path, kind: str, exclude: tuple[str, ...] = ()) -> tuple[PreTrainedModel, dict[str, float]]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, quantize_by_library_(model, kind, exclude=exclude)


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The library's own linears in a model; they are subclasses."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, tuple(made for made, _ in KINDS.values()))
    }


@pytest.fixture(scope="module")
def loud_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> folder of a model with a third of its activations' columns beyond the threshold of LLM.int8()."""
    root = tmp_path_factory.mktemp("loud")
    for family in tiny.FAMILIES:
        model = tiny.model(family)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data *= 2.5
        model.save_pretrained(root / family)
    return {family: root / family for family in tiny.FAMILIES}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", tuple(tiny.FAMILIES))
def test_the_model_and_its_bytes_are_those_of_transformers(
    family: str, kind: str, tmp_path: Path, loud_folders: dict[str, Path]
) -> None:
    """Same logits bit for bit; and the bytes are those of the file that transformers writes."""
    theirs, (ours, size) = by_transformers(loud_folders[family], kind), by_us(loud_folders[family], kind)
    windows = torch.randint(0, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(ours(windows).logits, theirs(windows).logits)
        dense = AutoModelForCausalLM.from_pretrained(loud_folders[family]).eval()(windows).logits
    assert not torch.equal(ours(windows).logits, dense)
    names = set(compressible_linears(tiny.model(family)))
    assert set(linears(ours)) == set(linears(theirs)) == names
    theirs.save_pretrained(tmp_path)
    written = {
        name: tensor.nbytes
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if not name.endswith(".bias") and any(name.startswith(f"{linear}.") for linear in names)
    }
    assert size["bytes"] == sum(written.values()) and len(written) > len(names)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_bytes_are_weights_scales_and_tables(kind: str, model_folders: dict[str, Path]) -> None:
    model, size = by_us(model_folders["llama"], kind)
    formula = 0
    for linear in linears(model).values():
        n = linear.in_features * linear.out_features
        if kind == "bitsandbytes_int8":  # a float32 scale per output channel, a byte for the layout
            formula += n + 4 * linear.out_features + 1
        else:  # an 8-bit maximum per block of 64, a float32 one per 256 blocks, tables of 16 and 256 float32
            blocks = -(-n // 64)
            formula += n // 2 + blocks + 4 * -(-blocks // 256) + 4 * 16 + 4 * 256
    slack = 0 if kind == "bitsandbytes_int8" else BLOB * len(linears(model))
    assert formula <= size["bytes"] <= formula + slack
    assert size["dense_bytes"] == 2 * sum(each.in_features * each.out_features for each in linears(model).values())
    assert size["ratio"] == size["bytes"] / size["dense_bytes"]


def test_the_bias_is_not_counted() -> None:
    assert saved_bytes(nn.Linear(6, 5)) == saved_bytes(nn.Linear(6, 5, bias=False)) == 4 * 30


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_excluded_linears_embeddings_and_head_stay_as_they_are(kind: str, model_folders: dict[str, Path]) -> None:
    before = AutoModelForCausalLM.from_pretrained(model_folders["qwen2"]).eval()
    after, size = by_us(model_folders["qwen2"], kind, exclude=("*.mlp.*", "*.layers.0.*"))
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(linears(after)) == {f"model.layers.1.self_attn.{name}" for name in names}
    assert size["dense_bytes"] == 2 * (2 * 32 * 32 + 2 * 16 * 32)
    for name, tensor in before.state_dict().items():
        linear, _, part = name.rpartition(".")
        if linear not in linears(after) or part == "bias":
            assert torch.equal(after.state_dict()[name], tensor), name
    with pytest.raises(ModelError, match=r"matches all 14 nn\.Linear"):
        by_us(model_folders["qwen2"], kind, exclude=("*",))


def test_fewer_bits_hurt_more_and_perplexity_is_finite(model_folders: dict[str, Path]) -> None:
    windows = torch.randint(0, tiny.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
    dense = perplexity(AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval(), windows)["perplexity"]
    change = {
        kind: abs(math.log(perplexity(by_us(model_folders["llama"], kind)[0], windows)["perplexity"] / dense))
        for kind in KINDS
    }
    assert 0 < change["bitsandbytes_int8"] < change["bitsandbytes_nf4"] < 0.5
