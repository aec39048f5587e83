"""A coded weight in training: the product and its gradients are those of its dense weight, the integers stay."""

import pytest
import torch
from torch import nn

from spectrim.compression.stepped_training import SteppedTraining
from spectrim.maths.two_sided_rounding import Stepped


@pytest.mark.parametrize("largest", [3, 300, 70_000])
def test_the_product_and_its_gradients_are_those_of_the_dense_weight(largest: int) -> None:
    draw = torch.Generator().manual_seed(largest)
    values = torch.randint(-3, 4, (6, 5), generator=draw, dtype=torch.int32)
    values[2, 3] = largest
    rows, columns = (torch.rand(size, generator=draw).add(0.5).half() for size in (6, 5))
    module = SteppedTraining(Stepped(values, rows, columns), nn.Parameter(torch.randn(6, generator=draw)))
    x = torch.randn(2, 4, 5, generator=draw).requires_grad_()
    y = module(x)
    (y.square().sum() / largest).backward()

    a, b = (torch.zeros(size, 1).requires_grad_() for size in (6, 5))
    weight = values * (rows.float() * (1 + a.flatten()))[:, None] * (columns.float() * (1 + b.flatten()))
    x_twin = x.detach().clone().requires_grad_()
    expected = x_twin @ weight.T + module.bias.detach()
    (expected.square().sum() / largest).backward()
    torch.testing.assert_close(y, expected)
    for found, wanted in ((x, x_twin), (module.row_change, a), (module.column_change, b)):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-3)


def test_what_is_stored_has_the_steps_as_trained_and_the_integers_as_given() -> None:
    given = Stepped(torch.randint(-9, 9, (4, 3), dtype=torch.int32), torch.ones(4).half(), torch.ones(3).half())
    module = SteppedTraining(given, None)
    with torch.no_grad():
        module.row_change += 0.5
        module.column_change -= 0.25
    stored, factors = module.stored()
    assert factors is None and torch.equal(stored.values, given.values)
    assert (stored.rows == 1.5).all() and (stored.columns == 0.75).all()
    assert set(module.trained()) == {"rows.change", "columns.change"}
