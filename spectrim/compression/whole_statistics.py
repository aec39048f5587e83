"""What enters and leaves every linear, from passes through the whole model as transformers runs it.

It serves every model that fits into memory, also those whose blocks cannot be run one by one: blocks that are told
about the tokens, that share keys and values, or that hand more than hidden states to one another. What it sums is what
``statistics`` sums block by block.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from spectrim.compression.moments import GradientMoments, InputMoments, batches
from spectrim.errors import NumericalError
from spectrim.maths.losses import next_token_loss
from spectrim.models.blocks import first
from spectrim.models.hooks import differentiable, hooked, observed, observed_gradients
from spectrim.models.whole import WholeModel

Statistics = tuple[dict[str, Tensor], dict[str, str]]


@torch.no_grad()
def input_statistics_of(
    model: WholeModel, indices: Sequence[int], windows: Tensor, batch_size: int
) -> tuple[list[Statistics], Tensor]:
    """Of the blocks ``indices`` what ``InputMoments.finished`` returns; and what leaves the last block of the model.

    Args:
        windows: (windows, seq) int64.
        batch_size: windows per pass.

    Returns:
        One of them per index; hidden states (windows, seq, hidden) on the CPU.
    """
    moments = {index: InputMoments() for index in indices}
    leaving: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        leaving.append(first(output).cpu())

    last = model.running.get_submodule(model.names[-1])
    with ExitStack() as hooks:
        hooks.enter_context(hooked([last.register_forward_hook(keep)]))
        for index, sums in moments.items():
            hooks.enter_context(observed(model.running_linears(index), sums.observe))
        for part in batches(len(windows), batch_size):
            for sums in moments.values():
                sums.start(part)
            model.running(input_ids=windows[part].to(model.device), use_cache=False)
    found = [
        sums.finished(model.linears[index], model.experts(index), windows.numel()) for index, sums in moments.items()
    ]
    return found, torch.cat(leaving)


def gradient_statistics_of(
    model: WholeModel, indices: Sequence[int], windows: Tensor, batch_size: int
) -> list[dict[str, Tensor]]:
    """Of the blocks ``indices`` what ``GradientMoments.finished`` returns; the loss is summed over the tokens.

    Raises:
        NumericalError: the loss or a gradient is not finite.
    """
    moments = {index: GradientMoments() for index in indices}
    with ExitStack() as hooks:
        # the weights need no gradient: what enters the first block does
        hooks.enter_context(hooked([model.running.get_input_embeddings().register_forward_hook(differentiable)]))
        for index, sums in moments.items():
            hooks.enter_context(observed_gradients(model.running_linears(index), sums.observe))
        for part in batches(len(windows), batch_size):
            for sums in moments.values():
                sums.start(part)
            tokens = windows[part].to(model.device)
            with torch.enable_grad():
                logits = model.running(input_ids=tokens, use_cache=False).logits
                loss = next_token_loss(logits, tokens) * (tokens.shape[1] - 1) * len(tokens)
            if not torch.isfinite(loss):
                raise NumericalError(
                    f"calibration windows {part.start} to {part.stop - 1}: the loss is {loss.item()}; check the "
                    "model's weights, or use prepare.load_dtype float32 or bfloat16"
                )
            loss.backward()
    return [sums.finished(model.linears[index], model.experts(index)) for index, sums in moments.items()]
