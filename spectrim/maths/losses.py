"""What a model's predictions cost: against the text, and against the dense model's predictions.

Logits are (windows, seq, vocabulary) of any float dtype, tokens (windows, seq) int64; losses are float32 scalars in
nats per token.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """mean_t −log q_t[x_{t+1}] over the positions that have a next token."""
    following = tokens[:, 1:].flatten().to(logits.device)
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), following)


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """mean_t KL(p_t ‖ q_t) = mean_t Σ_v p_t[v] (log p_t[v] − log q_t[v]) over all positions, p of ``teacher``."""
    expected = teacher.flatten(0, 1).float().log_softmax(-1)
    chances = expected.exp()
    entropy = -(chances * expected).sum(-1).mean()
    return cross_entropy(logits.flatten(0, 1).float(), chances) - entropy


def distillation_loss(logits: Tensor, teacher: Tensor, tokens: Tensor, kl_weight: float) -> Tensor:
    """λ·divergence + (1 − λ)·next_token_loss.

    Args:
        logits: of the compressed model.
        teacher: logits of the dense model, the same shape, without gradient; not read when λ = 0.
        tokens: what both read.
        kl_weight: λ in [0, 1].

    Source: distillation, Hinton et al. 2015, arXiv:1503.02531.
    """
    if kl_weight == 0:
        return next_token_loss(logits, tokens)
    loss = kl_weight * divergence(logits, teacher)
    return loss if kl_weight == 1 else loss + (1 - kl_weight) * next_token_loss(logits, tokens)
