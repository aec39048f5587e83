"""The interval of a ratio of perplexities: it holds the ratio, and pairing is what makes it narrow."""

import numpy as np
import pytest

from spectrim.evaluation.intervals import paired_interval


def drawn(seed: int, windows: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Losses of two models that differ by 0.05 ± 0.01 in windows that differ by 0.5."""
    draw = np.random.default_rng(seed)
    reference = 3 + 0.5 * draw.standard_normal(windows)
    return reference + 0.05 + 0.01 * draw.standard_normal(windows), reference


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    found = [paired_interval(*drawn(seed)) for seed in range(200)]
    holds = sum(interval is not None and interval[0] <= np.exp(0.05) <= interval[1] for interval in found)
    assert 0.85 * 200 < holds < 0.99 * 200


def test_it_is_the_same_in_every_run_and_much_narrower_than_without_pairs() -> None:
    losses, reference = drawn(0)
    found, unpaired = paired_interval(losses, reference), paired_interval(losses, reference[::-1])
    assert found is not None and unpaired is not None
    assert found == paired_interval(losses.tolist(), reference.tolist())
    assert found[0] < np.exp(losses.mean() - reference.mean()) < found[1]
    assert found[1] - found[0] < 0.05 * (unpaired[1] - unpaired[0])


def test_equal_models_do_not_differ_and_one_window_says_nothing() -> None:
    losses, _ = drawn(1)
    assert paired_interval(losses, losses) == (1.0, 1.0)
    assert paired_interval([3.0], [2.0]) is None
    with pytest.raises(ValueError, match="broadcast"):
        paired_interval([3.0, 2.0], [1.0, 2.0, 3.0])
