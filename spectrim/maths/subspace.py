"""The subspace that the outputs of many windows share: Dobi-SVD's IPCA weight update.

Window i has outputs Y_i = X_i Wᵀ (tokens, out) and top right singular vectors V_i (out, r). The common basis is the top
eigenvectors U_r of the mean projector P = mean_i V_i V_iᵀ, and W' = U_r U_rᵀ W (Dobi-SVD, Wang et al. 2025,
arXiv:2502.02723; incremental PCA as in Ross et al. 2008, IJCV 77, without its mean). Nothing is centred: singular
vectors have arbitrary sign, so their mean means nothing, while V Vᵀ is free of the sign.

``MeanProjector`` is exact and holds (out, out); ``IncrementalPCA`` holds (out, r) and merges each V_i by one thin SVD.
"""

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.lowrank import Factors
from spectrim.maths.whitening import require_finite


def top_right_singular_vectors(outputs: Tensor, rank: int) -> Tensor:
    """V, (out, q), VᵀV = I: the right singular vectors of the q largest singular values of Y, q = min(rank, rank of Y).

    Fewer than ``rank`` columns come back when Y has fewer directions above rounding (fewer tokens than ``rank``, or
    rank-deficient outputs): the others would be arbitrary. One eigenproblem of size min(tokens, out), float64.

    Args:
        outputs: Y, (tokens, out).
        rank: r, number of directions wanted.

    Raises:
        NumericalError: Y is not finite, or ``rank`` is not in [1, out].
    """
    require_finite("outputs", outputs)
    _require_rank(rank, outputs.shape[1])
    outputs = outputs.double()
    tokens, out = outputs.shape
    wide = tokens < out
    values, vectors = torch.linalg.eigh(outputs @ outputs.T if wide else outputs.T @ outputs)
    # σ² carries an error of ε·σ₁²: directions below √ε·σ₁, beyond float32's own resolution, are noise.
    kept = int((values > max(tokens, out) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)).sum())
    vectors = vectors.flip(1)[:, : min(rank, kept)]
    if not wide:
        return vectors
    return torch.linalg.qr(outputs.T @ vectors).Q  # (out, q); Yᵀu = σv, orthogonal but for rounding


class MeanProjector:
    """P = mean_i V_i V_iᵀ, exactly, in (out, out) float64; ``basis`` is its top eigenvectors."""

    def __init__(self, out: int, rank: int) -> None:
        _require_rank(rank, out)
        self.out, self.rank, self.n_windows = out, rank, 0
        self._sum: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        """Add one window's V, (out, q <= rank), orthonormal columns."""
        vectors = _checked(vectors, self.out)
        projector = vectors @ vectors.T
        self._sum = projector if self._sum is None else self._sum.add_(projector)
        self.n_windows += 1

    def projector(self) -> Tensor:
        """P, (out, out), symmetric, eigenvalues in [0, 1].

        Raises:
            NumericalError: no window was added.
        """
        if self._sum is None:
            raise _empty()
        return self._sum / self.n_windows

    def basis(self) -> Tensor:
        """U_r, (out, rank): eigenvectors of the largest eigenvalues of P, descending.

        Raises:
            NumericalError: no window was added.
        """
        return torch.linalg.eigh(self.projector()).eigenvectors.flip(1)[:, : self.rank].contiguous()


class IncrementalPCA:
    """P ≈ U diag(w) Uᵀ / n_windows with r components: [U √w, V] = U' Σ' Z'ᵀ by one thin SVD, w' = Σ'², cut to r.

    Memory O(out · 2r), independent of the number of windows. Exact while the windows seen span at most r dimensions;
    otherwise each merge drops Σ_{i>r} w'ᵢ, and ``dropped`` sums them up: the part of n_windows · tr P that is lost.
    """

    def __init__(self, out: int, rank: int) -> None:
        _require_rank(rank, out)
        self.out, self.rank, self.n_windows = out, rank, 0
        self.dropped = 0.0
        self._scaled: Tensor | None = None  # (out, <= rank), U √w

    def add(self, vectors: Tensor) -> None:
        """Merge one window's V, (out, q <= rank), orthonormal columns, with weight one."""
        vectors = _checked(vectors, self.out)
        merged = vectors if self._scaled is None else torch.cat([self._scaled, vectors], dim=1)
        if merged.shape[1] > self.rank:
            left, sigma, _ = torch.linalg.svd(merged, full_matrices=False)
            self.dropped += float(sigma[self.rank :].square().sum())
            merged = left[:, : self.rank] * sigma[: self.rank]
        self._scaled = merged
        self.n_windows += 1

    def basis(self) -> Tensor:
        """U_r, (out, rank), orthonormal, by descending weight; completed arbitrarily if the windows span less.

        Raises:
            NumericalError: no window was added.
        """
        if self._scaled is None:
            raise _empty()
        padded = self._scaled.new_zeros(self.out, self.rank)
        padded[:, : self._scaled.shape[1]] = self._scaled
        return torch.linalg.svd(padded, full_matrices=False).U


def ipca_update(weight: Tensor, basis: Tensor) -> Factors:
    """W' = U Uᵀ W: left = U, right = Uᵀ W, float64.

    Args:
        weight: W, (out, in).
        basis: U, (out, rank), orthonormal columns.

    Raises:
        NumericalError: shapes do not match or W is not finite.
    """
    require_finite("weight", weight)
    basis = _checked(basis, weight.shape[0])
    return Factors(basis, basis.T @ weight.double())


def _checked(vectors: Tensor, out: int) -> Tensor:
    if vectors.ndim != 2 or vectors.shape[0] != out or vectors.shape[1] > out:
        raise NumericalError(f"vectors have shape {tuple(vectors.shape)}; ({out}, at most {out}) is required")
    require_finite("vectors", vectors)
    return vectors.double()


def _require_rank(rank: int, out: int) -> None:
    if not 1 <= rank <= out:
        raise NumericalError(f"rank {rank} of outputs with {out} features; it must lie in [1, {out}]")


def _empty() -> NumericalError:
    return NumericalError("the subspace of no window at all was asked for; add at least one window's vectors first")
