"""The naive, obviously right versions of the kernels in spectrim/maths: loops, dense inverses, torch.linalg.svd."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spectrim.maths.lowrank import Factors


def draw(seed: int, out: int, in_: int, tokens: int, skew: float = 1.0) -> tuple[Tensor, Tensor]:
    """W (out, in) and X (tokens, in), float64, X's columns scaled from 1 down to 10^-skew and mixed: a skewed Gram."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -skew, in_, dtype=torch.float64)
    mixing = torch.randn(in_, in_, generator=generator, dtype=torch.float64) / math.sqrt(in_)
    return weight, torch.randn(tokens, in_, generator=generator, dtype=torch.float64) * scale @ mixing


def with_spectrum(seed: int, out: int, in_: int, sigma: Sequence[float]) -> Tensor:
    """A random (out, in) float64 matrix with exactly these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(out, len(sigma), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(in_, len(sigma), generator=generator, dtype=torch.float64))
    return left * torch.tensor(sigma, dtype=torch.float64) @ right.T


def gram(x: Tensor) -> Tensor:
    """Σ over tokens of x xᵀ."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for token in x.double():
        total += torch.outer(token, token)
    return total


def damped(matrix: Tensor, damping: float) -> Tensor:
    """G + δ·mean(diag G)·I, entry by entry."""
    result = matrix.clone()
    mean = sum(float(matrix[i, i]) for i in range(len(matrix))) / len(matrix)
    for i in range(len(matrix)):
        result[i, i] += damping * mean
    return result


def matrix_sqrt(matrix: Tensor) -> Tensor:
    """The principal square root by scipy's Schur method."""
    return torch.from_numpy(np.real(scipy.linalg.sqrtm(matrix.numpy())))


def best_for_outputs(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """argmin ‖X(W − W')ᵀ‖ over rank r, from the outputs: project them on their own top right singular vectors."""
    _, _, right = torch.linalg.svd(x @ weight.T, full_matrices=False)
    basis = right[:rank].T
    return basis @ basis.T @ weight


def asvd(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """ASVD's W' of a rank: every column times the root of its input's mean size, a truncated SVD, and back."""
    scale = [math.sqrt(sum(abs(float(token[j])) for token in x) / len(x)) for j in range(x.shape[1])]
    scaled = torch.stack([weight[:, j] * scale[j] for j in range(x.shape[1])], dim=1)
    left, sigma, right = torch.linalg.svd(scaled, full_matrices=False)
    best = left[:, :rank] @ torch.diag(sigma[:rank]) @ right[:rank]
    return torch.stack([best[:, j] / scale[j] for j in range(x.shape[1])], dim=1)


def two_sided(weight: Tensor, gram: Tensor, gradient_gram: Tensor, rank: int) -> Tensor:
    """argmin ‖D^½ (W − W') G^½‖ over rank r, from both square roots, their inverses and one SVD."""
    row, column = matrix_sqrt(gradient_gram), matrix_sqrt(gram)
    left, sigma, right = torch.linalg.svd(row @ weight @ column, full_matrices=False)
    best = left[:, :rank] @ torch.diag(sigma[:rank]) @ right[:rank]
    return torch.linalg.inv(row) @ best @ torch.linalg.inv(column)


def two_sided_spectrum(weight: Tensor, gram: Tensor, gradient_gram: Tensor) -> Tensor:
    """The singular values of D^½ W G^½."""
    return torch.linalg.svdvals(matrix_sqrt(gradient_gram) @ weight @ matrix_sqrt(gram))


def mean_projector(windows: Sequence[Tensor], rank: int) -> Tensor:
    """The mean of V Vᵀ over windows, V from a full SVD of each window's outputs."""
    total = torch.zeros(windows[0].shape[1], windows[0].shape[1], dtype=torch.float64)
    for outputs in windows:
        right = torch.linalg.svd(outputs.double())[2][:rank]
        total += right.T @ right
    return total / len(windows)


def smooth_gate(truncation: float, rank: int, beta: float) -> list[float]:
    """½ tanh(β(τ − i)) + ½ for i = 1..rank."""
    return [0.5 * math.tanh(beta * (truncation - i)) + 0.5 for i in range(1, rank + 1)]


def truncated_activation(output: Tensor, truncation: Tensor, beta: float) -> Tensor:
    """U diag(σ∘T) Vᵀ through torch.linalg.svd, whose gradient is exact but unbounded."""
    left, sigma, right = torch.linalg.svd(output, full_matrices=False)
    index = torch.arange(1, len(sigma) + 1, dtype=output.dtype)
    gate = 0.5 * torch.tanh(beta * (truncation - index)) + 0.5
    return left @ torch.diag(sigma * gate) @ right


def cheapest(ladders: Sequence[Sequence[tuple[int, int, float]]], budget_bytes: int) -> tuple[float, list[int]]:
    """Least total loss and its ranks over every combination of (rank, bytes, loss) within the budget."""
    best = (math.inf, [])
    for combination in itertools.product(*ladders):
        if sum(cost for _, cost, _ in combination) <= budget_bytes:
            best = min(best, (sum(loss for *_, loss in combination), [rank for rank, *_ in combination]))
    return best


def svd_llm_v2_kept(losses: Sequence[float], sizes: Sequence[int], ratio: float, floor: float) -> list[float]:
    """1 − c / log L, L at least e, c raised again over the unclipped matrices until no more of them hits the floor."""
    inverse = [1 / max(math.log(loss), 1) if loss > 0 else 1 for loss in losses]
    most, clipped = 1 - floor * ratio, set()
    while True:
        wanted = (1 - ratio) * sum(sizes) - sum(most * sizes[index] for index in clipped)
        free = [index for index in range(len(losses)) if index not in clipped]
        constant = wanted / sum(sizes[index] * inverse[index] for index in free)
        over = {index for index in free if constant * inverse[index] > most}
        if not over:
            return [1 - (most if index in clipped else constant * inverse[index]) for index in range(len(losses))]
        clipped |= over


def matrix_bytes(format: str, out: int, in_: int, rank: int) -> int:
    """Bytes of the tensors that a format stores, counted one tensor at a time."""
    long, short = max(out, in_), min(out, in_)
    factors = [(out * rank, 1), (rank * in_, 1), (rank, 4), (out, 4)]
    int8, int4 = [(out * in_, 1), (out, 2)], [(out * in_ // 2, 1), (out * (1 if in_ % 64 else in_ // 64), 2)]
    tensors = {
        "dense": [(out * in_, 2)],
        "float16": [(out * rank, 2), (rank * in_, 2)],
        "pifa": [(rank * in_, 2), ((out - rank) * rank, 2), (out, 4)],
        "int8": factors,
        "pifa_int8": [(rank * in_, 1), ((out - rank) * rank, 1), (rank, 4), (out - rank, 4), (out, 4)],
        "dense_int8": int8,
        "dense_int4": int4,
        "int8_residual": [*int8, *factors],
        "int4_residual": [*int4, *factors],
        "remap": [(short * rank, 1), (short * rank, 1), ((long - short) * rank, 2), (rank, 4), (short, 4)],
    }[format]
    return sum(count * size for count, size in tensors)


def compensated(
    weight: Tensor, gram: Tensor, n_bits: int, scale: Tensor, damping: float, zero_point: Tensor | None = None
) -> Tensor:
    """GPTQ one input at a time, the costliest first, the inverse Gram of those that are left recomputed for each."""
    zeros = torch.zeros_like(weight, dtype=torch.float64)
    if zero_point is not None:
        zeros += zero_point.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    weight, result = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    steps = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    left = sorted(range(len(gram)), key=lambda at: -float(gram[at, at]))
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        at, step, zero = left[0], steps[:, left[0]], zeros[:, left[0]]
        integers = (weight[:, at] / step + zero).round().clamp(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)
        result[:, at] = (integers - zero) * step
        weight[:, left] -= ((weight[:, at] - result[:, at]) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return result


def best_scale(weights: Sequence[float], costs: Sequence[float], n_bits: int, tried: Iterable[float]) -> float:
    """The least weighted rounding error that any of the scales ``tried`` leaves in one group."""
    low, high = -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    errors = []
    for scale in tried:
        kept = [min(max(round(weight / scale), low), high) * scale for weight in weights]
        errors.append(sum(cost * (weight - near) ** 2 for weight, near, cost in zip(weights, kept, costs, strict=True)))
    return min(errors)


def best_cut(weights: Sequence[float], costs: Sequence[float], n_bits: int, ratios: Iterable[float]) -> float:
    """The least weighted rounding error in one group whose range, from zero at least, is cut alike at both ends."""
    levels, part = 2**n_bits - 1, 2 ** (8 - n_bits)
    errors = []
    for ratio in ratios:
        low, high = ratio * min(*weights, 0.0), ratio * max(*weights, 0.0)
        scale = float(torch.tensor((high - low) / levels).half())
        zero = round(-low / scale * part) / part  # the lowest integer is 0 here
        kept = [(min(max(round(weight / scale + zero), 0), levels) - zero) * scale for weight in weights]
        errors.append(sum(cost * (weight - near) ** 2 for weight, near, cost in zip(weights, kept, costs, strict=True)))
    return min(errors)


def round_factors(left: Tensor, right: Tensor, heads: tuple[int, int], gram: Tensor) -> Tensor:
    """left @ right, the right factor rounded, the left one refitted to it by least squares on tokens, then rounded."""
    rounded = right.clone()
    for direction in rounded[:, : heads[1]]:
        scale = (direction.abs().max() / 127).float().double()
        direction[:] = (direction / scale).round().clamp(-127, 127) * scale if scale > 0 else 0.0
    tokens = torch.linalg.cholesky(gram, upper=True)  # any X with XᵀX = G
    left = torch.linalg.lstsq(tokens @ rounded.T, tokens @ (left @ right).T).solution.T
    inner = rounded @ gram @ rounded.T
    inner += 1e-2 * inner.diagonal().mean() * torch.eye(len(inner), dtype=torch.float64)
    scale = (left[: heads[0]].abs().amax(1) / 127).float().double()
    order = sorted(range(len(inner)), key=lambda at: -float(inner[at, at]))
    for done, at in enumerate(order):  # what an input's rounding costs goes to the inputs after it
        after = order[done:]
        inverse = torch.linalg.inv(inner[after][:, after])
        exact = left[: heads[0], at].clone()
        left[: heads[0], at] = (exact / scale).round().clamp(-128, 127) * scale
        share = ((exact - left[: heads[0], at]) / inverse[0, 0])[:, None] * inverse[0, 1:]
        left[: heads[0], after[1:]] -= share
    return left @ rounded


def round_to_nearest(weight: Tensor, n_bits: int, group_size: int | None, symmetric: bool) -> Tensor:
    """The weight after rounding to ``n_bits`` and back, one number at a time, scales in float16."""
    out, in_ = weight.shape
    size = group_size or in_
    result = torch.zeros_like(weight)
    for row in range(out):
        for start in range(0, in_, size):
            group = [float(value) for value in weight[row, start : start + size]]
            low, high = min(0.0, *group), max(0.0, *group)
            steps = 2 ** (n_bits - 1) - 1 if symmetric else 2**n_bits - 1
            span = max(-low, high) if symmetric else high - low
            scale = float(torch.tensor(span / steps).half())
            zero = 0 if symmetric or scale == 0 else min(max(round(-low / scale), 0), steps)
            for offset, value in enumerate(group):
                level = round(value / scale) + zero if scale else 0
                level = min(max(level, -steps if symmetric else 0), steps)
                result[row, start + offset] = (level - zero) * scale
    return result


def pack(values: Sequence[int], n_bits: int) -> list[int]:
    """Integers as one long binary number, the first in its lowest bits, cut into bytes."""
    whole = sum((value % 2**n_bits) << n_bits * at for at, value in enumerate(values))
    return list(whole.to_bytes(len(values) * n_bits // 8, "little"))


def distillation_loss(logits: Tensor, teacher: Tensor, tokens: Tensor, kl_weight: float) -> float:
    """Mean divergence from the teacher and mean loss of the next token, one position at a time, weighted."""
    divergences, losses = [], []
    for window in range(len(tokens)):
        for at in range(tokens.shape[1]):
            q, p = (x[window, at].double().softmax(-1) for x in (logits, teacher))
            divergences.append(float((p * (p.log() - q.log())).sum()))
            if at + 1 < tokens.shape[1]:
                losses.append(-float(q[tokens[window, at + 1]].log()))
    return kl_weight * sum(divergences) / len(divergences) + (1 - kl_weight) * sum(losses) / len(losses)


def largest_volume(left: Tensor, rank: int) -> float:
    """max |det| over every choice of ``rank`` rows."""
    choices = itertools.combinations(range(len(left)), rank)
    return max(abs(float(torch.linalg.det(left[list(rows)]))) for rows in choices)


def unpivot(rows: Tensor, coefficients: Tensor, order: Tensor) -> Factors:
    """left (out, r) with a unit row for every pivot and its coefficients for every other row, and right = rows."""
    identity = [torch.eye(len(rows), dtype=rows.dtype)[at] for at in range(len(rows))]
    everything = [*identity, *coefficients]
    return Factors(torch.stack([everything[int(at)] for at in order]), rows)


def anchored(weight: Tensor, x: Tensor, behind: Tensor, alpha: float, damping: float) -> Tensor:
    """argmin_M ‖α X Wᵀ + (1 − α) X' Wᵀ − X' Mᵀ‖² + δ ‖M − W‖², by least squares on stacked rows; δ relative."""
    shift = damping * float((behind**2).sum()) / behind.shape[1]
    rows = torch.cat([behind, math.sqrt(shift) * torch.eye(behind.shape[1], dtype=torch.float64)])
    targets = torch.cat([alpha * x @ weight.T + (1 - alpha) * behind @ weight.T, math.sqrt(shift) * weight.T])
    return torch.linalg.lstsq(rows, targets).solution.T


def two_sided_rounded(weight: Tensor, rows: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Z of W (out, in) in order, number by number; steps ``rows`` (out,), ``columns`` (in,), unit upper triangles."""
    errors, values = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            known = sum(left[k, i] * errors[k, m] * right[m, j] for k in range(i + 1) for m in range(j + 1))
            values[i, j] = ((weight[i, j] + known) / (rows[i] * columns[j])).round()
            errors[i, j] = weight[i, j] - values[i, j] * rows[i] * columns[j]
    return values


def activations(model: Any, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What every ``nn.Linear`` is given, and the gradient of what it returns, by hooks on one pass through the model.

    The loss is the sum of the next tokens' cross-entropy. Both are linear -> (tokens, features) float64.
    """
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    gradients: dict[str, list[Tensor]] = defaultdict(list)

    def note(found: list[Tensor], values: Tensor) -> None:
        found.append(values.detach().flatten(0, -2).double())

    def watch(name: str, x: Tensor, output: Tensor) -> None:
        note(inputs[name], x)
        if x.requires_grad and output.requires_grad:  # a constant's gradient says nothing of the weight
            output.register_hook(lambda gradient: note(gradients[name], gradient))

    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda m, args, out, n=name: watch(n, args[0], out))
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    together = [{name: torch.cat(parts) for name, parts in found.items()} for found in (inputs, gradients)]
    return together[0], together[1]
