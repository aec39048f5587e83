"""Moments behind compressed blocks against activations collected by hand; the walk that collects them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.steps.model_folders import load_model
from spectrim.compression.prefix import prefix_moments
from spectrim.compression.statistics import forward_block, input_statistics
from spectrim.errors import NumericalError
from spectrim.maths.lowrank import Factors, plain_svd, truncate
from spectrim.models.blocks import BlockModel

TOKENS = torch.randint(2, 200, (3, 24), generator=torch.Generator().manual_seed(5))


def factors(model: BlockModel, index: int, share: float) -> dict[str, Factors]:
    return {
        name: truncate(plain_svd(weight), max(1, round(share * min(weight.shape))))
        for name, weight in model.weights(index).items()
    }


def inputs(model: BlockModel, index: int, hidden: Tensor) -> dict[str, Tensor]:
    """Linear -> its inputs (tokens, in) float64, by hooks of the test's own."""
    found: dict[str, list[Tensor]] = {name: [] for name in model.linears[index]}
    handles = [
        linear.register_forward_pre_hook(lambda m, args, n=name: found[n].append(args[0].flatten(0, -2).double()))
        for name, linear in model.linears[index].items()
    ]
    with torch.no_grad(), model.resident(index):
        for window in hidden:
            model.run(index, window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_moments_are_those_of_the_activations(family: str, model_folders: dict[str, Path]) -> None:
    model = BlockModel(model_folders[family])
    hidden = model.embed(TOKENS)
    after = forward_block(model, 0, hidden, 1)
    behind = forward_block(model, 0, hidden, 1, factors(model, 0, 0.5))
    input_of = input_statistics(model, 1, after, 1)[1]
    moments = prefix_moments(model, 1, input_of, after, behind)
    assert set(moments) == set(input_of.values())
    original, prefix = inputs(model, 1, after), inputs(model, 1, behind)
    for name, found in moments.items():
        for measured, expected in (
            (found.cross, original[name].T @ prefix[name]),
            (found.gram, prefix[name].T @ prefix[name]),
        ):
            torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert not torch.allclose(found.cross, found.gram, rtol=1e-2)


def test_factors_take_the_place_of_the_weights(model_folders: dict[str, Path]) -> None:
    model = BlockModel(model_folders["llama"])
    hidden = model.embed(TOKENS)
    whole = forward_block(model, 0, hidden, 1)
    torch.testing.assert_close(forward_block(model, 0, hidden, 1, {}), whole)
    torch.testing.assert_close(forward_block(model, 0, hidden, 1, factors(model, 0, 1.0)), whole, rtol=1e-4, atol=1e-5)
    cut = factors(model, 0, 0.3)
    dense = load_model(model_folders["llama"], torch.device("cpu"))
    for name, pair in cut.items():
        dense.get_submodule(name).weight.data.copy_(pair.left @ pair.right)
    with torch.no_grad():
        expected = dense(TOKENS, output_hidden_states=True).hidden_states[1]
    found = forward_block(model, 0, hidden, 1, cut)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, whole, rtol=1e-2)
    torch.testing.assert_close(forward_block(model, 0, hidden, 1), whole)  # the model itself is unchanged


def test_inputs_that_are_not_finite_name_their_window(model_folders: dict[str, Path]) -> None:
    model = BlockModel(model_folders["llama"])
    hidden = model.embed(TOKENS)
    input_of = input_statistics(model, 0, hidden, 1)[1]
    behind = hidden.clone()
    behind[2] = torch.inf
    with pytest.raises(NumericalError, match=r"layers\.0\.\S+: non-finite input .* in calibration window 2"):
        prefix_moments(model, 0, input_of, hidden, behind)
