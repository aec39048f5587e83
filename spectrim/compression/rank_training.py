"""Truncation positions learned by gradient under a byte budget, for `gates` and for `dobi`.

Both attach one learned fraction θ in (0, 1] to every linear and minimise the cross-entropy of the truncated model, or
its divergence from the dense one; after each step the fractions are put back on the plane Σ cost·θ = budget, so that
training never buys loss with bytes.

* gates (ARA, arXiv 2510.19389): W(τ) = left diag(T(τ)) right with FIXED whitened factors; no SVD in the loop.
* dobi (Dobi-SVD, arXiv 2502.02723): the activation of each window, y = U diag(σ∘T(τ)) Vᵀ, through a stable SVD.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spectrim.errors import NumericalError
from spectrim.maths.losses import divergence, next_token_loss
from spectrim.maths.lowrank import Factors
from spectrim.maths.sampling import in_rounds
from spectrim.maths.truncation import smooth_gate, truncated_activation
from spectrim.models.modules import replace

Objective = Literal["cross_entropy", "kl"]

CLOSED = 5.0  # gate widths 1/β beyond τ after which a direction counts as cut


class Truncated(nn.Module):
    """A linear with a learned ``fraction`` θ of the numbers it takes at full rank k, and the steepness β of its gate.

    Two factors of rank τ take θ = τ/k of the numbers that rank k takes. Pivoted ones take τ(s − τ) with s = out + in,
    ``pivoted``: θ = τ(s − τ) / k(s − k). Either way the bytes are linear in θ.
    Linears tied to one rank share θ: k, the ``reach``, is then their largest full rank and s their mean.
    """

    def __init__(self, full_rank: int, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.fraction = nn.Parameter(torch.ones((), device=weight.device))
        self.full_rank, self.bias, self.beta, self.open = full_rank, bias, 1.0, False
        self.reach: float = full_rank
        self.pivoted: float | None = None

    def share(self, rank: float) -> float:
        """θ of a truncation at ``rank``."""
        if self.pivoted is None:
            return rank / self.reach
        return rank * (self.pivoted - rank) / (self.reach * (self.pivoted - self.reach))

    def position(self) -> Tensor:
        """τ, the truncation in directions that θ stands for: the inverse of ``share``, differentiable."""
        if self.pivoted is None:
            return self.fraction * self.reach
        half = self.pivoted / 2
        inside = half**2 - self.fraction * self.reach * (self.pivoted - self.reach)
        return half - inside.clamp(min=1e-6).sqrt()  # a square matrix's slope is infinite at full rank


class GatedLinear(Truncated):
    """y = left diag(T(τ)) right x + bias, T the smooth gate at τ = θ·k; left (out, k) and right (k, in) stay fixed.

    ``open`` is the dense matrix itself; ``rank`` cuts exactly, for validation, full rank being the dense matrix too.
    Directions more than CLOSED gate widths beyond τ (T < 5e-5) are left out of the products: they cost most of them.

    Args:
        factors: of full rank, ordered by singular value.
        weight, bias: of the linear.
    """

    def __init__(self, factors: Factors, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(factors.right.shape[0], weight, bias)
        for name, tensor in (("left", factors.left), ("right", factors.right), ("weight", weight.detach())):
            self.register_buffer(name, tensor, persistent=False)
        self.rank: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.get_buffer("left"), self.get_buffer("right")
        if self.open or self.rank == self.full_rank:
            return linear(x, self.get_buffer("weight"), self.bias)
        if self.rank is not None:
            return linear(linear(x, right[: self.rank]), left[:, : self.rank], self.bias)
        tau = self.position()
        seen = min(self.full_rank, math.ceil(tau.item() + CLOSED / self.beta))
        inner = linear(x, right[:seen])
        return linear(inner * smooth_gate(tau, seen, self.beta).to(inner.dtype), left[:, :seen], self.bias)


class TruncatedActivation(Truncated):
    """y = U diag(σ∘T(τ)) Vᵀ of the linear's own output, per window, as Dobi-SVD trains its positions.

    The output of a window of n tokens has at most k = min(n, out, in) singular values, so τ = θ·k.
    """

    def __init__(self, original: nn.Linear, terms: int, threshold: float) -> None:
        super().__init__(min(original.weight.shape), original.weight, original.bias)
        self.register_buffer("weight", original.weight.detach(), persistent=False)
        self.terms, self.threshold = terms, threshold

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.get_buffer("weight"))
        if not self.open:
            windows = y.reshape(-1, *y.shape[-2:]) if x.dim() > 2 else y.unsqueeze(0)
            tau = self.position() * min(1.0, windows.shape[-2] / self.full_rank)
            cut = [truncated_activation(w, tau, self.beta, self.terms, self.threshold, self.full_rank) for w in windows]
            y = torch.stack(cut).reshape(y.shape)
        return y if self.bias is None else y + self.bias


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


def attach(model: nn.Module, modules: Mapping[str, Truncated]) -> None:
    """Put every truncated module in the place of the linear of its name."""
    for name, module in modules.items():
        replace(model, name, module)


def train(
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
    on_step: Callable[[Step], None] = lambda step: None,
) -> dict[str, float]:
    """Truncations τ that minimise the ``objective`` on ``windows`` at the cost of ``initial``, in directions.

    Adam on θ with a cosine learning rate; the gate's width goes geometrically from ``width`` of the full rank to 1/β
    components. After every step θ is projected onto Σ cost·θ = Σ cost·θ(initial), τ inside [1, k].

    Args:
        modules: linear name -> the module attached to ``model``; those that are ``open`` are not trained.
        costs: linear name -> bytes of its full rank in factored form.
        initial: linear name -> rank to start from.
        windows: (windows, seq) int64; each step takes ``batch_size`` of them in a seeded order.
        groups: names of gates that share one rank.
        objective: cross-entropy of the text, or the divergence from the dense model (``training_loss``).

    Raises:
        NumericalError: the loss is not finite, naming the step.
    """
    trained = [name for name, module in modules.items() if not module.open]
    if not trained:
        return {}
    units = _tie(modules, costs, initial, trained, groups)
    parameters = [leader.fraction for leader, _ in units]
    cost = torch.tensor([price for _, price in units], dtype=torch.float64)
    floor = torch.tensor([leader.share(1) for leader, _ in units], dtype=torch.float64)
    budget = float(cost @ _values(parameters))
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = in_rounds(len(windows), steps * batch_size, seed)
    for step in range(steps):
        started = time.perf_counter()
        mean_width = _anneal([modules[name] for name in trained], width, beta, step / max(steps - 1, 1))
        batch = windows[order[step * batch_size : (step + 1) * batch_size]]
        loss, entropy = training_loss(model, modules, batch, objective)
        _require_finite(step, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        projected = onto_budget(_values(parameters), cost, budget, floor)
        for parameter, value in zip(parameters, projected.tolist(), strict=True):
            parameter.data.fill_(value)
        divergence = loss.item() if objective == "kl" else None
        on_step(Step(step, entropy, divergence, mean_width, time.perf_counter() - started))
    return {name: modules[name].position().item() for name in trained}


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


@contextmanager
def opened(modules: Mapping[str, Truncated]) -> Iterator[None]:
    """The dense model for the length of the ``with``."""
    before = {name: module.open for name, module in modules.items()}
    for module in modules.values():
        module.open = True
    try:
        yield
    finally:
        for name, module in modules.items():
            module.open = before[name]


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
