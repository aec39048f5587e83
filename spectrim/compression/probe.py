"""What Spectrim assumes about a model, tried out on a few random tokens before anything is computed.

    walk      blocks one after the other give what the whole model gives
    causal    a later token changes nothing before it
    reached   a gradient reaches every matrix to be compressed; one whose weight is read without a call, or that only
              chooses which tokens are seen, is left dense
    replaced  with low-rank factors in the place of one matrix of each kind, at full rank, the outputs stay
    cached    generating with a cache gives what generating without one gives

Two batches of different tokens, so that what depends on the tokens cannot pass for a constant.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.errors import ModelError
from spectrim.models.blocks import BlockModel, hooked
from spectrim.models.linearise import linearise
from spectrim.models.modules import compressible_linears, replace

BATCH, SEQ_LEN, NEW_TOKENS = 2, 16, 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits, relative to the largest logit, where the same products are to give the same."""

CACHED = 1e-2
"""The same between a cached step and a whole pass, whose sums have another order: experts may be chosen otherwise."""


@torch.no_grad()
def probe(folder: Path, device: torch.device | str = "cpu") -> list[str]:
    """Names of the linears that no gradient reaches, of the model in ``folder``, for which all else holds.

    Raises:
        ModelError: something does not hold; says what, and by how much.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    model = model.to(device).eval()
    batches = list(_random_tokens(model))
    expected = [model(input_ids=tokens, use_cache=False).logits for tokens in batches]
    _require_causal(model, batches[0], expected[0])
    _require_cache(model, batches[0])
    unreached = _walked(BlockModel(folder, device), batches, expected)
    _require_replaceable(model, batches[0], expected[0], unreached)
    return unreached


def _random_tokens(model: Any) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    for _ in range(2):
        yield torch.randint(vocabulary, (BATCH, SEQ_LEN), generator=generator).to(model.device)


def _walked(model: BlockModel, batches: list[Tensor], expected: list[Tensor]) -> list[str]:
    """Linears that no gradient reaches while all batches go through the blocks, whose logits must be ``expected``."""
    reached: set[str] = set()

    def note(name: str) -> Any:
        return lambda module, args, output: reached.add(_of_all_experts(name)) if output.requires_grad else None

    for tokens, logits in zip(batches, expected, strict=True):
        try:
            hidden = model.embed(tokens)
            for index, linears in enumerate(model.linears):
                hooks = (linear.register_forward_hook(note(name)) for name, linear in linears.items())
                with model.resident(index), hooked(hooks), torch.enable_grad():
                    hidden = model.run(index, hidden.detach().requires_grad_()).detach()
            found = model.logits(tokens, hidden)
        except ModelError:
            raise
        except Exception as error:  # whatever a model's own code raises when its blocks are called one by one
            raise ModelError(
                f"{_called(model.model)}: cannot be walked block by block ({type(error).__name__}: {error}). "
                "Such a model is not supported"
            ) from error
        _require_equal(model.model, "walked block by block", found, logits)
    names = [name for linears in model.linears for name in linears]
    return [name for name in names if _of_all_experts(name) not in reached]


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
    linearise(model)
    linears, kinds = compressible_linears(model), dict[str, str]()
    for name in linears:
        if name not in unreached:
            kinds.setdefault(re.sub(r"\.\d+", "", name), name)
    for name in kinds.values():
        replace(model, name, _Factored(linears[name]))
    try:
        found = model(input_ids=tokens, use_cache=False).logits
    except Exception as error:
        raise ModelError(
            f"{_called(model)}: with factors in the place of one linear of each kind it fails, for it reads their "
            f"weights itself ({type(error).__name__}: {error}). Such a model is not supported"
        ) from error
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
