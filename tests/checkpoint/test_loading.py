"""Plain from_pretrained gives the compressed model, in any process and dtype, or fails loudly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import spectrim
from spectrim.checkpoint.layout import read_bytes
from spectrim.errors import CheckpointError
from spectrim.formats.kinds import kind_of
from spectrim.formats.stored_linear import StoredLinear
from spectrim.maths.budget import Format
from spectrim.models.modules import compressible_linears, replace
from tests import tiny
from tests.checkpoints import CASES, FORMATS, TOKENS, Folders, build_all, chosen, logits, stored_linear
from tests.tiny import process_environment


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every family in every format; read only."""
    return build_all(tmp_path_factory.mktemp("checkpoints"))


def by_hand(dense: Path, format: Format) -> PreTrainedModel:
    """The dense model with its linears replaced one by one, without any checkpoint."""
    matrices, packed = chosen(dense, format)
    model = AutoModelForCausalLM.from_pretrained(dense)
    for name, linear in compressible_linears(model).items():
        if matrices[name].format == "dense":
            continue
        tensors = {
            suffix: tensor.float() if tensor.dtype == torch.float16 and not suffix.endswith("_scale") else tensor
            for suffix, tensor in packed[name].tensors.items()
        }
        replace(model, name, stored_linear(tensors, format, linear.weight.shape, linear.bias))
    return model.eval()


def child(code: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=process_environment(), capture_output=True, text=True, check=check, cwd=tiny.REPOSITORY,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "format"), CASES)
def test_loading_gives_the_model_that_was_built_by_hand(family: str, format: Format, folders: Folders) -> None:
    dense, folder = folders[family, "prepared"], folders[family, format]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    # not equal: the loaded one computes q/k/v and gate/up together
    torch.testing.assert_close(logits(model), logits(by_hand(dense, format)), rtol=1e-4, atol=1e-4)
    kinds = {
        type(model.get_submodule(name)).__name__
        for name in json.loads((folder / "spectrim.json").read_text())["matrices"]
    }
    assert kinds == {kind_of(format).__name__, "Linear"}
    original = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    state = model.state_dict()
    for name, tensor in original.items():
        if name.endswith(".weight") and isinstance(model.get_submodule(name.removesuffix(".weight")), StoredLinear):
            continue
        assert torch.equal(state[name], tensor), name
    assert any(name.endswith("bias") for name in state) == (family != "llama")
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == (family != "qwen2")
    assert AutoTokenizer.from_pretrained(folder)("the river").input_ids == tiny.tokenizer()("the river").input_ids
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 23)


def test_a_fresh_process_gives_the_same_logits_bit_for_bit(folders: Folders, tmp_path: Path) -> None:
    named = {f"{family}-{format}": folders[family, format] for family, format in CASES}
    code = f"""
import json, sys, torch
import spectrim
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
tokens = torch.arange(2, 42).reshape(2, 20)
torch.set_num_threads({torch.get_num_threads()})
with torch.inference_mode():
    results = {{
        name: AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens).logits
        for name, folder in json.loads(sys.argv[1]).items()
    }}
save_file(results, sys.argv[2])
"""
    child(code, json.dumps({name: str(folder) for name, folder in named.items()}), str(tmp_path / "logits"))
    results = load_file(tmp_path / "logits")
    for name, folder in named.items():
        assert torch.equal(results[name], logits(AutoModelForCausalLM.from_pretrained(folder))), name


IMPORTS = {
    "transformers first": "from transformers import quantizers\nimport spectrim",
    "a part of spectrim first": "from spectrim.models import modules; from spectrim.checkpoint import layout",
    "the loader itself": "from spectrim.checkpoint.loading import to_dense",
}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_the_format_is_registered_in_whatever_order_things_are_imported(imports: str) -> None:
    ask = "from transformers.quantizers import auto\nprint(auto.AUTO_QUANTIZER_MAPPING['spectrim'].__name__)"
    assert child(f"{imports}\n{ask}").stdout.strip() == "SpectrimQuantizer"


def test_without_the_import_nothing_loads(folders: Folders) -> None:
    code = """
import json, sys
from transformers import AutoModelForCausalLM
for name, folder in json.loads(sys.argv[1]).items():
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print(name, type(error).__name__)
    else:
        print(name, "loaded")
print("spectrim" in sys.modules)
"""
    named = {f"{family}-{format}": str(folders[family, format]) for family, format in CASES}
    lines = child(code, json.dumps(named)).stdout.splitlines()
    assert lines == [f"{name} RuntimeError" for name in named] + ["False"]


def test_importing_the_errors_alone_is_light() -> None:
    done = child("import sys, spectrim.errors; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_other_dtypes_keep_quantized_values_and_scales(
    dtype: torch.dtype, format: Format, folders: Folders, tmp_path: Path
) -> None:
    folder = folders["qwen2", format]
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, tensor in model.state_dict().items():
        exact = not stored[name].is_floating_point() or name.endswith("_scale")
        assert tensor.dtype == (stored[name].dtype if exact else dtype), name
        assert not exact or torch.equal(tensor, stored[name]), name
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(logits(model).float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    model.save_pretrained(tmp_path)
    assert read_bytes(tmp_path)["linears"] == read_bytes(folder)["linears"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)), logits(model))


@pytest.mark.parametrize(("family", "format"), CASES)
def test_to_dense_is_the_same_model_without_spectrim(
    family: str, format: Format, folders: Folders, tmp_path: Path
) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(folders[family, format]))
    model = spectrim.to_dense(AutoModelForCausalLM.from_pretrained(folders[family, format]))
    assert not any(isinstance(module, StoredLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "spectrim" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float16])
def test_transformers_own_dequantize_takes_a_dtype_or_its_name(
    dtype: str | torch.dtype | None, folders: Folders
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama", "pifa"])
    model.dequantize(dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == expected and weight.shape == (96, 64)


def test_weights_from_elsewhere_are_refused(folders: Folders) -> None:
    folder = folders["llama", "int8"]
    config, state = AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not from a state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


def test_lm_eval_runs_on_a_checkpoint(folders: Folders, tmp_path: Path) -> None:
    rows = [{"q": f"the river {i}", "choices": ["two valleys", "the capital"], "gold": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "spectrim.integrations.lm_eval", "--model", "hf", "--model_args",
         f"pretrained={folders['llama', 'int8']}", "--tasks", "tiny_choice", "--include_path", str(tmp_path),
         "--device", "cpu"],
        env=process_environment(HF_HOME=str(tmp_path / "home")), capture_output=True, text=True, cwd=tiny.REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|tiny_choice|" in done.stdout.replace(" ", "")
