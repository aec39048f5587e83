"""Run a stage's layers as tasks of a Prefect flow, on the server that PREFECT_API_URL names.

The flow runs in a thread of its own while the caller watches the server: Prefect's client would wait minutes for one
that died. Its result cache cannot verify a file, so tasks are NO_CACHE over the resume store, and what the store held
is shown as ``Cached``. Prefect takes seconds to import: only functions of this module import it.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from spectrim.errors import OrchestrationError, SpectrimError

POLL = 0.5  # seconds between two looks at the server
REFUSALS = 5  # looks in a row that find nobody listening
SILENCES = 12  # looks in a row that get no answer in time, a minute: a starved server is not a dead one
ANSWER = 5.0  # seconds to answer one look

Body = Callable[[Callable[[Any], None]], None]


def configure() -> None:
    """Set what Prefect reads when it is imported: no telemetry, quiet logs, state in the project's ``.prefect``."""
    home = Path(os.environ.get("DVC_ROOT") or Path.cwd()) / ".prefect"
    for name, value in {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    }.items():
        os.environ.setdefault(name, value)
    # a proxy for the world outside must not be asked for a server on this machine
    for name in ("no_proxy", "NO_PROXY"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*known, "127.0.0.1", "localhost"]))


def connect() -> "Server":
    """The server of PREFECT_API_URL. Raises OrchestrationError when none is named or nobody answers there."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise OrchestrationError(
            "runtime.engine wants a Prefect server and PREFECT_API_URL names none; run `make flow`, "
            "set PREFECT_API_URL, or set runtime.engine: auto"
        )
    configure()
    server = Server(url)
    server.require()
    return server


class Server:
    """The Prefect API at ``url``; ``check`` costs nothing when the last look was less than POLL seconds ago."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._last = 0.0
        self._refused = self._silent = 0

    def answers(self) -> bool:
        """Look once; counts what kind of failure it was."""
        import httpx

        try:
            if httpx.get(f"{self.url}/health", timeout=ANSWER).status_code < 500:
                self._refused = self._silent = 0
                return True
            self._silent += 1
        except httpx.ConnectError:
            self._refused += 1
        except httpx.HTTPError:
            self._silent += 1
        return False

    def require(self) -> None:
        """Raises OrchestrationError when the server does not answer now."""
        while not self.answers():
            self._complain("does not answer; start it (`make flow` brings its own) or set runtime.engine: inline")
            time.sleep(POLL)

    def check(self) -> None:
        """Raises OrchestrationError when the server went away."""
        if time.monotonic() - self._last >= POLL:
            if not self.answers():
                self._complain("went away; finished layers are kept, start it (or `make flow`) and run again to resume")
            self._last = time.monotonic()

    def cancel(self, flow_run: str) -> None:
        """Tell the server that nobody works on ``flow_run`` any more; a server that cannot hear it does no harm."""
        import httpx

        with suppress(httpx.HTTPError):
            body = {"state": {"type": "CANCELLED", "name": "Cancelled"}, "force": True}
            httpx.post(f"{self.url}/flow_runs/{flow_run}/set_state", json=body, timeout=1.0)

    def _complain(self, what: str) -> None:
        if self._refused >= REFUSALS or self._silent >= SILENCES:
            raise OrchestrationError(f"the Prefect server at {self.url} {what}")


def watched(server: Server, name: str, body: Body, runner: Any = None) -> Iterator[Any]:
    """Run ``body(emit)`` as the Prefect flow ``name`` in another thread; yield what it emits, raise what it raises.

    Raises:
        OrchestrationError: the server went away; the flow's thread is then abandoned.
    """
    from prefect import flow
    from prefect.runtime import flow_run

    here = _Here(body)

    @flow(name=name, task_runner=runner, persist_result=False, log_prints=False)
    def stage() -> None:
        here.events.put(("run", flow_run.id))
        here.body(lambda item: here.events.put(("item", item)))

    def work() -> None:
        try:
            stage()
        except BaseException as error:  # handed to the caller's thread
            here.events.put(("error", error))
        else:
            here.events.put(("end", None))

    threading.Thread(target=work, name=f"flow {name}", daemon=True).start()
    run = None
    try:
        while True:
            server.check()
            with suppress(queue.Empty):
                kind, value = here.events.get(timeout=POLL)
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                if kind == "item":
                    yield value
                else:
                    run = value
    except (KeyboardInterrupt, GeneratorExit):
        if run:
            server.cancel(run)
        raise


class _Here:
    """What stays in this process: Prefect sends a flow's function, with all it refers to, to every Dask worker."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)


def task_runner(engine: str, workers: int) -> Any:
    """Prefect's thread pool, or Dask: DASK_SCHEDULER_ADDRESS when set, else a cluster on this machine for the stage.

    Raises:
        OrchestrationError: ``dask`` without the extra that brings it.
    """
    if engine != "dask":
        from prefect.task_runners import ThreadPoolTaskRunner

        return ThreadPoolTaskRunner(max_workers=workers)
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        message = f"runtime.engine is dask, which needs prefect-dask ({error}); `pip install .[dask]` or set auto"
        raise OrchestrationError(message) from error
    if address := os.environ.get("DASK_SCHEDULER_ADDRESS"):
        return DaskTaskRunner(address=address)
    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    return DaskTaskRunner(cluster_class="distributed.LocalCluster", cluster_kwargs=local)


def layer_task(retries: int) -> Any:
    """A Prefect task that computes ``attempt(layer)``; an ``attempt`` of None: the store held the layer."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    @task(
        task_run_name="{layer.name}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=retries,
        retry_condition_fn=lambda task, run, state: not isinstance(state.data, SpectrimError),
    )
    def compute(layer: Any, attempt: Any) -> Any:
        return Completed(name="Cached") if attempt is None else attempt(layer)

    return compute
