"""What Spectrim assumes about a model, tried out on a few random tokens before anything is computed.

    walk      blocks one after the other give what the whole model gives; else it is run as a whole
    head      what comes behind the blocks makes the same logits of the hidden states by itself
    causal    a later token changes nothing before it
    reached   a gradient reaches every matrix to be compressed; one whose weight is read without a call, or that only
              chooses which tokens are seen, is left dense
    replaced  with low-rank factors in the place of one matrix of each kind, at full rank, the outputs stay
    cached    generating with a cache gives what generating without one gives

Two batches of different tokens, so that what depends on the tokens cannot pass for a constant.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.errors import ModelError
from spectrim.models.blocks import BlockModel, leaving, logits
from spectrim.models.hooks import differentiable, hooked, observed_gradients
from spectrim.models.linearise import linearise
from spectrim.models.modules import compressible_linears, decoder_blocks, replace

BATCH, SEQ_LEN, NEW_TOKENS = 2, 16, 3
REACH_LEN = 256  # some matrices are read from a number of tokens on
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits, relative to the largest logit, where the same products are to give the same."""

CACHED = 1e-2
"""The same between a cached step and a whole pass, whose sums have another order: experts may be chosen otherwise."""


class Probed(NamedTuple):
    """What was found of a model for which all else holds.

    Attributes:
        unreached: names of the linears that no gradient reaches.
        obstacle: why the model must run as a whole; None where it can be walked block by block.
    """

    unreached: list[str]
    obstacle: str | None


@torch.no_grad()
def probe(folder: Path, device: torch.device | str = "cpu") -> Probed:
    """Try out the model in ``folder``.

    Raises:
        ModelError: something does not hold that must; says what, and by how much.
    """
    from transformers import AutoModelForCausalLM

    blocks = BlockModel(folder, device)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    model = model.to(device).eval()
    batches = list(_random_tokens(model))
    expected = [model(input_ids=tokens, use_cache=False).logits for tokens in batches]
    _require_causal(model, batches[0], expected[0])
    _require_cache(model, batches[0])
    _require_head(model, batches[0], expected[0])
    obstacle = _obstacle(blocks, batches, expected)
    linearise(model)
    unreached = _unreached(model)
    _require_replaceable(model, batches[0], expected[0], unreached)
    return Probed(unreached, obstacle)


def _random_tokens(model: Any) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        yield _random(model, BATCH, SEQ_LEN, generator)


def _random(model: Any, batch: int, seq_len: int, generator: torch.Generator) -> Tensor:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return torch.randint(vocabulary, (batch, seq_len), generator=generator).to(model.device)


def _obstacle(model: BlockModel, batches: list[Tensor], expected: list[Tensor]) -> str | None:
    """Why the logits of all batches, walked block by block, are not ``expected``."""
    for tokens, whole in zip(batches, expected, strict=True):
        try:
            hidden = model.embed(tokens)
            for index in range(len(model.names)):
                with model.resident(index):
                    hidden = model.run(index, hidden)
            found = model.logits(tokens, hidden)
            _require_equal(model.model, "walked block by block", found, whole, "so it must run as a whole")
        except ModelError as error:
            return f"{error}."
        except Exception as error:  # whatever a model's own code raises when its blocks are called one by one
            return f"{_called(model.model)}: cannot be walked block by block ({type(error).__name__}: {error})."
    return None


def _unreached(model: Any) -> list[str]:
    """Linears that no gradient of the logits reaches, at REACH_LEN random tokens or half of what the model takes."""
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    longest = min([limit for limit in limits if limit] or [2 * REACH_LEN])
    tokens = _random(model, 1, min(REACH_LEN, longest // 2), torch.Generator().manual_seed(1))
    linears, reached = compressible_linears(model), set[str]()
    model.requires_grad_(False)
    embedding = model.get_input_embeddings().register_forward_hook(differentiable)
    noted = observed_gradients(linears, lambda name, gradient: reached.add(_of_all_experts(name)))
    with hooked([embedding]), noted, torch.enable_grad():
        model(input_ids=tokens, use_cache=False).logits.float().square().mean().backward()
    return [name for name in linears if _of_all_experts(name) not in reached]


def _of_all_experts(name: str) -> str:
    """A linear's name without numbers but for the block's, which comes first: a few tokens reach few experts."""
    block, number, rest = re.split(r"(\.\d+)", name, maxsplit=1)
    return block + number + re.sub(r"\.\d+", "", rest)


def _require_causal(model: Any, tokens: Tensor, expected: Tensor) -> None:
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % int(model.get_input_embeddings().weight.shape[0])
    found = model(input_ids=other, use_cache=False).logits
    if _difference(found[:, -1], expected[:, -1]) == 0:
        raise ModelError(
            f"{_called(model)}: its prediction does not depend on the last token; the weights are unusable"
        )
    _require_equal(
        model, "with another last token, before that token", found[:, :-1], expected[:, :-1],
        "a causal language model is required; this one looks ahead",
    )  # fmt: skip


def _require_head(model: Any, tokens: Tensor, expected: Tensor) -> None:
    with _refusing(model, "what comes behind its blocks cannot be run apart from them"):
        hidden, n_returned = leaving(model, tokens)
        found = logits(model, decoder_blocks(model)[1], tokens, hidden, n_returned)
    _require_equal(model, "with what comes behind its blocks run apart from them", found, expected)


def _require_cache(model: Any, tokens: Tensor) -> None:
    def generated(use_cache: bool) -> Tensor:
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), use_cache=use_cache, do_sample=False,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(found.logits)

    with_cache, without = generated(True), generated(False)
    tolerance = max(CACHED, TOLERANCE[without.dtype])
    _require_equal(model, "generating with a cache", with_cache[:2], without[:2], tolerance=tolerance)


def _require_replaceable(model: Any, tokens: Tensor, expected: Tensor, unreached: list[str]) -> None:
    linears, kinds = compressible_linears(model), dict[str, str]()
    for name in linears:
        if name not in unreached:
            kinds.setdefault(re.sub(r"\.\d+", "", name), name)
    for name in kinds.values():
        replace(model, name, _Factored(linears[name]))
    what = "with factors in the place of one linear of each kind it fails, for it reads their weights itself"
    with _refusing(model, what):
        found = model(input_ids=tokens, use_cache=False).logits
    _require_equal(model, "with factors of full rank in the place of one linear of each kind", found, expected)


class _Factored(nn.Module):
    """y = x weightᵀ leftᵀ + bias at full rank, with the right factor under the name that the formats give it."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, bias = linear.weight, linear.bias
        unit = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device)
        left, right = (weight, unit) if weight.shape[1] <= weight.shape[0] else (unit, weight)
        self.weight, self.left = nn.Parameter(right), nn.Parameter(left)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.weight), self.left, self.bias)


@contextmanager
def _refusing(model: Any, what: str) -> Iterator[None]:
    """Let whatever a model's own code raises within the ``with`` be one refusal, which says ``what`` and why."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"{_called(model)}: {what} ({type(error).__name__}: {error}). Such a model is not supported"
        ) from error


def _require_equal(
    model: Any, when: str, found: Tensor, expected: Tensor, cause: str = "", tolerance: float = 0
) -> None:
    difference = _difference(found, expected)
    if not difference <= (tolerance or TOLERANCE[expected.dtype]):
        raise ModelError(
            f"{_called(model)}: {when}, its logits differ by {difference:.2g} of the largest"
            f"{'; ' + cause if cause else '. Such a model is not supported'}"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    largest = expected.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found.float() - expected.float()).abs().max() / largest)


def _called(model: Any) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"
