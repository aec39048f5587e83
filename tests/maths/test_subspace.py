"""Mean projectors: the incremental form against the exact one, and both against the optimum on the captured outputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import NumericalError
from spectrim.maths.lowrank import closed_form, output_error, truncate
from spectrim.maths.subspace import IncrementalPCA, MeanProjector, ipca_update, top_right_singular_vectors
from tests import reference

close = torch.testing.assert_close
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
seeds = st.integers(0, 2**16)
POOLS = [MeanProjector, IncrementalPCA]


def identity(size):
    return torch.eye(size, dtype=torch.float64)


def projector(basis):
    return basis @ basis.T


def draw_windows(seed, n_windows, tokens, out, noise=0.3):
    """Outputs of windows that share a decaying spectrum and differ by noise."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(out, out, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, out).double()
    return [
        torch.randn(tokens, out, generator=generator, dtype=torch.float64) @ shared.T
        + noise * 0.1 * torch.randn(tokens, out, generator=generator, dtype=torch.float64)
        for _ in range(n_windows)
    ]


def pooled(pool, windows, rank):
    for outputs in windows:
        pool.add(top_right_singular_vectors(outputs, rank))
    return pool


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.data())
def test_the_vectors_span_the_top_of_the_svd(seed, tokens, out, data):
    rank = data.draw(st.integers(1, out))
    _, outputs = reference.draw(seed, 1, out, tokens)
    vectors = top_right_singular_vectors(outputs, rank)
    kept = min(rank, tokens, out)
    assert vectors.shape == (out, kept)
    assert vectors.dtype == torch.float64
    close(vectors.T @ vectors, identity(kept), **TIGHT)
    sigma = torch.linalg.svdvals(outputs)
    captured = torch.linalg.norm(outputs @ vectors) ** 2
    close(captured, sigma[:kept].square().sum(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("tokens", "out"), [(20, 6), (6, 20), (8, 8)])
def test_scaling_permuting_and_negating_tokens_change_no_subspace(tokens, out):
    _, outputs = reference.draw(1, 1, out, tokens)
    expected = projector(top_right_singular_vectors(outputs, 3))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    sign = torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0)[:, None]
    close(projector(top_right_singular_vectors(-7 * outputs[order] * sign, 3)), expected, **TIGHT)


def test_directions_that_are_not_there_are_not_invented():
    outputs = reference.with_spectrum(0, 10, 8, [3.0, 2.0])
    assert top_right_singular_vectors(outputs, 5).shape == (8, 2)
    assert top_right_singular_vectors(outputs[:1], 5).shape == (8, 1)
    assert top_right_singular_vectors(torch.zeros(4, 8), 5).shape == (8, 0)
    assert top_right_singular_vectors(torch.zeros(9, 8), 5).shape == (8, 0)


def test_float32_outputs_are_decomposed_in_float64():
    outputs = draw_windows(0, 1, 30, 10)[0].float()
    vectors = top_right_singular_vectors(outputs, 4)
    close(projector(vectors), reference.mean_projector([outputs], 4), **TIGHT)


@pytest.mark.parametrize(("tokens", "out", "rank"), [(20, 8, 3), (5, 12, 4), (10, 10, 10)])
def test_the_exact_pool_is_the_mean_of_projectors(tokens, out, rank):
    windows = draw_windows(2, 6, tokens, out)
    pool = pooled(MeanProjector(out, rank), windows, rank)
    expected = reference.mean_projector(windows, rank)
    close(pool.projector(), expected, **TIGHT)
    basis = pool.basis()
    close(basis.T @ basis, identity(rank), **TIGHT)
    captured = torch.trace(basis.T @ expected @ basis)
    close(captured, torch.linalg.eigvalsh(expected)[-rank:].sum(), **TIGHT)


@pytest.mark.parametrize("pool_kind", POOLS)
def test_equal_windows_give_their_own_subspace(pool_kind):
    outputs = draw_windows(3, 1, 20, 9)[0]
    pool = pooled(pool_kind(9, 4), [outputs, -2 * outputs, outputs], 4)
    close(projector(pool.basis()), projector(top_right_singular_vectors(outputs, 4)), **TIGHT)
    assert pool.n_windows == 3


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(1, 8))
def test_the_incremental_pool_is_exact_while_everything_fits(seed, n_windows, rank):
    """Windows whose vectors lie in one common r-dimensional space lose nothing in a merge."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.linalg.qr(torch.randn(12, rank, generator=generator, dtype=torch.float64)).Q
    exact, incremental = MeanProjector(12, rank), IncrementalPCA(12, rank)
    for _ in range(n_windows):
        width = int(torch.randint(1, rank + 1, (), generator=generator))
        inner = torch.linalg.qr(torch.randn(rank, width, generator=generator, dtype=torch.float64)).Q
        for pool in (exact, incremental):
            pool.add(common @ inner)
    assert incremental.dropped == pytest.approx(0, abs=1e-9)
    whole, basis = exact.projector(), incremental.basis()
    close(torch.trace(basis.T @ whole @ basis), torch.trace(whole), **TIGHT)


@pytest.mark.parametrize("seed", range(4))
def test_the_incremental_pool_captures_nearly_what_the_exact_one_does(seed):
    windows = draw_windows(seed, 12, 40, 24)
    rank = 6
    exact = pooled(MeanProjector(24, rank), windows, rank)
    incremental = pooled(IncrementalPCA(24, rank), windows, rank)
    whole = exact.projector()

    def captured(basis):
        return float(torch.trace(basis.T @ whole @ basis))

    best, found = captured(exact.basis()), captured(incremental.basis())
    assert found <= best + 1e-9
    assert found >= 0.98 * best
    assert best - found <= incremental.dropped / len(windows) + 1e-9  # what was dropped bounds what can be missing
    generator = torch.Generator().manual_seed(seed)
    guess = torch.linalg.qr(torch.randn(24, rank, generator=generator, dtype=torch.float64)).Q
    assert captured(guess) < 0.6 * best  # negative control: the measure tells subspaces apart


def test_every_window_weighs_the_same_however_late_it_comes():
    """A pool that forgot its weights would end up at the last windows; the exact basis stays near the majority."""
    early = identity(6)[:, :1]
    late = 0.5 * identity(6)[:, :1] + 0.75**0.5 * identity(6)[:, 1:2]
    exact, incremental = MeanProjector(6, 1), IncrementalPCA(6, 1)
    for vectors in [early] * 10 + [late] * 5:
        for pool in (exact, incremental):
            pool.add(vectors)
    assert float((exact.basis().T @ incremental.basis()).abs()) > 0.99
    assert float((exact.basis().T @ late).abs()) < 0.9  # negative control: the last window alone is elsewhere


def test_the_incremental_pool_needs_no_more_memory_for_more_windows():
    pool = IncrementalPCA(24, 5)
    sizes = set()
    for outputs in draw_windows(0, 8, 30, 24):
        pool.add(top_right_singular_vectors(outputs, 5))
        sizes.add(sum(value.numel() for value in vars(pool).values() if isinstance(value, torch.Tensor)))
    assert sizes == {24 * 5}


@pytest.mark.parametrize("pool_kind", POOLS)
def test_a_pool_does_not_change_what_it_is_given(pool_kind):
    vectors = identity(5)[:, :2].clone()
    pool = pool_kind(5, 2)
    for _ in range(3):
        pool.add(vectors)
    close(vectors, identity(5)[:, :2], rtol=0, atol=0)


@pytest.mark.parametrize("pool_kind", POOLS)
def test_windows_with_too_few_directions_still_give_a_full_basis(pool_kind):
    pool = pool_kind(7, 4)
    pool.add(identity(7)[:, :1])
    pool.add(torch.zeros(7, 0, dtype=torch.float64))
    basis = pool.basis()
    assert basis.shape == (7, 4)
    close(basis.T @ basis, identity(4), **TIGHT)
    assert abs(float(basis[0, 0])) == pytest.approx(1)


@pytest.mark.parametrize("pool_kind", POOLS)
@pytest.mark.parametrize(("out", "in_", "rank"), [(10, 6, 3), (6, 10, 3), (8, 8, 8), (5, 4, 1)])
def test_ipca_is_never_better_than_the_closed_form_on_the_captured_outputs(pool_kind, out, in_, rank):
    weight, x = reference.draw(4, out, in_, 60)
    gram = reference.gram(x)
    pool = pooled(pool_kind(out, rank), [window @ weight.T for window in x.split(15)], rank)
    error = output_error(weight, ipca_update(weight, pool.basis()), gram)
    best = output_error(weight, truncate(closed_form(weight, gram), rank), gram)
    assert best <= error + 1e-9
    assert error <= 0.9 * float(torch.linalg.norm(x @ weight.T))


def test_one_window_makes_ipca_the_closed_form():
    weight, x = reference.draw(5, 8, 6, 40)
    factors = ipca_update(weight, pooled(IncrementalPCA(8, 3), [x @ weight.T], 3).basis())
    close(factors.left @ factors.right, reference.best_for_outputs(weight, x, 3), rtol=1e-6, atol=1e-6)


def test_full_rank_gives_the_weight_back():
    weight, x = reference.draw(6, 5, 9, 30)
    factors = ipca_update(weight, pooled(MeanProjector(5, 5), [x @ weight.T], 5).basis())
    close(factors.left @ factors.right, weight, **TIGHT)


def test_centring_would_lose_the_mean_direction():
    """Negative control: outputs that share a large mean lie along it; centred PCA drops exactly that direction."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    outputs[:, 0] = 10
    uncentred = top_right_singular_vectors(outputs, 1)
    centred = top_right_singular_vectors(outputs - outputs.mean(0), 1)
    assert float(uncentred[0].abs()) > 0.99
    assert float(torch.linalg.norm(outputs @ centred)) < 0.3 * float(torch.linalg.norm(outputs @ uncentred))


@pytest.mark.parametrize("pool_kind", POOLS)
def test_bad_input_is_named(pool_kind):
    with pytest.raises(NumericalError, match="no window at all"):
        pool_kind(4, 2).basis()
    with pytest.raises(NumericalError, match=r"shape \(3, 2\); \(4, at most 4\)"):
        pool_kind(4, 2).add(torch.ones(3, 2))
    with pytest.raises(NumericalError, match="vectors: 8 of 8"):
        pool_kind(4, 2).add(torch.full((4, 2), float("nan")))
    with pytest.raises(NumericalError, match=r"rank 5 of outputs with 4 features"):
        pool_kind(4, 5)
    with pytest.raises(NumericalError, match="rank 0"):
        top_right_singular_vectors(torch.ones(3, 4), 0)
    with pytest.raises(NumericalError, match="outputs: 1 of 4"):
        top_right_singular_vectors(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), 1)
    with pytest.raises(NumericalError, match=r"shape \(3, 1\); \(4, at most 4\)"):
        ipca_update(torch.ones(4, 6), torch.ones(3, 1))
