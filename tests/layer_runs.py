"""Toy layers run in child processes, and what an interrupted run must leave: for the tests of every engine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.config.sections import Runtime
from pipeline.runtime.layers import run_layers
from pipeline.runtime.store import LayerStore
from tests.layer_worker import names, tasks_of
from tests.runtime.test_artifacts import tree

PROJECT = Path(__file__).parents[1]
INLINE = Runtime("inline", 2, 0, "cpu")


def computed(log: Path) -> list[str]:
    return (
        [line.split()[1] for line in log.read_text().splitlines() if line.startswith("start")] if log.exists() else []
    )


def finished(log: Path) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines() if line.startswith("end")] if log.exists() else []


def worker(store: Path, log: Path, *options: str, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.layer_worker", str(store), "--log", str(log), *options]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return subprocess.Popen(
        command,
        cwd=PROJECT,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def gone(process: psutil.Process) -> bool:
    """Ended, though perhaps not yet collected by whoever adopted it."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def last_line(text: str) -> str:
    return text.replace("\r", "\n").splitlines()[-1]


def resume(tmp_path: Path, reference: dict[str, bytes], expected: list[str]) -> None:
    """Running again computes exactly ``expected`` and ends in the bytes of an uninterrupted run."""
    log = tmp_path / "resume.log"
    run_layers("worker", tasks_of(names(4), log), INLINE, LayerStore(tmp_path / "layers"))
    assert sorted(computed(log)) == sorted(expected)
    assert tree(tmp_path / "layers") == reference
