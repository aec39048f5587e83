"""A block's factors trained by themselves: against the naive gradient, and what stays as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.compression.block_refinement import Hidden, Refined, refine_block
from spectrim.compression.statistics import forward_block
from spectrim.compression.weight_update import svd_factors
from spectrim.errors import NumericalError
from spectrim.maths.lowrank import Factors
from spectrim.models.blocks import BlockModel, factored

TOKENS = torch.randint(2, 200, (24, 32), generator=torch.Generator().manual_seed(3))
OPTIONS = {"steps": 40, "learning_rate": 1e-3, "seed": 0}


class Case:
    """Block 1 of a tiny model at half the rank, behind a first block that is cut as well."""

    def __init__(self, folder: Path) -> None:
        self.model = BlockModel(folder)
        hidden = self.model.embed(TOKENS)
        before = svd_factors(*self.halves(0))
        original = forward_block(self.model, 0, hidden, 1)
        entering, leaving = forward_block(self.model, 0, hidden, 1, before), forward_block(self.model, 1, original, 1)
        self.training, self.validation = Hidden(entering[:20], leaving[:20]), Hidden(entering[20:], leaving[20:])
        self.factors = svd_factors(*self.halves(1))

    def halves(self, index: int) -> tuple[dict[str, Tensor], dict[str, int]]:
        weights = self.model.weights(index)
        return weights, {name: min(weight.shape) // 2 for name, weight in weights.items()}

    def refined(self, **options: Any) -> Refined:
        return refine_block(self.model, 1, self.factors, self.training, self.validation, **(OPTIONS | options))

    def error(self, factors: dict[str, Factors]) -> float:
        """mean_t ‖f'(x') − y‖² / ‖y‖² on the validation windows, in float64."""
        found = forward_block(self.model, 1, self.validation.entering, 1, factors).double()
        expected = self.validation.leaving.double()
        return float(((found - expected).square().sum(-1) / expected.square().sum(-1)).mean())


@pytest.fixture(scope="module", params=["llama", "opt", "qwen2"])
def case(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> Case:
    return Case(model_folders[request.param])


def test_the_error_falls_and_is_that_of_the_factors(case: Case) -> None:
    found = case.refined()
    assert found.after < 0.95 * found.before
    assert found.before == pytest.approx(case.error(case.factors), rel=1e-4)
    assert found.after == pytest.approx(case.error(found.factors), rel=1e-4)
    assert {name: pair.left.shape for name, pair in found.factors.items()} == {
        name: pair.left.shape for name, pair in case.factors.items()
    }
    parts = [part for pair in found.factors.values() for part in pair]
    assert all(part.dtype == torch.float32 and not part.requires_grad for part in parts)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(case: Case) -> None:
    first, again, other = case.refined(), case.refined(), case.refined(seed=1)
    for name, pair in first.factors.items():
        assert torch.equal(pair.left, again.factors[name].left) and torch.equal(pair.right, again.factors[name].right)
    assert other.after != first.after


def test_factors_that_became_worse_are_not_kept(case: Case) -> None:
    found = case.refined(learning_rate=30.0, steps=2)
    assert found.after == found.before
    for name, pair in case.factors.items():
        product = found.factors[name].left @ found.factors[name].right
        torch.testing.assert_close(product, (pair.left @ pair.right).float(), rtol=1e-4, atol=1e-6)


def test_the_model_is_the_same_afterwards(case: Case) -> None:
    before = forward_block(case.model, 1, case.validation.entering, 1)
    case.refined(steps=1)
    assert torch.equal(forward_block(case.model, 1, case.validation.entering, 1), before)
    assert all("forward" not in vars(module) for module in case.model.linears[1].values())


def test_factored_linears_compute_with_their_factors(case: Case) -> None:
    name, module = next(iter(case.model.linears[1].items()))
    pair = case.factors[name]
    with case.model.resident(1):
        x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(1))
        plain = module(x)
        with factored({name: module}, {name: pair}):
            cut = module(x)
        expected = x.double() @ (pair.left @ pair.right).double().T
        if module.bias is not None:
            expected = expected + module.bias.double()
        torch.testing.assert_close(cut.double(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(cut, plain, rtol=1e-2)
        assert torch.equal(module(x), plain)


def test_an_error_that_is_not_finite_names_the_block(case: Case) -> None:
    broken = Hidden(case.training.entering, torch.full_like(case.training.leaving, torch.nan))
    with pytest.raises(NumericalError, match=r"layers\.1: block refinement step 0: the error is nan; lower"):
        refine_block(case.model, 1, case.factors, broken, case.validation, **OPTIONS)
