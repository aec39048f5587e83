"""Noise of so many steps, group by group; weights on a 4-bit grid are on none any more."""

import pytest
import torch

from spectrim.maths.perturbation import GROUP, LEVELS, perturbed


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_noise_has_the_size_of_the_step_of_its_group(dtype: torch.dtype) -> None:
    sizes = torch.tensor([1e-3, 1.0, 30.0])
    weight = (torch.randn(4000, 3 * GROUP, generator=generator()) * sizes.repeat_interleave(GROUP)).to(dtype)
    moved = perturbed(weight, 0.3, generator())
    assert moved.dtype == dtype
    for group, other in zip(weight.double().split(GROUP, 1), moved.double().split(GROUP, 1), strict=True):
        step = (group.amax(1) - group.amin(1)) / LEVELS
        noise = (other - group) / step[:, None]
        assert abs(float(noise.mean())) < 0.01 and float(noise.std()) == pytest.approx(0.3, rel=0.02)


def test_weights_on_a_grid_are_moved_off_it() -> None:
    integers = torch.randint(0, LEVELS + 1, (64, 2 * GROUP), generator=generator()).float()
    integers[:, ::GROUP], integers[:, 1::GROUP] = 0, LEVELS  # a whole range in every group
    weight = 0.01 * integers - 0.05
    on_grid = (perturbed(weight, 0.0, generator()) + 0.05) / 0.01
    moved = (perturbed(weight, 0.3, generator()) + 0.05) / 0.01
    assert (on_grid - on_grid.round()).abs().max() < 1e-4
    assert float((moved - moved.round()).square().mean()) > 0.04  # of 1 / 12 where nothing of the grid is left


def test_constant_groups_a_short_last_group_and_equal_seeds() -> None:
    weight = torch.full((3, GROUP + 5), 2.0)
    weight[:, -1] = 3.0
    moved = perturbed(weight, 0.3, generator())
    assert torch.equal(moved[:, :GROUP], weight[:, :GROUP]) and not torch.equal(moved[:, GROUP:], weight[:, GROUP:])
    assert torch.equal(moved, perturbed(weight, 0.3, generator()))
