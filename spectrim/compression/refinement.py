"""Whatever is stored, trained until the compressed model predicts what the dense model predicts.

    min over factors, scales, norms and biases of  Σ_t [ λ KL(p_t ‖ q_t) + (1 − λ) (−log q_t[x_{t+1}]) ]

p_t and q_t are the next-token distributions of the dense and of the compressed model on the calibration windows, λ the
``kl_weight``. Trained are the factors of a truncated matrix, the scales of a rounded one and the factors of what
rounding lost, and the vectors of the blocks: norms and biases. Integers, embeddings, the head with its norm, and the
matrices left dense stay as they are. The closed form starts it, AdamW with a linear warm-up and a cosine descent ends
it. What the next step depends on is in ``StoredTraining.state``, so that a run may be killed and continued with the
same bits.

Source: distillation, Hinton et al. 2015, arXiv:1503.02531; on the factors of a truncated model, AA-SVD 2026,
arXiv:2604.02119.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectrim.compression.rounded_training import RoundedTraining
from spectrim.compression.stepped_training import SteppedTraining
from spectrim.errors import NumericalError
from spectrim.formats.lowrank_linear import LowRankLinear
from spectrim.maths.losses import divergence, token_loss
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import balance
from spectrim.maths.residual import RoundedWeight
from spectrim.maths.sampling import in_rounds
from spectrim.maths.schedule import BETAS, course
from spectrim.maths.two_sided_rounding import Stepped
from spectrim.models.blocks import leaving, logits
from spectrim.models.modules import block_vectors, decoder_blocks, replace

if TYPE_CHECKING:  # importing it takes seconds, and a result of the store needs no model
    from transformers import PreTrainedModel

StepsTraining = RoundedTraining | SteppedTraining
"""What stands in for a rounded weight."""

CLIP = 1.0  # norm of the gradient over all that has one learning rate
PARTS = ("parameter", "mean", "square")  # of a run's state
POSITIONS = 128  # whose predictions are in memory at once: a vocabulary is 100 times as wide as the hidden states


def attach_factors(model: nn.Module, factors: Mapping[str, Factors]) -> dict[str, LowRankLinear]:
    """Put float32 factors in the place of the linears of their names.

    The norm of each direction is shared by both factors first, so that one learning rate suits both.

    Args:
        model: changed in place.
        factors: linear name -> left (out, rank), right (rank, in).
    """
    modules = {}
    for name, pair in factors.items():
        linear: Any = model.get_submodule(name)
        even = balance(Factors(*(part.to(linear.weight.device, torch.float32) for part in pair)))
        modules[name] = LowRankLinear.from_factors(even, linear.bias)
        replace(model, name, modules[name])
    return modules


def attach_rounded(model: nn.Module, rounded: Mapping[str, RoundedWeight]) -> dict[str, StepsTraining]:
    """Put rounded weights in the place of the linears of their names, with the factors of what rounding lost.

    Args:
        model: changed in place.
        rounded: linear name -> values (out, in) and their steps, and left (out, rank), right (rank, in) or None.
    """
    modules: dict[str, StepsTraining] = {}
    for name, (weight, residual) in rounded.items():
        linear: Any = model.get_submodule(name)
        module = (
            SteppedTraining(weight, linear.bias)
            if isinstance(weight, Stepped)
            else RoundedTraining(weight, residual, linear.bias)
        )
        modules[name] = module.to(next(linear.parameters()).device)  # it may stand in for a linear already
        replace(model, name, modules[name])
    return modules


class LearningRates(NamedTuple):
    """Peaks: of factors with even norms, of scales relative to their size, of norms and biases (0: they stay)."""

    factors: float
    scales: float
    vectors: float


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Let every decoder block of ``model`` forget its activations and compute them again for its gradient.

    transformers' own switch works in training mode only, which brings dropout with it.
    """
    for block in decoder_blocks(model)[1]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class StoredTraining:
    """A training run over what is stored of ``model``; ``advance`` takes one step, ``state`` is all it depends on.

    Args:
        model: with what is trained attached. Its head is the dense model's too, since refinement leaves it as it is.
        factored, rounded: linear name -> its module, as ``attach_factors`` and ``attach_rounded`` return them.
        windows: (windows, seq) int64; each step takes ``batch_size`` of them in a seeded order, every window once
            before any comes again.
        expected: indices of windows -> what leaves the dense model's last block for them, (windows, seq, hidden).
        steps: of the whole run; the learning rate's course depends on it.
        learning_rates: their peaks.
        kl_weight: λ; 1 learns from the dense model alone, 0 from the text alone.
        seed: of the order of the windows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        factored: Mapping[str, LowRankLinear],
        rounded: Mapping[str, StepsTraining],
        windows: Tensor,
        expected: Callable[[Tensor], Tensor],
        *,
        steps: int,
        batch_size: int,
        learning_rates: LearningRates,
        kl_weight: float,
        seed: int,
    ) -> None:
        self.model, self.windows, self.expected = model, windows, expected
        self.steps, self.batch_size, self.kl_weight = steps, batch_size, kl_weight
        self.step = 0
        self._factored, self._rounded = factored, rounded
        groups = self._groups(learning_rates)
        self.parameters = {name: part for parts, _ in groups for name, part in parts.items()}
        model.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self._blocks = decoder_blocks(model)[1]
        self._optimizer = torch.optim.AdamW(
            [{"params": list(parts.values()), "lr": rate, "peak": rate} for parts, rate in groups],
            betas=BETAS,
            weight_decay=0.0,
            fused=True,
        )
        self._order = in_rounds(len(windows), steps * batch_size, seed)

    def advance(self) -> float:
        """One step; returns its loss in nats per token before the step.

        Raises:
            NumericalError: the loss is not finite.
        """
        chosen = self._order[self.step * self.batch_size : (self.step + 1) * self.batch_size]
        device = next(iter(self.parameters.values())).device
        tokens, expected = self.windows[chosen].to(device), self.expected(chosen).to(device)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            hidden, n_returned = leaving(self.model, tokens)
            loss, gradient = self.loss_and_gradient(tokens, expected, hidden.detach(), n_returned)
        if not math.isfinite(loss):
            raise NumericalError(f"refinement step {self.step}: the loss is {loss}; lower refinement.learning_rate")
        hidden.backward(gradient)
        for group in self._optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], CLIP)
            group["lr"] = group["peak"] * course(self.step, self.steps)
        self._optimizer.step()
        self.step += 1
        return loss

    def loss_and_gradient(
        self, tokens: Tensor, expected: Tensor, hidden: Tensor, n_returned: int
    ) -> tuple[float, Tensor]:
        """mean_t λ KL(p_t ‖ q_t) + mean_t (1 − λ) (−log q_t[x_{t+1}]) and its gradient by ``hidden``.

        The second mean is over the positions that have a next token. Logits exist for POSITIONS positions at a time.

        Args:
            tokens: (batch, seq).
            expected, hidden: what leaves the last block of the dense and of the compressed model, (batch, seq, hidden).
            n_returned: see ``blocks.logits``.
        """
        leaf, seq_len, total = hidden.requires_grad_(), hidden.shape[1], 0.0
        for start in range(0, seq_len, POSITIONS):
            part = slice(start, start + POSITIONS)
            following = tokens[:, start + 1 : start + 1 + POSITIONS]
            predicted = logits(self.model, self._blocks, tokens[:, part], leaf[:, part], n_returned)
            loss = predicted.new_zeros((), dtype=torch.float32)
            if self.kl_weight:
                with torch.no_grad():
                    teacher = logits(self.model, self._blocks, tokens[:, part], expected[:, part], n_returned)
                loss = loss + self.kl_weight * predicted.shape[1] / seq_len * divergence(predicted, teacher)
            if self.kl_weight < 1 and following.shape[1]:
                share = following.shape[1] / (seq_len - 1)
                loss = loss + (1 - self.kl_weight) * share * token_loss(predicted[:, : following.shape[1]], following)
            if loss.requires_grad:  # the last position has no next token
                loss.backward()
            total += loss.item()
        assert leaf.grad is not None
        return total, leaf.grad

    def state(self) -> dict[str, dict[str, Tensor]]:
        """PARTS -> name -> tensor on the CPU: the parameters, and AdamW's moments, which step 0 does not have.

        They are the run's own tensors where it is on the CPU: save or copy them before the next step.
        """
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
        for name, parameter in self.parameters.items():
            parts["parameter"][name] = parameter.detach().cpu()
            if moments := self._optimizer.state.get(parameter):
                parts["mean"][name], parts["square"][name] = moments["exp_avg"].cpu(), moments["exp_avg_sq"].cpu()
        return parts

    def restore(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Go on after ``step`` steps from what ``state`` returned then."""
        self.step = step
        self.set(state["parameter"])
        for name, parameter in self.parameters.items():
            if step:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),
                    # in the parameter's order in memory, which the fused kernel goes by
                    "exp_avg": torch.empty_like(parameter, requires_grad=False).copy_(state["mean"][name]),
                    "exp_avg_sq": torch.empty_like(parameter, requires_grad=False).copy_(state["square"][name]),
                }

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Give the trained parameters the values that ``state`` had for "parameter"."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def factors(self) -> dict[str, Factors]:
        """The factors as they are now: linear name -> left (out, rank), right (rank, in), float32, on the CPU."""
        return {
            name: Factors(module.left.detach().cpu(), module.weight.detach().cpu().mT)
            for name, module in self._factored.items()
        }

    def rounded(self) -> dict[str, RoundedWeight]:
        """The rounded weights as they are now, and their factors; on the CPU."""
        return {name: module.stored() for name, module in self._rounded.items()}

    def vectors(self) -> dict[str, Tensor]:
        """Norms and biases as they are now, by their names in the model; on the CPU."""
        return {name: part.detach().cpu() for name, part in self._vectors.items()}

    def _groups(self, rates: LearningRates) -> list[tuple[dict[str, nn.Parameter], float]]:
        """Name -> parameter of all that has one learning rate, and that rate."""
        factors = {
            f"{name}.{side}": getattr(module, side)
            for name, module in self._factored.items()
            for side in ("left", "weight")
        }
        trained = {f"{name}.{part}": value for name, m in self._rounded.items() for part, value in m.trained().items()}
        scales = {name: value for name, value in trained.items() if name.endswith(".change")}
        factors |= {name: value for name, value in trained.items() if name not in scales}
        self._vectors = block_vectors(self.model) if rates.vectors else {}
        found = [(factors, rates.factors), (scales, rates.scales), (self._vectors, rates.vectors)]
        return [(parts, rate) for parts, rate in found if parts]
