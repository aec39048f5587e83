"""Grams of experts that saw few tokens, against the sums of their definition."""

import torch
from torch import Tensor

from spectrim.compression.expert_statistics import ENOUGH, shrunk

FEATURES = 6
NAMES = [f"mlp.experts.down_proj.{index}" for index in range(4)]


def inputs(counts: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(n, FEATURES, generator=generator).double() for name, n in zip(NAMES, counts, strict=True)
    }
    return {name: x for name, x in drawn.items() if len(x)}


def found(counts: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x = inputs(counts)
    grams = {name: part.T @ part for name, part in x.items()}
    return shrunk(grams, {name: len(part) for name, part in x.items()}, NAMES), grams


def test_an_expert_of_few_tokens_gets_as_many_of_the_layer_as_it_has_features() -> None:
    counts = [ENOUGH * FEATURES, ENOUGH * FEATURES - 1, 2, 0]
    result, grams = found(counts)
    everything = torch.cat(list(inputs(counts).values()))
    of_layer = FEATURES * everything.T @ everything / len(everything)
    assert result.keys() == set(NAMES[1:])
    torch.testing.assert_close(result[NAMES[1]], grams[NAMES[1]] + of_layer)
    torch.testing.assert_close(result[NAMES[2]], grams[NAMES[2]] + of_layer)
    torch.testing.assert_close(result[NAMES[3]], of_layer)


def test_an_expert_of_two_tokens_has_no_direction_without_weight() -> None:
    result, grams = found([100, 100, 2, 0])
    assert int(torch.linalg.matrix_rank(grams[NAMES[2]])) == 2
    assert float(torch.linalg.eigvalsh(result[NAMES[2]])[0]) > 0.1


def test_nothing_is_known_of_a_layer_that_saw_no_token() -> None:
    assert shrunk({}, {}, NAMES) == {}
