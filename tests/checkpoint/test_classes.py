"""Other classes than the checkpoint's load what they have in common with it, as they do from the dense folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from spectrim.checkpoint.layout import read_bytes
from spectrim.errors import CheckpointError
from spectrim.formats.stored_linear import StoredLinear
from spectrim.maths.budget import Format
from tests.checkpoints import TOKENS, Folders, Made, logits

SOME: tuple[Format, ...] = ("float16", "pifa_int8", "dense_int4_asym", "coded")
FAMILIES = ("llama", "opt", "qwen2", "gpt2")
WITH_HEADS = [
    *((family, AutoModelForSequenceClassification) for family in FAMILIES),
    *((family, AutoModelForTokenClassification) for family in FAMILIES if family != "opt"),  # which has none
    *((family, AutoModelForQuestionAnswering) for family in ("opt", "gpt2")),
]
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Made(tmp_path_factory.mktemp("checkpoints"))


def hidden(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model.base_model(input_ids=TOKENS).last_hidden_state


def load(kind: Any, folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model and what transformers reports of its tensors; a head is drawn from the same random numbers each time."""
    torch.manual_seed(0)
    model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    return model, report


def names_of(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, StoredLinear)}


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_computes_the_hidden_states(family: str, format: Format, folders: Folders) -> None:
    folder = folders[family, format]
    causal = AutoModelForCausalLM.from_pretrained(folder)
    model, report = load(AutoModel, folder)
    assert torch.equal(hidden(model), hidden(causal))
    assert {f"{causal.base_model_prefix}.{name}" for name in names_of(model)} == names_of(causal) != set()
    assert report == load(AutoModel, folders[family, "prepared"])[1]
    assert report["unexpected_keys"] == ({"lm_head.weight"} if family == "qwen2" else set())  # the others tie it


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize(("family", "kind"), WITH_HEADS)
def test_another_head_is_that_of_the_dense_twin(family: str, kind: Any, format: Format, folders: Folders) -> None:
    folder = folders[family, format]
    options = {} if kind is AutoModelForQuestionAnswering else {"num_labels": 3}
    model, report = load(kind, folder, **options)
    twin, expected = load(kind, folders[family, "prepared"], **options)
    assert report == expected and report["missing_keys"]
    for name in report["missing_keys"]:
        head = model.get_parameter(name)
        assert torch.equal(head, twin.get_parameter(name)) and len(head) == options.get("num_labels", 2)
        assert head.any() or name.endswith("bias")
    assert torch.equal(hidden(model), hidden(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_saved_and_load_again(family: str, format: Format, folders: Folders, tmp_path: Path) -> None:
    folder = folders[family, format]
    causal = AutoModelForCausalLM.from_pretrained(folder)
    for kind in (AutoModel, AutoModelForSequenceClassification):
        model, _ = load(kind, folder)
        saved = tmp_path / kind.__name__
        model.save_pretrained(saved)
        again, report = load(kind, saved)
        assert not any(report.values())
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
        listed = json.loads((saved / "config.json").read_text())["quantization_config"]["matrices"]
        assert names_of(model) < listed.keys()
        assert read_bytes(saved)["linears"] == read_bytes(folder)["linears"]
        back, report = load(AutoModelForCausalLM, saved)
        assert report["missing_keys"] == ({"lm_head.weight"} if family == "qwen2" else set())
        assert torch.equal(hidden(back), hidden(causal))
        if family != "qwen2":
            assert torch.equal(logits(back), logits(causal))


def test_a_configuration_serves_several_classes(folders: Folders) -> None:
    folder = folders["llama", "pifa"]
    config = AutoConfig.from_pretrained(folder)
    expected = hidden(AutoModelForCausalLM.from_pretrained(folder))
    for kind in (AutoModel, AutoModelForCausalLM, AutoModel):
        assert torch.equal(hidden(load(kind, folder, config=config)[0]), expected)


def test_a_head_trains_on_a_compressed_model(folders: Folders) -> None:
    model, _ = load(AutoModelForSequenceClassification, folders["llama", "int8"], num_labels=3)
    hidden(model)
    labels = torch.tensor([0, 2])
    losses = []
    optimizer = torch.optim.AdamW(model.score.parameters(), lr=1e-1)
    for _ in range(5):
        loss = model(input_ids=TOKENS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def changed(folder: Path, destination: Path, without: str | None = None, more: str | None = None) -> Path:
    """The checkpoint with a tensor less or one more."""
    shutil.copytree(folder, destination)
    state = load_file(destination / "model.safetensors")
    if without:
        del state[without]
    if more:
        state[more] = torch.ones(3, dtype=torch.float16)
    save_file(state, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"without": "model.layers.0.mlp.up_proj.left"}, r"model\.layers\.0\.mlp\.up_proj\.left: missing"),
        ({"without": "model.layers.0.mlp.up_proj.weight"}, r"model\.layers\.0\.mlp\.up_proj\.weight: missing"),
        ({"without": NORM}, r"missing (model\.)?layers\.0\.input_layernorm\.weight"),
        ({"more": "model.layers.9.mlp.up_proj.left"}, r"unexpected model\.layers\.9\.mlp\.up_proj\.left"),
        ({"more": "model.layers.0.mlp.up_proj.right"}, r"model\.layers\.0\.mlp\.up_proj\.right: not part of"),
    ],
)
def test_the_base_model_must_be_whole(
    kind: Any, change: dict[str, str], problem: str, folders: Folders, tmp_path: Path
) -> None:
    folder = changed(folders["llama", "float16"], tmp_path / "changed", **change)
    with pytest.raises(CheckpointError, match=problem):
        kind.from_pretrained(folder)


def test_a_base_model_that_was_saved_must_be_whole(folders: Folders, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folders["llama", "float16"]).save_pretrained(tmp_path / "base")
    less = changed(tmp_path / "base", tmp_path / "less", without=NORM.removeprefix("model."))
    more = changed(tmp_path / "base", tmp_path / "more", more="layers.9.bias")
    for kind in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        with pytest.raises(CheckpointError, match=r"missing (model\.)?layers\.0\.input_layernorm"):
            kind.from_pretrained(less)
        with pytest.raises(CheckpointError, match=r"unexpected layers\.9\.bias"):
            kind.from_pretrained(more)


def test_the_checkpoint_s_own_class_needs_its_head(folders: Folders, tmp_path: Path) -> None:
    folder = changed(folders["qwen2", "float16"], tmp_path / "less", without="lm_head.weight")
    with pytest.raises(CheckpointError, match=r"Qwen2ForCausalLM: .*missing lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)
    folder = changed(folders["qwen2", "float16"], tmp_path / "more", more="score.weight")
    with pytest.raises(CheckpointError, match=r"Qwen2ForCausalLM: .*unexpected score\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_class_with_another_name_for_the_base_model_is_refused(folders: Folders) -> None:
    with pytest.raises(CheckpointError, match=r"LlamaForQuestionAnswering has NoneType.*under the same name"):
        AutoModelForQuestionAnswering.from_pretrained(folders["llama", "float16"])
