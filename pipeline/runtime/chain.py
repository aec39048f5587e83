"""Values that follow from one another, block by block: hidden states, and gradients."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.runtime.store import LayerStore, key

State = TypeVar("State")


class Onward(Generic[State]):
    """``walk[0] = start()``, ``walk[i + 1] = step(i, walk[i])``; the newest is in memory, an older one begins anew."""

    def __init__(self, start: Callable[[], State], step: Callable[[int, State], State]) -> None:
        self._start, self._step = start, step
        self._newest: tuple[int, State] | None = None

    def __getitem__(self, index: int) -> State:
        at, value = self._newest if self._newest and self._newest[0] <= index else (0, self._start())
        for i in range(at, index):
            value = self._step(i, value)
        self._newest = (index, value)
        return value


class Chain:
    """``Onward`` that survives a crash; a value put in is never computed again.

    The newest value is in memory, and every ``every``-th on disk; older ones are dropped unless ``keep_all``. A killed
    run goes on from the last one on disk, and a value that is gone is computed again from the nearest that is left.
    """

    def __init__(
        self,
        store: LayerStore,
        name: str,
        start: Callable[[], Tensor],
        step: Callable[[int, Tensor], Tensor],
        *,
        every: int = 1,
        keep_all: bool = False,
    ) -> None:
        self._store, self._name, self._start, self._step = store, name, start, step
        self._every, self._keep_all = every, keep_all
        self._newest: tuple[int, Tensor] | None = None

    def __getitem__(self, index: int) -> Tensor:
        if (value := self._stored(index)) is not None:
            return value
        nearest = index - 1
        while nearest >= 0 and (value := self._stored(nearest)) is None:
            nearest -= 1
        if value is None:
            nearest, value = 0, self._start()
        for i in range(nearest, index):
            value = self._step(i, value)
        self._newest = (index, value)
        return value

    def __setitem__(self, index: int, value: Tensor) -> None:
        def write(folder: Path) -> None:
            save_file({"value": value.contiguous()}, folder / "value.safetensors")

        self._newest = (index, value)
        if index % self._every:
            return
        self._store.commit(self._key(index), write)
        if not self._keep_all:
            self._discard(index - self._every)

    def clear(self, length: int) -> None:
        """Forget the values 0 .. length of this chain, on disk too."""
        self._newest = None
        for index in range(length + 1):
            self._discard(index)

    def _stored(self, index: int) -> Tensor | None:
        if self._newest is not None and self._newest[0] == index:
            return self._newest[1]
        entry = self._store.lookup(self._key(index))
        return load_file(entry / "value.safetensors")["value"] if entry else None

    def _discard(self, index: int) -> None:
        shutil.rmtree(self._store.path(self._key(index)), ignore_errors=True)

    def _key(self, index: int) -> str:
        return key("chain", self._name, index)
