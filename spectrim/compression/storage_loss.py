"""What rounding factors to int8 adds to the loss, in the metric that predicts what cutting their rank adds.

    loss = ‖D^½ (left right − Q) G^½‖_F² = tr(D E G Eᵀ),  E = left right − Q

with Q what the storage format multiplies with. With G and D divided by their numbers of tokens half of it is in nats
per token, as are the Σ_{i>r} σᵢ² / 2 of ``maths.lowrank.two_sided``, so that the two add up and compare.
"""

from torch import Tensor

from spectrim.formats.lowrank_linear import LowRankLinear
from spectrim.formats.packing import pack
from spectrim.maths.budget import Format
from spectrim.maths.lowrank import Factors


def storage_loss(factors: Factors, format: Format, gram: Tensor, gradient_gram: Tensor) -> float:
    """tr(D E G Eᵀ) of ``factors`` stored in ``format``, rounded against the Gram as `remap` does it.

    Args:
        factors: left (out, rank), right (rank, in), floating point.
        format: one of ``budget.FACTORED``.
        gram, gradient_gram: G (in, in) and D (out, out), float64, per token.

    Raises:
        CheckpointError: a value does not fit float16.
        NumericalError: a value is not finite.
    """
    tensors = pack(factors, format, gram).tensors
    stored = LowRankLinear.from_tensors(tensors, format, len(factors.left), factors.right.shape[1], None)
    error = factors.left.double() @ factors.right.double() - stored.dense_weight().double()
    return float(((gradient_gram @ error) * (error @ gram)).sum())
