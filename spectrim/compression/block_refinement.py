"""The factors of one block trained together until the block returns what the original block returned.

    min over the factors of block b of  mean_t ‖f'_b(x'_t) − y_t‖² / ‖y_t‖²,   y_t = f_b(x_t)

x_t enters the block in the original model and x'_t behind the blocks compressed before it, so that each block makes up
for what those have lost. The quotient is per token: otherwise the few tokens that models give huge hidden states would
be all that counts. AdamW, ``maths.schedule.course``.

Source: blockwise distillation of truncated factors, AA-SVD 2026, arXiv:2604.02119.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import balance
from spectrim.maths.sampling import in_rounds
from spectrim.maths.schedule import BETAS, course
from spectrim.models.blocks import BlockModel, factored


class Hidden(NamedTuple):
    """What enters the compressed block and what should leave it, both (windows, seq, hidden), on the CPU."""

    entering: Tensor
    leaving: Tensor


class Refined(NamedTuple):
    """The better factors on the validation windows, float32, and the mean error there before and after."""

    factors: dict[str, Factors]
    before: float
    after: float


def refine_block(
    model: BlockModel,
    index: int,
    factors: Mapping[str, Factors],
    training: Hidden,
    validation: Hidden,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> Refined:
    """Train ``factors`` of block ``index`` for ``steps`` windows of ``training``.

    Factors that are no better on ``validation`` than those it began with are not kept: ``after`` then equals
    ``before``. O(steps) forward and backward passes of one block; memory of one block's activations.

    Args:
        factors: linear name -> left (out, rank), right (rank, in); linears that are not named stay as they are.
        learning_rate: its peak, for factors with even norms.
        seed: of the order of the windows.

    Raises:
        NumericalError: the error is not finite, naming block and step.
    """
    even = {
        name: balance(Factors(*(part.to(model.device, torch.float32) for part in pair)))
        for name, pair in factors.items()
    }
    trained = {name: Factors(*(part.clone().requires_grad_() for part in pair)) for name, pair in even.items()}
    parameters = [part for pair in trained.values() for part in pair]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=0.0, fused=True)
    with model.resident(index), factored(model.linears[index], trained):
        before = _error(model, index, validation)
        for step, window in enumerate(in_rounds(len(training.entering), steps, seed).tolist()):
            optimizer.zero_grad(set_to_none=True)
            loss = _distance(model, index, training, window)
            if not torch.isfinite(loss):
                raise NumericalError(
                    f"{model.names[index]}: block refinement step {step}: the error is {loss.item()}; "
                    "lower update_weights.block_refinement.learning_rate"
                )
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * course(step, steps)
            optimizer.step()
        after = _error(model, index, validation)
    if not after < before:
        return Refined(even, before, before)
    return Refined({name: Factors(*(part.detach() for part in pair)) for name, pair in trained.items()}, before, after)


@torch.no_grad()
def _error(model: BlockModel, index: int, hidden: Hidden) -> float:
    distances = [float(_distance(model, index, hidden, i)) for i in range(len(hidden.entering))]
    return math.fsum(distances) / len(distances)


def _distance(model: BlockModel, index: int, hidden: Hidden, window: int) -> Tensor:
    """mean_t ‖f'(x'_t) − y_t‖² / ‖y_t‖² of one window, float32."""
    expected = hidden.leaving[window].to(model.device).float()
    found = model.run(index, hidden.entering[window : window + 1].to(model.device))[0].float()
    floor = torch.finfo(torch.float32).tiny
    return ((found - expected).square().sum(-1) / expected.square().sum(-1).clamp(min=floor)).mean()
