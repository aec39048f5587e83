"""Training keeps the byte budget at every step, lowers the loss, and its gates are the truncation they stand for."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.compression import rank_training
from spectrim.compression.rank_training import Objective, RankTraining, onto_budget
from spectrim.compression.truncated import GatedLinear, TruncatedActivation, attach_truncated
from spectrim.errors import NumericalError
from spectrim.maths.losses import next_token_loss
from spectrim.maths.lowrank import Factors
from spectrim.models.modules import compressible_linears
from tests import reference, tiny
from tests.training import train

WINDOWS = torch.randint(2, 200, (6, 16), generator=torch.Generator().manual_seed(1))
SETTINGS = {"steps": 8, "batch_size": 2, "learning_rate": 0.05, "width": 0.1, "beta": 10.0, "seed": 0}


def svd_gates(model: torch.nn.Module) -> dict[str, GatedLinear]:
    modules = {}
    for name, linear in compressible_linears(model).items():
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        modules[name] = GatedLinear(Factors(u * s, v), linear.weight, linear.bias)
    return modules


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 2), st.floats(1, 1000), st.floats(0.01, 0.2)), min_size=1, max_size=20),
    st.floats(0, 1),
)
def test_projection_meets_the_budget_and_is_nearest(rows: list[tuple[float, float, float]], share: float) -> None:
    theta, cost, floor = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    budget = float(cost @ floor) + share * float(cost.sum() - cost @ floor)
    found = onto_budget(theta, cost, budget, floor)
    assert float(cost @ found) == pytest.approx(budget, rel=1e-9)
    assert bool((found >= floor).all() and (found <= 1).all())
    # nearest: moving cost-neutrally between two free coordinates never helps, so theta - found is a multiple of cost
    free = (found > floor + 1e-9) & (found < 1 - 1e-9)
    multiples = ((theta - found) / cost)[free]
    if len(multiples) > 1:
        assert float(multiples.max() - multiples.min()) < 1e-6


def test_hard_rank_is_the_limit_of_the_gate() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(12, 20), torch.randn(3, 20)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    gated = GatedLinear(Factors(u * s, v), weight, torch.randn(12))
    gated.rank = 5
    hard = gated(x)
    torch.testing.assert_close(hard, x @ ((u * s)[:, :5] @ v[:5]).T + gated.bias)
    gated.rank, gated.beta = None, 200.0
    gated.fraction.data.fill_(5.5 / 12)
    torch.testing.assert_close(gated(x), hard, rtol=1e-4, atol=1e-4)
    gated.open = True
    torch.testing.assert_close(gated(x), x @ weight.T + gated.bias, rtol=1e-4, atol=1e-4)


def test_what_is_trained_is_where_the_weight_is() -> None:
    linear = torch.nn.Linear(4, 3, device="meta")
    factors = Factors(torch.empty(3, 3, device="meta"), torch.empty(3, 4, device="meta"))
    for module in (GatedLinear(factors, linear.weight, linear.bias), TruncatedActivation(linear, 10, 1e-2)):
        assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("method", ["gates", "dobi"])
def test_training_keeps_the_budget_and_lowers_the_loss(method: str, pivoted: bool) -> None:
    model = tiny.model("llama").eval().requires_grad_(False)
    linears = compressible_linears(model)
    if method == "gates":
        modules = svd_gates(model)
    else:
        modules = {name: TruncatedActivation(linear, 10, 1e-2) for name, linear in linears.items()}
    for name, module in modules.items():
        module.pivoted = sum(linears[name].weight.shape) if pivoted else None
    attach_truncated(model, modules)
    costs = {name: float(sum(linear.weight.shape) * min(linear.weight.shape)) for name, linear in linears.items()}
    losses: list[float] = []
    start = {name: 0.4 * module.full_rank for name, module in modules.items()}
    windows = WINDOWS[:2]  # the same batch every step, so that the curve falls if the gradient points downhill
    settings = SETTINGS | {"steps": 12, "beta": 1 / (0.1 * 32)}
    learned = train(model, modules, costs, start, windows, on_step=lambda s: losses.append(s.cross_entropy), **settings)
    spent = sum(costs[name] * modules[name].share(rank) for name, rank in learned.items())
    assert spent == pytest.approx(sum(costs[name] * modules[name].share(start[name]) for name in costs), rel=1e-5)
    assert any(abs(learned[name] - start[name]) > 1e-3 for name in learned)
    assert losses[-1] < losses[0]


@given(st.integers(1, 50), st.integers(0, 50), st.floats(0, 1))
def test_a_share_of_the_numbers_is_a_position_and_back(full: int, more: int, at: float) -> None:
    """position(share(τ)) = τ; the share is that of the numbers r(s − r) or r, and 1 at full rank."""
    module = GatedLinear(Factors(torch.ones(1, full), torch.ones(full, 1)), torch.ones(1, 1), None).double()
    rank = 1 + at * (full - 1)
    for pivoted in (None, 2 * full + more):
        module.pivoted = pivoted
        module.fraction.data.fill_(module.share(rank))
        assert module.position().item() == pytest.approx(rank, abs=2e-3)
        assert module.share(full) == pytest.approx(1)
    numbers = [reference.matrix_bytes("pifa", full + more, full, int(r)) - 4 * (full + more) for r in (1, full)]
    assert module.share(1) == pytest.approx(numbers[0] / numbers[1])


def gated_llama(rank: int) -> tuple[torch.nn.Module, dict[str, GatedLinear]]:
    """A tiny model whose gates stand sharply at one rank."""
    model = tiny.model("llama").eval().requires_grad_(False)
    modules = svd_gates(model)
    for module in modules.values():
        module.fraction.data.fill_(rank / module.full_rank)
        module.beta = 10.0
    attach_truncated(model, modules)
    return model, modules


def test_the_kl_objective_is_the_mean_divergence_from_the_dense_model() -> None:
    with torch.no_grad():
        p = tiny.model("llama").eval()(input_ids=WINDOWS).logits.double().softmax(-1)
        model, modules = gated_llama(8)
        q = model(input_ids=WINDOWS).logits.double().softmax(-1)
        loss, entropy = rank_training.training_loss(model, modules, WINDOWS, "kl")
        naive = [sum(p[w, t] * (p[w, t] / q[w, t]).log()) for w in range(len(p)) for t in range(p.shape[1])]
        assert float(loss) == pytest.approx(float(sum(naive)) / len(naive), rel=1e-4)
        chosen, same = rank_training.training_loss(model, modules, WINDOWS, "cross_entropy")
        assert (
            float(chosen)
            == same
            == entropy
            == pytest.approx(float(next_token_loss(model(input_ids=WINDOWS).logits, WINDOWS)))
        )
        assert not any(module.open for module in modules.values()), "the gates close again"
        for module in modules.values():
            module.open = True
        assert float(rank_training.training_loss(model, modules, WINDOWS, "kl")[0]) == pytest.approx(0, abs=1e-6)


def test_gates_close_again_when_the_dense_model_fails() -> None:
    _, modules = gated_llama(8)
    with pytest.raises(RuntimeError), rank_training.opened(modules):
        assert all(module.open for module in modules.values())
        raise RuntimeError
    assert not any(module.open for module in modules.values())


def test_each_objective_lowers_what_it_names_and_they_learn_different_ranks() -> None:
    learned = {}
    for objective in ("cross_entropy", "kl"):
        model, modules = gated_llama(16)
        costs = {name: float(module.full_rank) for name, module in modules.items()}
        curve: list[rank_training.Step] = []
        settings = SETTINGS | {"steps": 12, "beta": 1 / (0.1 * 32)}
        start = dict.fromkeys(modules, 16)
        learned[objective] = train(
            model, modules, costs, start, WINDOWS[:2], objective=objective, on_step=curve.append, **settings
        )
        losses = [step.divergence if objective == "kl" else step.cross_entropy for step in curve]
        assert losses[-1] < losses[0]
        assert all((step.divergence is None) == (objective == "cross_entropy") for step in curve)
    assert learned["kl"] != pytest.approx(learned["cross_entropy"], rel=1e-3)


def test_open_modules_are_not_trained() -> None:
    model = tiny.model("llama").eval().requires_grad_(False)
    modules = svd_gates(model)
    first = next(iter(modules))
    modules[first].open = True
    attach_truncated(model, modules)
    learned = train(model, modules, dict.fromkeys(modules, 1.0), dict.fromkeys(modules, 16), WINDOWS, **SETTINGS)
    assert first not in learned and len(learned) == len(modules) - 1


@pytest.mark.parametrize("pivoted", [False, True])
def test_tied_gates_share_one_rank_and_keep_the_budget(pivoted: bool) -> None:
    def learn(groups: list[list[str]]) -> tuple[dict[str, float], dict[str, float]]:
        """Ranks learned from 16 each, and the numbers that a linear takes at its learned rank beyond those at 16."""
        model = tiny.model("llama").eval().requires_grad_(False)
        modules = svd_gates(model)
        sums = {name: sum(module.get_buffer("weight").shape) for name, module in modules.items()}
        modules[v].open = True  # dense from the start: its group goes on without it
        for name, module in modules.items():
            module.pivoted = sums[name] if pivoted else None
        attach_truncated(model, modules)

        def numbers(name: str, rank: float) -> float:
            return rank * (sums[name] - (rank if pivoted else 0))

        costs = {name: numbers(name, module.full_rank) for name, module in modules.items()}
        learned = train(model, modules, costs, dict.fromkeys(modules, 16), WINDOWS, groups=groups, **SETTINGS)
        return learned, {name: numbers(name, rank) - numbers(name, 16) for name, rank in learned.items()}

    q, k, v = (f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv")  # full ranks 64, 32, 32
    tied, spent = learn([[q, k, v]])
    assert v not in tied
    assert tied[q] == tied[k] and tied[q] != pytest.approx(16, abs=1e-3)
    assert sum(spent.values()) == pytest.approx(0, abs=0.05)
    free, spent = learn([])
    assert free[q] != pytest.approx(free[k], rel=1e-3), "untied, the two learn different ranks"
    assert sum(spent.values()) == pytest.approx(0, abs=0.05)


def test_same_seed_same_fractions() -> None:
    def once() -> dict[str, float]:
        model = tiny.model("llama").eval().requires_grad_(False)
        modules = svd_gates(model)
        attach_truncated(model, modules)
        return train(model, modules, dict.fromkeys(modules, 1.0), dict.fromkeys(modules, 16), WINDOWS, **SETTINGS)

    assert once() == once()


def test_non_finite_loss_names_the_step() -> None:
    model = tiny.model("llama").eval().requires_grad_(False)
    modules = svd_gates(model)
    next(iter(modules.values())).get_buffer("left").fill_(torch.nan)
    attach_truncated(model, modules)
    with pytest.raises(NumericalError, match="step 0"):
        train(model, modules, dict.fromkeys(modules, 1.0), dict.fromkeys(modules, 16), WINDOWS, **SETTINGS)


def test_validation_loss_prefers_more_rank() -> None:
    model = tiny.model("llama").eval().requires_grad_(False)
    with torch.no_grad():
        exact = float(next_token_loss(model(input_ids=WINDOWS).logits, WINDOWS))
    modules = svd_gates(model)
    attach_truncated(model, modules)
    full = rank_training.validation_loss(model, modules, {n: m.full_rank for n, m in modules.items()}, WINDOWS)
    assert full == pytest.approx(exact, rel=1e-4)
    assert all(module.rank is None for module in modules.values())


@pytest.mark.parametrize("objective", ["cross_entropy", "kl"])
def test_a_restored_training_goes_on_with_the_same_bits(objective: Objective) -> None:
    """Through JSON, as a snapshot is kept; without the moments of Adam it would not."""

    def begun() -> RankTraining:
        model, modules = gated_llama(16)
        for module in modules.values():
            module.rank = None
        ones = dict.fromkeys(modules, 1.0)
        return RankTraining(
            model, modules, ones, dict.fromkeys(modules, 16), WINDOWS, **SETTINGS | {"objective": objective}
        )

    whole, first = begun(), begun()
    states = []
    while whole.step < whole.steps:
        whole.advance()
    for _ in range(2):
        first.advance()
    states.append(json.dumps(first.state()))
    resumed, forgetful = begun(), begun()
    resumed.restore(json.loads(states[0]))
    while resumed.step < resumed.steps:
        resumed.advance()
    assert resumed.truncations() == whole.truncations()
    forgotten = json.loads(states[0])
    forgotten["adam"] = [{**moment, "exp_avg": 0.0} for moment in forgotten["adam"]]
    forgetful.restore(forgotten)
    while forgetful.step < forgetful.steps:
        forgetful.advance()
    assert forgetful.truncations() != whole.truncations()
