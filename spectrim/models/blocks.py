"""A causal language model as embedding -> blocks -> head, one block in memory at a time.

The model is built without weights; ``resident(i)`` brings in block i and drops it again, so that statistics of any
model need the memory of its embedding, its head, one block and that block's hidden states. What stands before and
after the blocks is reached without knowing the architecture: the model's own forward runs with every block stubbed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn.functional import linear

from spectrim.errors import ModelError
from spectrim.maths.lowrank import Factors
from spectrim.models.block_weights import BlockWeights
from spectrim.models.modules import WHOLE, decoder_blocks

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with besides the hidden states


class BlockModel(BlockWeights):
    """A model folder run block by block; see ``BlockWeights``."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", exclude: tuple[str, ...] = ()) -> None:
        super().__init__(folder, device, exclude)
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._arity: int | None = None
        self._is_open = False

    def _open(self) -> None:
        """Bring in what is outside the blocks, which who asks for ``weights`` alone need not wait for.

        Raises:
            ModelError: `prepare` found that it cannot be walked, or weights have names that are not the module's.
        """
        if self._is_open:
            return
        if found := getattr(self.model.config, WHOLE, None):
            raise ModelError(
                f"{found} So nothing can be had of it that runs blocks one by one: set capture.walk to auto or whole, "
                "and leave out update_weights.anchor, update_weights.block_refinement and methods that read activations"
            )
        self._is_open = True
        for name, buffer in list(self.model.named_buffers()):
            if buffer.device.type != "meta":
                set_module_tensor_to_device(self.model, name, self.device, buffer)
        block_parts = tuple(f"{name}." for name in self.names)
        outside = [name for name in self.model.state_dict() if not name.startswith(block_parts)]
        self._load([name for name in outside if self._source(name).name in self._files])
        self.model.tie_weights()
        missing = [
            n for n, p in self.model.named_parameters() if p.device.type == "meta" and not n.startswith(block_parts)
        ]
        if missing:
            raise ModelError(
                f"{self.folder}: no weights for {missing[0]} ({len(missing)} tensors); save the model again"
            )
        self._returned()  # now: later it would run block 0 inside a caller's hooks and drop its weights

    @contextmanager
    def resident(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` with its weights in memory for the length of the ``with``."""
        self._open()
        prefix = f"{self.names[index]}."
        wanted = [f"{prefix}{name}" for name in self.blocks[index].state_dict()]  # persistent buffers are weights, too
        if absent := [name for name in wanted if self._source(name).name not in self._files]:
            raise ModelError(f"{self.folder}: no weights for {absent[0]}; save the model again with save_pretrained")
        self._load(wanted)
        try:
            yield self.blocks[index]
        finally:
            for name in wanted:
                set_module_tensor_to_device(self.model, name, "meta")

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (batch, seq) int64 -> hidden states (batch, seq, hidden) that enter the first block."""
        self._open()
        entered: list[Tensor] = []
        calls: list[Call] = []

        def record(_: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            entered.append(hidden)
            calls.append((args, kwargs))
            return hidden

        with self._stubbed(record):
            self.model.base_model(input_ids=tokens.to(self.device), use_cache=False)
        known = self._calls.setdefault(tuple(tokens.shape), calls)
        if not all(_same(old, new) for old, new in zip(known, calls, strict=True)):
            raise ModelError(
                f"{type(self.model).__name__}: its blocks receive inputs that depend on the tokens besides the hidden "
                "states; such a model cannot be walked block by block"
            )
        return entered[0]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states (batch, seq, hidden) through block ``index``, which must be resident; differentiable."""
        args, kwargs = self._call(index, (hidden.shape[0], hidden.shape[1]))
        output = self.blocks[index](hidden, *args, **kwargs)
        return first(output)

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states that leave the last block -> logits (batch, seq, vocabulary); differentiable."""
        self._open()
        return logits(self.model, self.blocks, tokens.to(self.device), hidden, self._returned())

    def _call(self, index: int, shape: tuple[int, int]) -> Call:
        if shape not in self._calls:  # depends on the shape alone: positions and masks, never on the tokens
            self.embed(torch.zeros(shape, dtype=torch.long))
        return self._calls[shape][index]

    def _returned(self) -> int:
        """``arity`` of what blocks return: seen on a real one-token call, since stubs must return as much."""
        if self._arity is None:
            kept: list[Any] = []
            first = self.blocks[0]

            class Seen(Exception):
                pass

            def spy(*args: Any, **kwargs: Any) -> Any:
                kept.append(type(first).forward(first, *args, **kwargs))
                raise Seen

            with self.resident(0):
                first.forward = spy
                try:
                    token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
                    self.model.base_model(input_ids=token, use_cache=False)
                except Seen:
                    pass
                finally:
                    del first.forward
            self._arity = arity(kept[0])
        return self._arity

    def _stubbed(self, stub: Any) -> AbstractContextManager[None]:
        return stubbed(self.blocks, stub, self._returned())


@contextmanager
def factored(linears: Mapping[str, nn.Linear], factors: Mapping[str, Factors]) -> Iterator[None]:
    """Let the linears named in ``factors`` compute y = (x rightᵀ) leftᵀ + bias for the length of the ``with``."""

    def forward_of(module: nn.Linear, pair: Factors) -> Callable[[Tensor], Tensor]:
        return lambda x: linear(linear(x, pair.right.to(x)), pair.left.to(x), module.bias)

    for name, pair in factors.items():
        module: Any = linears[name]
        module.forward = forward_of(module, pair)
    try:
        yield
    finally:
        for name in factors:
            del linears[name].forward


@contextmanager
def stubbed(blocks: Iterable[nn.Module], stub: Any, n_returned: int) -> Iterator[None]:
    """Let every block return ``stub(index, hidden, args, kwargs)`` for the length of the ``with``."""

    def forward_of(index: int) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = stub(index, hidden_states, args, kwargs)
            return (out, *[None] * (n_returned - 1)) if n_returned else out

        return forward

    own = [vars(block).get("forward") for block in blocks]  # a forward of its own, as of activation checkpointing
    for index, block in enumerate(blocks):
        block.forward = forward_of(index)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


def arity(returned: Any) -> int:
    """0 of hidden states alone, the length of (hidden, ...)."""
    return len(returned) if isinstance(returned, tuple | list) else 0


def first(returned: Any) -> Tensor:
    """The hidden states of what a block returns."""
    return returned[0] if arity(returned) else returned


def leaving(model: Any, tokens: Tensor) -> tuple[Tensor, int]:
    """What leaves the last block for tokens (batch, seq), (batch, seq, hidden), and how many values a block returns."""
    left: list[Any] = []
    handle = decoder_blocks(model)[1][-1].register_forward_hook(lambda module, args, output: left.append(output))
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    return first(left[0]), arity(left[0])


def logits(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, hidden: Tensor, n_returned: int) -> Tensor:
    """What ``model`` makes of the hidden states (batch, seq, hidden) that leave its last block; differentiable.

    Args:
        tokens: (batch, seq) int64 of that shape; what they are does not matter.
        n_returned: ``arity`` of what the blocks of this model return.
    """
    last = len(blocks) - 1

    def stub(index: int, entered: Tensor, *_: Any) -> Tensor:
        return hidden if index == last else entered

    with stubbed(blocks, stub, n_returned):
        return model(input_ids=tokens, use_cache=False).logits


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor):
        return isinstance(new, Tensor) and torch.equal(old, new)
    if isinstance(old, tuple | list):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    return True
