"""Run a stage layer by layer: what the store holds is taken from it, the rest is computed and committed.

    engine    the layers run in                                needs
    inline    a thread pool of runtime.workers                 nothing
    prefect   the same pool, as tasks of a Prefect flow        PREFECT_API_URL (`make flow` sets it)
    dask      Dask workers, as tasks of a Prefect flow         the same, and the extra [dask]; see prefect_engine.py
    auto      prefect when PREFECT_API_URL is set, else inline

Every engine runs the same tasks on the same store: another engine may continue a run. Layers are committed one by one:
after a death at any moment the next run computes the unfinished ones only and ends in the same bytes.
"""

import itertools
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.runtime import prefect_engine, progress
from pipeline.runtime.closure import code_digest
from pipeline.runtime.store import LayerStore, key
from spectrim.errors import OrchestrationError, SpectrimError


class Workers(Protocol):
    """Where and how layers run: the section `runtime` of params.yaml."""

    @property
    def engine(self) -> Literal["auto", "inline", "prefect", "dask"]: ...

    @property
    def workers(self) -> int: ...

    @property
    def retries(self) -> int: ...


@dataclass(frozen=True)
class LayerTask:
    """One layer: ``compute`` fills the empty folder it is given with the result that ``key`` names (``store.key``)."""

    name: str
    key: str
    compute: Callable[[Path], None]


def keyed(stage: str, name: str, compute: Callable[[Path], None], *parts: Any) -> LayerTask:
    """The task whose key names all that its result depends on: the code that ``compute`` can execute, and ``parts``."""
    return LayerTask(name, key(stage, name, code_digest(compute), *parts), compute)


def run_layers(
    stage: str, tasks: Sequence[LayerTask], runtime: Workers, store: LayerStore, *, ordered: bool = False
) -> dict[str, Path]:
    """The verified store entry of every task, by task name, in the order of ``tasks``.

    ``ordered`` computes one layer at a time, in the given order and in this process; otherwise ``runtime.workers`` at
    once, which divide torch's threads among them. A SpectrimError ends the run; what else a layer raises is tried
    ``runtime.retries`` more times. After a failure nothing new starts, and what is running is finished and kept.

    Raises:
        OrchestrationError: a layer failed for good, or the Prefect server is missing or went away.
        StorageError: the store cannot take a layer; what it held before stays.
    """
    if len({task.name for task in tasks}) != len(tasks):
        raise ValueError(f"{stage}: two layers have the same name")
    engine = _engine(runtime)
    store.sweep()
    workers = 1 if ordered else min(runtime.workers, max(1, len(tasks)))
    cached = _lookup(tasks, store, workers)
    with progress.bar(stage, len(tasks), initial=len(cached), unit="layer") as bar:
        bar.set_postfix_str(f"{len(cached)} cached")
        if len(cached) < len(tasks):
            with _threads_each(workers) as threads:
                attempt = _Attempt(store, threads)
                if engine == "inline":
                    finished = _inline(stage, tasks, cached, attempt, workers, runtime.retries)
                else:
                    engine = "prefect" if ordered else engine
                    finished = _flow(stage, tasks, cached, attempt, workers, runtime.retries, engine)
                for _ in finished:
                    bar.update()
    return {task.name: store.path(task.key) for task in tasks}


@dataclass(frozen=True)
class _Attempt:
    """Compute and commit one layer, here or on a Dask worker."""

    store: LayerStore
    threads: int

    def __call__(self, task: LayerTask) -> Path:
        import torch

        torch.set_num_threads(self.threads)  # of the calling thread
        return self.store.commit(task.key, task.compute)


def _inline(
    stage: str, tasks: Sequence[LayerTask], cached: set[str], attempt: _Attempt, workers: int, retries: int
) -> Iterator[str]:
    """Yield the name of each layer as it is finished."""

    def persistent(task: LayerTask) -> Path:
        for _ in range(retries):
            try:
                return attempt(task)
            except SpectrimError:  # says what is wrong with the input or the machine: it would be so again
                raise
            except Exception as error:
                progress.say(f"warning: {stage}: {task.name}: {type(error).__name__}: {error}; trying again")
        return attempt(task)

    pool = ThreadPoolExecutor(workers, thread_name_prefix=stage)
    try:
        missing = [task for task in tasks if task.name not in cached]
        for task, future in _sliding(missing, workers, lambda task: pool.submit(persistent, task)):
            yield _named(stage, task, future, retries)
    except Exception:
        pool.shutdown(wait=True)
        raise
    finally:
        pool.shutdown(wait=False)  # a stop does not wait for the layers


def _flow(
    stage: str,
    tasks: Sequence[LayerTask],
    cached: set[str],
    attempt: _Attempt,
    workers: int,
    retries: int,
    engine: str,
) -> Iterator[str]:
    """The same as ``_inline`` by way of Prefect, where retries and cached layers show in the UI."""
    server = prefect_engine.connect()

    def body(emit: Callable[[str], None]) -> None:
        compute = prefect_engine.layer_task(retries)

        def submit(task: LayerTask) -> Any:
            return compute.submit(task, None if task.name in cached else attempt)

        for task, future in _sliding(tasks, workers, submit):
            name = _named(stage, task, future, retries)
            if name not in cached:
                emit(name)

    yield from prefect_engine.watched(server, stage, body, prefect_engine.task_runner(engine, workers))


def _sliding(
    tasks: Sequence[LayerTask], workers: int, submit: Callable[[LayerTask], Any]
) -> Iterator[tuple[LayerTask, Any]]:
    """Keep ``workers`` tasks in flight; yield each with its future when it is done, whatever came of it."""
    done: queue.SimpleQueue[tuple[LayerTask, Any]] = queue.SimpleQueue()
    waiting = iter(tasks)

    def start(count: int) -> None:
        for task in itertools.islice(waiting, count):
            submit(task).add_done_callback(lambda future, task=task: done.put((task, future)))

    start(workers)
    for _ in tasks:
        yield done.get()
        start(1)


def _named(stage: str, task: LayerTask, future: Any, retries: int) -> str:
    """The layer's name once its future holds a result; raises its error, with the layer's name in it."""
    try:
        future.result()
    except SpectrimError:
        raise
    except Exception as error:
        found = f"{stage}: {task.name}: {type(error).__name__}: {error}"
        tries = "" if not retries else f"; tried {retries + 1} times"
        raise OrchestrationError(f"{found}{tries}; set SPECTRIM_DEBUG=1 to see where") from error
    return task.name


def _engine(runtime: Workers) -> Literal["inline", "prefect", "dask"]:
    if runtime.engine == "auto":
        return "prefect" if os.environ.get("PREFECT_API_URL") else "inline"
    return runtime.engine


def _lookup(tasks: Sequence[LayerTask], store: LayerStore, workers: int) -> set[str]:
    """Names of the layers that the store holds whole."""
    with ThreadPoolExecutor(workers) as pool:  # hashing releases the interpreter lock
        found = list(pool.map(lambda task: store.lookup(task.key), tasks))
    return {task.name for task, entry in zip(tasks, found, strict=True) if entry}


@contextmanager
def _threads_each(workers: int) -> Iterator[int]:
    """Torch's threads per worker; the setting is restored, since it reaches beyond the thread that makes it."""
    import torch

    total = torch.get_num_threads()
    try:
        yield max(1, total // workers)
    finally:
        torch.set_num_threads(total)
