"""Run the DVC graph as one Prefect flow: a task per stage, in the order of dvc.yaml, with each stage's layers visible.

The Prefect server and its UI run on loopback for as long as the flow, with their state in ``.prefect``; a server that
PREFECT_API_URL names already is used instead. DVC decides what runs and what is restored from its cache: this adds
nothing to the results. However the flow ends, its server and its stages end with it.
"""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.config.params import load
from pipeline.runtime import artifacts, console, prefect_engine, progress
from spectrim.errors import OrchestrationError

START = 180.0  # seconds until a new server must answer; 7 on an idle machine, with a new database
PATIENCE = 2.0  # seconds for server and stages to end on request
UI_PORT = 4200
CACHED = re.compile(r"Stage '.*' (didn't change, skipping|is cached - skipping run)")
NOISE = re.compile(r"\s*$|Data and pipelines are up to date|Use `dvc push`|To (track|enable)|\s+(git add|dvc config) ")
# A child started through this dies with its parent, even when that is killed without a chance to clean up.
BOUND = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(143)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class OwnServer(prefect_engine.Server):
    """A server that this process started: its end is noticed at once, not after some unanswered looks."""

    def __init__(self, url: str, process: "subprocess.Popen[Any]", log: Path) -> None:
        super().__init__(url)
        self.process = process
        self.log = log

    def check(self) -> None:
        self._check_process()
        super().check()

    def require(self) -> None:
        """Wait until a new server answers."""
        deadline = time.monotonic() + START
        while not self.answers():
            self._check_process()
            if time.monotonic() > deadline:
                raise OrchestrationError(f"the Prefect server did not answer within {START:.0f} s; see {self.log}")
            time.sleep(0.2)

    def _check_process(self) -> None:
        if (code := self.process.poll()) is not None:
            raise OrchestrationError(
                f"the Prefect server ended (exit code {code}, log in {self.log}); finished stages and layers are kept, "
                "run again to resume"
            )


def order(targets: Iterable[str] = ()) -> list[str]:
    """The stages that ``targets`` need (all without targets), each after the stages it depends on.

    Raises:
        OrchestrationError: there is no DVC graph here, or it lacks a target.
    """
    graph: TopologicalSorter[str] = TopologicalSorter()
    for target in list(targets) or [""]:
        command = ["dag", "--dot", *([target] if target else [])]
        result = subprocess.run(
            [sys.executable, "-m", "dvc", *command], capture_output=True, text=True, check=False, env=_environment()
        )
        if result.returncode != 0:
            raise OrchestrationError(f"dvc dag: {' '.join(result.stderr.split()) or 'failed without a message'}")
        for line in result.stdout.splitlines():
            names = re.findall(r'"([^"]+)"', line)
            if names:
                graph.add(names[-1], *names[:-1])
    return list(graph.static_order())


def repro(stage: str) -> bool:
    """Bring one stage up to date by DVC; True when nothing had to be computed.

    Raises:
        OrchestrationError: the stage failed; it has said why on stderr.
    """
    process = _start(["-m", "dvc", "repro", "--single-item", stage], stdout=subprocess.PIPE)
    cached = False
    for line in process.stdout or ():
        cached = cached or bool(CACHED.match(line))
        if not NOISE.match(line):
            print(line, end="", flush=True)
    if code := process.wait():
        raise OrchestrationError(f"stage {stage} failed (DVC's exit code {code}); the reason stands above")
    return cached


def run_graph(server: prefect_engine.Server, stages: list[str], ending: threading.Event) -> None:
    """One flow, one task per stage, one after the other: DVC holds a lock on the project while a stage runs.

    After ``ending`` no stage starts: whoever ends the children may take their exit codes, and 0 is then left of one.
    """

    def body(emit: Callable[[Any], None]) -> None:
        from prefect import task
        from prefect.cache_policies import NO_CACHE
        from prefect.states import Completed

        @task(task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
        def run_stage(stage: str) -> Any:
            return Completed(name="Cached") if repro(stage) else None

        for stage in stages:
            if not ending.is_set():
                run_stage.submit(stage).result()

    for _ in prefect_engine.watched(server, "spectrim", body):
        pass


@contextmanager
def prefect_server() -> Iterator[prefect_engine.Server]:
    """The server of PREFECT_API_URL, or one on loopback that ends with the block.

    Raises:
        OrchestrationError: it does not start, or does not answer.
    """
    prefect_engine.configure()
    if os.environ.get("PREFECT_API_URL"):
        yield prefect_engine.connect()
        return
    home = Path(os.environ["PREFECT_HOME"])
    port = _free_port()
    root = f"http://127.0.0.1:{port}"
    os.environ["PREFECT_SERVER_UI_API_URL"] = os.environ["PREFECT_API_URL"] = f"{root}/api"
    log = home / "server.log"
    with artifacts.storage_errors(log):
        home.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            arguments = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
            process = _start(arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        server = OwnServer(f"{root}/api", process, log)
        server.require()
        progress.say(f"Prefect: {root}")
        yield server
    finally:
        console.end_children(PATIENCE, only=process.pid)
        del os.environ["PREFECT_API_URL"]


def main(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages to bring up to date; all without.")] = None,
    keep_ui: Annotated[bool, typer.Option("--keep-ui", help="Leave server and UI running until Ctrl-C.")] = False,
) -> None:
    """Run the DVC graph as a Prefect flow, with a UI on loopback."""
    load()  # refuses before DVC removes the output of the stage that would refuse
    stages, ending = order(targets or ()), threading.Event()
    with prefect_server() as server:
        try:
            run_graph(server, stages, ending)
        except BaseException:
            ending.set()
            console.end_children(PATIENCE)  # server and stage together: neither may report the end of the other
            raise
        progress.say(f"{len(stages)} stages are up to date")
        if keep_ui:
            progress.say(f"the UI stays at {server.url.removesuffix('/api')}; Ctrl-C ends it")
            while True:
                server.check()
                time.sleep(prefect_engine.POLL)


def _start(arguments: list[str], **streams: Any) -> "subprocess.Popen[Any]":
    """``python ARGUMENTS`` in a session of its own, so that a Ctrl-C at the terminal reaches only this process."""
    command = [sys.executable, "-c", BOUND, str(os.getpid()), *arguments]
    return subprocess.Popen(command, env=_environment(), start_new_session=True, text=True, **streams)


def _environment() -> dict[str, str]:
    return {**os.environ, "DVC_NO_ANALYTICS": "1", "SPECTRIM_FLOW": "1", "PYTHONUNBUFFERED": "1"}


def _free_port() -> int:
    for port in (UI_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server ended here a minute ago
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OrchestrationError("no free port on 127.0.0.1 for the Prefect server")


if __name__ == "__main__":
    console.run(main)
