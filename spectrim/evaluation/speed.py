"""How fast a language model runs and how much memory it needs, always beside another model in the same run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectrim.errors import DataError

if TYPE_CHECKING:  # importing it takes seconds, and a result of the store needs no model
    from transformers import PreTrainedModel

Progress = Callable[[Sequence[int]], Iterable[int]]


class Throughput(TypedDict):
    """Tokens per second: ``prefill`` of a prompt and ``decode`` of one token after the other, model name -> median."""

    prefill: dict[str, float]
    decode: dict[str, float]


def throughput(
    models: Mapping[str, PreTrainedModel],
    *,
    prefill_tokens: int,
    decode_tokens: int,
    repeats: int,
    batch_size: int = 1,
    progress: Progress = iter,
) -> Throughput:
    """Tokens per second of every model, over the whole batch: n_tokens / median of ``repeats`` wall-clock times.

    The models take turns within every repeat, so that a machine that slows down slows all of them. The first round
    warms up and is not counted. Prefill reads ``prefill_tokens`` at once and computes the last logits only, as
    generation does; decode then takes ``decode_tokens`` greedy steps of one token with the key-value cache.

    Args:
        models: name -> causal language model in evaluation mode, each on its device.
        prefill_tokens: length of each prompt, tokens.
        decode_tokens: steps after it, tokens.
        repeats: timed rounds.
        batch_size: prompts at once.
        progress: wraps the sequence of the rounds, for a progress bar.

    Raises:
        DataError: the model's context is too short.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for name, model in models.items():
        _check_context(name, model, prefill_tokens + decode_tokens)
    for turn in progress(range(repeats + 1)):
        for name, model in models.items():
            seconds = _run(model, prefill_tokens, decode_tokens, batch_size)
            if turn > 0:
                times[name].append(seconds)
    read, written = batch_size * prefill_tokens, batch_size * decode_tokens
    return {
        "prefill": {name: read / median(pair[0] for pair in pairs) for name, pairs in times.items()},
        "decode": {name: written / median(pair[1] for pair in pairs) for name, pairs in times.items()},
    }


def to_fastest(
    model: PreTrainedModel, dtypes: Sequence[torch.dtype], *, prefill_tokens: int, decode_tokens: int
) -> torch.dtype:
    """The one of ``dtypes`` in which ``model`` answers soonest, prompt and all; the model has it from then on."""
    fastest = dtypes[0]
    if len(dtypes) > 1:
        seconds = {}
        for dtype in dtypes:
            nn.Module.to(model, dtype)
            _run(model, prefill_tokens, 1)
            seconds[dtype] = sum(_run(model, prefill_tokens, decode_tokens))
        fastest = min(seconds, key=lambda dtype: seconds[dtype])
    nn.Module.to(model, fastest)
    return fastest


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers in memory; tied and shared tensors are counted once."""
    return sum(_storages(model).values())


def peak_bytes(model: PreTrainedModel, *, prefill_tokens: int, decode_tokens: int) -> int:
    """``weight_bytes`` + the most bytes of other tensors alive at once during one prefill and its decode steps.

    On a GPU it is the allocator's own peak. On a CPU it counts every tensor an operator returns, from birth to
    death, and so is the same on every run; scratch memory inside an operator, the interpreter and other models in the
    process do not count.

    Raises:
        DataError: the model's context is too short.
    """
    _check_context(type(model).__name__, model, prefill_tokens + decode_tokens)
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        _run(model, prefill_tokens, decode_tokens)
        return weight_bytes(model) + torch.cuda.max_memory_allocated(model.device) - before
    with _Alive(known=_storages(model)) as alive:
        _run(model, prefill_tokens, decode_tokens)
    return weight_bytes(model) + alive.peak


@torch.inference_mode()
def _run(model: PreTrainedModel, prefill_tokens: int, decode_tokens: int, batch_size: int = 1) -> tuple[float, float]:
    """Seconds of a prefill, and of the decode steps after it."""
    embedding: Any = model.get_input_embeddings()
    tokens = torch.arange(prefill_tokens, device=model.device) % embedding.num_embeddings
    prompt = tokens.expand(batch_size, -1)  # (batch, prefill_tokens)
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    start = _now(model)
    output = model(input_ids=prompt, **options)
    token = output.logits[:, -1:].argmax(-1)
    middle = _now(model)
    for _ in range(decode_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, **options)
        token = output.logits[:, -1:].argmax(-1)
    return middle - start, _now(model) - middle


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return perf_counter()


def _check_context(name: str, model: PreTrainedModel, n_tokens: int) -> None:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and n_tokens > context:
        raise DataError(
            f"{name}: a speed test of {n_tokens} tokens; the model's context is {context} tokens: lower "
            "speed.prefill_tokens or speed.decode_tokens"
        )


def _storages(model: nn.Module) -> dict[int, int]:
    """Address -> bytes of every distinct block of memory behind the model's parameters and buffers."""
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class _Alive(TorchDispatchMode):
    """Bytes of the tensors that operators returned and that are still alive; ``peak`` is the most at any time.

    The storages in ``known`` (address -> bytes) are not counted when an operator returns a view of them.
    """

    def __init__(self, known: Mapping[int, int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = known
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        address, n_bytes = storage.data_ptr(), storage.nbytes()
        if n_bytes == 0 or address in self._known or address in self._alive:
            return
        self._alive[address] = n_bytes
        self.now += n_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._died, address)

    def _died(self, address: int) -> None:
        self.now -= self._alive.pop(address)
