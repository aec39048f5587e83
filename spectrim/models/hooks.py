"""Hooks on the linears of a model for the length of a ``with``."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


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


def observed_gradients(
    linears: Mapping[str, nn.Linear], observe: Callable[[str, Tensor], None]
) -> AbstractContextManager[None]:
    """Let ``observe(name, g)`` see every linear's output gradient for the length of the ``with``."""

    def hook(name: str) -> Any:
        def register(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda g: observe(name, g))

        return register

    return hooked(module.register_forward_hook(hook(name)) for name, module in linears.items())


def differentiable(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook, of an embedding: gradients go back as far as its output, and its weights need none."""
    return output.detach().requires_grad_().clone()  # no leaf: some models scale it in place
