"""Bytes of every storage format against a count of the tensors that packing makes."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import BudgetError
from spectrim.formats.packing import pack, pack_rounded
from spectrim.maths.budget import (
    FACTORED,
    RESIDUAL,
    ROUNDED,
    break_even_rank,
    budget_bytes,
    dense_bytes,
    matrix_bytes,
    resolve_format,
    stored_bytes,
)
from spectrim.maths.lowrank import Factors
from spectrim.maths.storage_formats import FORMATS as DECLARED
from tests.checkpoints import nearest

FORMATS = list(FACTORED)
formats = st.sampled_from(FORMATS)
sizes = st.integers(1, 70)
INPUTS = {8: 1, 4: 2, 3: 8}  # that fill whole bytes, by the bits of each


@cache
def counted(format: str, out: int, in_: int, rank: int) -> int:
    """Bytes of the tensors that hold a random matrix."""
    torch.manual_seed(0)
    factors = Factors(torch.randn(out, rank), torch.randn(rank, in_))
    if format in FACTORED:
        tensors = pack(factors, format).tensors
    else:
        rounded = nearest(torch.randn(out, in_), ROUNDED[format])
        tensors = pack_rounded(rounded, format, factors if format in RESIDUAL else None).tensors
    return sum(tensor.nbytes for tensor in tensors.values())


@settings(deadline=None)
@given(formats, sizes, sizes, st.data())
def test_bytes_are_those_of_the_stored_tensors(format, out, in_, data):
    rank = data.draw(st.integers(1, min(out, in_)))
    assert matrix_bytes(format, out, in_, rank) == counted(format, out, in_, rank)
    if format in ("float16", "remap"):  # pifa orders the rows, and not the columns; int8 has a scale for each
        assert matrix_bytes(format, out, in_, rank) == matrix_bytes(format, in_, out, rank)


@settings(deadline=None)
@given(st.sampled_from(list(ROUNDED)), sizes, st.integers(1, 99), st.data())
def test_bytes_of_rounded_weights_are_those_of_the_stored_tensors(format, out, units, data):
    in_ = units * INPUTS[ROUNDED[format].n_bits]
    rank = data.draw(st.integers(1, min(out, in_)))
    assert matrix_bytes(format, out, in_, rank) == counted(format, out, in_, rank)


@settings(deadline=None)
@given(st.sampled_from(list(DECLARED)), sizes, sizes, st.data())
def test_the_shape_of_a_weight_is_read_back_from_its_tensors(format, out, units, data):
    in_ = 8 * units
    rank = data.draw(st.integers(1, min(out, in_)))
    layouts = DECLARED[format].tensors(out, in_, rank)
    assert DECLARED[format].shape_of({suffix: shape for suffix, (shape, _) in layouts.items()}, rank) == (out, in_)


@pytest.mark.parametrize(("format", "in_", "needed"), [("dense_int4", 7, 2), ("dense_int3", 12, 8)])
def test_inputs_that_fill_no_whole_bytes_are_refused(format, in_, needed):
    with pytest.raises(BudgetError, match=rf"of a \(4, {in_}\) matrix: .* a number of inputs .* that {needed} divides"):
        matrix_bytes(format, 4, in_, 1)


@settings(deadline=None)
@given(formats, sizes, sizes, st.floats(0.01, 1), st.floats(0.01, 1))
def test_bytes_grow_with_a_fractional_rank(format, out, in_, less, more):
    less, more = sorted((less, more))
    at = [matrix_bytes(format, out, in_, share * min(out, in_)) for share in (less, more)]
    assert at[0] <= at[1] <= matrix_bytes(format, out, in_, min(out, in_))


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("float16", 2 * 96 * 2112),
        ("pifa", 2 * 96 * 2016 + 4 * 1536),
        ("remap", 2 * 96 * 1536 + 4 * (96 + 576)),
        ("int8", 96 * 2112 + 4 * (96 + 1536)),
        ("pifa_int8", 96 * 2016 + 4 * 1536 + 4 * 1536),
        ("dense_int8", 1536 * 576 + 2 * 1536),
        ("dense_int4", 1536 * 288 + 2 * 1536 * 9),
        ("int8_residual", 1536 * 576 + 2 * 1536 + 96 * 2112 + 4 * (96 + 1536)),
        ("int4_residual", 1536 * 288 + 2 * 1536 * 9 + 96 * 2112 + 4 * (96 + 1536)),
    ],
)
def test_bytes_of_a_real_matrix(format, expected):
    """Written out as formulas: files of format version 1 have these sizes."""
    assert matrix_bytes(format, 1536, 576, 96) == expected


@settings(deadline=None)
@given(formats, sizes, sizes, st.data())
def test_a_matrix_is_dense_exactly_when_its_factors_are_not_cheaper(format, out, in_, data):
    rank = data.draw(st.integers(1, min(out, in_)))
    factors, dense = counted(format, out, in_, rank), 2 * out * in_
    cheaper = factors < dense and not (DECLARED[format].pivoted and rank == min(out, in_))
    assert resolve_format(format, out, in_, rank) == (format if cheaper else "dense")
    assert stored_bytes(format, out, in_, rank) == (factors if cheaper else dense)
    assert (rank <= break_even_rank(format, out, in_)) == cheaper


def test_break_even_of_int8_is_capped_at_full_rank():
    assert break_even_rank("int8", 192, 576) == 192
    assert resolve_format("int8", 192, 576, 192) == "int8"


def test_factors_that_cost_as_much_as_dense_are_stored_dense():
    assert matrix_bytes("float16", 8, 8, 4) == dense_bytes(8, 8)
    assert resolve_format("float16", 8, 8, 4) == "dense"
    assert break_even_rank("float16", 8, 8) == 3


def test_one_by_one_matrices_are_always_dense():
    assert [break_even_rank(format, 1, 1) for format in FORMATS] == [0] * len(FORMATS)


@pytest.mark.parametrize("hundredth", range(1, 101))
def test_budget_takes_the_ratio_as_written(hundredth):
    assert budget_bytes([(5, 10)], hundredth / 100) == hundredth  # floats give int(0.29 * 100) == 28


def test_budget_adds_up_all_matrices_before_rounding_down():
    assert budget_bytes([(1, 1), (1, 1), (1, 2)], 0.4) == 3
    assert budget_bytes([(3, 7), (5, 2)], 1.0) == 62


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_a_ratio_outside_the_unit_interval_is_refused(ratio):
    with pytest.raises(BudgetError, match=r"fraction of bytes kept"):
        budget_bytes([(4, 4)], ratio)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(BudgetError, match=rf"rank {rank} of a \(4, 6\) matrix"):
        matrix_bytes("float16", 4, 6, rank)


def test_an_unknown_format_has_no_bytes():
    with pytest.raises(BudgetError, match="format 'float8' is none of float16, pifa, remap, int8, pifa_int8"):
        matrix_bytes("float8", 4, 6, 2)
