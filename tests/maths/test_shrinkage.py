"""Shrinkage of a Gram: its identities, and that it brings a Gram of few tokens closer to that of all."""

import pytest
import torch

from spectrim.errors import NumericalError
from spectrim.maths.shrinkage import shrunk
from tests import reference


def gram_of_tokens(tokens: int, seed: int = 0, features: int = 24) -> torch.Tensor:
    """Second moment of Gaussian tokens with a spread spectrum."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(1, 3, features, dtype=torch.float64)
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64) * scales
    return reference.gram(x) / tokens


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_trace_and_eigenvectors_stay_and_the_eigenvalues_draw_together(share: float) -> None:
    gram = gram_of_tokens(50)
    found = shrunk(gram, share)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.trace(), gram.trace())
    torch.testing.assert_close(found @ gram, gram @ found)
    values, mean = torch.linalg.eigvalsh(gram), gram.diagonal().mean()
    torch.testing.assert_close(torch.linalg.eigvalsh(found), (1 - share) * values + share * mean)


def test_the_ends_are_the_gram_and_no_metric() -> None:
    gram = gram_of_tokens(50)
    assert torch.equal(shrunk(gram, 0.0), gram)
    torch.testing.assert_close(shrunk(gram, 1.0), torch.eye(24, dtype=torch.float64) * gram.diagonal().mean())


def test_few_tokens_gain_and_many_lose() -> None:
    """Distance to the Gram of very many tokens: the negative control is the Gram that needs no shrinkage."""
    truth = torch.diag(torch.linspace(1, 3, 24, dtype=torch.float64).square())

    def distance(tokens: int, share: float) -> float:
        return sum(float((shrunk(gram_of_tokens(tokens, seed), share) - truth).norm()) for seed in range(8))

    assert distance(12, 0.3) < 0.8 * distance(12, 0.0)
    assert distance(20_000, 0.3) > 2 * distance(20_000, 0.0)


def test_what_is_no_share_or_no_gram_is_refused() -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(NumericalError, match=r"it must lie in \[0, 1\]"):
            shrunk(gram_of_tokens(50), share)
    with pytest.raises(NumericalError, match="not finite"):
        shrunk(torch.full((3, 3), torch.inf), 0.1)
    with pytest.raises(NumericalError, match="square matrix"):
        shrunk(torch.ones(3, 2), 0.1)
