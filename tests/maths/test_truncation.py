"""The gate, and an SVD whose gradient is right where it exists and finite where it does not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from spectrim.errors import NumericalError
from spectrim.maths.truncation import smooth_gate, stable_svd, truncated_activation
from tests import reference

close = torch.testing.assert_close
seeds = st.integers(0, 2**16)
SHAPES = [(7, 4), (4, 7), (4, 4), (1, 3), (3, 1)]
DEGENERATE = {
    "equal": torch.eye(5),
    "two pairs": torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0])),
    "zero": torch.zeros(5, 4),
    "rank one": torch.ones(5, 3),
    "equal and zero": torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])),
    "one token": torch.ones(1, 6),
}


def separated(seed, rows, columns):
    """Singular values n, n − 1, ..., 1: every relative gap is far above the threshold."""
    return reference.with_spectrum(seed, rows, columns, [float(i) for i in range(min(rows, columns), 0, -1)])


@settings(deadline=None)
@given(st.floats(-10, 40), st.integers(1, 30), st.floats(0.01, 20))
def test_the_gate_is_the_tanh_formula(truncation, rank, beta):
    gate = smooth_gate(torch.tensor(truncation, dtype=torch.float64), rank, beta)
    expected = torch.tensor(reference.smooth_gate(truncation, rank, beta), dtype=torch.float64)
    close(gate, expected, rtol=1e-10, atol=1e-12)
    assert bool((gate.diff() <= 0).all())


def test_the_gate_broadcasts_over_truncations_and_steepness():
    tau, beta = torch.tensor([[2.0, 5.0], [1.0, 9.0]]), torch.tensor([[1.0, 10.0], [0.1, 3.0]])
    gate = smooth_gate(tau, 6, beta)
    assert gate.shape == (2, 2, 6)
    close(gate[1, 1], smooth_gate(torch.tensor(9.0), 6, 3.0))
    close(gate[0, 1], torch.tensor([1.0, 1, 1, 1, 0.5, 0]), rtol=0, atol=1e-6)


def test_the_gate_is_differentiable_and_wider_when_flatter():
    tau, beta = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.3, 2.0))
    assert gradcheck(lambda t, b: smooth_gate(t, 8, b), (tau, beta))
    steep, flat = (
        torch.autograd.functional.jacobian(lambda t, b=beta: smooth_gate(t, 50, b), torch.tensor(25.3))
        for beta in (10.0, 0.1)
    )
    assert int((steep.abs() > 0.01 * steep.abs().max()).sum()) <= 2  # the reason for annealing: one direction is seen
    assert int((flat.abs() > 0.01 * flat.abs().max()).sum()) > 40


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 8), st.integers(1, 8))
def test_the_factors_multiply_to_the_matrix(seed, rows, columns):
    _, matrix = reference.draw(seed, 1, columns, rows)
    left, sigma, right = stable_svd(matrix)
    k = min(rows, columns)
    close((left * sigma) @ right, matrix, rtol=1e-9, atol=1e-9)
    close(left.T @ left, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)
    close(right @ right.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)
    close(sigma, torch.linalg.svdvals(matrix), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_gradcheck_on_losses_free_of_sign(rows, columns):
    matrix = separated(0, rows, columns).requires_grad_()
    weights = torch.arange(1.0, min(rows, columns) + 1, dtype=torch.float64)

    def invariants(a):
        left, sigma, right = stable_svd(a)
        return (left * weights) @ left.T, sigma, (right.T * weights) @ right, (left * weights) @ right

    assert gradcheck(invariants, (matrix,))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_gradcheck_of_the_truncated_activation(rows, columns):
    matrix = separated(1, rows, columns).requires_grad_()
    tau, beta = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.7, 0.8))
    assert gradcheck(truncated_activation, (matrix, tau, beta))


def test_gradcheck_in_a_batch():
    matrix = torch.stack([separated(seed, 5, 3) for seed in range(2)]).requires_grad_()
    tau = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a, t: truncated_activation(a, t, 1.0), (matrix, tau))


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (4, 7), (6, 6)])
def test_value_and_gradient_equal_torch_where_singular_values_are_separated(rows, columns):
    results = []
    for function in (truncated_activation, reference.truncated_activation):
        matrix = separated(2, rows, columns).requires_grad_()
        tau = torch.tensor(2.2, dtype=torch.float64, requires_grad=True)
        output = function(matrix, tau, 1.5)
        output.sin().sum().backward()
        results.append((output.detach(), matrix.grad, tau.grad))
    for found, expected in zip(*results, strict=True):
        close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_finite_at_equal_and_zero_singular_values(name, dtype):
    matrix = DEGENERATE[name].clone().to(dtype).requires_grad_()
    tau = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    output = truncated_activation(matrix, tau, 1.0)
    (output * torch.arange(output.numel(), dtype=dtype).reshape(output.shape)).sum().backward()
    assert bool(torch.isfinite(output).all())
    assert bool(torch.isfinite(matrix.grad).all())
    assert bool(torch.isfinite(tau.grad))
    assert float(matrix.grad.abs().max()) < 1e4


@pytest.mark.parametrize("name", ["equal", "two pairs", "zero", "equal and zero"])
def test_the_gradient_of_torch_is_not_finite_there(name):
    """Negative control: autograd of torch.linalg.svd gives NaN or infinity on the same matrices."""
    matrix = DEGENERATE[name].clone().double().requires_grad_()
    output = reference.truncated_activation(matrix, torch.tensor(1.5, dtype=torch.float64), 1.0)
    (output * torch.arange(output.numel(), dtype=torch.float64).reshape(output.shape)).sum().backward()
    assert not bool(torch.isfinite(matrix.grad).all())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_gradient_does_not_depend_on_the_unit_of_the_activations(scale):
    """y'(c·y) = c·y'(y), so the gradient of a linear loss is the same: the thresholds are relative."""
    grads = []
    for factor in (1.0, scale):
        matrix = (factor * reference.with_spectrum(3, 6, 5, [2.0, 1.999, 1.0, 0.5, 0.4999])).requires_grad_()
        output = truncated_activation(matrix, torch.tensor(2.5, dtype=torch.float64), 1.0)
        (output * torch.arange(30.0).reshape(6, 5)).sum().backward()
        grads.append(matrix.grad)
    close(grads[1], grads[0], rtol=1e-7, atol=1e-9)


def test_close_singular_values_use_the_bounded_series():
    """At a relative gap of 1e-5 the exact coefficient is 5e4/σ²; the series of ten terms stays below ten."""
    sizes = {}
    for name, threshold in (("series", 1e-2), ("exact", 1e-9)):
        matrix = reference.with_spectrum(4, 4, 4, [1.0, 1 - 1e-5, 0.5, 0.2]).requires_grad_()
        output = truncated_activation(matrix, torch.tensor(1.5, dtype=torch.float64), 5.0, threshold=threshold)
        (output * torch.arange(16.0).reshape(4, 4)).sum().backward()
        sizes[name] = float(matrix.grad.abs().max())
    assert sizes["exact"] > 100 * sizes["series"]


def test_more_terms_approach_the_exact_gradient():
    def gradient(terms, threshold):
        matrix = reference.with_spectrum(5, 5, 4, [3.0, 2.9, 1.0, 0.3]).requires_grad_()
        output = truncated_activation(matrix, torch.tensor(1.5, dtype=torch.float64), 1.0, terms, threshold)
        output.sin().sum().backward()
        return matrix.grad

    exact = gradient(10, 1e-9)
    errors = [float((gradient(terms, 0.5) - exact).abs().max()) for terms in (2, 10, 50, 400)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8 < errors[0]


@pytest.mark.parametrize("terms", [5, 10])
def test_below_the_floor_the_coefficient_is_one_constant(terms):
    """For L = (U diag(1, 2, 3) Uᵀ)₂₃ at diag(1, σ₂, σ₃) the gradient is −F₂₃ times σ₃ at (2, 3) and σ₂ at (3, 2)."""
    matrix = torch.diag(torch.tensor([1.0, 1e-9, 5e-10], dtype=torch.float64)).requires_grad_()
    left, _, _ = stable_svd(matrix, terms=terms, floor=1e-6)
    ((left * torch.tensor([1.0, 2.0, 3.0])) @ left.T)[1, 2].backward()
    constant = terms / 1e-6**2
    close(matrix.grad[1, 2], -constant * 5e-10 * torch.ones((), dtype=torch.float64))
    close(matrix.grad[2, 1], -constant * 1e-9 * torch.ones((), dtype=torch.float64))


def test_an_open_gate_gives_the_activation_and_its_gradient_back():
    matrix = separated(6, 6, 4).requires_grad_()
    output = truncated_activation(matrix, torch.tensor(100.0, dtype=torch.float64), 1.0)
    close(output, matrix, rtol=1e-9, atol=1e-9)
    upstream = torch.arange(24.0, dtype=torch.float64).reshape(6, 4)
    output.backward(upstream)
    close(matrix.grad, upstream, rtol=1e-7, atol=1e-7)


def test_a_steep_gate_is_the_truncated_svd():
    matrix = separated(7, 6, 5)
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    output = truncated_activation(matrix, torch.tensor(2.5, dtype=torch.float64), 100.0)
    close(output, (left[:, :2] * sigma[:2]) @ right[:2], rtol=1e-9, atol=1e-9)


def test_rank_drops_the_directions_that_rounding_adds():
    low = reference.with_spectrum(8, 9, 8, [3.0, 2.0, 1.0])
    matrix = low.clone().requires_grad_()
    output = truncated_activation(matrix, torch.tensor(100.0, dtype=torch.float64), 1.0, rank=3)
    close(output, low, rtol=1e-9, atol=1e-9)
    output.square().sum().backward()
    assert bool(torch.isfinite(matrix.grad).all())
    close(matrix.grad, 2 * low, rtol=1e-6, atol=1e-6)


def test_integer_like_truncations_of_another_dtype_are_accepted():
    output = truncated_activation(torch.eye(3), torch.tensor(2.0, dtype=torch.float64), 1.0)
    assert output.dtype == torch.float32


def test_a_matrix_that_is_not_finite_is_refused():
    with pytest.raises(NumericalError, match="matrix: 1 of 4 entries"):
        stable_svd(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
