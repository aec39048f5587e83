"""Matrices that are no plain linears become such, compute the same, and are found again in the original's files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.families import small_model
from spectrim.models.blocks import BlockModel
from spectrim.models.experts import RoutedExperts, as_linears
from spectrim.models.linearise import behaves_as_linear, linearise, matrices_of
from spectrim.models.modules import gates_of, linears_by_block

TOKENS = torch.randint(3, 120, (2, 16), generator=torch.Generator().manual_seed(1))
EXPERTS = ("mixtral", "gpt_oss", "qwen2_moe")  # a gate, biases beside transposed weights, shared experts


def experts_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if as_linears(module))


def by_loops(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Token by token, expert by expert, from the three-dimensional parameters."""
    found = torch.zeros_like(x)
    turned = experts.is_transposed
    for token in range(len(x)):
        for place in range(chosen.shape[1]):
            index = int(chosen[token, place])
            first, down = experts.gate_up_proj[index], experts.down_proj[index]
            inner = x[token] @ (first if turned else first.T)
            inner = inner + experts.gate_up_proj_bias[index] if experts.has_bias else inner
            inner = experts._apply_gate(inner[None])[0]
            y = inner @ (down if turned else down.T)
            y = y + experts.down_proj_bias[index] if experts.has_bias else y
            found[token] += weights[token, place] * y
    return found


@pytest.mark.parametrize("kind", EXPERTS)
@torch.no_grad()
def test_experts_as_linears_compute_what_loops_over_the_parameters_do(kind: str) -> None:
    experts: Any = experts_of(small_model(kind))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 32, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator)
    expected = by_loops(experts, x, chosen, weights)
    linears = RoutedExperts(experts)
    torch.testing.assert_close(linears(x, chosen, weights), expected, rtol=1e-5, atol=1e-5)
    linears.down_proj[int(chosen[0, 0])].weight.zero_()
    assert not torch.allclose(linears(x, chosen, weights), expected, atol=1e-3)


@pytest.mark.parametrize("kind", [*EXPERTS, "llama4_text", "jetmoe", "gpt2", "falcon", "llama"])
@torch.no_grad()
def test_a_model_of_linears_gives_the_same_logits(kind: str) -> None:
    model: Any = small_model(kind)
    expected = model(input_ids=TOKENS, use_cache=False).logits
    places = matrices_of(model)
    weights = {name: place.of(model.get_parameter(place.name)).clone() for name, place in places.items()}
    linearise(model)
    torch.testing.assert_close(model(input_ids=TOKENS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert not any(as_linears(module) or isinstance(module, Conv1D) for module in model.modules())
    found = {name: linear for linears in linears_by_block(model).values() for name, linear in linears.items()}
    assert found.keys() == weights.keys()
    assert all(torch.equal(linear.weight, weights[name]) for name, linear in found.items())


def test_one_expert_is_read_from_the_file_of_all(tmp_path: Path) -> None:
    model = small_model("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    blocks, name = BlockModel(tmp_path), "model.layers.1.mlp.experts.down_proj.2"
    expected = model.get_parameter("model.layers.1.mlp.experts.down_proj")[2]
    assert torch.equal(blocks.weights(1)[name], expected)


def test_only_what_computes_a_linear_counts_as_one() -> None:
    class Named(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Router(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    assert behaves_as_linear(Named)
    assert not behaves_as_linear(Scaled)
    assert not behaves_as_linear(Router)


def test_gates_stay_dense() -> None:
    model = small_model("qwen2_moe")
    linearise(model)
    gates = gates_of(model.get_submodule("model.layers.0"))
    assert gates == {"mlp.shared_expert_gate"}
    assert "model.layers.0.mlp.shared_expert_gate" not in linears_by_block(model)["model.layers.0"]


def perturbed_buffer(folder: Path) -> tuple[PreTrainedModel, str]:
    model = small_model("deepseek_v3")
    name = next(name for name in model.state_dict() if name.endswith("e_score_correction_bias"))
    model.save_pretrained(folder, save_original_format=False)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), name


@torch.no_grad()
def test_persistent_buffers_of_a_block_are_loaded(tmp_path: Path) -> None:
    whole, name = perturbed_buffer(tmp_path)
    blocks = BlockModel(tmp_path)
    index = int(name.split(".")[2])
    with blocks.resident(index):
        assert torch.equal(blocks.model.get_buffer(name), whole.get_buffer(name))
        assert whole.get_buffer(name).abs().max() > 0
