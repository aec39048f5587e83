"""What enters and leaves every linear of a block, streamed, and the whitened factors made from it.

Blocks are streamed: forward from the embedding, then backward from the loss, the cross-entropy summed over tokens, each
block recomputed from its stored input, so that no more than one block and its hidden states are in memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from spectrim.compression.moments import GradientMoments, InputMoments, batches, non_finite, unpack_symmetric
from spectrim.errors import NumericalError
from spectrim.maths.losses import next_token_loss
from spectrim.maths.lowrank import Factors, smaller_root, spectrum, two_sided
from spectrim.maths.whitening import Whitener
from spectrim.models.blocks import BlockModel, factored
from spectrim.models.hooks import observed, observed_gradients

LAST_HIDDEN = "last_hidden.safetensors"


def embedded(model: BlockModel, windows: Tensor, batch_size: int = 1) -> Tensor:
    """Hidden states (windows, seq, hidden) that enter the first block, on the CPU, of windows (windows, seq)."""
    return torch.cat([model.embed(windows[part]).cpu() for part in batches(len(windows), batch_size)])


@torch.no_grad()
def forward_block(
    model: BlockModel, index: int, hidden: Tensor, batch_size: int, factors: Mapping[str, Factors] | None = None
) -> Tensor:
    """Hidden states (windows, seq, hidden) through block ``index``; no statistics. The result is on the CPU.

    Linears named in ``factors`` compute with W' = left @ right.
    """
    output = torch.empty_like(hidden)
    with model.resident(index), factored(model.linears[index], factors or {}):
        for part in batches(len(hidden), batch_size):
            output[part] = model.run(index, hidden[part].to(model.device)).cpu()
    return output


@torch.no_grad()
def input_statistics(
    model: BlockModel, index: int, hidden: Tensor, batch_size: int
) -> tuple[dict[str, Tensor], dict[str, str], Tensor]:
    """Grams and means of the inputs of block ``index``, and the hidden states that leave it.

    Args:
        hidden: (windows, seq, hidden), what enters the block.
        batch_size: windows per forward pass.

    Returns:
        What ``InputMoments.finished`` returns, and the output, as ``hidden``.

    Raises:
        NumericalError: a non-finite input, naming the linear and the window.
    """
    moments, output = InputMoments(), torch.empty_like(hidden)
    with model.resident(index), observed(model.linears[index], moments.observe):
        for part in batches(len(hidden), batch_size):
            moments.start(part)
            result = model.run(index, hidden[part].to(model.device))
            if not torch.isfinite(result.sum()):
                raise NumericalError(non_finite(model.names[index], result, part, "output"))
            output[part] = result.cpu()
    found = moments.finished(model.linears[index], model.experts(index), hidden.shape[0] * hidden.shape[1])
    return *found, output


def loss_gradient(model: BlockModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """∂L/∂hidden at the output of the last block, L = Σ next-token cross-entropy; (windows, seq, hidden) on the CPU."""
    gradient = torch.empty_like(hidden)
    for i in range(len(hidden)):
        leaf = hidden[i : i + 1].to(model.device).requires_grad_()
        window = tokens[i : i + 1]
        loss = next_token_loss(model.logits(window, leaf), window) * (window.shape[1] - 1)
        if not torch.isfinite(loss):
            state = "finite" if torch.isfinite(leaf).all() else "not finite"
            raise NumericalError(
                f"calibration window {i}: the loss is {loss.item()} after the head ({state} hidden states leave "
                f"{model.names[-1]}, the last block); check the weights of the final norm and the head, and that window"
            )
        gradient[i : i + 1] = torch.autograd.grad(loss, leaf)[0].cpu()
    return gradient


def gradient_statistics(
    model: BlockModel, index: int, hidden: Tensor, gradient: Tensor, batch_size: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient Grams of the outputs of block ``index``, and the gradient that enters the block from above.

    Args:
        hidden: (windows, seq, hidden), what enters the block.
        gradient: ∂L/∂(output of the block), same shape.

    Returns:
        ``{"gradient_gram.LINEAR": packed D}`` and ∂L/∂hidden.

    Raises:
        NumericalError: a non-finite gradient, naming the linear and the window.
    """
    moments, below = GradientMoments(), torch.empty_like(hidden)
    with model.resident(index), observed_gradients(model.linears[index], moments.observe):
        for part in batches(len(hidden), batch_size):
            moments.start(part)
            leaf = hidden[part].to(model.device).requires_grad_()
            output = model.run(index, leaf)
            below[part] = torch.autograd.grad(output, leaf, gradient[part].to(model.device))[0].cpu()
    return moments.finished(model.linears[index], model.experts(index)), below


def decompose(
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    input_of: Mapping[str, str],
    n_tokens: int,
    n_gradient_tokens: int,
    damping: float,
    max_damping: float,
) -> dict[str, Tensor]:
    """Full-rank two-sided factors and both spectra of every linear of a block.

    With G and D divided by their numbers of tokens, the two-sided spectrum predicts the loss: dropping the components
    i > r raises the cross-entropy by about Σ_{i>r} σᵢ² / 2 nats per token, comparable across matrices. The input
    spectrum's Σ_{i>r} σᵢ² is the mean squared output error per token.

    Returns:
        Per linear ``left.`` (out, k) and ``right.`` (k, in) float32, ``two_sided.`` and ``input.`` (k,) float64,
        k = min(out, in), and ``damping.`` (1,), what the decomposed side needed.
    """
    tensors: dict[str, Tensor] = {}
    roots: dict[str, dict[str, Whitener]] = {}
    for name, weight in weights.items():
        owner = input_of[name]
        gram = unpack_symmetric(statistics[f"gram.{owner}"]).to(weight.device) / n_tokens
        gradient_gram = unpack_symmetric(statistics[f"gradient_gram.{name}"]).to(weight.device) / n_gradient_tokens
        try:
            side = roots.get(owner) if weight.shape[0] > weight.shape[1] else None
            side = side or smaller_root(weight, gram, gradient_gram, damping, max_damping)
            if "gram_root" in side:  # serves all that share the input
                roots[owner] = side
            result = two_sided(weight, gram, gradient_gram, damping, max_damping, **side)
            input_sigma = spectrum(weight, gram)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None
        tensors[f"left.{name}"] = result.left.float().cpu().contiguous()
        tensors[f"right.{name}"] = result.right.float().cpu().contiguous()
        tensors[f"two_sided.{name}"] = result.sigma.cpu()
        tensors[f"input.{name}"] = input_sigma.cpu()
        tensors[f"damping.{name}"] = torch.tensor([root.damping for root in side.values()], dtype=torch.float64)
    return tensors


def gram_of(folder: Path, index: int, name: str) -> Tensor:
    """The input Gram (in, in) float64 of linear ``name`` of block ``index``, read from a capture folder."""
    return unpack_symmetric(_input_statistic(folder, index, "gram", name))


def gradient_gram_of(folder: Path, index: int, name: str) -> Tensor:
    """The output-gradient Gram (out, out) float64 of linear ``name`` of block ``index``, read from a capture folder."""
    with safe_open(folder / "gradients" / f"{index:03}.safetensors", framework="pt") as handle:
        return unpack_symmetric(handle.get_tensor(f"gradient_gram.{name}"))


def abs_mean_of(folder: Path, index: int, name: str) -> Tensor:
    """The mean over tokens of |x|, (in,) float64, of linear ``name`` of block ``index``, read from a capture folder."""
    return _input_statistic(folder, index, "abs_mean", name)


def inputs_of(file: Path) -> dict[str, str]:
    """Linear -> the linear under whose name its input's statistics stand, from a block's file of input statistics."""
    with safe_open(file, framework="pt") as handle:
        return json.loads(handle.metadata()["input_of"])


def _input_statistic(folder: Path, index: int, kind: str, name: str) -> Tensor:
    file = folder / "inputs" / f"{index:03}.safetensors"
    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor(f"{kind}.{inputs_of(file)[name]}")


def last_hidden(folder: Path, seq_len: int) -> Tensor:
    """What leaves the last block of the dense model, (windows, seq_len, hidden), read from a capture folder."""
    with safe_open(folder / "inputs" / LAST_HIDDEN, framework="pt") as handle:
        return handle.get_slice("hidden")[:, :seq_len]
