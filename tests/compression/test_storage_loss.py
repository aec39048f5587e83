"""What int8 factors lose by rounding: against the norm written out, and added to what their rank drops."""

import pytest
import torch
from torch import Tensor

from spectrim.compression.storage_loss import storage_loss
from spectrim.formats.packing import pack
from spectrim.maths.budget import INT8_FACTORS, Format
from spectrim.maths.lowrank import Factors, truncate, two_sided
from tests.checkpoints import stored_linear
from tests.maths.test_residual import drawn


def decomposed(out: int, in_: int) -> tuple[Tensor, Tensor, Tensor, Factors, Tensor]:
    """A weight, G, D, its two-sided factors at half the rank in float32 and the energies of all directions."""
    weight, gram, gradient_gram = drawn(out, in_)
    found = two_sided(weight, gram, gradient_gram)
    left, right = truncate(found, min(out, in_) // 2)
    return weight, gram, gradient_gram, Factors(left.float(), right.float()), found.sigma.square()


@pytest.mark.parametrize("format", INT8_FACTORS)
@pytest.mark.parametrize(("out", "in_"), [(24, 40), (40, 24)])
def test_it_is_the_norm_in_the_metric_and_adds_to_what_the_rank_drops(format: Format, out: int, in_: int) -> None:
    weight, gram, gradient_gram, factors, energy = decomposed(out, in_)
    loss = storage_loss(factors, format, gram, gradient_gram)
    packed = pack(factors, format, gram).tensors
    stored = stored_linear(packed, format, (out, in_)).dense_weight().double()

    def norm(error: Tensor) -> float:
        above, below = (torch.linalg.cholesky(side) for side in (gradient_gram, gram))
        return float((above.T @ error @ below).square().sum())

    assert loss == pytest.approx(norm(factors.left.double() @ factors.right.double() - stored), rel=1e-9)
    dropped = float(energy[len(factors.right) :].sum())
    assert norm(weight - stored) == pytest.approx(dropped + loss, rel=0.02)


def test_sixteen_bits_lose_next_to_nothing_and_eight_bits_do_not() -> None:
    _, gram, gradient_gram, factors, _ = decomposed(24, 40)
    sixteen = storage_loss(factors, "pifa", gram, gradient_gram)
    eight = storage_loss(factors, "pifa_int8", gram, gradient_gram)
    assert 0 < 100 * sixteen < eight
