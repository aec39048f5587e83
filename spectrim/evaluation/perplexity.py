"""How good a language model is: perplexity, a generation sample, and round-to-nearest quantization to compare with.

Protocol: a text is tokenised once, without special tokens, and cut into contiguous windows of ``seq_len`` tokens. The
first token of a window is context only, every other token's loss counts once: where a window begins with BOS, that is
every token of the text. Nothing is padded and nothing is skipped: a non-finite loss is an error that names the module
and the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spectrim.errors import DataError, NumericalError
from spectrim.maths.budget import dense_bytes
from spectrim.maths.quantization import Quantized, dequantize, round_to_nearest, rounded_bytes
from spectrim.models.modules import compressible_linears

if TYPE_CHECKING:  # importing it takes seconds, and a result of the store needs no model
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[Sequence[int]], Iterable[int]]


class Perplexity(TypedDict):
    """``perplexity`` = exp(mean loss in nats) over ``n_tokens`` next-token losses; ``losses``: each window's mean."""

    perplexity: float
    n_tokens: int
    losses: list[float]


class QuantizedBytes(TypedDict):
    """``bytes`` of the quantized weights with their scales, ``dense_bytes`` of the same in 16 bit, their ``ratio``."""

    bytes: int
    dense_bytes: int
    ratio: float


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int = 1,
    progress: Progress = iter,
    begun: Sequence[float] = (),
    keep: Callable[[list[float]], None] = lambda losses: None,
) -> Perplexity:
    """exp(Σ losses / n_tokens), n_tokens = n_windows · (seq_len − 1): every next-token loss counted once.

    A loss is −log softmax(logits) of the token that follows, in float32, whatever the model computes in; losses are
    summed in float64, so the result does not depend on ``batch_size`` beyond the rounding of the model itself.

    Args:
        model: a causal language model in evaluation mode.
        windows: (n_windows, seq_len) token ids, integer; moved to the model's device batch by batch.
        batch_size: windows per forward pass.
        progress: wraps the sequence of the batches' first windows, for a progress bar.
        begun: the mean losses in nats of the windows that were measured before.
        keep: called after every batch with those of all windows so far.

    Raises:
        DataError: no window, windows of one token, or a token the model does not know.
        NumericalError: a non-finite loss; names the window and the first module whose output is not finite.
    """
    _check(windows, model)
    found = list(begun)
    for start in progress(range(len(found), len(windows), batch_size)):
        batch = windows[start : start + batch_size].to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits
        for index, (row, tokens) in enumerate(zip(logits, batch, strict=True)):  # one float32 copy at a time
            losses = cross_entropy(row[:-1].float(), tokens[1:], reduction="none")
            if not losses.isfinite().all():
                raise NumericalError(_diagnosis(model, batch[index : index + 1], start + index, losses))
            found.append(float(losses.double().mean()))
        keep(found)
    n_tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = torch.tensor(found, dtype=torch.float64).mean()
    if not mean.exp().isfinite():
        raise NumericalError(f"mean loss of {mean:.1f} nats over {n_tokens:,} tokens has no finite perplexity")
    return {"perplexity": float(mean.exp()), "n_tokens": n_tokens, "losses": found}


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """``prompt`` followed by what the model writes, greedily, in at most ``new_tokens`` tokens.

    What ``tokenizer`` puts before a text by itself, BOS, stands before the prompt.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    writer: Any = model  # PreTrainedModel's types do not know that causal models generate
    tokens = writer.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,  # a checkpoint's own sampling settings mean nothing here, and are warned about
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


@torch.no_grad()
def quantize_model_(
    model: PreTrainedModel, n_bits: int, *, group_size: int | None = None, exclude: Iterable[str] = ()
) -> QuantizedBytes:
    """W <- scale · round(W / scale), symmetric, in place, for every compressible linear: the baseline to beat.

    One 16-bit scale per output channel, or per ``group_size`` inputs of one; scales count. The weights stay in the
    model's dtype, so its speed and memory tell nothing about quantization.

    Args:
        model: changed in place.
        n_bits: of a weight, 2 to 8.
        group_size: inputs that share a scale; None: all inputs of an output channel.
        exclude: shell patterns of linears left alone, as in ``compressible_linears``.

    Raises:
        ModelError: the model has no linear to quantize.
        NumericalError: a non-finite weight, or a scale outside 16 bit; names the linear.
    """
    stored = dense = 0
    for name, linear in compressible_linears(model, exclude).items():
        try:
            quantized = round_to_nearest(linear.weight, n_bits, group_size)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
        linear.weight.copy_(dequantize(quantized))
        stored += rounded_bytes(linear.out_features, linear.in_features, n_bits, group_size)
        dense += dense_bytes(linear.out_features, linear.in_features)
    return {"bytes": stored, "dense_bytes": dense, "ratio": stored / dense}


@torch.no_grad()
def store_quantized_(
    model: PreTrainedModel, rounded: Mapping[str, Quantized], n_bits: int, exclude: Iterable[str] = ()
) -> QuantizedBytes:
    """W <- q s in place for every compressible linear in ``rounded``; the others stay, at their 16-bit bytes.

    Args:
        model: changed in place.
        rounded: linear name -> its integers and scales, and zero points of a byte each where it has some.
        n_bits: of an integer.
        exclude: shell patterns of linears that do not count, as in ``compressible_linears``.
    """
    stored = dense = 0
    for name, linear in compressible_linears(model, exclude).items():
        weight, n_bytes = rounded.get(name), dense_bytes(linear.out_features, linear.in_features)
        dense += n_bytes
        if weight is not None:
            linear.weight.copy_(dequantize(weight))
            zeros = 0 if weight.zero_point is None else weight.zero_point.numel()
            n_bytes = weight.values.numel() * n_bits // 8 + weight.scale.nbytes + zeros
        stored += n_bytes
    return {"bytes": stored, "dense_bytes": dense, "ratio": stored / dense}


def _check(windows: Tensor, model: PreTrainedModel) -> None:
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise DataError(
            f"windows of shape {tuple(windows.shape)}; at least one window of at least two tokens is required: "
            "give a longer text or a smaller calibrate.seq_len"
        )
    embedding: Any = model.get_input_embeddings()
    known, largest = embedding.num_embeddings, int(windows.max())
    if largest >= known or int(windows.min()) < 0:
        raise DataError(
            f"token {largest if largest >= known else int(windows.min())} in the windows; the model knows tokens 0 to "
            f"{known - 1}: the windows were made with another tokenizer, run calibrate again"
        )


def _diagnosis(model: PreTrainedModel, window: Tensor, index: int, losses: Tensor) -> str:
    """What to say about a window (1, seq_len) with non-finite losses: run it again, with an eye on every module."""
    where: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if not where and any(not tensor.isfinite().all() for tensor in _tensors(output)):
                where.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(input_ids=window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    bad, count = int((~losses.isfinite()).sum()), losses.numel()
    first = f"{where[0]}: its output is the first that is not finite" if where else "every module's output is finite"
    return (
        f"{first}; {bad} of {count} losses in window {index} are not finite; all must be: "
        "check the weights, or compute in float32 (prepare.load_dtype)"
    )


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
