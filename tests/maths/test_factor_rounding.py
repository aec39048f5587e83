"""Factors in int8 against a naive version, the product they stand for, and rounding to the nearest."""

import pytest
import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.factor_rounding import RoundedFactors, round_factors
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import balance, quantize_int8
from tests import reference

Case = tuple[Factors, Tensor]


def draw(seed: int, out: int, in_: int, rank: int, decades: float = 2) -> Case:
    """Balanced factors with a falling spectrum, rows of unlike size, and the Gram of inputs that share directions."""
    generator = torch.Generator().manual_seed(seed)
    left, right, mixing, tokens = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((out, rank), (rank, in_), (in_, in_), (4 * in_, in_))
    )
    mixing = torch.logspace(0, -decades, in_, dtype=torch.float64)[:, None] * mixing
    sizes = torch.logspace(0, -1, out, dtype=torch.float64)[:, None]
    sigma = torch.logspace(0, -2, rank, dtype=torch.float64)
    return balance(Factors(sizes * left * sigma, right)), reference.gram(tokens @ mixing)


def product(found: RoundedFactors) -> Tensor:
    left = torch.cat([found.left.values * found.left.scale.double()[:, None], found.left.tail.double()])
    right = torch.cat([found.right.values * found.right.scale.double(), found.right.tail.double()])
    return left @ right.mT


def error(found: RoundedFactors, case: Case) -> float:
    (left, right), gram = case
    difference = left @ right - product(found)
    return float((difference @ gram @ difference.mT).trace())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("out", "in_", "rank"), [(12, 9, 5), (9, 12, 5), (20, 30, 8), (7, 7, 1)])
@pytest.mark.parametrize("tail", [False, True])
def test_equals_the_naive_version(seed: int, out: int, in_: int, rank: int, tail: bool) -> None:
    """Fixed cases: where a number lies midway between two integers, either is right, and what follows differs."""
    case = draw(seed, out, in_, rank, decades=0)  # well conditioned: the refit damps, if ever so little
    heads = (min(out, in_), min(out, in_)) if tail else (out, in_)
    expected = reference.round_factors(*case[0], heads, case[1])
    found, largest = product(round_factors(case[0], heads, case[1])), float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_outputs_err_far_less_than_after_rounding_to_the_nearest(shape: tuple[int, int]) -> None:
    case = draw(0, *shape, 12)
    assert error(round_factors(case[0], shape, case[1]), case) < 0.5 * error(round_factors(case[0], shape), case)


def test_a_scale_per_row_is_what_rows_of_unlike_size_need() -> None:
    """Negative control: one scale per direction on both sides."""
    case = draw(1, 64, 24, 12)
    values, scale = quantize_int8(case[0].left, dim=1)
    found = round_factors(case[0], (64, 24))
    right = (found.right.values * found.right.scale.double()).mT
    difference = case[0].left @ case[0].right - values * scale.double() @ right
    assert float((difference @ case[1] @ difference.mT).trace()) > 1.5 * error(found, case)


def test_without_a_gram_both_are_rounded_to_the_nearest() -> None:
    factors, _ = draw(2, 9, 14, 5)
    left, right = round_factors(factors, (9, 10))
    assert torch.equal(left.values, quantize_int8(factors.left, dim=0)[0]) and left.tail.shape == (0, 5)
    assert torch.equal(right.values, quantize_int8(factors.right.mT[:10], dim=1)[0])
    assert torch.equal(right.tail, factors.right.mT[10:])


def test_a_direction_without_inputs_is_left_alone() -> None:
    factors, gram = draw(3, 8, 10, 4)
    factors.right[2] = 0
    found = round_factors(factors, (8, 10), gram)
    assert product(found).isfinite().all() and not found.right.values[:, 2].any()


@pytest.mark.parametrize(
    ("gram", "message"), [(torch.eye(9), r"gram \(9, 9\)"), (torch.full((10, 10), torch.nan), "not finite")]
)
def test_errors_say_what_is_wrong(gram: Tensor, message: str) -> None:
    with pytest.raises(NumericalError, match=message):
        round_factors(draw(4, 8, 10, 4)[0], (8, 10), gram)
