"""The scale of every group of a rounded weight that loses least, when each input errs by itself.

    min over s of  Σ_j g_j (w_j − s·clip(⌊w_j / s⌉, −2^(b−1), 2^(b−1) − 1))²      j in a group of one row

g_j = G_jj is what the error of input j costs. The largest number of a group may be clipped, if that makes the others
finer, and s may be negative: integers reach one step further down than up, so that the side of the largest number gets
the longer end. Tried are RATIOS of the scale that just reaches it, on both ends; the best is then replaced by the scale
of least squares for its integers, where that is better still.

Source: clipping by search, AWQ, Lin et al. 2023, arXiv:2306.00978; weighted by the diagonal of the Gram as in
SqueezeLLM, Kim et al. 2023, arXiv:2306.07629.
"""

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.quantization import half
from spectrim.maths.storage_formats import Grid
from spectrim.maths.whitening import require_finite

RATIOS = tuple(0.5 + 0.05 * step for step in range(11))
"""Of the largest number of a group: what the end of the grid reaches."""

AT_ONCE = 2**22  # numbers whose candidates are in memory together


def searched_scale(weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """(out, in / group) float16 scales, zero for a group of zeros; float32 inside.

    Args:
        weight: W, (out, in).
        importance: g, (in,), not negative.
        grid: its group must divide ``in``.

    Raises:
        NumericalError: W or g is not finite, the group does not divide ``in``, or a scale overflows float16.
    """
    cost, size = grouped_costs(weight, importance, grid)
    rows = max(1, AT_ONCE // weight.shape[1])
    return torch.cat([_search(part.float().unflatten(1, (-1, size)), cost, grid) for part in weight.split(rows)])


def grouped_costs(weight: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, int]:
    """g as (groups, size) in float32, and the size of a group; the errors of both searches."""
    require_finite("weight", weight)
    require_finite("importance", importance)
    size, inputs = grid.group_size(weight.shape[1]), weight.shape[1]
    if importance.shape != (inputs,) or inputs % size:
        raise NumericalError(
            f"weight {tuple(weight.shape)}, importance {tuple(importance.shape)}, groups of {size}: an importance "
            f"({inputs},) and groups that divide {inputs} are required"
        )
    return importance.float().view(-1, size), size


def _search(grouped: Tensor, cost: Tensor, grid: Grid) -> Tensor:
    """``grouped`` (rows, groups, size), ``cost`` (groups, size) -> (rows, groups) float16."""
    lowest, highest = grid.ends
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = torch.zeros_like(extreme)
    least = torch.full_like(extreme, torch.inf)

    def offer(scale: Tensor) -> None:
        nonlocal best, least
        kept = half(scale).float()
        error = torch.linalg.vecdot((grouped - _integers(grouped, kept, grid) * kept[..., None]).square_(), cost)
        better = error < least
        best, least = torch.where(better, kept, best), torch.where(better, error, least)

    for end in (lowest, highest):
        for ratio in RATIOS:
            offer(extreme * (ratio / end))
    values = _integers(grouped, best, grid)
    weighted = values * cost
    norm = torch.linalg.vecdot(weighted, values)
    offer(torch.where(norm > 0, torch.linalg.vecdot(weighted, grouped) / norm.clamp(min=1e-38), best))
    return half(best)


def _integers(grouped: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    inverse = torch.where(scale != 0, 1 / torch.where(scale != 0, scale, 1.0), 0.0)
    return (grouped * inverse[..., None]).round_().clamp_(*grid.ends)
