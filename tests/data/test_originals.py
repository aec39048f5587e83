"""pipeline/data/originals.py: pickled and quantized checkpoints become plain weights, and no pickle is run."""

import math
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig

from pipeline.config.sections import Model, Prepare
from pipeline.data.originals import load_original
from pipeline.data.prepared import write_prepared
from spectrim.errors import ModelError, SourceError
from tests import tiny
from tests.data.folders import change_config, pickle_weights

Tensors = dict[str, torch.Tensor]
BLOCK = 128
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and their negatives, by the highest of four bits


@pytest.fixture
def folder(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama's folder, to be changed."""
    return Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))


@pytest.mark.parametrize("n_shards", [0, 3])
def test_bin_files_are_read_and_prepared_as_safetensors(n_shards: int, folder: Path, tmp_path: Path) -> None:
    tensors = pickle_weights(folder, n_shards)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    write_prepared(Model(str(folder), None), Prepare("float32", "float32", 0.0), None, prepared)
    written = load_file(prepared / "model.safetensors")
    assert set(written) == set(tensors) and not list(prepared.glob("*.bin"))
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


class Hostile:
    """Opens ``trace`` for writing when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("way", ["torch.save", "pickle", "shard"])
def test_a_hostile_pickle_is_refused_and_never_run(way: str, folder: Path, tmp_path: Path) -> None:
    tensors, trace = pickle_weights(folder, 2 if way == "shard" else 0), tmp_path / "trace"
    file = folder / ("pytorch_model-00002-of-00002.bin" if way == "shard" else "pytorch_model.bin")
    if way == "pickle":
        file.write_bytes(pickle.dumps(Hostile(trace), protocol=2))
    else:
        torch.save({**tensors, "extra": Hostile(trace)}, file)
    with pytest.raises(SourceError, match=rf"{file.name}: not tensors alone: it names posix\.system.* as safetensors"):
        load_original(folder, torch.float32)
    assert not trace.exists()
    with suppress(RuntimeError):  # a plain pickle is run before torch finds that it is none of its own
        torch.load(file, weights_only=False)
    assert trace.exists(), "the pickle is hostile indeed"


def test_safetensors_go_before_bin_files(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"whatever this is")
    original = load_original(folder, torch.float32)
    assert torch.equal(original.get_input_embeddings().weight, tiny.model("llama").get_input_embeddings().weight)


def naive_fp8(quantized: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """W[i, j] = Q[i, j] s[i // 128, j // 128]."""
    rows, columns = (torch.arange(length) // BLOCK for length in quantized.shape)
    return quantized.float() * scales[rows][:, columns]


def deepseek(kv_lora_rank: int) -> torch.nn.Module:
    """A tiny DeepSeek-V3: a dense block and one with experts; kv_a_proj has kv_lora_rank + 32 rows."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=256, intermediate_size=320, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=kv_lora_rank, q_lora_rank=64, qk_rope_head_dim=32,
        qk_nope_head_dim=32, v_head_dim=32, n_shared_experts=1, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def write_fp8(folder: Path, kv_lora_rank: int) -> Tensors:
    """The tiny DeepSeek-V3 with its projections in fp8, scales per 128 x 128; returns what its weights are."""
    deepseek(kv_lora_rank).save_pretrained(folder)
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = meant[name] = weight
            continue
        rows, columns = (math.ceil(length / BLOCK) for length in weight.shape)
        scales = torch.rand(rows, columns) + 0.5
        stored[name] = (weight / naive_fp8(torch.ones_like(weight), scales)).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        meant[name] = naive_fp8(stored[name], scales)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    change_config(folder, quantization_config=how)
    return meant


# rows of kv_a_proj: whole blocks; two scales that divide them evenly and wrongly; scales that do not divide them
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(128, torch.float32), (192, torch.float32), (321, torch.float32), (192, torch.bfloat16), (321, torch.float16)],
)
def test_fp8_weights_are_dequantized(rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    meant = {name: weight.to(dtype) for name, weight in write_fp8(tmp_path, rows - 32).items()}
    model = load_original(tmp_path, dtype)
    assert not hasattr(model.config, "quantization_config")
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    found = model.state_dict()
    for name in [name for name in found if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        joined = found.pop(name)  # (experts, out, in), gate and up one above the other
        parent, of_expert = name.rsplit(".", 1)[0], ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
        for expert, weight in enumerate(joined):
            parts = [meant.pop(f"{parent}.{expert}.{part}.weight") for part in of_expert]
            assert torch.equal(weight, torch.cat(parts)), name
    assert set(found) == set(meant)
    for name in found:
        assert torch.equal(found[name], meant[name].to(found[name].dtype)), name


def test_fp8_weights_without_their_scales_are_refused(tmp_path: Path) -> None:
    write_fp8(tmp_path, 96)
    tensors = load_file(tmp_path / "model.safetensors")
    down = "model.layers.0.mlp.down_proj.weight"
    scales = tensors.pop(f"{down}_scale_inv")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{down}: stays in torch.float8_e4m3fn, its scales are not in the file"):
        load_original(tmp_path, torch.float32)
    tensors[f"{down}_scale_inv"] = torch.ones(scales.shape[0] + 1, scales.shape[1])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"not a model that transformers .* can load .*; give a folder with weights"):
        load_original(tmp_path, torch.float32)


def naive_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """W[e, 32 g + 2 b + h, row] = FP4[nibble h of byte b] 2^(scale - 127); low nibble first."""
    experts, rows, groups, _ = blocks.shape
    weight = torch.zeros(experts, groups * 32, rows)
    for at in ((e, r, g, b) for e in range(experts) for r in range(rows) for g in range(groups) for b in range(16)):
        e, r, g, b = at
        for half, nibble in enumerate((int(blocks[at]) & 15, int(blocks[at]) >> 4)):
            value = FP4[nibble & 7] * (-1 if nibble & 8 else 1)
            weight[e, 32 * g + 2 * b + half, r] = value * 2.0 ** (int(scales[e, r, g]) - 127)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_experts_are_dequantized(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if not name.endswith("_proj"):
            stored[name] = meant[name] = weight
            continue
        experts, inputs, rows = weight.shape
        stored[f"{name}_blocks"] = torch.randint(256, (experts, rows, inputs // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 128, (experts, rows, inputs // 32), dtype=torch.uint8)
        meant[name] = naive_mxfp4(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    assert len(stored) == len(meant) + 2
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    model = load_original(tmp_path, dtype)
    assert not hasattr(model.config, "quantization_config")
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    found = model.state_dict()
    assert set(found) == set(meant)
    for name in found:
        assert torch.equal(found[name], meant[name].to(dtype)), name
