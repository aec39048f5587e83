"""Statistics of experts that saw few tokens, shrunk towards those of all experts of their layer.

    G_e ← G_e + m · Σ_e G_e / Σ_e n_e            m = features where n_e < features · ENOUGH, else 0

n_e is the number of tokens that expert e was routed. A Gram of fewer tokens than features has directions of which
nothing is known, and rounding or cutting would take them for worthless; in the mean of the layer's experts they are
known. m pseudo-tokens of that mean cost an expert that saw enough nothing. One that saw none has the mean alone.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

ENOUGH = 8
"""Tokens for each feature, from which on a Gram stands for itself."""


def shrunk(grams: Mapping[str, Tensor], tokens: Mapping[str, int], experts: Iterable[str]) -> dict[str, Tensor]:
    """The Grams of the ``experts`` of one layer and kind that saw too few tokens, as above.

    Args:
        grams: linear -> Σ x xᵀ, (features, features); none of one that saw no token.
        tokens: linear -> how many tokens.
    """
    known = [grams[name] for name in experts if name in grams]
    total = sum(tokens.get(name, 0) for name in experts)
    if not total:
        return {}
    mean = sum(known[1:], known[0].clone()) / total
    features = len(mean)
    few = [name for name in experts if tokens.get(name, 0) < ENOUGH * features]
    return {name: grams.get(name, 0 * mean) + features * mean for name in few}
