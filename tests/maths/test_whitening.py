"""Square roots and inverses of Grams, their damping and its bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import NumericalError
from spectrim.maths.whitening import cholesky, damped, eigen_whitener, require_finite, sqrt_and_inverse
from tests import reference

close = torch.testing.assert_close
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
seeds = st.integers(0, 2**16)
sizes = st.integers(1, 12)


def some_gram(seed, features, tokens=None):
    _, x = reference.draw(seed, 1, features, tokens or 4 * features)
    return reference.gram(x)


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, st.sampled_from([0.0, 1e-6, 1e-3]))
def test_every_whitener_squares_to_the_damped_gram(seed, features, damping):
    gram = some_gram(seed, features)
    expected = reference.damped(gram, damping)
    close(damped(gram, damping), expected, **TIGHT)
    root = sqrt_and_inverse(gram, damping)
    close(root.root, root.root.T, **TIGHT)
    close(root.root @ root.root, expected, **TIGHT)
    close(root.root @ root.inverse, torch.eye(features, dtype=torch.float64), rtol=0, atol=1e-6)
    other = eigen_whitener(gram, damping)
    close(other.root @ other.root.T, expected, **TIGHT)
    close(other.root @ other.inverse, torch.eye(features, dtype=torch.float64), rtol=0, atol=1e-6)
    lower, used = cholesky(gram, damping)
    close(lower @ lower.T, expected, **TIGHT)
    close(lower, lower.tril(), rtol=0, atol=0)
    assert root.damping == other.damping == used == damping


def test_the_square_root_is_the_principal_one():
    gram = some_gram(3, 6)
    close(sqrt_and_inverse(gram).root, reference.matrix_sqrt(gram), rtol=1e-7, atol=1e-9)


def test_rotating_the_features_rotates_the_root():
    gram = some_gram(4, 7)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    turned = sqrt_and_inverse(rotation @ gram @ rotation.T, 1e-4).root
    close(turned, rotation @ sqrt_and_inverse(gram, 1e-4).root @ rotation.T, rtol=1e-7, atol=1e-9)


def test_a_rank_deficient_gram_gets_a_pseudo_inverse_without_damping():
    gram = some_gram(5, features=8, tokens=3)
    root = sqrt_and_inverse(gram)
    assert root.damping == 0
    projector = root.root @ root.inverse
    close(projector @ projector, projector, rtol=0, atol=1e-7)
    assert float(projector.trace()) == pytest.approx(3, abs=1e-7)
    assert float(root.inverse.abs().max()) < 1e4
    plain = torch.linalg.eigh(gram)  # without the cut, rounding noise is inverted to a huge number
    assert float(plain.eigenvalues.abs().rsqrt().max()) > 1e6


def test_cholesky_damps_what_is_only_semidefinite():
    gram = some_gram(5, features=8, tokens=3)
    lower, used = cholesky(gram)
    assert 0 < used <= 1e-2
    close(lower @ lower.T, reference.damped(gram, used), **TIGHT)


def test_an_indefinite_gram_is_damped_until_it_is_positive_and_says_so():
    gram = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1e-5], dtype=torch.float64))
    assert cholesky(gram, 1e-8)[1] == pytest.approx(1e-5)  # the first that makes it positive: 1.5e-5 outweighs 1e-5
    for whitener in (sqrt_and_inverse, eigen_whitener):
        found = whitener(gram, 1e-8)
        assert found.damping == pytest.approx(1e-4)  # the first that outweighs it twice, so that the inverse is bounded
        close(found.root @ found.root.T, reference.damped(gram, found.damping), **TIGHT)
        assert float(found.inverse.abs().max()) <= (found.damping * 1.5 / 2) ** -0.5


@pytest.mark.parametrize("function", [sqrt_and_inverse, eigen_whitener, cholesky])
def test_repair_is_bounded(function):
    gram = torch.diag(torch.tensor([3.0, -1.0], dtype=torch.float64))
    with pytest.raises(NumericalError, match=r"gram \(2, 2\) is not positive definite even with damping 1e-02.*-1"):
        function(gram, 1e-6, 1e-2)


@pytest.mark.parametrize("function", [sqrt_and_inverse, eigen_whitener, cholesky])
@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.full((3, 3), float("nan")), "9 of 9 entries"),
        (torch.diag(torch.tensor([1.0, float("inf")])), "1 of 4 entries"),
        (torch.ones(2, 3), "square matrix"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
    ],
)
def test_what_is_no_gram_is_refused(function, gram, message):
    with pytest.raises(NumericalError, match=message):
        function(gram)


@pytest.mark.parametrize("function", [sqrt_and_inverse, eigen_whitener, cholesky])
def test_the_identity_stands_for_a_gram_of_zeros(function):
    for found, expected in zip(function(torch.zeros(3, 3)), function(torch.eye(3)), strict=True):
        close(found, expected)
    assert torch.equal(function(torch.zeros(3, 3))[0], torch.eye(3, dtype=torch.float64))


def test_negative_damping_is_refused():
    for function in (damped, sqrt_and_inverse, cholesky):
        with pytest.raises(NumericalError, match="negative"):
            function(torch.eye(2), -0.1)


def test_a_single_feature_and_float32_are_fine():
    root = sqrt_and_inverse(torch.tensor([[4.0]]))
    assert root.root.dtype == torch.float64
    assert (float(root.root), float(root.inverse)) == (2.0, 0.5)


def test_finiteness_is_reported_with_the_name_and_the_count():
    require_finite("weight", torch.ones(2, 2))
    with pytest.raises(NumericalError, match=r"weight: 1 of 4 entries of the \(2, 2\) matrix"):
        require_finite("weight", torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
