"""Rank training from its first step to its last, for the tests."""

from collections.abc import Callable
from typing import Any

from spectrim.compression.rank_training import RankTraining, Step


def train(*arguments: Any, on_step: Callable[[Step], None] = lambda step: None, **settings: Any) -> dict[str, float]:
    """The truncations that ``RankTraining`` of these arguments ends with."""
    run = RankTraining(*arguments, **settings)
    while run.step < run.steps:
        on_step(run.advance())
    return run.truncations()
