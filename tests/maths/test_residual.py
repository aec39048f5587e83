"""Rounded weights with a low-rank correction: the error they leave, and what it predicts."""

import pytest
import torch
from torch import Tensor

from spectrim.maths.lowrank import truncate
from spectrim.maths.quantization import dequantize
from spectrim.maths.residual import rounded
from spectrim.maths.storage_formats import Grid
from tests import reference


def drawn(out: int, in_: int) -> tuple[Tensor, Tensor, Tensor]:
    weight, x = reference.draw(0, out, in_, 4 * in_)
    mixing = torch.randn(in_, in_, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, g = reference.draw(2, 1, out, 3 * out)
    return weight, reference.gram(x @ mixing), reference.gram(g * torch.linspace(0.1, 3, out, dtype=torch.float64))


def error(difference: Tensor, gram: Tensor, gradient_gram: Tensor) -> float:
    """‖D^½ E G^½‖²"""
    return float((gradient_gram @ difference @ gram @ difference.T).trace())


@pytest.mark.parametrize("n_bits", [4, 8])
@pytest.mark.parametrize(("out", "in_"), [(12, 20), (20, 12)])
def test_the_spectrum_predicts_the_error_of_every_rank(n_bits: int, out: int, in_: int) -> None:
    weight, gram, gradient_gram = drawn(out, in_)
    quantized, residual = rounded(weight, gram, gradient_gram, Grid(n_bits, None), 0.0, 1e-2)
    lost = weight - dequantize(quantized, torch.float64)
    for rank in (0, 3, min(out, in_)):
        left, right = truncate(residual, rank) if rank else (torch.zeros(out, 0), torch.zeros(0, in_))
        left_over = error(lost - left.double() @ right.double(), gram, gradient_gram)
        expected = float(residual.sigma[rank:].square().sum())
        assert left_over == pytest.approx(expected, rel=1e-6, abs=1e-9 * float(residual.sigma[0] ** 2))


def test_the_correction_is_that_of_the_metric_and_not_the_plain_one() -> None:
    weight, gram, gradient_gram = drawn(24, 32)
    quantized, residual = rounded(weight, gram, gradient_gram, Grid(4), 0.0, 1e-2)
    lost = weight - dequantize(quantized, torch.float64)
    u, s, v = torch.linalg.svd(lost)
    plain = lost - (u[:, :4] * s[:4]) @ v[:4]
    corrected = lost - torch.linalg.multi_dot(truncate(residual, 4))
    assert error(corrected, gram, gradient_gram) < 0.9 * error(plain, gram, gradient_gram)
