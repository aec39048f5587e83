"""Products with weights that stay int8: the same numbers on every path, and no path where it does not hold."""

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.formats.products import FEW, product

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
dtypes = st.sampled_from(list(TOLERANCE))


def draw(seed: int, out: int, in_: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (out, in_), generator=generator, dtype=torch.int8)
    return values, torch.rand(out, generator=generator) / 50 + 0.01, torch.randn(out, generator=generator)


def worst(found: Tensor, expected: Tensor, size: Tensor) -> float:
    """The largest error, as a share of the largest of the sums of absolute values that were added up."""
    return float((found.double() - expected).abs().max() / size.max())


@settings(deadline=None, max_examples=100)
@given(dtypes, st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 2, FEW, FEW + 1, 40]), st.booleans())
def test_is_the_product_with_the_scaled_integers(
    dtype: torch.dtype, out: int, in_: int, rows: int, transposed: bool
) -> None:
    """Any number of inputs: torch's kernel would read beyond rows that its step does not divide."""
    values, scale, bias = draw(out + in_, out, in_)
    x = torch.randn(1, rows, in_, generator=torch.Generator().manual_seed(in_)).to(dtype)
    weight = values.mT.contiguous().mT if transposed else values
    bias = bias.to(dtype)
    exact = (values * scale.double()[:, None]).mT
    expected, size = x.double() @ exact + bias.double(), x.double().abs() @ exact.abs() + bias.double().abs()
    found = product(x, weight, scale, bias)
    assert (found.shape, found.dtype) == ((1, rows, out), dtype)
    assert worst(found, expected, size) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, FEW + 1])
def test_float16_does_not_overflow_in_sums_of_integers(rows: int) -> None:
    values, scale = torch.full((8, 1024), 127, dtype=torch.int8), torch.full((8,), 1e-3)
    x = torch.ones(rows, 1024, dtype=torch.float16)
    assert not torch.nn.functional.linear(x, values.half()).isfinite().all()  # negative control
    torch.testing.assert_close(product(x, values, scale), torch.full((rows, 8), 130.048).half(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_reach_the_input(dtype: torch.dtype) -> None:
    values, scale, _ = draw(0, 16, 32)
    x = torch.ones(2, 32, dtype=dtype, requires_grad=True)
    product(x, values, scale).sum().backward()
    assert x.grad is not None
    exact = values * scale.double()[:, None]
    assert worst(x.grad, exact.sum(0).expand(2, -1), exact.abs().sum(0)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    values, scale, _ = draw(0, 16, 32)
    assert product(torch.ones(2, 0, 32, dtype=dtype), values, scale).shape == (2, 0, 16)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own CPU interpreter, which needs no GPU
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or not (torch.cuda.is_available() or INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)


def on_gpu(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    from spectrim.formats.int8_kernel import int8_product

    device = "cpu" if INTERPRETED else "cuda"
    return int8_product(x.to(device), weight.to(device), scale.to(device)).cpu()


@needs_triton
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from([1, 2, 17, 40]), st.booleans())
def test_the_gpu_kernel_is_the_product_with_the_scaled_integers(
    out: int, in_: int, rows: int, transposed: bool
) -> None:
    values, scale, _ = draw(out + in_, out, in_)
    x = torch.randn(1, rows, in_, generator=torch.Generator().manual_seed(in_)).half()
    found = on_gpu(x, values.mT.contiguous().mT if transposed else values, scale)
    exact = (values * scale.double()[:, None]).mT
    expected, size = x.double() @ exact, x.double().abs() @ exact.abs()
    assert (found.shape, found.dtype) == ((1, rows, out), torch.float16)
    assert worst(found, expected, size) < TOLERANCE[torch.float16]


@needs_triton
def test_the_gpu_kernel_sums_without_overflow_and_scales_each_row() -> None:
    values, scale = torch.full((2, 1024), 127, dtype=torch.int8), torch.tensor([1e-3, 2e-3])
    x = torch.ones(1, 1024, dtype=torch.float16)
    torch.testing.assert_close(on_gpu(x, values, scale), torch.tensor([[130.048, 260.096]]).half(), rtol=2e-3, atol=0)
    assert not on_gpu(x, values, torch.ones(2)).isfinite().any()  # negative control: beyond float16 without the scales
