"""What a model's predictions cost: against the text, and against the dense model's predictions.

Logits are (windows, seq, vocabulary) of any float dtype, tokens (windows, seq) int64; losses are float32 scalars in
nats per token.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """mean_t −log q_t[x_t], q_t the prediction for token x_t itself."""
    return cross_entropy(logits.flatten(0, 1).float(), tokens.flatten().to(logits.device))


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """mean_t −log q_t[x_{t+1}] over the positions that have a next token."""
    return token_loss(logits[:, :-1], tokens[:, 1:])


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """mean_t KL(p_t ‖ q_t) = mean_t Σ_v p_t[v] (log p_t[v] − log q_t[v]) over all positions, p of ``teacher``."""
    expected = teacher.flatten(0, 1).float().log_softmax(-1)
    chances = expected.exp()
    entropy = -(chances * expected).sum(-1).mean()
    return cross_entropy(logits.flatten(0, 1).float(), chances) - entropy
