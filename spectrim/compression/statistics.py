"""Second moments of what enters and leaves every linear of a block, and the whitened factors made from them.

For a linear y = W x with tokens t: gram G = Σ_t x_t x_tᵀ, mean = Σ_t x_t / n_tokens, abs_mean = Σ_t |x_t| / n_tokens
and gradient_gram D = Σ_t g_t g_tᵀ with g_t = ∂L/∂y_t and L the cross-entropy summed over tokens. Linears that read the
same tensor (q/k/v, gate/up) share their input's statistics. Blocks are streamed: forward from the embedding, then
backward from the loss, each block recomputed from its stored input, so that no more than one block and its hidden
states are in memory.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from scipy.linalg.blas import ssyrk
from torch import Tensor, nn

from spectrim.compression.expert_statistics import shrunk
from spectrim.errors import ModelError, NumericalError
from spectrim.maths.losses import next_token_loss
from spectrim.maths.lowrank import Factors, smaller_root, spectrum, two_sided
from spectrim.maths.whitening import Whitener
from spectrim.models.blocks import BlockModel, factored, hooked, observed
from spectrim.models.experts import expert_groups

LAST_HIDDEN = "last_hidden.safetensors"
SYRK_FEATURES = 1024  # below, the general product with its better threading wins


def second_moment(x: Tensor) -> Tensor:
    """xᵀx of x (tokens, features) float32, of which only the upper triangle is to be read.

    On the CPU large ones go through BLAS syrk, which computes that half alone: 1.5 times as fast at 1,536 features.
    """
    if x.device.type != "cpu" or x.shape[1] < SYRK_FEATURES:
        return x.T @ x
    return torch.from_numpy(ssyrk(1.0, x.contiguous().numpy().T))


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Symmetric (n, n) -> its upper triangle, row by row, (n(n+1)/2,) float32: the precision Grams are summed from."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns].float().cpu()


def unpack_symmetric(triangle: Tensor) -> Tensor:
    """Inverse of ``pack_symmetric``: (n(n+1)/2,) -> (n, n) float64."""
    size = round(((8 * triangle.numel() + 1) ** 0.5 - 1) / 2)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size)
    matrix[rows, columns] = triangle.double()
    return matrix + matrix.triu(1).T


def batches(n_windows: int, batch_size: int) -> Iterator[slice]:
    """Slices of at most ``batch_size`` that cover range(n_windows) in order."""
    for start in range(0, n_windows, batch_size):
        yield slice(start, min(start + batch_size, n_windows))


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
        ``{"gram.LINEAR": packed Gram, "mean.LINEAR" and "abs_mean.LINEAR": (in,) float64}`` with one entry per distinct
        input, named after the first linear that reads it; for every linear the name its input stands under; the output,
        as ``hidden``.

    Raises:
        NumericalError: a non-finite input, naming the linear and the window.
    """
    sums: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    tokens: dict[str, int] = defaultdict(int)
    seen: list[tuple[Tensor, str]] = []
    part = slice(0, 0)

    def observe(name: str, x: Tensor) -> None:
        owner = next((other for tensor, other in seen if tensor is x), None)
        if owner is None:
            seen.append((x, name))
            flat = x.reshape(-1, x.shape[-1]).float()
            tokens[name] += len(flat)
            block = second_moment(flat)
            if not torch.isfinite(block.diagonal().sum()):
                raise NumericalError(_non_finite(name, x, part, "input"))
            sums[name] = sums[name].add_(block) if name in sums else block.double()
            for total, values in ((f"mean.{name}", flat), (f"abs_mean.{name}", flat.abs())):
                added = values.sum(0).double()
                totals[total] = totals[total] + added if total in totals else added
        owners[name] = owner or name

    output = torch.empty_like(hidden)
    with model.resident(index), observed(model.linears[index], observe):
        for part in batches(len(hidden), batch_size):
            seen.clear()
            result = model.run(index, hidden[part].to(model.device))
            if not torch.isfinite(result.sum()):
                raise NumericalError(_non_finite(model.names[index], result, part, "output"))
            output[part] = result.cpu()
    for experts in _experts(model, index):
        sums |= shrunk(sums, tokens, experts)
        for name in experts:
            owners.setdefault(name, name)
            for total in (f"mean.{name}", f"abs_mean.{name}"):
                totals.setdefault(total, sums[name].new_zeros(len(sums[name])))
    if unseen := sorted(model.linears[index].keys() - owners.keys()):
        raise ModelError(f"{unseen[0]}: its block never calls it; name it in compression.exclude")
    n_tokens = hidden.shape[0] * hidden.shape[1]
    tensors = {f"gram.{name}": pack_symmetric(gram) for name, gram in sums.items()}
    tensors |= {name: (total / n_tokens).cpu() for name, total in totals.items()}
    return tensors, owners, output


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
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = defaultdict(int)
    part = slice(0, 0)

    def accumulate(name: str, g: Tensor) -> None:
        flat = g.reshape(-1, g.shape[-1]).float()
        tokens[name] += len(flat)
        block = second_moment(flat)
        if not torch.isfinite(block.diagonal().sum()):
            raise NumericalError(_non_finite(name, g, part, "output gradient"))
        sums[name] = sums[name].add_(block) if name in sums else block.double()

    below = torch.empty_like(hidden)
    with model.resident(index), _observed_gradients(model.linears[index], accumulate):
        for part in batches(len(hidden), batch_size):
            leaf = hidden[part].to(model.device).requires_grad_()
            output = model.run(index, leaf)
            below[part] = torch.autograd.grad(output, leaf, gradient[part].to(model.device))[0].cpu()
    for experts in _experts(model, index):
        sums |= shrunk(sums, tokens, experts)
    return {f"gradient_gram.{name}": pack_symmetric(gram) for name, gram in sums.items()}, below


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


def _observed_gradients(
    linears: Mapping[str, nn.Linear], observe: Callable[[str, Tensor], None]
) -> AbstractContextManager[None]:
    """Let ``observe(name, g)`` see the gradient of every linear's output for the length of the ``with``."""

    def hook(name: str) -> Any:
        def register(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(lambda g: observe(name, g))

        return register

    return hooked(module.register_forward_hook(hook(name)) for name, module in linears.items())


def _experts(model: BlockModel, index: int) -> list[list[str]]:
    """The compressible linears of the experts of block ``index``, a list for each kind."""
    groups = expert_groups(model.blocks[index], model.names[index])
    return [[name for name in names if name in model.linears[index]] for names in groups]


def _non_finite(name: str, values: Tensor, part: slice, what: str) -> str:
    if values.numel() % (part.stop - part.start):  # of an expert, which sees some tokens of every window
        return (
            f"{name}: non-finite {what} in calibration windows {part.start} to {part.stop - 1}; activations must be "
            "finite: use prepare.load_dtype float32 or bfloat16, or check the model's weights"
        )
    windows = values.reshape(part.stop - part.start, -1)
    bad = next((i for i, row in enumerate(windows) if not torch.isfinite(row).all()), None)
    if bad is None:  # finite themselves, but not their squares
        return (
            f"{name}: {what} of up to {float(values.detach().abs().max()):.3g} in calibration windows {part.start} to "
            f"{part.stop - 1} overflows its Gram; check the model's weights"
        )
    return (
        f"{name}: non-finite {what} in calibration window {part.start + bad}; "
        "activations must be finite: use prepare.load_dtype float32 or bfloat16, or check the model's weights"
    )
