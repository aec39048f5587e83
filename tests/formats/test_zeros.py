"""A matrix of zeros, and one that is zero in part, in every storage format."""

import math

import pytest
import torch
from torch import Tensor

from spectrim.compression.storage_loss import storage_loss
from spectrim.formats.packing import pack, pack_rounded
from spectrim.maths.budget import FACTORED, INT8_FACTORS, RESIDUAL, ROUNDED, Format, resolve_format
from spectrim.maths.lowrank import Factors, truncate, two_sided
from spectrim.maths.residual import rounded
from spectrim.maths.storage_formats import FORMATS
from tests.checkpoints import stored_linear

SHAPES = [(24, 40), (40, 24), (32, 32)]
RANK = 6


def moments(out: int, in_: int, silent: bool) -> tuple[Tensor, Tensor]:
    """G and D of random inputs and gradients, or zeros where all of them are ``silent``."""
    torch.manual_seed(out + in_)
    x, g = (torch.randn(3 * size, size, dtype=torch.float64) * (not silent) for size in (in_, out))
    return x.T @ x, g.T @ g


def kept(weight: Tensor, format: Format, gram: Tensor, gradient_gram: Tensor) -> Tensor:
    """The weight as ``format`` gives it back, on the way that the pipeline takes."""
    shape = (weight.shape[0], weight.shape[1])
    if format in ROUNDED:
        found = rounded(weight, gram, gradient_gram, ROUNDED[format], 1e-6, 1e-2)
        packed = pack_rounded(found.weight, format, truncate(found.residual, RANK) if format in RESIDUAL else None)
    else:
        left, right = truncate(two_sided(weight, gram, gradient_gram), RANK)
        packed = pack(Factors(left.float(), right.float()), format, gram)
        assert all(math.isfinite(value) for value in packed.facts.values())
    assert all(bool(tensor.isfinite().all()) for tensor in packed.tensors.values() if tensor.is_floating_point())
    module = stored_linear(packed.tensors, format, shape)
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(module(x), x @ module.dense_weight().mT, rtol=1e-4, atol=1e-4)
    return module.dense_weight()


@pytest.mark.parametrize("format", (*FACTORED, *ROUNDED))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("silent", [False, True])
def test_zeros_come_back_as_zeros(format: Format, shape: tuple[int, int], silent: bool) -> None:
    assert resolve_format(format, *shape, RANK) == format
    found = kept(torch.zeros(shape), format, *moments(*shape, silent))
    assert found.shape == shape and not found.any()


@pytest.mark.parametrize("format", (*FACTORED, *ROUNDED))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("silent", [False, True])
def test_a_weight_of_low_rank_with_zero_rows_and_columns_comes_back(
    format: Format, shape: tuple[int, int], silent: bool
) -> None:
    """Its rank is below that of the format: some directions are rounding noise or nothing at all."""
    moments_of = moments(*shape, silent)
    weight = torch.randn(shape[0], RANK - 2) @ torch.randn(RANK - 2, shape[1])
    weight[3], weight[:, 5] = 0, 0
    found = kept(weight, format, *moments_of)
    error = float(torch.linalg.matrix_norm(found - weight) / torch.linalg.matrix_norm(weight))
    declared = FORMATS[format]
    allowed = {3: 0.45, 4: 0.2, 8: 6e-2, None: 6e-2 if declared.in_int8 else 4e-3}
    assert error < allowed[declared.grid and declared.grid.n_bits]


@pytest.mark.parametrize("format", INT8_FACTORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_zeros_loses_nothing(format: Format, shape: tuple[int, int]) -> None:
    gram, gradient_gram = moments(*shape, silent=False)
    left, right = torch.randn(shape[0], RANK), torch.randn(RANK, shape[1])
    for factors in (Factors(0 * left, right), Factors(left, 0 * right)):
        assert storage_loss(factors, format, gram, gradient_gram) == 0
