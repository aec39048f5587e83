"""The Prefect and Dask engines on a real server: the same bytes, retries, cached layers, a stop, a death."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from pipeline.config.sections import Runtime
from pipeline.runtime.layers import run_layers
from pipeline.runtime.store import LayerStore
from spectrim.errors import OrchestrationError
from tests.layer_runs import PROJECT, computed, finished, gone, last_line, resume, wait_for, worker
from tests.layer_worker import names, tasks_of
from tests.runtime.test_artifacts import tree


def test_prefect_needs_a_server(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for engine in ("prefect", "dask"):
        with pytest.raises(OrchestrationError, match="PREFECT_API_URL"):
            run_layers("w", tasks_of(["a"], tmp_path / "log"), Runtime(engine, 1, 0, "cpu"), LayerStore(tmp_path / "l"))
    assert computed(tmp_path / "log") == []


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    process = worker(tmp_path / "layers", tmp_path / "log", PREFECT_API_URL="http://127.0.0.1:9/api")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert last_line(errors).startswith("error: the Prefect server at http://127.0.0.1:9/api does not answer")
    assert "Traceback" not in errors and computed(tmp_path / "log") == []


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A real server, started as `make flow` starts its own: (API url, process id)."""
    script = (
        "import sys; from pipeline import flow\n"
        "with flow.prefect_server() as server: print(server.url, server.process.pid, flush=True); sys.stdin.read()"
    )
    folder = tmp_path_factory.mktemp("prefect")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**clean, "PYTHONPATH": str(PROJECT), "DVC_ROOT": str(folder)},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout and process.stdin
    url, pid = process.stdout.readline().split()
    yield url, int(pid)
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert not psutil.pid_exists(int(pid)) or gone(psutil.Process(int(pid)))


def task_runs(url: str) -> list[tuple[str, str]]:
    """(task run, state) of the newest flow run, by name."""

    def ask(path: str, query: dict[str, object]) -> list[dict[str, str]]:
        request = urllib.request.Request(f"{url}/{path}/filter", json.dumps(query).encode())
        request.add_header("content-type", "application/json")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)

    newest = ask("flow_runs", {"sort": "START_TIME_DESC", "limit": 1})[0]
    assert newest["name"] and newest["state_type"] != "RUNNING"
    runs = ask("task_runs", {"flow_runs": {"id": {"any_": [newest["id"]]}}})
    return sorted((run["name"], run["state_name"]) for run in runs)


def test_prefect_engine(tmp_path, reference, prefect_server):
    """One server for all: it runs, shows cached layers, retries, fails, is cancelled, and in the end dies mid-run."""
    url, pid = prefect_server
    api = {"PREFECT_API_URL": url, "DVC_ROOT": str(tmp_path)}
    store, log = tmp_path / "layers", tmp_path / "log"

    process = worker(store, log, "--layers", "3", **api)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and last_line(errors).startswith("worker: 100%")
    assert [line.split()[0] for line in output.splitlines()] == names(3)
    wait_for(lambda: task_runs(url) == [(name, "Completed") for name in names(3)])

    process = worker(store, log, "--engine", "prefect", "--ordered", **api)
    assert process.wait(timeout=120) == 0
    wait_for(lambda: task_runs(url) == [*((name, "Cached") for name in names(3)), ("layers.3", "Completed")])
    assert sorted(computed(log)) == names(4)
    assert tree(store) == reference

    failing = ("--broken", "layers.1", "--retries", "1", "--workers", "1")
    process = worker(tmp_path / "second", tmp_path / "second.log", *failing, **api)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert last_line(errors).startswith("error: worker: layers.1: RuntimeError: the machine has a cold; tried 2 times")
    assert "Traceback" not in errors
    assert computed(tmp_path / "second.log") == ["layers.0", "layers.1", "layers.1"]
    wait_for(lambda: task_runs(url) == [("layers.0", "Completed"), ("layers.1", "Failed")])

    process = worker(tmp_path / "dask", tmp_path / "dask.log", "--engine", "dask", **api)
    _, errors = process.communicate(timeout=240)
    if importlib.util.find_spec("prefect_dask"):
        assert process.returncode == 0 and sorted(computed(tmp_path / "dask.log")) == names(4)
        assert tree(tmp_path / "dask") == reference
    else:
        assert process.returncode == 1 and "pip install .[dask]" in last_line(errors)

    for how, code, line in (
        ("stop", 130, "stopped by Ctrl-C"),
        ("server", 1, f"error: the Prefect server at {url} went away; finished layers are kept"),
    ):
        log = tmp_path / f"{how}.log"
        process = worker(tmp_path / how / "layers", log, "--seconds", "2", "--workers", "1", **api)
        wait_for(lambda log=log: len(finished(log)) == 1 and len(computed(log)) == 2)
        process.send_signal(signal.SIGINT) if how == "stop" else os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code
        assert last_line(errors).startswith(line) and "Traceback" not in errors
        if how == "stop":
            wait_for(lambda: task_runs(url)[0] == ("layers.0", "Completed"))
        whole = [task.name for task in tasks_of(names(4), log) if (tmp_path / how / "layers" / task.key).is_dir()]
        assert whole and len(whole) < 4
        resume(tmp_path / how, reference, names(4)[len(whole) :])
