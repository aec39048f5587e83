"""Rounding on a trained model of one megabyte: what the library adds to rounding to the nearest is worth its time.

Random weights do not show it: their inputs share no directions. The texts are stories that the model writes itself.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from spectrim.evaluation.perplexity import perplexity
from spectrim.maths.compensation import compensated
from spectrim.maths.quantization import dequantize, round_to_nearest
from spectrim.maths.storage_formats import Grid
from spectrim.models.modules import compressible_linears

FOLDER = Path(os.environ.get("SPECTRIM_EVAL_DATA", "")) / "stories260K"
GROUP, SEQ = 64, 256
Rounding = Callable[[Tensor, Tensor], Tensor]
"""A weight and the Gram of its inputs -> the weight as it is kept."""

pytestmark = pytest.mark.skipif(
    not os.environ.get("SPECTRIM_EVAL_DATA"), reason="SPECTRIM_EVAL_DATA names no folder with a model"
)


def dense() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def stories() -> Tensor:
    """(48, SEQ) tokens, of which the first half calibrates."""
    torch.manual_seed(0)
    start = torch.full((48, 1), dense().config.bos_token_id)
    return dense().generate(start, do_sample=True, top_k=0, min_new_tokens=SEQ - 1, max_new_tokens=SEQ - 1)


@pytest.fixture(scope="module")
def grams(stories: Tensor) -> dict[str, Tensor]:
    model, found = dense(), dict[str, Tensor]()

    def add(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            found[name] = found.get(name, 0) + x.mT @ x

        return hook

    for name, linear in compressible_linears(model).items():
        linear.register_forward_pre_hook(add(name))
    with torch.no_grad():
        model(input_ids=stories[:24])
    return found


def nearest(n_bits: int) -> Rounding:
    return lambda weight, gram: dequantize(round_to_nearest(weight, n_bits, GROUP))


def ours(n_bits: int, asymmetric: bool) -> Rounding:
    return lambda weight, gram: dequantize(compensated(weight, gram, Grid(n_bits, GROUP, asymmetric)))


def excess(stories: Tensor, grams: dict[str, Tensor], rounding: Rounding) -> float:
    """What rounding adds to the loss, in nats per token of stories that nothing was calibrated on."""
    model = dense()
    before = perplexity(model, stories[24:])["perplexity"]
    with torch.no_grad():
        for name, linear in compressible_linears(model).items():
            linear.weight.copy_(rounding(linear.weight.detach(), grams[name]))
    return math.log(perplexity(model, stories[24:])["perplexity"] / before)


@pytest.mark.parametrize("n_bits", [3, 4])
def test_gptq_and_its_zero_points_lose_less_than_rounding_to_the_nearest(
    n_bits: int, stories: Tensor, grams: dict[str, Tensor]
) -> None:
    plain, symmetric, asymmetric = (
        excess(stories, grams, rounding)
        for rounding in (nearest(n_bits), ours(n_bits, asymmetric=False), ours(n_bits, asymmetric=True))
    )
    assert 0 < asymmetric < symmetric < 0.7 * plain
