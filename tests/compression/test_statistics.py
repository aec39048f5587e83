"""Streamed statistics equal those of one whole forward and backward pass; factors rebuild the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spectrim.compression import moments, whole_statistics
from spectrim.compression import statistics as captured
from spectrim.compression.moments import InputMoments
from spectrim.errors import NumericalError
from spectrim.models.blocks import BlockModel
from spectrim.models.whole import WholeModel
from tests import reference, tiny

TOKENS = torch.randint(2, 200, (5, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["llama", "opt", "qwen2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def stream(
    folder: Path, batch_size: int = 2, tokens: torch.Tensor = TOKENS
) -> tuple[BlockModel, list[dict], list[dict], list[torch.Tensor]]:
    """Statistics of every block, which linear reads which input, and what enters each block."""
    model = BlockModel(folder)
    hidden = [model.embed(tokens)]
    statistics, owners = [], []
    for index in range(len(model.names)):
        tensors, reads, output = captured.input_statistics(model, index, hidden[index], batch_size)
        statistics.append(tensors)
        owners.append(reads)
        hidden.append(output)
    gradient = captured.loss_gradient(model, tokens, hidden[-1])
    for index in reversed(range(len(model.names))):
        tensors, gradient = captured.gradient_statistics(model, index, hidden[index], gradient, batch_size)
        statistics[index] |= tensors
    return model, statistics, owners, hidden


def summed_whole(
    folder: Path, batch_size: int = 2, tokens: torch.Tensor = TOKENS
) -> tuple[WholeModel, list[dict], list[dict], torch.Tensor]:
    """The same from passes through the whole model, and what leaves its last block."""
    model = WholeModel(folder)
    indices = range(len(model.names))
    found, leaving = whole_statistics.input_statistics_of(model, indices, tokens, batch_size)
    gradients = whole_statistics.gradient_statistics_of(model, indices, tokens, batch_size)
    statistics = [tensors | others for (tensors, _), others in zip(found, gradients, strict=True)]
    return model, statistics, [owners for _, owners in found], leaving


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("walk", [stream, summed_whole])
def test_statistics_equal_a_whole_pass(walk: Any, family: str, model_folders: dict[str, Path]) -> None:
    model, statistics, owners, _ = walk(model_folders[family])
    inputs, gradients = reference.activations(tiny.model(family).eval(), TOKENS)
    for index, linears in enumerate(model.linears):
        for name in linears:
            owner = owners[index][name]
            assert_close(moments.unpack_symmetric(statistics[index][f"gram.{owner}"]), inputs[name].T @ inputs[name])
            assert_close(statistics[index][f"mean.{owner}"], inputs[name].mean(0))
            assert_close(statistics[index][f"abs_mean.{owner}"], inputs[name].abs().mean(0))
            assert statistics[index][f"abs_mean.{owner}"].dtype == torch.float64
            gram = moments.unpack_symmetric(statistics[index][f"gradient_gram.{name}"])
            assert_close(gram, gradients[name].T @ gradients[name])


def test_both_walks_are_one(family: str, model_folders: dict[str, Path]) -> None:
    _, streamed, readers, hidden = stream(model_folders[family])
    _, whole, owners, leaving = summed_whole(model_folders[family], batch_size=3)
    assert owners == readers
    assert_close(leaving.double(), hidden[-1])
    for left, right in zip(streamed, whole, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert_close(left[name].double(), right[name])


def test_shared_inputs_are_captured_once(model_folders: dict[str, Path]) -> None:
    _, statistics, owners, _ = stream(model_folders["llama"])
    grams = sorted(name.rsplit(".", 1)[1] for name in statistics[0] if name.startswith("gram."))
    assert grams == ["down_proj", "gate_proj", "o_proj", "q_proj"]
    assert {name.split(".", 1)[0] for name in statistics[0]} == {"gram", "mean", "abs_mean", "gradient_gram"}
    assert len([name for name in statistics[0] if name.startswith("abs_mean.")]) == len(grams)
    short = {name.rsplit(".", 1)[1]: owner.rsplit(".", 1)[1] for name, owner in owners[0].items()}
    assert short["k_proj"] == short["v_proj"] == "q_proj" and short["up_proj"] == "gate_proj"


def test_batch_size_does_not_matter(model_folders: dict[str, Path]) -> None:
    one, many = stream(model_folders["llama"], 1)[1], stream(model_folders["llama"], 5)[1]
    for left, right in zip(one, many, strict=True):
        for name in left:
            assert_close(left[name].double(), right[name])


def test_factors_rebuild_the_weight_and_spectrum_predicts_the_loss(model_folders: dict[str, Path]) -> None:
    model, statistics, owners, _ = stream(model_folders["llama"])
    n_tokens = TOKENS.numel()
    weights = model.weights(0)
    tensors = captured.decompose(weights, statistics[0], owners[0], n_tokens, n_tokens, 1e-6, 1e-2)
    for name, weight in weights.items():
        left, right = tensors[f"left.{name}"].double(), tensors[f"right.{name}"].double()
        assert float((left @ right - weight).norm() / weight.norm()) < 1e-4
        sigma, rank = tensors[f"two_sided.{name}"], weight.shape[0] // 2
        difference = weight.double() - left[:, :rank] @ right[:rank]
        gram = moments.unpack_symmetric(statistics[0][f"gram.{owners[0][name]}"]) / n_tokens
        gradient_gram = moments.unpack_symmetric(statistics[0][f"gradient_gram.{name}"]) / n_tokens
        lost = torch.trace(gradient_gram @ difference @ gram @ difference.T)
        assert float(lost) == pytest.approx(float(sigma[rank:].square().sum()), rel=2e-2)


def test_symmetric_packing_round_trips() -> None:
    half = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)).double()
    matrix = (half + half.T).float().double()
    assert torch.equal(moments.unpack_symmetric(moments.pack_symmetric(matrix)), matrix)


def test_non_finite_input_names_layer_and_window(model_folders: dict[str, Path]) -> None:
    model = BlockModel(model_folders["llama"])
    hidden = model.embed(TOKENS)
    hidden[3, 5] = torch.inf
    with pytest.raises(NumericalError, match=r"model\.layers\.0\..*window 3"):
        captured.input_statistics(model, 0, hidden, 2)


@pytest.mark.parametrize("features", [3, moments.SYRK_FEATURES, moments.SYRK_FEATURES + 5])
def test_second_moment_is_the_product(features: int) -> None:
    x = torch.randn(40, features, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moments.second_moment(x).triu(), (x.T @ x).triu(), rtol=1e-4, atol=1e-4)


def test_what_overflows_its_gram_is_named() -> None:
    """Finite activations whose squares are not: no window is to blame, the numbers are."""
    found = moments.non_finite("model.layers.0.x", torch.full((2, 3), 1e30), slice(4, 6), "input")
    assert "model.layers.0.x: input of up to 1e+30 in calibration windows 4 to 5 overflows its Gram" in found


@pytest.mark.parametrize("order", ["abB", "baB", "aBbc"])
def test_a_linear_that_is_called_twice_shares_its_input_with_none(order: str) -> None:
    """Letters are linears that read one tensor, b a second one, too (B)."""
    shared, other = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(7)).unbind()
    sums = InputMoments()
    for part in moments.batches(2, 1):
        sums.start(part)
        for letter in order:
            sums.observe(letter.lower(), other if letter == "B" else shared)
    readers = sorted(set(order.lower()))
    tensors, owners = sums.finished(readers, [], 12)
    for name in readers:
        expected = 2 * (shared.T @ shared + (other.T @ other if name == "b" else 0))
        torch.testing.assert_close(moments.unpack_symmetric(tensors[f"gram.{owners[name]}"]), expected.double())
        means = (shared.sum(0) + (other.sum(0) if name == "b" else 0)) / 6
        torch.testing.assert_close(tensors[f"mean.{owners[name]}"], means.double())
