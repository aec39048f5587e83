"""Pivoting loses nothing and bounds its coefficients, also where rows depend on each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.maths.lowrank import Factors
from spectrim.maths.pivoting import BOUND, _coefficients, _strengthened, pivot
from tests import reference

sizes, seeds = st.integers(1, 40), st.integers(0, 1000)


def draw(seed: int, out: int, in_: int, rank: int, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((out, rank), (rank, in_)))
    return Factors(left, right)


@settings(deadline=None)
@given(sizes, sizes, seeds, st.data())
def test_rows_and_coefficients_are_the_matrix(out: int, in_: int, seed: int, data: st.DataObject) -> None:
    """[rows; coefficients @ rows][order] = left @ right."""
    factors = draw(seed, out, in_, data.draw(st.integers(1, min(out, in_))))
    found = pivot(factors)
    expected = factors.left @ factors.right
    everything = torch.cat([found.rows, found.coefficients @ found.rows])
    torch.testing.assert_close(everything[found.order.long()], expected, rtol=1e-8, atol=1e-9)
    pair = reference.unpivot(*found[:3])
    torch.testing.assert_close(pair.left @ pair.right, expected, rtol=1e-8, atol=1e-9)
    assert float(found.coefficients.abs().max()) <= BOUND + 1e-9 if found.coefficients.numel() else True
    numbers, rank = found.rows.numel() + found.coefficients.numel(), len(found.rows)
    whole = torch.cat([torch.eye(rank, dtype=torch.float64), found.coefficients])
    assert found.condition == pytest.approx(float(torch.linalg.matrix_norm(whole, ord=2)), rel=1e-6)
    assert 2 * numbers + 4 * out == reference.matrix_bytes("pifa", out, in_, rank)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 7), st.integers(1, 5), seeds, st.data())
def test_pivots_are_within_reach_of_the_best(out: int, in_: int, seed: int, data: st.DataObject) -> None:
    """The pivots' volume against the largest of all choices of rows: |coefficients| <= BOUND ties them together."""
    rank = data.draw(st.integers(1, min(out, in_)))
    factors = draw(seed, out, in_, rank)
    pivots = pivot(factors).order.argsort()[:rank]
    volume = abs(float(torch.linalg.det(factors.left[pivots])))
    assert volume >= reference.largest_volume(factors.left, rank) / (BOUND**rank * rank ** (rank / 2)) - 1e-12


@given(seeds)
def test_the_rows_are_rows_of_the_matrix(seed: int) -> None:
    factors = draw(seed, 9, 7, 4)
    found = pivot(factors)
    pivots = found.order.argsort()[:4]
    torch.testing.assert_close(found.rows, (factors.left @ factors.right)[pivots])
    assert pivots.tolist() == sorted(pivots.tolist()) and sorted(found.order.tolist()) == list(range(9))


@given(seeds)
def test_the_choice_does_not_depend_on_the_factorization(seed: int) -> None:
    factors = draw(seed, 12, 8, 4)
    mixing = draw(seed + 1, 4, 4, 4).left
    other = Factors(factors.left @ mixing, torch.linalg.solve(mixing, factors.right))
    found, again = pivot(factors), pivot(other)
    assert torch.equal(found.order, again.order)
    torch.testing.assert_close(found.coefficients, again.coefficients, rtol=1e-6, atol=1e-6)


def test_full_rank_keeps_every_row() -> None:
    factors = draw(0, 5, 9, 5)
    found = pivot(factors)
    torch.testing.assert_close(found.rows, factors.left @ factors.right)
    assert found.coefficients.shape == (0, 5) and found.order.tolist() == [0, 1, 2, 3, 4]


def test_rounding_to_16_bit_costs_about_what_it_costs_two_factors() -> None:
    factors = draw(3, 192, 96, 48)
    exact = factors.left @ factors.right
    found = pivot(factors)
    rows, coefficients = (part.half().double() for part in found[:2])
    rounded = torch.cat([rows, coefficients @ rows])[found.order.long()]
    plain = factors.left.half().double() @ factors.right.half().double()
    errors = [float((other - exact).norm() / exact.norm()) for other in (rounded, plain)]
    assert errors[0] < 8 * errors[1] < 1e-2
    first = _first_rows(factors)  # negative control: any rows would do in exact arithmetic
    assert float(first.abs().max()) > 3 * BOUND


def _first_rows(factors: Factors) -> Tensor:
    rank = factors.left.shape[1]
    return torch.linalg.solve(factors.left[:rank], factors.left[rank:], left=False)


def test_exchanges_repair_a_bad_choice_and_are_counted() -> None:
    basis = torch.linalg.qr(draw(5, 60, 60, 20).left)[0]
    first = torch.arange(20)
    pivots, exchanges = _strengthened(basis, first.clone())
    rest = torch.tensor([row for row in range(60) if row not in pivots.tolist()])
    assert exchanges > 0 and float(_coefficients(basis, pivots, rest).abs().max()) <= BOUND
    assert float(_coefficients(basis, first, torch.arange(20, 60)).abs().max()) > BOUND
    assert _strengthened(basis, pivots.clone())[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_factors(dtype: torch.dtype) -> None:
    found = pivot(draw(1, 8, 6, 3, dtype))
    assert found.rows.dtype == found.coefficients.dtype == dtype and found.order.dtype == torch.int32


@pytest.mark.parametrize("columns", [[0, 0, 1], [0, 0, 0], [2, 0, 0]])
def test_pivots_that_no_row_needs_fill_up_where_columns_depend(columns: list[int]) -> None:
    factors = draw(2, 8, 6, 3)
    twice = Factors(factors.left[:, columns], factors.right)
    found = pivot(twice)
    everything = torch.cat([found.rows, found.coefficients @ found.rows])
    torch.testing.assert_close(everything[found.order.long()], twice.left @ twice.right, rtol=1e-8, atol=1e-9)
    used = found.coefficients.any(0)
    assert int(used.sum()) == len(set(columns)) and float(found.coefficients.abs().max()) <= BOUND + 1e-9
    whole = torch.cat([torch.eye(3, dtype=torch.float64), found.coefficients])
    assert found.condition == pytest.approx(float(torch.linalg.matrix_norm(whole, ord=2)), rel=1e-6)


@pytest.mark.parametrize("zeros", ["left", "right", "both"])
def test_a_matrix_of_zeros_is_zeros(zeros: str) -> None:
    factors = Factors(*(part * (zeros not in (side, "both")) for side, part in draw(4, 7, 5, 3)._asdict().items()))
    found = pivot(factors)
    assert not found.rows.any() and not (found.coefficients @ found.rows).any()
    assert sorted(found.order.tolist()) == list(range(7)) and found.condition >= 1


def test_bad_numbers_are_refused() -> None:
    factors = draw(2, 8, 6, 3)
    with pytest.raises(NumericalError, match="1 of 18 entries"):
        pivot(factors._replace(right=torch.where(torch.arange(18).view(3, 6) == 4, torch.nan, factors.right)))
    with pytest.raises(NumericalError, match="at least as many rows as directions"):
        pivot(Factors(factors.left.T, torch.eye(8, dtype=torch.float64)))
