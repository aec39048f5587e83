"""The probe of a model refuses what breaks an assumption; each of its checks is seen to fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from spectrim.compression.probe import Probed, probe
from spectrim.errors import ModelError
from spectrim.models.blocks import BlockModel

Forward = Callable[..., Any]


def test_a_plain_model_holds(model_folders: dict[str, Path]) -> None:
    for folder in model_folders.values():
        assert probe(folder) == Probed(unreached=[], obstacle=None)


def broken(monkeypatch: pytest.MonkeyPatch, kind: type, change: Callable[[Forward], Forward]) -> None:
    monkeypatch.setattr(kind, "forward", change(kind.forward))


def test_a_model_that_looks_ahead_is_refused(model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def change(forward: Forward) -> Forward:
        def with_mean(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(self, hidden_states, *args, **kwargs) + hidden_states.mean(1, keepdim=True)

        return with_mean

    broken(monkeypatch, modeling_llama.LlamaDecoderLayer, change)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .llama.: with another last token.*looks ahead"):
        probe(model_folders["llama"])


def test_a_cache_that_changes_the_result_is_refused(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(forward: Forward) -> Forward:
        def by_length(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            scale = 2 if hidden_states.shape[1] == 1 else 1
            return scale * forward(self, hidden_states, *args, **kwargs)

        return by_length

    broken(monkeypatch, modeling_llama.LlamaDecoderLayer, change)
    with pytest.raises(ModelError, match="generating with a cache, its logits differ by"):
        probe(model_folders["llama"])


def test_a_walk_that_differs_is_not_taken(model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = BlockModel.run
    monkeypatch.setattr(BlockModel, "run", lambda self, index, hidden: 1.01 * run(self, index, hidden))
    assert "walked block by block, its logits differ by" in str(probe(model_folders["llama"]).obstacle)


def test_code_that_fails_on_blocks_alone_is_named(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, index: int, hidden: Tensor) -> Tensor:
        raise KeyError("past")

    monkeypatch.setattr(BlockModel, "run", fails)
    assert "cannot be walked block by block (KeyError: 'past')" in str(probe(model_folders["llama"]).obstacle)


def test_a_matrix_whose_weight_is_only_read_is_reported(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(forward: Forward) -> Forward:
        def reading(self: Any, x: Tensor) -> Tensor:
            inner = self.act_fn(self.gate_proj(x)) * torch.nn.functional.linear(x, self.up_proj.weight)
            return self.down_proj(inner)

        return reading

    broken(monkeypatch, modeling_llama.LlamaMLP, change)
    expected = [f"model.layers.{index}.mlp.up_proj" for index in range(3)]
    assert probe(model_folders["llama"]).unreached == expected


def test_a_matrix_that_is_called_and_read_is_refused(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(forward: Forward) -> Forward:
        def both(self: Any, x: Tensor) -> Tensor:
            return forward(self, x) + self.up_proj.weight.mean()

        return both

    broken(monkeypatch, modeling_llama.LlamaMLP, change)
    with pytest.raises(ModelError, match=r"with factors .* one linear of each kind"):
        probe(model_folders["llama"])


def test_a_dead_model_is_refused(model_folders: dict[str, Path], tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not depend on the last token"):
        probe(tmp_path)
