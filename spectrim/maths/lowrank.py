"""Low-rank factors of a weight that lose as little as possible of what the model computes with it.

Notation: weight W (m, n) = (out, in), activations X (tokens, n), gram G = XᵀX, outputs Y = X Wᵀ, output gradients g
per token, gradient_gram D = Σ g gᵀ (m, m), k = min(m, n). Every method decomposes once at full rank k and serves every
rank r by slicing: W'_r = left[:, :r] @ right[:r].

    plain_svd          min ‖W − W'‖_F
    asvd               min ‖(W − W') S‖_F         S = diag(mean |x_j|)^½, what ASVD takes for the activations
    closed_form        min ‖X (W − W')ᵀ‖_F        W' = U_r U_rᵀ W, U the eigenvectors of W G Wᵀ = YᵀY
    svd_llm_cholesky   the same optimum           SVD(W L), L Lᵀ = G
    svd_llm_v2         the same optimum           SVD(W S), S = Q Λ^½, G = Q Λ Qᵀ
    two_sided          min ‖D^½ (W − W') G^½‖_F   predicts the increase of the loss, so it compares across matrices

Each minimum is the discarded energy Σ_{i>r} σᵢ² (Eckart and Young 1936, in the respective metric). Float64 throughout.
Where G, D or S is zero, nothing is lost whatever W' is: σ = 0, and the factors are those of the identity in its place.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.whitening import (
    Whitener,
    cholesky,
    damped,
    eigen_whitener,
    require_finite,
    sqrt_and_inverse,
    weighing,
)


class Factors(NamedTuple):
    """W ≈ left @ right; ``left`` (out, rank), ``right`` (rank, in)."""

    left: Tensor
    right: Tensor


class Decomposition(NamedTuple):
    """Factors of every rank, float64: ``left`` (out, k), ``sigma`` (k,) descending, ``right`` (k, in), k = min."""

    left: Tensor
    sigma: Tensor
    right: Tensor


def truncate(decomposition: Decomposition, rank: int) -> Factors:
    """The best ``rank`` directions, left[:, :rank] and right[:rank], contiguous copies.

    Raises:
        NumericalError: ``rank`` is not in [1, k].
    """
    full = len(decomposition.sigma)
    if not 1 <= rank <= full:
        raise NumericalError(f"rank {rank} asked of a decomposition of {full} directions; it must lie in [1, {full}]")
    left, right = decomposition.left[:, :rank], decomposition.right[:rank]
    return Factors(*(part.clone(memory_format=torch.contiguous_format) for part in (left, right)))


def plain_svd(weight: Tensor) -> Decomposition:
    """min ‖W − W'‖_F: W = U Σ Vᵀ, left = U √Σ, right = √Σ Vᵀ. It ignores the activations: the baseline.

    Args:
        weight: W, (m, n).

    Raises:
        NumericalError: W is not a finite matrix.
    """
    return _svd(_weight(weight))


def asvd(weight: Tensor, abs_mean: Tensor, exponent: float = 0.5) -> Decomposition:
    """min ‖(W − W') S‖_F, S = diag(mean |x_j|)^α: SVD(W S) = U Σ Vᵀ, left = U √Σ, right = √Σ Vᵀ S⁻¹.

    S sees each input channel alone, so it is no optimum for the outputs: correlated channels are missed. A channel that
    is (nearly) silent keeps 1e-6 of the largest scale, so that full rank gives W back.

    Args:
        weight: W, (m, n).
        abs_mean: mean over tokens of |x_j|, (n,), not negative.
        exponent: α; 0 is ``plain_svd``.

    Raises:
        NumericalError: wrong shapes, non-finite or negative entries.

    Source: ASVD, Yuan et al. 2023, arXiv:2312.05821 (α = 0.5 with the mean absolute activation).
    """
    weight = _weight(weight)
    if tuple(abs_mean.shape) != (weight.shape[1],):
        raise NumericalError(
            f"abs_mean has shape {tuple(abs_mean.shape)}; this weight requires ({weight.shape[1]},); "
            "pass its own layer's"
        )
    require_finite("abs_mean", abs_mean)
    lowest, highest = float(abs_mean.min()), float(abs_mean.max())
    if lowest < 0:
        raise NumericalError(f"abs_mean falls to {lowest:.3g}; means of |x| are required; pass its own layer's")
    scale = abs_mean.double().pow(exponent) if highest > 0 else torch.ones_like(abs_mean, dtype=torch.float64)
    scale = scale.clamp(min=1e-6 * float(scale.max()))
    left, sigma, right = _svd(weight * scale)
    return _weighed(Decomposition(left, sigma, right / scale), abs_mean)


def closed_form(weight: Tensor, gram: Tensor) -> Decomposition:
    """min ‖X (W − W')ᵀ‖_F: left = U, right = Uᵀ W, σᵢ² the eigenvalues of W G Wᵀ; error² = Σ_{i>r} σᵢ².

    U has orthonormal columns, and full rank gives W back. G is used as it is, without damping or inverse, so it may be
    rank deficient or zero. When m > n the eigenproblem is that of R G Rᵀ with W = Q R: O(m n max(m, n)) time at most.

    Args:
        weight: W, (m, n).
        gram: G = XᵀX, (n, n), symmetric positive semidefinite.

    Raises:
        NumericalError: wrong shapes, non-finite entries, or G has a clearly negative eigenvalue along W.

    Source: SVD-LLM, Wang et al. 2024, arXiv:2403.07378 (the optimum); Swift-SVD, 2026, arXiv:2604.01609 (this form).
    """
    weight, gram = _weight(weight), _side("gram", damped(gram, 0.0), weight.shape[1])
    if weight.shape[0] <= weight.shape[1]:
        sigma, vectors = _eigen(weight @ gram @ weight.T)
        return Decomposition(vectors, sigma, vectors.T @ weight)
    basis, core = torch.linalg.qr(weight)  # (m, n), (n, n)
    sigma, vectors = _eigen(core @ gram @ core.T)
    return Decomposition(basis @ vectors, sigma, vectors.T @ core)


def spectrum(weight: Tensor, gram: Tensor) -> Tensor:
    """The singular values of X Wᵀ, (min(m, n),) descending: ``closed_form(weight, gram).sigma`` without the vectors."""
    weight, gram = _weight(weight), _side("gram", damped(gram, 0.0), weight.shape[1])
    core = weight if weight.shape[0] <= weight.shape[1] else torch.linalg.qr(weight, mode="r").R
    product = core @ gram @ core.T
    return _roots(torch.linalg.eigvalsh((product + product.T) / 2).flip(0))


def svd_llm_cholesky(
    weight: Tensor, gram: Tensor, damping: float = 0.0, max_damping: float = 1e-2, *, lower: Tensor | None = None
) -> Decomposition:
    """min ‖(W − W') L‖_F with L Lᵀ = G: SVD(W L) = U Σ Vᵀ, left = U √Σ, right = √Σ Vᵀ L⁻¹.

    Equals ``closed_form`` in the damped Gram. A Gram that is not positive definite is damped first.

    Args:
        weight: W, (m, n).
        gram: G = XᵀX, (n, n).
        damping: first relative damping tried.
        max_damping: largest relative damping tried.
        lower: L of ``cholesky(gram, ...)``, to share it between matrices with one input; then nothing is damped here.

    Raises:
        NumericalError: wrong shapes, non-finite entries, or no damping up to ``max_damping`` works.

    Source: SVD-LLM, Wang et al. 2024, arXiv:2403.07378.
    """
    weight = _weight(weight)
    gram = _side("gram", gram, weight.shape[1])
    if lower is None:
        lower, _ = cholesky(gram, damping, max_damping)
    left, sigma, right = _svd(weight @ lower)
    right = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
    return _weighed(Decomposition(left, sigma, right), gram)


def svd_llm_v2(
    weight: Tensor, gram: Tensor, damping: float = 0.0, max_damping: float = 1e-2, *, whitener: Whitener | None = None
) -> Decomposition:
    """min ‖(W − W') S‖_F with G = Q Λ Qᵀ, S = Q Λ^½: SVD(W S) = U Σ Vᵀ, left = U √Σ, right = √Σ Vᵀ Λ^(−½) Qᵀ.

    The first of its two SVDs is that of a symmetric positive semidefinite matrix, hence its eigendecomposition. A
    rank-deficient Gram needs no damping (pseudo-inverse). Arguments and errors as in ``svd_llm_cholesky``; ``whitener``
    is ``eigen_whitener(gram, ...)``, to share it.

    Source: SVD-LLM V2, Wang et al. 2025, arXiv:2503.12340.
    """
    weight = _weight(weight)
    gram = _side("gram", gram, weight.shape[1])
    whitener = whitener or eigen_whitener(gram, damping, max_damping)
    left, sigma, right = _svd(weight @ whitener.root)
    return _weighed(Decomposition(left, sigma, right @ whitener.inverse), gram)


def two_sided(
    weight: Tensor,
    gram: Tensor,
    gradient_gram: Tensor,
    damping: float = 1e-6,
    max_damping: float = 1e-2,
    *,
    gram_root: Whitener | None = None,
    gradient_root: Whitener | None = None,
) -> Decomposition:
    """min ‖D^½ (W − W') G^½‖_F: D^½ W G^½ = U Σ Vᵀ, left = D^(−½) U √Σ, right = √Σ Vᵀ G^(−½); error² = Σ_{i>r} σᵢ².

    Both Grams are damped. Because D^(−½) U Σ = W G^½ V, and Σ Vᵀ G^(−½) = Uᵀ D^½ W, one square root is enough: that of
    G when m > n, else that of D, and one symmetric eigenproblem of size min(m, n). The larger Gram is only multiplied
    with. σ below 1e-8 σ₁ is rounding noise of the squared problem; full rank still gives W back.

    Args:
        weight: W, (m, n).
        gram: G = XᵀX, (n, n).
        gradient_gram: D = Σ g gᵀ, (m, m).
        damping: relative damping of both Grams (the first one tried where a square root is taken).
        max_damping: largest relative damping tried.
        gram_root: ``sqrt_and_inverse(gram, ...)``, to share it between matrices with one input (used when m > n).
        gradient_root: ``sqrt_and_inverse(gradient_gram, ...)`` (used when m <= n). A Gram whose root is given is
            damped by the root's own damping, on either side.

    Raises:
        NumericalError: wrong shapes, non-finite entries, or a Gram that stays indefinite.

    Source: the Kronecker-factored second-order model of the loss, Martens and Grosse 2015, arXiv:1503.05671.
    """
    weight = _weight(weight)
    gram = _side("gram", gram, weight.shape[1])
    gradient_gram = _side("gradient_gram", gradient_gram, weight.shape[0])
    given, gram, gradient_gram = (gram, gradient_gram), weighing(gram), weighing(gradient_gram)
    # A square matrix may take either side; take the one whose root somebody has paid for already.
    input_side = gram_root is not None and gradient_root is None and weight.shape[0] == weight.shape[1]
    if weight.shape[0] > weight.shape[1] or input_side:
        whitener = gram_root or sqrt_and_inverse(gram, damping, max_damping)
        half = weight @ whitener.root  # (m, n)
        metric = damped(gradient_gram, gradient_root.damping if gradient_root else damping)
        sigma, vectors = _eigen(half.T @ (metric @ half))
        scale = _balance(sigma)
        found = Decomposition(half @ vectors / scale, sigma, scale[:, None] * (vectors.T @ whitener.inverse))
        return _weighed(found, *given)
    whitener = gradient_root or sqrt_and_inverse(gradient_gram, damping, max_damping)
    half = whitener.root @ weight  # (m, n)
    sigma, vectors = _eigen(half @ damped(gram, gram_root.damping if gram_root else damping) @ half.T)
    scale = _balance(sigma)
    return _weighed(Decomposition(whitener.inverse @ vectors * scale, sigma, vectors.T @ half / scale[:, None]), *given)


def smaller_root(
    weight: Tensor, gram: Tensor, gradient_gram: Tensor, damping: float, max_damping: float
) -> dict[str, Whitener]:
    """The one root that ``two_sided`` takes, under its argument's name: of the smaller Gram, G when m > n."""
    if weight.shape[0] > weight.shape[1]:
        return {"gram_root": sqrt_and_inverse(gram, damping, max_damping)}
    return {"gradient_root": sqrt_and_inverse(gradient_gram, damping, max_damping)}


def output_error(weight: Tensor, factors: Factors, gram: Tensor) -> float:
    """‖X (W − W')ᵀ‖_F = √tr((W − W') G (W − W')ᵀ), W' = left @ right; 0 where rounding makes the trace negative."""
    difference = _weight(weight) - factors.left.double() @ factors.right.double()
    gram = _side("gram", damped(gram, 0.0), weight.shape[1])
    return float(((difference @ gram) * difference).sum().clamp(min=0).sqrt())


def _weight(weight: Tensor) -> Tensor:
    if weight.ndim != 2:
        raise NumericalError(f"weight has shape {tuple(weight.shape)}; a matrix (out, in) is required")
    require_finite("weight", weight)
    return weight.double()


def _side(name: str, gram: Tensor, features: int) -> Tensor:
    if tuple(gram.shape) != (features, features):
        raise NumericalError(
            f"{name} has shape {tuple(gram.shape)}; this weight requires ({features}, {features}); pass its own layer's"
        )
    require_finite(name, gram)
    return gram


def _svd(matrix: Tensor) -> Decomposition:
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    scale = sigma.sqrt()
    return Decomposition(left * scale, sigma, scale[:, None] * right)


def _weighed(found: Decomposition, *metrics: Tensor) -> Decomposition:
    """``found``, with σ = 0 where a metric is zero: whatever is dropped then changes nothing."""
    return found if all(bool(metric.any()) for metric in metrics) else found._replace(sigma=found.sigma * 0)


def _eigen(product: Tensor) -> tuple[Tensor, Tensor]:
    """σ = √λ descending and the eigenvectors of a symmetric positive semidefinite product of matrices."""
    values, vectors = torch.linalg.eigh((product + product.T) / 2)
    return _roots(values.flip(0)), vectors.flip(1)


def _roots(values: Tensor) -> Tensor:
    # Grams accumulated from float32 products are indefinite at 1e-6 of their size; more than that is no rounding.
    if values[-1] < -1e-4 * values[0].abs():
        raise NumericalError(
            f"gram is indefinite along the weight: eigenvalues from {float(values[-1]):.3g} to {float(values[0]):.3g}; "
            "accumulate XᵀX in float64, or calibrate on more tokens"
        )
    return values.clamp(min=0).sqrt()


def _balance(sigma: Tensor) -> Tensor:
    """√σ, kept away from zero so that a noise direction is scaled and not divided by nothing."""
    floor = 1e-8 * sigma[0]
    return sigma.clamp(min=floor).sqrt() if floor > 0 else torch.ones_like(sigma)
