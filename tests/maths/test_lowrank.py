"""Closed forms: the discarded energy is the error, all routes meet at one optimum, and nothing beats it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import NumericalError
from spectrim.maths.energies import discarded, predicted_loss
from spectrim.maths.lowrank import (
    Factors,
    closed_form,
    output_error,
    plain_svd,
    smaller_root,
    spectrum,
    svd_llm_cholesky,
    svd_llm_v2,
    truncate,
    two_sided,
)
from spectrim.maths.whitening import cholesky, damped, eigen_whitener, sqrt_and_inverse
from tests import reference

close = torch.testing.assert_close
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
seeds = st.integers(0, 2**16)
sizes = st.integers(1, 12)
SHAPES = [(12, 5), (5, 12), (7, 7), (1, 4), (4, 1), (1, 1)]
WHITENED = [closed_form, svd_llm_cholesky, svd_llm_v2]


def draw(seed, out, in_):
    """W, G of a skewed input and D of random gradients, all well conditioned enough to invert."""
    weight, x = reference.draw(seed, out, in_, 4 * in_)
    _, gradients = reference.draw(seed + 1, 1, out, 4 * out)
    return weight, x, reference.gram(x), reference.gram(gradients)


def product(decomposition, rank):
    factors = truncate(decomposition, rank)
    return factors.left @ factors.right


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, sizes, st.data())
def test_the_output_error_is_the_discarded_energy(seed, out, in_, data):
    """‖X(W − W')ᵀ‖_F² = Σ_{i>r} σᵢ², and W' projects the outputs on their own best subspace."""
    weight, x, gram, _ = draw(seed, out, in_)
    rank = data.draw(st.integers(1, min(out, in_)))
    whole = float(torch.linalg.norm(x @ weight.T))
    for method in WHITENED:
        decomposition = method(weight, gram)
        factors = truncate(decomposition, rank)
        expected = float(discarded(decomposition.sigma**2)[rank].sqrt())
        captured = float(torch.linalg.norm(x @ (weight - factors.left @ factors.right).T))
        assert captured == pytest.approx(expected, abs=1e-6 * whole)
        assert output_error(weight, factors, gram) == pytest.approx(captured, abs=1e-6 * whole)
        close(decomposition.sigma, torch.linalg.svdvals(x @ weight.T)[: min(out, in_)], rtol=1e-6, atol=1e-6 * whole)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_the_three_routes_to_the_optimum_agree(out, in_):
    weight, x, gram, _ = draw(7, out, in_)
    whole = torch.linalg.norm(x @ weight.T)
    for rank in range(1, min(out, in_) + 1):
        expected = reference.best_for_outputs(weight, x, rank)
        for method in WHITENED:
            difference = torch.linalg.norm(x @ (product(method(weight, gram), rank) - expected).T)
            assert difference <= 1e-8 * whole, (method.__name__, rank)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("method", [*WHITENED, lambda w, g: plain_svd(w)])
def test_full_rank_gives_the_weight_back(out, in_, method):
    weight, _, gram, _ = draw(3, out, in_)
    decomposition = method(weight, gram)
    assert decomposition.left.shape == (out, min(out, in_))
    assert decomposition.right.shape == (min(out, in_), in_)
    assert {part.dtype for part in decomposition} == {torch.float64}
    close(product(decomposition, min(out, in_)), weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_the_left_factor_of_the_closed_form_is_orthonormal(out, in_):
    weight, _, gram, _ = draw(3, out, in_)
    decomposition = closed_form(weight, gram)
    close(decomposition.left.T @ decomposition.left, torch.eye(min(out, in_), dtype=torch.float64), **TIGHT)
    close(decomposition.left.T @ weight, decomposition.right, **TIGHT)
    close(spectrum(weight, gram), decomposition.sigma, **TIGHT)


@pytest.mark.parametrize("seed", range(5))
def test_plain_svd_is_worse_on_skewed_inputs(seed):
    """Negative control: without the Gram the error on the captured outputs is far above the optimum."""
    weight, x = reference.draw(seed, 16, 12, 60, skew=2.0)
    gram = reference.gram(x)
    best = output_error(weight, truncate(closed_form(weight, gram), 4), gram)
    plain = output_error(weight, truncate(plain_svd(weight), 4), gram)
    assert plain > 1.5 * best


@pytest.mark.parametrize("seed", range(5))
def test_no_nearby_factors_are_better(seed):
    weight, _, gram, _ = draw(seed, 9, 6)
    best = truncate(closed_form(weight, gram), 3)
    error = output_error(weight, best, gram)
    generator = torch.Generator().manual_seed(seed)
    for step in (1e-1, 1e-2, 1e-3):
        for _ in range(10):
            left = best.left + step * torch.randn(best.left.shape, generator=generator, dtype=torch.float64)
            right = best.right + step * torch.randn(best.right.shape, generator=generator, dtype=torch.float64)
            assert output_error(weight, Factors(left, right), gram) >= error


def test_isotropic_inputs_make_it_the_plain_svd():
    weight, _, _, _ = draw(0, 8, 6)
    isotropic = 3.0 * torch.eye(6, dtype=torch.float64)
    for method in WHITENED:
        close(product(method(weight, isotropic), 2), product(plain_svd(weight), 2), **TIGHT)


@settings(max_examples=30, deadline=None)
@given(seeds, sizes, sizes, st.sampled_from([0.0, 1e-3]), st.data())
def test_two_sided_is_the_textbook_formula(seed, out, in_, damping, data):
    weight, _, gram, gradient_gram = draw(seed, out, in_)
    rank = data.draw(st.integers(1, min(out, in_)))
    rows, columns = reference.damped(gradient_gram, damping), reference.damped(gram, damping)
    decomposition = two_sided(weight, gram, gradient_gram, damping)
    expected = reference.two_sided_spectrum(weight, columns, rows)
    close(decomposition.sigma, expected, rtol=1e-6, atol=1e-6 * float(expected[0]))
    difference = weight - product(decomposition, rank)
    error = torch.linalg.norm(reference.matrix_sqrt(rows) @ difference @ reference.matrix_sqrt(columns))
    tail = discarded(expected**2)[rank].sqrt()
    close(error, tail, rtol=1e-6, atol=1e-6 * float(expected[0]))


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_two_sided_factors_equal_the_reference(out, in_):
    weight, _, gram, gradient_gram = draw(11, out, in_)
    decomposition = two_sided(weight, gram, gradient_gram, 0.0)
    for rank in range(1, min(out, in_) + 1):
        expected = reference.two_sided(weight, gram, gradient_gram, rank)
        close(product(decomposition, rank), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_two_sided_factors_are_balanced_in_their_metrics(out, in_):
    """‖D^½ left_i‖² = ‖right_i G^½‖² = σᵢ."""
    weight, _, gram, gradient_gram = draw(2, out, in_)
    left, sigma, right = two_sided(weight, gram, gradient_gram, 0.0)
    close(torch.diagonal(left.T @ gradient_gram @ left), sigma, rtol=1e-6, atol=1e-9)
    close(torch.diagonal(right @ gram @ right.T), sigma, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("given_roots", ["input", "gradient", "both"])
def test_precomputed_roots_change_nothing(out, in_, given_roots):
    weight, _, gram, gradient_gram = draw(5, out, in_)
    roots = {}
    if given_roots in ("input", "both"):
        roots["gram_root"] = sqrt_and_inverse(gram, 1e-4)
    if given_roots in ("gradient", "both"):
        roots["gradient_root"] = sqrt_and_inverse(gradient_gram, 1e-4)
    expected = two_sided(weight, gram, gradient_gram, 1e-4)
    found = two_sided(weight, gram, gradient_gram, 1e-4, **roots)
    close(found.sigma, expected.sigma, rtol=1e-6, atol=1e-6 * float(expected.sigma[0]))
    for rank in range(1, min(out, in_) + 1):
        close(product(found, rank), product(expected, rank), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_a_shared_whitener_changes_nothing(out, in_):
    weight, _, gram, _ = draw(5, out, in_)
    lower, whitener = cholesky(gram, 1e-4)[0], eigen_whitener(gram, 1e-4)
    for found, expected in (
        (svd_llm_cholesky(weight, gram, lower=lower), svd_llm_cholesky(weight, gram, 1e-4)),
        (svd_llm_v2(weight, gram, whitener=whitener), svd_llm_v2(weight, gram, 1e-4)),
    ):
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def test_two_sided_without_gradient_information_is_the_closed_form():
    weight, x, gram, _ = draw(1, 9, 6)
    found = two_sided(weight, gram, torch.eye(9, dtype=torch.float64), 0.0)
    difference = product(found, 3) - product(closed_form(weight, gram), 3)
    assert torch.linalg.norm(x @ difference.T) <= 1e-7 * torch.linalg.norm(x @ weight.T)


def test_the_one_sided_optimum_is_worse_in_the_two_sided_metric():
    """Negative control: the gradient Gram matters."""
    weight, _, gram, _ = draw(1, 10, 8)
    _, gradients = reference.draw(9, 1, 10, 40, skew=2.0)
    gradient_gram = reference.gram(gradients)
    row, column = reference.matrix_sqrt(gradient_gram), reference.matrix_sqrt(gram)

    def loss(candidate):
        return float(torch.linalg.norm(row @ (weight - candidate) @ column))

    one_sided = loss(product(closed_form(weight, gram), 3))
    assert one_sided > 1.2 * loss(product(two_sided(weight, gram, gradient_gram, 0.0), 3))


@pytest.mark.parametrize(("out", "in_"), [(9, 6), (6, 9)])
def test_fewer_tokens_than_features_still_give_the_weight_back(out, in_):
    weight, x = reference.draw(0, out, in_, 3)
    _, gradients = reference.draw(1, 1, out, 3)
    gram, gradient_gram = reference.gram(x), reference.gram(gradients)
    decomposition = two_sided(weight, gram, gradient_gram, 1e-6)
    close(product(decomposition, 6), weight, rtol=0, atol=1e-6)
    for method in (closed_form, svd_llm_v2):
        assert output_error(weight, truncate(method(weight, gram), 3), gram) < 1e-6  # rank 3 holds all three tokens


def test_one_token_needs_one_direction():
    weight, x = reference.draw(0, 5, 7, 1)
    gram = reference.gram(x)
    decomposition = closed_form(weight, gram)
    close(x @ product(decomposition, 1).T, x @ weight.T, **TIGHT)
    assert float(decomposition.sigma[1]) < 1e-6 * float(decomposition.sigma[0])


def test_degenerate_weights_stay_finite():
    gram = torch.eye(4, dtype=torch.float64)
    for weight in (torch.zeros(6, 4), torch.ones(6, 4), torch.zeros(4, 4)):
        for decomposition in (
            closed_form(weight, gram),
            svd_llm_v2(weight, gram),
            two_sided(weight, gram, torch.eye(len(weight), dtype=torch.float64)),
        ):
            assert all(bool(torch.isfinite(part).all()) for part in decomposition)
            close(product(decomposition, 4), weight.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("out", "in_"), [(6, 4), (4, 6), (4, 4)])
@pytest.mark.parametrize("silent", ["gram", "gradient_gram", "both"])
def test_a_metric_of_zeros_loses_nothing_and_the_identity_takes_its_place(out, in_, silent):
    weight, _, gram, gradient_gram = draw(2, out, in_)
    given = {"gram": gram * (silent == "gradient_gram"), "gradient_gram": gradient_gram * (silent == "gram")}
    found = two_sided(weight, *given.values(), 0.0, **smaller_root(weight, *given.values(), 0.0, 1e-2))
    assert not found.sigma.any()
    instead = [side if side.any() else torch.eye(len(side), dtype=torch.float64) for side in given.values()]
    expected = two_sided(weight, *instead, 0.0)
    assert expected.sigma.all()
    close(product(found, 2), product(expected, 2), **TIGHT)
    for method in (closed_form, svd_llm_cholesky, svd_llm_v2):
        if silent != "gradient_gram":
            one_sided = method(weight, given["gram"])
            assert not one_sided.sigma.any()
            close(product(one_sided, min(out, in_)), weight, **TIGHT)
            if method is not closed_form:
                close(product(one_sided, 2), product(plain_svd(weight), 2), **TIGHT)


def test_predicted_loss_is_half_the_discarded_energy_per_token():
    close(
        predicted_loss(torch.tensor([3.0, 2.0, 1.0]), 10),
        torch.tensor([14.0, 5.0, 1.0, 0.0], dtype=torch.float64) / 20,
    )


def test_predicted_loss_is_the_loss_of_a_quadratic_model():
    """For L = ½ Σ_t Σ_s (g_s·ΔW x_t)² / n the prediction is exact: D and G are the sums over the same tokens."""
    weight, x, gram, _ = draw(4, 6, 5)
    _, gradients = reference.draw(8, 1, 6, len(x))
    decomposition = two_sided(weight, gram, reference.gram(gradients), 0.0)
    for rank in range(1, 6):
        change = gradients @ (weight - product(decomposition, rank)) @ x.T  # (tokens, tokens)
        expected = float((change**2).sum()) / (2 * len(x))
        assert float(predicted_loss(decomposition.sigma, len(x))[rank]) == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("rank", [0, 5])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(NumericalError, match=rf"rank {rank} asked of a decomposition of 4"):
        truncate(plain_svd(torch.ones(4, 6)), rank)


def test_truncated_factors_own_their_memory():
    factors = truncate(plain_svd(torch.ones(4, 6)), 2)
    assert factors.left.is_contiguous()
    assert factors.left.untyped_storage().nbytes() == 4 * 2 * 8


def test_bad_input_is_named():
    weight, gram = torch.ones(3, 2), torch.eye(2)
    broken = torch.tensor([[float("nan"), 0.0], [0.0, 1.0]])
    for method in (*WHITENED, spectrum):
        with pytest.raises(NumericalError, match=r"gram has shape \(3, 3\); this weight requires \(2, 2\)"):
            method(weight, torch.eye(3))
        with pytest.raises(NumericalError, match="gram: 1 of 4 entries"):
            method(weight, broken)
        with pytest.raises(NumericalError, match="weight: 6 of 6 entries"):
            method(weight * float("inf"), gram)
    with pytest.raises(NumericalError, match=r"gradient_gram has shape \(2, 2\)"):
        two_sided(weight, gram, gram)
    with pytest.raises(NumericalError, match="gradient_gram: 9 of 9"):
        two_sided(weight, gram, torch.full((3, 3), float("nan")))
    with pytest.raises(NumericalError, match="a matrix"):
        plain_svd(torch.ones(3))


def test_an_indefinite_gram_is_refused():
    with pytest.raises(NumericalError, match="indefinite along the weight"):
        closed_form(torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -0.5])))


def test_damping_regularises_towards_the_plain_svd():
    weight, _, gram, _ = draw(6, 8, 6)
    close(
        product(svd_llm_cholesky(weight, gram, damping=1e-3), 3),
        product(closed_form(weight, damped(gram, 1e-3)), 3),
        **TIGHT,
    )
