"""The block-by-block walk gives exactly what the whole model gives, with one block in memory."""

from pathlib import Path

import pytest
import torch

from spectrim.errors import ModelError, StorageError
from spectrim.models.blocks import BlockModel
from tests import tiny

TOKENS = torch.arange(40).reshape(4, 10)


@pytest.fixture(params=["llama", "opt", "qwen2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def walk(model: BlockModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(tokens)
    for index in range(len(model.names)):
        with model.resident(index):
            hidden = model.run(index, hidden)
    return model.logits(tokens, hidden)


def test_walk_equals_the_whole_model(family: str, model_folders: dict[str, Path]) -> None:
    whole = tiny.model(family).eval()
    with torch.no_grad():
        expected = whole(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(walk(BlockModel(model_folders[family]), TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_walk_depends_on_every_block(family: str, model_folders: dict[str, Path]) -> None:
    model = BlockModel(model_folders[family])
    with torch.no_grad():
        skipped = model.logits(TOKENS, model.embed(TOKENS))
    assert not torch.allclose(skipped, walk(model, TOKENS), atol=1e-2)


def test_only_the_resident_block_has_weights(model_folders: dict[str, Path]) -> None:
    model = BlockModel(model_folders["llama"])
    with model.resident(1):
        loaded = [any(p.device.type != "meta" for p in block.parameters()) for block in model.blocks]
    assert loaded == [False, True, False]
    assert all(p.device.type == "meta" for block in model.blocks for p in block.parameters())


def test_weights_are_those_of_the_file(family: str, model_folders: dict[str, Path]) -> None:
    whole = dict(tiny.model(family).named_parameters())
    model = BlockModel(model_folders[family])
    for index in range(len(model.names)):
        weights = model.weights(index)
        assert weights.keys() == model.linears[index].keys()
        for name, weight in weights.items():
            assert torch.equal(weight, whole[f"{name}.weight"])


def test_logits_are_differentiable(model_folders: dict[str, Path]) -> None:
    model = BlockModel(model_folders["llama"])
    hidden = model.embed(TOKENS).requires_grad_()
    (gradient,) = torch.autograd.grad(model.logits(TOKENS, hidden).square().sum(), hidden)
    assert gradient.abs().sum() > 0


def test_excluded_linears_are_left_out(model_folders: dict[str, Path]) -> None:
    model = BlockModel(model_folders["llama"], exclude=("*.down_proj", "model.layers.0.*"))
    assert model.linears[0] == {}
    assert not any(name.endswith("down_proj") for linears in model.linears for name in linears)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"prepare/config\.json: not found"):
        BlockModel(tmp_path / "prepare")


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    tiny.model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        BlockModel(tmp_path)
