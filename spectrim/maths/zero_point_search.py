"""The scale and zero point of every group of a rounded weight that lose least, when each input errs by itself.

    min over s, z of  Σ_j g_j (w_j − s·(q_j − z))²,  q_j = clip(⌊w_j / s + z⌉, −2^(b−1), 2^(b−1) − 1)

over the inputs j of a group of one row. g_j = G_jj is what the error of input j costs; z is a multiple of
1 / ``zero_steps``, finer than a step, so that the integers lie where the numbers are. The range [min(w, 0), max(w, 0)]
may be cut at either end, if that makes the other numbers finer. Tried are RATIOS of both ends together, then of each by
itself; the best scale is then replaced by that of least squares for its integers, where that is better still.

Source: cut ranges by search, AWQ, Lin et al. 2023, arXiv:2306.00978; zero points that are no integers, HQQ, Badri and
Shaji 2023.
"""

import torch
from torch import Tensor

from spectrim.maths.quantization import half
from spectrim.maths.scale_search import AT_ONCE, RATIOS, grouped_costs
from spectrim.maths.storage_formats import Grid


def searched_zero_point(weight: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """s (out, in / group) float16, zero for a group of zeros, and z of that shape in float32; float32 inside.

    Args:
        weight: W, (out, in).
        importance: g, (in,), not negative.
        grid: asymmetric; its group must divide ``in``.

    Raises:
        NumericalError: W or g is not finite, the group does not divide ``in``, or a scale overflows float16.
    """
    cost, size = grouped_costs(weight, importance, grid)
    rows = max(1, AT_ONCE // weight.shape[1])
    found = [_Search(part.float().unflatten(1, (-1, size)), cost, grid).run() for part in weight.split(rows)]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zeros)


class _Search:
    """The best that was offered so far, for ``grouped`` (rows, groups, size) and ``cost`` (groups, size)."""

    def __init__(self, grouped: Tensor, cost: Tensor, grid: Grid) -> None:
        self.grouped, self.cost, self.grid = grouped, cost, grid
        self.low, self.high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        self.scale, self.zero = torch.zeros_like(self.low), torch.zeros_like(self.low)
        self.least = torch.full_like(self.low, torch.inf)
        self.cuts = torch.ones_like(self.low), torch.ones_like(self.low)  # of the best, at either end

    def run(self) -> tuple[Tensor, Tensor]:
        """s in float16 and z."""
        for ratio in RATIOS:
            self._offer_range(*(torch.full_like(cut, ratio) for cut in self.cuts))
        for end in range(2):
            kept = self.cuts[1 - end]
            for ratio in RATIOS:
                tried = torch.full_like(kept, ratio)
                self._offer_range(*((tried, kept) if end == 0 else (kept, tried)))
        steps = self._integers(self.scale, self.zero) - self.zero[..., None]
        norm = torch.linalg.vecdot(steps * self.cost, steps)
        fitted = torch.linalg.vecdot(steps * self.cost, self.grouped) / norm.clamp(min=1e-38)
        self._offer(torch.where(norm > 0, fitted, self.scale), self.zero)
        return half(self.scale), self.zero

    def _offer_range(self, low_cut: Tensor, high_cut: Tensor) -> None:
        lowest, highest = self.grid.ends
        low, high = self.low * low_cut, self.high * high_cut
        scale = half((high - low) / (highest - lowest)).float()
        divisor = torch.where(scale != 0, scale, 1.0)
        zero = (((lowest - low / divisor) * self.grid.zero_steps).round() / self.grid.zero_steps).clamp(lowest, highest)
        better = self._offer(scale, zero)
        cuts = zip((low_cut, high_cut), self.cuts, strict=True)
        low_cut, high_cut = (torch.where(better, new, old) for new, old in cuts)
        self.cuts = low_cut, high_cut

    def _offer(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Take it where it is better; returns where that is."""
        kept = half(scale).float()
        error = self.grouped - (self._integers(kept, zero) - zero[..., None]) * kept[..., None]
        lost = torch.linalg.vecdot(error.square_(), self.cost)
        better = lost < self.least
        self.scale, self.zero = torch.where(better, kept, self.scale), torch.where(better, zero, self.zero)
        self.least = torch.where(better, lost, self.least)
        return better

    def _integers(self, scale: Tensor, zero: Tensor) -> Tensor:
        inverse = torch.where(scale != 0, 1 / torch.where(scale != 0, scale, 1.0), 0.0)
        return (self.grouped * inverse[..., None] + zero[..., None]).round_().clamp_(*self.grid.ends)
