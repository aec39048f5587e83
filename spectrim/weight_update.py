"""Factors of given ranks: truncated whitened factors, the closed form, or Dobi-SVD's IPCA on real activations."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spectrim.blocks import BlockModel
from spectrim.maths.lowrank import Factors, closed_form, output_error, truncate
from spectrim.maths.subspace import IncrementalPCA, MeanProjector, ipca_update, top_right_singular_vectors


def closed_form_factors(
    weights: Mapping[str, Tensor], grams: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> dict[str, Factors]:
    """Per linear the factors that minimise ‖X(W − W')ᵀ‖ over rank r: W' = U_r U_rᵀ W (DESIGN 5.1).

    Args:
        weights, grams: linear name -> W (out, in) and G = XᵀX (in, in); ``ranks``: those to factorise.
    """
    return {name: truncate(closed_form(weights[name].double(), grams[name]), rank) for name, rank in ranks.items()}


def truncated_factors(factors: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, Factors]:
    """Per linear the first r directions of full-rank factors that are ordered by their singular values."""
    return {name: Factors(factors[name].left[:, :rank], factors[name].right[:rank]) for name, rank in ranks.items()}


@torch.no_grad()
def ipca_factors(
    model: BlockModel, index: int, hidden: Tensor, ranks: Mapping[str, int], *, exact: bool
) -> dict[str, Factors]:
    """Per linear W' = U_r U_rᵀ W, U_r the mean of each window's top-r output subspaces (Dobi-SVD, arXiv 2502.02723).

    V_i = top r right singular vectors of Y_i = X_i Wᵀ (uncentred); P = mean_i V_i V_iᵀ; U_r = its top r eigenvectors,
    exactly from P (out, out) or incrementally in O(out·2r) memory.

    Args:
        hidden: (windows, seq, hidden), what enters block ``index`` of the original model.
        ranks: linear name -> rank of the linears to factorise.
    """
    kind = MeanProjector if exact else IncrementalPCA
    pools, bases, weights = {}, {}, {}
    for name, weight in model.weights(index).items():
        if name in ranks:
            weights[name] = weight.double()
            # Y = X Wᵀ has rank at most `in`: with W = Q R, its right singular vectors are Q times those of X Rᵀ
            bases[name] = torch.linalg.qr(weights[name]) if weight.shape[0] > weight.shape[1] else None
            pools[name] = kind(weight.shape[0], ranks[name])

    def on_input(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            if (basis := bases[name]) is None:
                vectors = top_right_singular_vectors(x @ weights[name].T, ranks[name])
            else:
                vectors = basis[0] @ top_right_singular_vectors(x @ basis[1].T, ranks[name])
            pools[name].add(vectors)

        return hook

    handles = [model.linears[index][name].register_forward_pre_hook(on_input(name)) for name in ranks]
    try:
        with model.resident(index):
            for window in hidden:
                model.run(index, window[None].to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: ipca_update(weights[name], pools[name].basis()) for name in ranks}


def relative_error(weight: Tensor, factors: Factors, gram: Tensor) -> float:
    """‖X(W − W')ᵀ‖_F / ‖XWᵀ‖_F from G = XᵀX (in, in), float64; 0 where the outputs are."""
    nothing = Factors(weight[:, :0], weight[:0])  # rank 0: W' = 0
    whole = output_error(weight, nothing, gram)
    return output_error(weight, factors, gram) / whole if whole > 0 else 0.0
