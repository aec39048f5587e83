"""Block updates against naive versions on the block's real activations; the closed form is never worse on them."""

from pathlib import Path

import pytest
import torch

from spectrim.compression.weight_update import (
    asvd_factors,
    closed_form_factors,
    ipca_factors,
    relative_error,
    svd_factors,
    svd_llm_factors,
    truncated_factors,
)
from spectrim.errors import NumericalError
from spectrim.maths.lowrank import Factors
from spectrim.models.blocks import BlockModel
from tests import reference

TOKENS = torch.randint(2, 200, (4, 32), generator=torch.Generator().manual_seed(5))


class Block:
    """Block 0 of the tiny Llama: weights, inputs per window, Grams."""

    def __init__(self, folder: Path) -> None:
        self.model = BlockModel(folder)
        self.hidden = self.model.embed(TOKENS)
        self.weights = {name: weight.double() for name, weight in self.model.weights(0).items()}
        self.inputs: dict[str, list[torch.Tensor]] = {name: [] for name in self.weights}
        for name, linear in self.model.linears[0].items():
            linear.register_forward_pre_hook(lambda m, args, n=name: self.inputs[n].append(args[0][0].double()))
        with torch.no_grad(), self.model.resident(0):
            for window in self.hidden:
                self.model.run(0, window[None])
        for linear in self.model.linears[0].values():
            linear._forward_pre_hooks.clear()
        self.grams = {name: sum(x.T @ x for x in windows) for name, windows in self.inputs.items()}
        self.ranks = {name: min(weight.shape) // 3 for name, weight in self.weights.items()}


@pytest.fixture(scope="module")
def block(model_folders: dict[str, Path]) -> Block:
    return Block(model_folders["llama"])


def naive_ipca(weight: torch.Tensor, windows: list[torch.Tensor], rank: int) -> torch.Tensor:
    projector = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    for x in windows:
        vectors = torch.linalg.svd(x @ weight.T).Vh[:rank].T
        projector += vectors @ vectors.T / len(windows)
    basis = torch.linalg.eigh(projector).eigenvectors[:, -rank:]
    return basis @ basis.T @ weight


def test_exact_ipca_equals_the_naive_version(block: Block) -> None:
    found = ipca_factors(block.model, 0, block.hidden, block.ranks, exact=True)
    for name, pair in found.items():
        expected = naive_ipca(block.weights[name], block.inputs[name], block.ranks[name])
        torch.testing.assert_close(pair.left.double() @ pair.right.double(), expected, rtol=1e-3, atol=1e-4)


def test_incremental_ipca_comes_close_to_the_exact(block: Block) -> None:
    exact = ipca_factors(block.model, 0, block.hidden, block.ranks, exact=True)
    incremental = ipca_factors(block.model, 0, block.hidden, block.ranks, exact=False)
    for name, weight in block.weights.items():
        best, found = (relative_error(weight, f[name], block.grams[name]) for f in (exact, incremental))
        assert found < 1.25 * best + 1e-6


def test_incremental_ipca_is_exact_from_half_the_directions_on(block: Block) -> None:
    """There the projector takes no more memory than the incremental form's columns, so nothing is dropped."""
    half = {name: -(-min(weight.shape) // 2) for name, weight in block.weights.items()}
    exact = ipca_factors(block.model, 0, block.hidden, half, exact=True)
    incremental = ipca_factors(block.model, 0, block.hidden, half, exact=False)
    less = ipca_factors(block.model, 0, block.hidden, block.ranks, exact=False)
    whole = ipca_factors(block.model, 0, block.hidden, block.ranks, exact=True)
    for name in half:
        assert torch.equal(incremental[name].left, exact[name].left)
    assert any(not torch.equal(less[name].left, whole[name].left) for name in less)


def test_closed_form_is_never_worse(block: Block) -> None:
    closed = closed_form_factors(block.weights, block.grams, block.ranks)
    ipca = ipca_factors(block.model, 0, block.hidden, block.ranks, exact=True)
    for name, weight in block.weights.items():
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        rank = block.ranks[name]
        plain = Factors((u * s)[:, :rank], v[:rank])
        best = relative_error(weight, closed[name], block.grams[name])
        assert best <= relative_error(weight, ipca[name], block.grams[name]) + 1e-9
        assert best < relative_error(weight, plain, block.grams[name])  # the activations matter


def test_svd_and_asvd_equal_the_naive_versions(block: Block) -> None:
    abs_means = {name: torch.cat(windows).abs().mean(0) for name, windows in block.inputs.items()}
    plain, scaled = svd_factors(block.weights, block.ranks), asvd_factors(block.weights, abs_means, block.ranks)
    for name, weight in block.weights.items():
        rank = block.ranks[name]
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(plain[name].left @ plain[name].right, (u * s)[:, :rank] @ v[:rank])
        expected = reference.asvd(weight, torch.cat(block.inputs[name]), rank)
        torch.testing.assert_close(scaled[name].left @ scaled[name].right, expected)
        assert relative_error(weight, plain[name], block.grams[name]) != pytest.approx(
            relative_error(weight, scaled[name], block.grams[name]), rel=1e-3
        )


@pytest.mark.parametrize("form", ["cholesky", "two_svds"])
def test_svd_llm_reports_the_damping_that_a_gram_needed(form: str) -> None:
    """Three tokens of six features: the Cholesky form needs damping, the two-SVD form takes the pseudo-inverse."""
    weight, few = reference.draw(0, 5, 6, 3)
    _, many = reference.draw(1, 5, 6, 30)
    grams = {"few": reference.gram(few), "many": reference.gram(many)}
    weights, input_of = {"a": weight, "b": weight, "c": weight}, {"a": "few", "b": "few", "c": "many"}
    options = {"form": form, "max_damping": 1e-2}
    made, used = svd_llm_factors(weights, grams, input_of, {"a": 3, "b": 2, "c": 2}, damping=0.0, **options)
    assert used["a"] == used["b"] and (used["a"] > 0) == (form == "cholesky") and used["c"] == 0.0
    assert relative_error(weight, made["a"], grams["few"]) < 1e-3  # rank 3 holds all three tokens
    _, used = svd_llm_factors(weights, grams, input_of, {"a": 3, "c": 2}, damping=1e-5, **options)
    assert used == {"a": 1e-5, "c": 1e-5}


def test_a_gram_that_cannot_be_damped_names_the_linear() -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    with pytest.raises(NumericalError, match=r"^up: gram .* even with damping 1e-02"):
        svd_llm_factors(
            {"up": torch.eye(3)}, {"x": gram}, {"up": "x"}, {"up": 1},
            form="cholesky", damping=1e-6, max_damping=1e-2,
        )  # fmt: skip


def test_truncated_factors_are_the_first_directions(block: Block) -> None:
    full = {name: Factors(torch.randn(8, 6), torch.randn(6, 9)) for name in ("a", "b")}
    cut = truncated_factors(full, {"a": 4})
    assert cut.keys() == {"a"}
    assert torch.equal(cut["a"].left, full["a"].left[:, :4]) and torch.equal(cut["a"].right, full["a"].right[:4])


def test_relative_error_is_that_of_the_outputs(block: Block) -> None:
    closed = closed_form_factors(block.weights, block.grams, block.ranks)
    for name, weight in block.weights.items():
        x = torch.cat(block.inputs[name])
        approximation = closed[name].left.double() @ closed[name].right.double()
        expected = (x @ (weight - approximation).T).norm() / (x @ weight.T).norm()
        assert relative_error(weight, closed[name], block.grams[name]) == pytest.approx(float(expected), rel=1e-5)
