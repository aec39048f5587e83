"""Block updates against naive versions on the block's real activations; the closed form is never worse on them."""

from pathlib import Path

import pytest
import torch

from spectrim.blocks import BlockModel
from spectrim.maths.lowrank import Factors
from spectrim.weight_update import closed_form_factors, ipca_factors, relative_error, truncated_factors

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
