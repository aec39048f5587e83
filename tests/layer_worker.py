"""A stage in miniature for tests that kill it: `python -m tests.layer_worker STORE --log FILE`.

Every layer writes the same bytes in every run, and its name to the log before and after.
"""

import hashlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from pipeline.config.sections import Runtime
from pipeline.runtime import console
from pipeline.runtime.layers import LayerTask, run_layers
from pipeline.runtime.store import LayerStore, key


def content(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest() * 2000


def tasks_of(names: list[str], log: Path, seconds: float = 0.0, broken: str = "") -> list[LayerTask]:
    """Layers that take ``seconds`` between the two files they write; ``broken`` raises."""

    def task(name: str) -> LayerTask:
        def compute(folder: Path) -> None:
            note(log, f"start {name}")
            (folder / "a.bin").write_bytes(content(name))
            time.sleep(seconds)
            if name == broken:
                raise RuntimeError("the machine has a cold")
            (folder / "b.bin").write_bytes(content(name)[::-1])
            note(log, f"end {name}")

        return LayerTask(name, key("worker", name), compute)

    return [task(name) for name in names]


def note(log: Path, line: str) -> None:
    with log.open("a") as stream:
        stream.write(line + "\n")


def names(n_layers: int) -> list[str]:
    return [f"layers.{index}" for index in range(n_layers)]


def die_at_sync(number: int) -> None:
    """SIGKILL this process instead of its ``number``-th flush to the disk: a death at an exact point of a commit."""
    real = os.fsync
    counter = iter(range(1, sys.maxsize))
    lock = threading.Lock()

    def fsync(handle: int) -> None:
        with lock:
            if next(counter) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync


def main(
    store: Path,
    log: Path = Path("layers.log"),
    layers: int = 4,
    seconds: float = 0.0,
    workers: int = 2,
    retries: int = 0,
    engine: str = "auto",
    broken: str = "",
    ordered: bool = False,
    die: int = 0,
) -> None:
    """Run some layers."""
    if die:
        die_at_sync(die)
    runtime = Runtime(engine, workers, retries, "cpu")  # type: ignore[arg-type]
    tasks = tasks_of(names(layers), log, seconds, broken)
    for name, entry in run_layers("worker", tasks, runtime, LayerStore(store), ordered=ordered).items():
        print(name, entry.name)


if __name__ == "__main__":
    console.run(main)
