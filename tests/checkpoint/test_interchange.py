"""A compressed model in the hands of other tools: transformers, torch.compile, PEFT."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from spectrim.errors import ModelError
from spectrim.formats.stored_linear import StoredLinear
from spectrim.integrations.lora import register
from spectrim.maths.budget import Format
from tests.checkpoints import FORMATS, TOKENS, Folders, build_all, logits, packed_weight, stored_linear

MIXED: tuple[Format, ...] = ("pifa", "remap", "int4_residual")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every family in every format; read only."""
    return build_all(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("format", MIXED)
def test_accelerate_places_it(format: Format, folders: Folders) -> None:
    folder = folders["llama", format]
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, device_map="auto").to("cpu")), expected)


@pytest.mark.parametrize("format", MIXED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loaded_model_changes_its_dtype(format: Format, dtype: torch.dtype, folders: Folders) -> None:
    folder = folders["llama", format]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    changed = model.half() if dtype == torch.float16 else model.to(dtype)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in changed.state_dict().items())
    found = logits(changed)  # not those of the loaded one: the cast reaches the rotary frequencies, too
    assert found.dtype == dtype and float((found.float() - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("format", MIXED)
def test_the_generation_pipeline_takes_it(format: Format, folders: Folders) -> None:
    folder = folders["llama", format]
    generate = pipeline("text-generation", model=str(folder), tokenizer=AutoTokenizer.from_pretrained(folder))
    (result,) = generate("the", max_new_tokens=4, do_sample=False, return_full_text=False)
    assert isinstance(result["generated_text"], str)


@pytest.mark.parametrize("format", MIXED)
def test_a_whole_model_compiles(format: Format, folders: Folders) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama", format])
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS)
def test_a_module_compiles_in_one_graph(format: Format) -> None:
    torch.compiler.reset()  # the formats share their code, and torch compiles one code for few kinds of weight
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    module = stored_linear(packed_weight(weight, format).tensors, format, (24, 128), torch.ones(24))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, 128)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("format", MIXED)
def test_an_adapter_trains_while_the_matrices_stay(format: Format, folders: Folders, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folders["llama", format])
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, register(LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(folders["llama", format])
    loaded = PeftModel.from_pretrained(again, tmp_path, config=register(LoraConfig.from_pretrained(tmp_path)))
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    assert any(isinstance(module, StoredLinear) for module in loaded.modules())
    with pytest.raises(ModelError, match="to_dense"):
        loaded.merge_and_unload()


def test_without_the_registration_peft_refuses(folders: Folders) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama", "pifa"])
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
