"""A causal language model as embedding -> blocks -> head, one block in memory at a time.

The model is built without weights; ``resident(i)`` brings in block i and drops it again, so that statistics of any
model need the memory of its embedding, its head, one block and that block's hidden states. What stands before and
after the blocks is reached without knowing the architecture: the model's own forward runs with every block stubbed.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from spectrim.errors import ModelError, StorageError
from spectrim.maths.lowrank import Factors
from spectrim.models.experts import Slice
from spectrim.models.linearise import linearise
from spectrim.models.modules import decoder_blocks, linears_by_block

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with besides the hidden states


class BlockModel:
    """A model folder run block by block.

    Args:
        folder: a Hugging Face model folder with safetensors weights.
        device: where blocks run.
        exclude: shell patterns of linears that are left out of ``linears``.

    Raises:
        StorageError: no model in ``folder``.
        ModelError: no decoder blocks, nothing to compress, or weights whose names are not the module's.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", exclude: tuple[str, ...] = ()) -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        if not (file := self.folder / "config.json").is_file():  # transformers would ask the hub for it
            raise StorageError(f"{file}: not found; give a folder with a model in the Hugging Face layout")
        from transformers import AutoConfig, AutoModelForCausalLM  # seconds, which a finished result need not take

        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.dtype = config.dtype or torch.float32
        with init_empty_weights():
            self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        self._sources = linearise(self.model)
        self.prefix, self.blocks = decoder_blocks(self.model)
        self.names = [f"{self.prefix}.{i}" for i in range(len(self.blocks))]
        self.linears = list(linears_by_block(self.model, exclude).values())
        self._files = _weight_files(self.folder)
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._arity: int | None = None
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

    def weights(self, index: int) -> dict[str, Tensor]:
        """Linear name -> weight (out, in) of block ``index`` in the model's dtype, read straight from the files."""
        wanted = [f"{name}.weight" for name in self.linears[index]]
        return {name.removesuffix(".weight"): value.to(self.device, self.dtype) for name, value in self._read(wanted)}

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (batch, seq) int64 -> hidden states (batch, seq, hidden) that enter the first block."""
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
        return output[0] if isinstance(output, tuple) else output

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states that leave the last block -> logits (batch, seq, vocabulary); differentiable."""
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

    def _load(self, names: Iterable[str]) -> None:
        for name, value in self._read(names):
            dtype = self.dtype if value.is_floating_point() else None
            set_module_tensor_to_device(self.model, name, self.device, value, dtype=dtype)

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the model from the files, one after the other; of many experts only the one that is asked for."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[self._source(name).name], []).append(name)
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as handle:
                for name in wanted:
                    yield name, self._source(name).read(handle)

    def _source(self, name: str) -> Slice:
        return self._sources.get(name, Slice(name))


def observed(linears: Mapping[str, nn.Module], observe: Callable[[str, Tensor], None]) -> AbstractContextManager[None]:
    """Let ``observe(name, x)`` see what every linear is given for the length of the ``with``."""

    def hook(name: str) -> Any:
        return lambda module, args: observe(name, args[0])

    return hooked(module.register_forward_pre_hook(hook(name)) for name, module in linears.items())


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register ``hooks`` for the length of the ``with``."""
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    """0 of hidden states alone, the length of a tuple (hidden, ...)."""
    return len(returned) if isinstance(returned, tuple) else 0


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


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file of ``folder`` that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    file = folder / "model.safetensors"
    if not file.exists():
        raise ModelError(f"{folder}: no model.safetensors; prepare the model first")
    with safe_open(file, framework="pt") as handle:
        return dict.fromkeys(handle.keys(), file)
