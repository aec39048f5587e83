"""Factors of given ranks: truncated decompositions in some metric, or Dobi-SVD's IPCA on real activations.

The last part computes one method of methods.py each, from the statistics of one ``Block``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.lowrank import (
    Decomposition,
    Factors,
    asvd,
    closed_form,
    output_error,
    plain_svd,
    smaller_root,
    svd_llm_cholesky,
    svd_llm_v2,
    truncate,
    two_sided,
)
from spectrim.maths.subspace import IncrementalPCA, MeanProjector, ipca_update, top_right_singular_vectors
from spectrim.maths.whitening import cholesky, eigen_whitener
from spectrim.models.blocks import BlockModel
from spectrim.models.hooks import observed

Damping = tuple[float, float]
"""First and largest relative damping of a Gram."""

Made = tuple[dict[str, Factors], dict[str, float]]
"""Factors of every linear, and the damping used, where a Gram was damped."""


class Block(Protocol):
    """What is known of one block; ``pipeline.steps.block_statistics`` reads it from files."""

    model: BlockModel
    index: int
    damping: Damping
    exact_ipca: bool
    input_of: dict[str, str]
    grams: dict[str, Tensor]
    """Input -> G = XᵀX (in, in), float64."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Linear -> W (out, in), float32."""

    def hidden(self) -> Tensor:
        """What enters the block, (windows, seq, hidden)."""

    def gram(self, name: str) -> Tensor:
        """G of what the linear reads."""

    def gradient_gram(self, name: str) -> Tensor:
        """D = Σ g gᵀ (out, out), float64."""

    def abs_mean(self, name: str) -> Tensor:
        """Mean |x| (in,), float64."""

    def captured_factors(self, names: Iterable[str]) -> Made:
        """Two-sided factors of full rank, and the damping of the side that was decomposed."""


Compute = Callable[[Block, Mapping[str, int]], Made]


def svd_factors(weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Factors]:
    """Per linear the factors that minimise ‖W − W'‖ over rank r, whatever the activations."""
    return _each(ranks, lambda name: plain_svd(weights[name]))


def asvd_factors(
    weights: Mapping[str, Tensor], abs_means: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> dict[str, Factors]:
    """Per linear the factors that minimise ‖(W − W') S‖ over rank r, S = diag(mean |x_j|)^½ (ASVD, arXiv 2312.05821).

    Args:
        weights, abs_means: linear name -> W (out, in) and mean |x| (in,); ``ranks``: those to factorise.
    """
    return _each(ranks, lambda name: asvd(weights[name], abs_means[name]))


def closed_form_factors(
    weights: Mapping[str, Tensor], grams: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> dict[str, Factors]:
    """Per linear the factors that minimise ‖X(W − W')ᵀ‖ over rank r: W' = U_r U_rᵀ W (DESIGN 5.1).

    Args:
        weights, grams: linear name -> W (out, in) and G = XᵀX (in, in); ``ranks``: those to factorise.
    """
    return _each(ranks, lambda name: closed_form(weights[name], grams[name]))


def svd_llm_factors(
    weights: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    input_of: Mapping[str, str],
    ranks: Mapping[str, int],
    *,
    form: Literal["cholesky", "two_svds"],
    damping: float,
    max_damping: float,
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Per linear the factors that minimise ‖(W − W') S‖ over rank r, S Sᵀ the damped Gram, and the damping used.

    One whitener serves all linears that read one input.

    Args:
        weights: linear name -> W (out, in).
        grams: input name -> G = XᵀX (in, in); ``input_of``: linear name -> input name.
        form: "cholesky" for SVD-LLM (arXiv 2403.07378), "two_svds" for SVD-LLM V2 (arXiv 2503.12340).
        damping, max_damping: first and largest relative damping tried.
    """
    used: dict[str, float] = {}

    def whitened(owner: str) -> Callable[[Tensor], Decomposition]:
        gram = grams[owner]
        if form == "cholesky":
            lower, used[owner] = cholesky(gram, damping, max_damping)
            return lambda weight: svd_llm_cholesky(weight, gram, lower=lower)
        whitener = eigen_whitener(gram, damping, max_damping)
        used[owner] = whitener.damping
        return lambda weight: svd_llm_v2(weight, gram, whitener=whitener)

    decomposed: dict[str, Callable[[Tensor], Decomposition]] = {}

    def decompose(name: str) -> Decomposition:
        owner = input_of[name]
        if owner not in decomposed:
            decomposed[owner] = whitened(owner)
        return decomposed[owner](weights[name])

    factors = _each(ranks, decompose)
    return factors, {name: used[input_of[name]] for name in ranks}


def two_sided_factors(
    weights: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    gradient_grams: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    *,
    damping: float,
    max_damping: float,
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Per linear the factors that minimise ‖D^½ (W − W') G^½‖ over rank r (DESIGN 5.2), and the damping used.

    Args:
        weights, grams, gradient_grams: linear name -> W (out, in), G = XᵀX (in, in), D = Σ g gᵀ (out, out).
        damping, max_damping: first and largest relative damping tried.
    """
    used: dict[str, float] = {}

    def decompose(name: str) -> Decomposition:
        weight, gram, gradient_gram = weights[name], grams[name], gradient_grams[name]
        root = smaller_root(weight, gram, gradient_gram, damping, max_damping)
        used[name] = next(iter(root.values())).damping
        return two_sided(weight, gram, gradient_gram, damping, max_damping, **root)

    return _each(ranks, decompose), used


def truncated_factors(factors: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, Factors]:
    """Per linear the first r directions of full-rank factors that are ordered by their singular values."""
    return {name: Factors(factors[name].left[:, :rank], factors[name].right[:rank]) for name, rank in ranks.items()}


@torch.no_grad()
def ipca_factors(
    model: BlockModel, index: int, hidden: Tensor, ranks: Mapping[str, int], *, exact: bool
) -> dict[str, Factors]:
    """Per linear W' = U_r U_rᵀ W, U_r the mean of each window's top-r output subspaces (Dobi-SVD, arXiv 2502.02723).

    V_i = top r right singular vectors of Y_i = X_i Wᵀ (uncentred); P = mean_i V_i V_iᵀ; U_r = its top r eigenvectors,
    exactly from P or incrementally in O(m·2r) memory, both among the m = min(out, in) directions that Y can have.

    Args:
        hidden: (windows, seq, hidden), what enters block ``index`` of the original model.
        ranks: linear name -> rank of the linears to factorise.
    """
    pools: dict[str, MeanProjector | IncrementalPCA] = {}
    frames: dict[str, Tensor] = {}  # Q of a tall W = Q R: what is in Y's rows lies in its columns
    cores: dict[str, Tensor] = {}  # R, or W where it is not tall: all is done in its min(out, in) rows
    for name, weight in model.weights(index).items():
        if name in ranks:
            cores[name] = weight.double()
            if weight.shape[0] > weight.shape[1]:
                frames[name], cores[name] = torch.linalg.qr(cores[name])
            features, rank = len(cores[name]), ranks[name]
            # from half the features on, the incremental's 2r columns would be more than the exact projector
            kind = MeanProjector if exact or 2 * rank >= features else IncrementalPCA
            pools[name] = kind(features, rank)

    def add(name: str, activation: Tensor) -> None:
        x = activation.reshape(-1, activation.shape[-1]).double()
        pools[name].add(top_right_singular_vectors(x @ cores[name].T, ranks[name]))

    with model.resident(index), observed({name: model.linears[index][name] for name in ranks}, add):
        for window in hidden:
            model.run(index, window[None].to(model.device))
    found = {name: ipca_update(cores[name], pools[name].basis()) for name in ranks}
    return {
        name: Factors(frames[name] @ pair.left, pair.right) if name in frames else pair for name, pair in found.items()
    }


def relative_error(weight: Tensor, factors: Factors, gram: Tensor) -> float:
    """‖X(W − W')ᵀ‖_F / ‖XWᵀ‖_F from G = XᵀX (in, in), float64; 0 where the outputs are."""
    nothing = Factors(weight[:, :0], weight[:0])  # rank 0: W' = 0
    whole = output_error(weight, nothing, gram)
    return output_error(weight, factors, gram) / whole if whole > 0 else 0.0


def _each(ranks: Mapping[str, int], decompose: Callable[[str], Decomposition]) -> dict[str, Factors]:
    """Per linear its decomposition cut to its rank; an error names the linear."""
    factors = {}
    for name, rank in ranks.items():
        try:
            factors[name] = truncate(decompose(name), rank)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
    return factors


def plain_svd_of(block: Block, ranks: Mapping[str, int]) -> Made:
    """`svd`: see ``svd_factors``."""
    return svd_factors(block.weights, ranks), {}


def asvd_of(block: Block, ranks: Mapping[str, int]) -> Made:
    """`asvd`: see ``asvd_factors``."""
    return asvd_factors(block.weights, {name: block.abs_mean(name) for name in ranks}, ranks), {}


def closed_form_of(block: Block, ranks: Mapping[str, int]) -> Made:
    """`closed_form`: see ``closed_form_factors``."""
    return closed_form_factors(block.weights, {name: block.gram(name) for name in ranks}, ranks), {}


def svd_llm_of(block: Block, ranks: Mapping[str, int]) -> Made:
    """`svd_llm`: see ``svd_llm_factors``."""
    return _svd_llm(block, ranks, "cholesky")


def svd_llm_v2_of(block: Block, ranks: Mapping[str, int]) -> Made:
    """`svd_llm_v2`: see ``svd_llm_factors``."""
    return _svd_llm(block, ranks, "two_svds")


def _svd_llm(block: Block, ranks: Mapping[str, int], form: Literal["cholesky", "two_svds"]) -> Made:
    first, largest = block.damping
    return svd_llm_factors(
        block.weights, block.grams, block.input_of, ranks, form=form, damping=first, max_damping=largest
    )


def ipca_of(block: Block, ranks: Mapping[str, int]) -> Made:
    """`ipca`: see ``ipca_factors``."""
    return ipca_factors(block.model, block.index, block.hidden(), ranks, exact=block.exact_ipca), {}


def captured(block: Block, ranks: Mapping[str, int]) -> Made:
    """`two_sided` in the captured metric: the factors that `capture` made, cut."""
    full, damping = block.captured_factors(ranks)
    return truncated_factors(full, ranks), damping


def two_sided_anew(block: Block, ranks: Mapping[str, int]) -> Made:
    """`two_sided` in another metric: see ``two_sided_factors``."""
    first, largest = block.damping
    grams = {name: block.gram(name) for name in ranks}
    gradient_grams = {name: block.gradient_gram(name) for name in ranks}
    return two_sided_factors(block.weights, grams, gradient_grams, ranks, damping=first, max_damping=largest)
