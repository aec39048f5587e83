"""States of one long computation, so that a killed one goes on from the newest."""

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.runtime.store import LayerStore, key

SECONDS = 20.0  # between two states on the disk: what a kill loses at most, beside one step


class Snapshots:
    """The newest state in the store; older ones go when a newer one is there.

    Args:
        name: key of the whole computation, which names its code and all it depends on.
        steps: those that a state may be of, in any order.
        seconds: least time between two states on the disk, SECONDS by default; 0: every one that ``keep`` is given.
    """

    def __init__(self, store: LayerStore, name: str, steps: Iterable[int], seconds: float | None = None) -> None:
        self._store, self._name = store, name
        self._seconds = SECONDS if seconds is None else seconds
        self._steps = sorted(steps, reverse=True)
        self._kept = time.monotonic()

    def newest(self) -> tuple[int, Path] | None:
        """The step and the folder of the newest state that is whole, or None."""
        for step in self._steps:
            if entry := self._store.lookup(self._key(step)):
                return step, entry
        return None

    def path(self, step: int) -> Path:
        """Where the state after ``step`` lies or will lie."""
        return self._store.path(self._key(step))

    def keep(self, step: int, write: Callable[[Path], None]) -> None:
        """Let ``write`` fill a folder with the state after ``step``, unless the last one is too young."""
        if time.monotonic() - self._kept < self._seconds:
            return
        self._store.commit(self._key(step), write)
        self._kept = time.monotonic()
        self.clear(but=step)

    def clear(self, but: int | None = None) -> None:
        """Drop every state, or all but one: once the result is in the store, not before."""
        for step in self._steps:
            if step != but:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def _key(self, step: int) -> str:
        return key("snapshot", self._name, step)
