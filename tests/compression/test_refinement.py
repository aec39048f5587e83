"""Refinement minimises what it says, touches nothing but the factors, and continues with the same bits."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectrim.compression import refinement as refinement_module
from spectrim.compression.refinement import (
    LearningRates,
    StoredTraining,
    attach_factors,
    attach_rounded,
    checkpoint_blocks,
    leaving,
)
from spectrim.compression.rounded_training import RoundedTraining
from spectrim.errors import NumericalError
from spectrim.formats.lowrank_linear import LowRankLinear
from spectrim.maths.losses import divergence as mean_divergence
from spectrim.maths.losses import next_token_loss
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import Quantized, dequantize
from spectrim.maths.storage_formats import Grid
from spectrim.models.modules import compressible_linears
from tests import reference, tiny
from tests.checkpoints import nearest

WINDOWS = torch.randint(2, 200, (6, 16), generator=torch.Generator().manual_seed(1))
RATES = LearningRates(factors=3e-3, scales=3e-3, vectors=0.0)
SETTINGS = {"steps": 6, "batch_size": 2, "learning_rates": RATES, "kl_weight": 1.0, "seed": 0}


def svd_factors(model: torch.nn.Module, share: float = 0.3) -> dict[str, Factors]:
    factors = {}
    for name, linear in compressible_linears(model).items():
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        rank = max(1, int(share * len(s)))
        factors[name] = Factors((u * s)[:, :rank], v[:rank])
    return factors


def student(family: str = "llama") -> tuple[PreTrainedModel, dict[str, LowRankLinear]]:
    model = tiny.model(family)
    return model, attach_factors(model, svd_factors(model))


def refinement(family: str = "llama", **changes: Any) -> StoredTraining:
    model, modules = student(family)
    with torch.no_grad():
        expected, _ = leaving(tiny.model(family), WINDOWS)
    return StoredTraining(model, modules, {}, WINDOWS, expected.__getitem__, **{**SETTINGS, **changes})


def divergence(run: StoredTraining) -> float:
    with torch.no_grad():
        teacher, logits = (
            model(input_ids=WINDOWS, use_cache=False).logits for model in (tiny.model("llama"), run.model)
        )
        return float(mean_divergence(logits, teacher))


@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("positions", [1, 5, 16])
def test_the_loss_in_parts_is_that_of_the_whole_logits(
    kl_weight: float, family: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refinement_module, "POSITIONS", positions)
    run, dense = refinement(family, kl_weight=kl_weight), tiny.model(family)
    tokens = WINDOWS[:2]
    hidden, n_returned = leaving(run.model, tokens)
    found, gradient = run.loss_and_gradient(tokens, run.expected(torch.arange(2)), hidden.detach(), n_returned)
    teacher, student = (model(input_ids=tokens, use_cache=False).logits for model in (dense, run.model))
    assert found == pytest.approx(
        reference.distillation_loss(student.detach(), teacher.detach(), tokens, kl_weight), abs=1e-5
    )
    whole = kl_weight * mean_divergence(student, teacher.detach()) + (1 - kl_weight) * next_token_loss(student, tokens)
    wanted = torch.autograd.grad(whole, list(run.parameters.values()))
    hidden.backward(gradient)
    for parameter, expected in zip(run.parameters.values(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_attached_factors_are_the_truncated_weights(family: str) -> None:
    model, expected = tiny.model(family), tiny.model(family)
    factors = svd_factors(model)
    with torch.no_grad():
        for name, pair in factors.items():
            expected.get_submodule(name).weight.copy_(pair.left @ pair.right)
    modules = attach_factors(model, factors)
    torch.testing.assert_close(model(WINDOWS).logits, expected(WINDOWS).logits, rtol=1e-4, atol=1e-4)
    assert modules.keys() == factors.keys()


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_refinement_changes_the_factors_only(family: str) -> None:
    run = refinement(family)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    for _ in range(2):
        run.advance()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in run.parameters), name
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{side}" for name in run.factors() for side in ("left", "weight")}


@pytest.mark.parametrize("kl_weight", [1.0, 0.5, 0.0])
def test_refinement_comes_closer_to_the_dense_model(kl_weight: float) -> None:
    run = refinement(kl_weight=kl_weight, steps=30)
    before = divergence(run)
    losses = [run.advance() for _ in range(30)]
    assert sum(losses[-3:]) < sum(losses[:3])
    if kl_weight == 1:
        assert divergence(run) < 0.8 * before


def test_a_vanishing_rate_learns_nothing() -> None:
    run = refinement(learning_rates=LearningRates(1e-12, 1e-12, 0.0))
    before = divergence(run)
    run.advance()
    assert divergence(run) == pytest.approx(before, abs=1e-6)


def assert_same(first: StoredTraining, second: StoredTraining) -> None:
    """Two runs have the same factors and moments, bit for bit."""
    for part, tensors in first.state().items():
        assert tensors.keys() == second.state()[part].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.state()[part][name]), (part, name)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_continued_run_has_the_same_bits(stop: int) -> None:
    whole, first = refinement(), refinement()
    losses = [whole.advance() for _ in range(6)]
    begun = [first.advance() for _ in range(stop)]
    second = refinement()
    second.restore(first.state(), stop)
    assert begun + [second.advance() for _ in range(6 - stop)] == losses
    assert_same(whole, second)


def test_without_its_moments_the_run_would_be_another() -> None:
    first, second = refinement(), refinement()
    first.advance()
    state = first.state()
    second.restore(state | {"square": {name: 0 * value for name, value in state["square"].items()}}, 1)
    first.advance()
    second.advance()
    with pytest.raises(AssertionError):
        assert_same(first, second)


def test_checkpointing_changes_no_bit() -> None:
    plain, frugal = refinement(), refinement()
    checkpoint_blocks(frugal.model)  # type: ignore[arg-type]
    assert [plain.advance() for _ in range(2)] == [frugal.advance() for _ in range(2)]
    assert_same(plain, frugal)


def test_factors_are_those_of_the_model() -> None:
    run = refinement()
    run.advance()
    for name, pair in run.factors().items():
        module = run.model.get_submodule(name)
        assert torch.equal(pair.left, module.left) and torch.equal(pair.right, module.weight.T)


def test_every_window_comes_before_any_comes_again() -> None:
    run = refinement()
    assert sorted(run._order[:6].tolist()) == sorted(run._order[6:].tolist()) == list(range(6))
    assert run._order[:6].tolist() != run._order[6:].tolist()


def test_a_diverged_run_says_so() -> None:
    run = refinement()
    with torch.no_grad():
        next(iter(run.parameters.values())).fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"refinement step 0: the loss is nan; lower refinement\.learning_rate"):
        run.advance()


def rounded_weights(model: torch.nn.Module, rank: int = 2) -> dict[str, tuple[Quantized, Factors | None]]:
    """Every linear in three bits; every second one with factors of what rounding lost."""
    found: dict[str, tuple[Quantized, Factors | None]] = {}
    for index, (name, linear) in enumerate(compressible_linears(model).items()):
        weight = linear.weight.detach()
        rounded = nearest(weight, Grid(3, 16, asymmetric=bool(index % 3)))
        u, s, v = torch.linalg.svd(weight - dequantize(rounded), full_matrices=False)
        found[name] = rounded, Factors((u * s)[:, :rank], v[:rank]) if index % 2 else None
    return found


def rounded_run(family: str = "llama", steps: int = 6, vectors: float = 3e-3) -> StoredTraining:
    model = tiny.model(family)
    modules = attach_rounded(model, rounded_weights(model))
    with torch.no_grad():
        expected, _ = leaving(tiny.model(family), WINDOWS)
    rates = LearningRates(factors=3e-3, scales=1e-2, vectors=vectors)
    return StoredTraining(
        model,
        {},
        modules,
        WINDOWS,
        expected.__getitem__,
        steps=steps,
        batch_size=2,
        learning_rates=rates,
        kl_weight=1.0,
        seed=0,
    )


def explicit(weight: Quantized, residual: Factors | None, change: torch.Tensor) -> torch.Tensor:
    scale = weight.scale.float() * (1 + change)
    zero = torch.zeros_like(scale) if weight.zero_point is None else weight.zero_point
    scale, zero = (part.repeat_interleave(weight.group_size, dim=1) for part in (scale, zero))
    dense = (weight.values.float() - zero) * scale
    return dense if residual is None else dense + residual.left @ residual.right


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_rounded_weight_multiplies_and_has_gradients_as_its_expansion(
    bias: bool, rank: int, asymmetric: bool
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 12, bias=bias)
    weight = nearest(linear.weight.detach() + 0.1, Grid(3, 16, asymmetric))
    residual = Factors(torch.randn(12, rank), torch.randn(rank, 32)) if rank else None
    module = RoundedTraining(weight, residual, linear.bias)
    with torch.no_grad():
        module.change.normal_(std=0.1)
    x, gradient = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 12)
    change, other = module.change.detach().requires_grad_(), x.detach().requires_grad_()
    expected = torch.nn.functional.linear(other, explicit(weight, residual, change), linear.bias)
    found = module(x)
    torch.testing.assert_close(found, expected)
    found.backward(gradient)
    of_x, of_change = torch.autograd.grad(expected, (other, change), gradient)
    torch.testing.assert_close(x.grad, of_x)
    torch.testing.assert_close(module.change.grad, of_change)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_refined_rounded_weights_keep_their_integers_and_all_else_outside_the_blocks(family: str) -> None:
    run = rounded_run(family)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    kept = {name: module.stored()[0].values for name, module in run._rounded.items()}
    for _ in range(2):
        run.advance()
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(run.parameters)
    assert run.vectors() and all(name in run.parameters and "layers." in name for name in run.vectors())
    for name, (weight, residual) in run.rounded().items():
        assert torch.equal(weight.values, kept[name]) and weight.scale.dtype == torch.float16
        stored = explicit(weight, residual, torch.zeros(()))
        module, x = run.model.get_submodule(name), torch.eye(weight.values.shape[1])
        expected = module(x) if module.bias is None else module(x) - module.bias
        torch.testing.assert_close(stored, expected.detach().mT, rtol=2e-3, atol=2e-3)


def test_refining_rounded_weights_comes_closer_to_the_dense_model() -> None:
    run, still = rounded_run(steps=30), rounded_run(steps=30, vectors=0.0)
    before = divergence(run)
    for _ in range(30):
        run.advance()
        still.advance()
    assert divergence(run) < 0.7 * before
    assert not still.vectors() and divergence(still) < 0.8 * before


def test_a_refinement_of_rounded_weights_goes_on_with_the_same_bits() -> None:
    whole, first, second = rounded_run(), rounded_run(), rounded_run()
    losses = [whole.advance() for _ in range(6)]
    begun = [first.advance() for _ in range(3)]
    second.restore(first.state(), 3)
    assert begun + [second.advance() for _ in range(3)] == losses
    assert_same(whole, second)
