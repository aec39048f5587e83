"""A linear that is cut at a learned truncation τ, softly: fixed factors behind a gate, or the SVD of its own output.

* gates (ARA, arXiv 2510.19389): W(τ) = left diag(T(τ)) right with FIXED whitened factors; no SVD in the loop.
* dobi (Dobi-SVD, arXiv 2502.02723): the activation of each window, y = U diag(σ∘T(τ)) Vᵀ, through a stable SVD.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spectrim.maths.lowrank import Factors
from spectrim.maths.truncation import smooth_gate, truncated_activation
from spectrim.models.modules import replace

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


def attach_truncated(model: nn.Module, modules: Mapping[str, Truncated]) -> None:
    """Put every truncated module in the place of the linear of its name."""
    for name, module in modules.items():
        replace(model, name, module)


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
