"""Truncation positions learned by gradient under a byte budget, for `gates` and for `dobi`.

Both attach one learned fraction θ in (0, 1] to every linear and minimise the cross-entropy of the truncated model, or
its divergence from the dense one; after each step the fractions are put back on the plane Σ cost·θ = budget, so that
training never buys loss with bytes.

The linears themselves are in truncated.py.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectrim.compression.truncated import GatedLinear, Truncated, opened
from spectrim.errors import NumericalError
from spectrim.maths.losses import divergence, next_token_loss
from spectrim.maths.sampling import in_rounds

Objective = Literal["cross_entropy", "kl"]


@dataclass(frozen=True)
class Step:
    """One line of the training curve: mean nats per token, mean gate width in units of the full rank.

    ``divergence`` from the dense model's predictions, where that was minimised.
    """

    step: int
    cross_entropy: float
    divergence: float | None
    width: float
    seconds: float


class RankTraining:
    """Truncations τ that minimise the ``objective`` on ``windows`` at the cost of ``initial``, step by step.

    Adam on θ with a cosine learning rate; the gate's width goes geometrically from ``width`` of the full rank to 1/β
    components. After every step θ is projected onto Σ cost·θ = Σ cost·θ(initial), τ inside [1, k].

    Args:
        modules: linear name -> the module attached to ``model``; those that are ``open`` are not trained.
        costs: linear name -> bytes of its full rank in factored form.
        initial: linear name -> rank to start from.
        windows: (windows, seq) int64; each step takes ``batch_size`` of them in a seeded order.
        groups: names of gates that share one rank.
        objective: cross-entropy of the text, or the divergence from the dense model (``training_loss``).
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, Truncated],
        costs: Mapping[str, float],
        initial: Mapping[str, float],
        windows: Tensor,
        *,
        groups: Iterable[Sequence[str]] = (),
        objective: Objective = "cross_entropy",
        steps: int,
        batch_size: int,
        learning_rate: float,
        width: float,
        beta: float,
        seed: int,
    ) -> None:
        self.model, self.modules, self.windows, self.objective = model, modules, windows, objective
        self.steps, self.batch_size, self.width, self.beta = steps, batch_size, width, beta
        self.step = 0
        self._trained = [name for name, module in modules.items() if not module.open]
        units = _tie(modules, costs, initial, self._trained, groups)
        self._parameters = [leader.fraction for leader, _ in units]
        self._order = in_rounds(len(windows), steps * batch_size, seed)
        if not units:
            self.steps = 0  # everything is dense: nothing to learn
            return
        self._cost = torch.tensor([price for _, price in units], dtype=torch.float64)
        self._floor = torch.tensor([leader.share(1) for leader, _ in units], dtype=torch.float64)
        self._budget = float(self._cost @ _values(self._parameters))
        self._optimizer = torch.optim.Adam(self._parameters, lr=learning_rate, betas=(0.9, 0.95))
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)

    def advance(self) -> Step:
        """One step.

        Raises:
            NumericalError: the loss is not finite, naming the step.
        """
        started, step = time.perf_counter(), self.step
        gates = [self.modules[name] for name in self._trained]
        mean_width = _anneal(gates, self.width, self.beta, step / max(self.steps - 1, 1))
        batch = self.windows[self._order[step * self.batch_size : (step + 1) * self.batch_size]]
        loss, entropy = training_loss(self.model, self.modules, batch, self.objective)
        _require_finite(step, loss)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self._set(onto_budget(_values(self._parameters), self._cost, self._budget, self._floor).tolist())
        self.step += 1
        divergence = loss.item() if self.objective == "kl" else None
        return Step(step, entropy, divergence, mean_width, time.perf_counter() - started)

    def truncations(self) -> dict[str, float]:
        """Linear name -> τ in directions, of those that are trained."""
        return {name: self.modules[name].position().item() for name in self._trained}

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as plain numbers: a run restored to it goes on with the same bits."""
        moments = [self._optimizer.state[parameter] for parameter in self._parameters]
        return {
            "step": self.step,
            "fractions": [parameter.item() for parameter in self._parameters],
            "adam": [{name: float(value) for name, value in moment.items()} for moment in moments],
            "schedule": self._schedule.state_dict(),
            "learning_rate": self._optimizer.param_groups[0]["lr"],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""
        self.step = state["step"]
        self._set(state["fractions"])
        for parameter, moment in zip(self._parameters, state["adam"], strict=True):
            self._optimizer.state[parameter] = {
                name: torch.tensor(value, device="cpu" if name == "step" else parameter.device)
                for name, value in moment.items()
            }
        self._schedule.load_state_dict(state["schedule"])
        self._optimizer.param_groups[0]["lr"] = state["learning_rate"]

    def _set(self, fractions: Iterable[float]) -> None:
        for parameter, value in zip(self._parameters, fractions, strict=True):
            parameter.data.fill_(value)


def _require_finite(step: int, loss: Tensor) -> None:
    if not torch.isfinite(loss):
        raise NumericalError(f"train_ranks step {step}: the loss is {loss.item()}; lower train_ranks.learning_rate")


def _values(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.stack([parameter.detach().double().cpu() for parameter in parameters])


def _tie(
    modules: Mapping[str, Truncated],
    costs: Mapping[str, float],
    initial: Mapping[str, float],
    trained: Sequence[str],
    groups: Iterable[Sequence[str]],
) -> list[tuple[Truncated, float]]:
    """Let the trained members of a group share one θ, set to ``initial``; one of them, and their bytes at θ = 1."""
    leader = {name: group[0] for group in groups for name in group}
    units: dict[str, list[str]] = {}
    for name in trained:
        units.setdefault(leader.get(name, name), []).append(name)
    priced = []
    for names in units.values():
        members = [modules[name] for name in names]
        reach: float = max(member.full_rank for member in members)
        sums = [member.pivoted for member in members if member.pivoted is not None]
        pivoted = sum(sums) / len(sums) if sums else None
        if pivoted is not None:
            reach = min(reach, pivoted / 2)  # beyond, τ(s − τ) falls again
        priced.append((members[0], sum(costs[name] * modules[name].share(reach) for name in names)))
        for member in members:
            member.reach, member.pivoted, member.fraction = reach, pivoted, members[0].fraction
        members[0].fraction.data.fill_(members[0].share(max(initial[name] for name in names)))
    return priced


def _anneal(trained: Sequence[Truncated], width: float, beta: float, progress: float) -> float:
    """Set every gate's width between ``width`` of its reach and 1/β components; their mean, in units of the reach."""
    for module in trained:
        widest = max(width * module.reach, 1 / beta)
        module.beta = 1 / (widest * (1 / beta / widest) ** progress)
    return sum(1 / (module.beta * module.reach) for module in trained) / len(trained)


def onto_budget(theta: Tensor, cost: Tensor, budget: float, floor: Tensor) -> Tensor:
    """argmin ‖θ' − θ‖ subject to costᵀθ' = budget and floor ≤ θ' ≤ 1, by bisection on the multiplier λ.

    θ'(λ) = clamp(θ − λ·cost, floor, 1), whose cost falls monotonically in λ.

    Args:
        theta, cost, floor: (n,) float64; ``budget`` in the unit of ``cost``.
    """
    budget = min(max(budget, float(cost @ floor)), float(cost.sum()))
    reach = float(((theta.abs() + 1) / cost).max()) * 2
    low, high = -reach, reach
    for _ in range(200):
        middle = (low + high) / 2
        if float(cost @ torch.clamp(theta - middle * cost, floor, torch.ones_like(floor))) > budget:
            low = middle
        else:
            high = middle
    return torch.clamp(theta - high * cost, floor, torch.ones_like(floor))


def training_loss(
    model: nn.Module, modules: Mapping[str, Truncated], windows: Tensor, objective: Objective
) -> tuple[Tensor, float]:
    """``next_token_loss`` of the truncated model, or its ``divergence`` from the same model with every module ``open``.

    The first also as a number.
    """
    with opened(modules), torch.no_grad():
        teacher = _logits(model, windows) if objective == "kl" else None
    logits = _logits(model, windows)
    entropy = next_token_loss(logits, windows)
    return (entropy if teacher is None else divergence(logits, teacher)), entropy.item()


@torch.no_grad()
def validation_loss(
    model: nn.Module, modules: Mapping[str, GatedLinear], ranks: Mapping[str, int], windows: Tensor
) -> float:
    """Mean cross-entropy in nats per token of the model cut to ``ranks``, one window at a time, summed in float64."""
    for name, module in modules.items():
        module.rank = ranks[name]
    try:
        losses = [float(next_token_loss(_logits(model, window[None]), window[None])) for window in windows]
    finally:
        for module in modules.values():
            module.rank = None
    mean = math.fsum(losses) / len(losses)
    if not math.isfinite(mean):
        bad = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
        raise NumericalError(f"validation window {bad}: the loss is {losses[bad]}; the candidate ranks are unusable")
    return mean


def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=windows.to(device), use_cache=False).logits
    return logits
