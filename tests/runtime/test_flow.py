"""`python -m pipeline.flow` on a tiny DVC project: order, cache, a server of its own, and no orphan however it ends."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline import flow
from spectrim.errors import OrchestrationError
from tests import warm_programs
from tests.layer_runs import computed, finished, gone, last_line, wait_for
from tests.layer_worker import names

PROJECT = Path(__file__).parents[2]
GRAPH = """
stages:
  zz_last:
    cmd: cat layers.txt second.txt > last.txt
    deps: [layers.txt, second.txt]
    outs: [last.txt]
  layers:
    cmd: python -m tests.layer_worker .spectrim/layers --workers 1 --seconds SECONDS > layers.txt
    deps: [first.txt]
    outs: [layers.txt]
  second:
    cmd: cp first.txt second.txt
    deps: [first.txt]
    outs: [second.txt]
  first:
    cmd: echo 1 > first.txt
    outs: [first.txt]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "dvc.yaml").write_text(GRAPH.replace("SECONDS", "0"))
    shutil.copy(PROJECT / "params.yaml", folder)
    command = [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"]
    subprocess.run(command, cwd=folder, check=True, env=environment())
    return folder


def environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DVC_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**clean, "PATH": path, "PYTHONPATH": str(PROJECT), "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}


def with_warm_programs() -> dict[str, str]:
    clean = environment()
    return {**clean, "PATH": os.pathsep.join([str(warm_programs.folder()), clean["PATH"]])}


def start(project: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.flow", *options],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def server_of(process: "subprocess.Popen[str]") -> psutil.Process:
    return next(child for child in descendants(process) if "server" in child.cmdline())


def test_order_follows_the_graph(project, monkeypatch):
    monkeypatch.chdir(project)
    order = flow.order()
    assert sorted(order) == ["first", "layers", "second", "zz_last"]
    assert order[0] == "first" and order[-1] == "zz_last"
    assert flow.order(["layers"]) == ["first", "layers"]
    assert set(flow.order(["layers", "second"])) == {"first", "layers", "second"}


@pytest.mark.parametrize("target", ["nowhere", None])
def test_no_graph_or_no_stage_is_one_line(project, tmp_path, monkeypatch, target):
    monkeypatch.chdir(project if target else tmp_path)
    with pytest.raises(OrchestrationError, match=target or "not inside of a DVC repo"):
        flow.order([target] if target else [])


def test_a_stage_that_fails_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True, env=environment())
    Path("dvc.yaml").write_text("stages: {bad: {cmd: echo because >&2; false}}")
    with pytest.raises(OrchestrationError, match="stage bad failed"):
        flow.repro("bad")
    assert "because" in capfd.readouterr().err


def test_the_graph_runs_and_the_ui_stays(project, monkeypatch, capfd):
    process = start(project, "--keep-ui")
    assert process.stderr
    lines = [""]
    wait_for(lambda: lines.append(process.stderr.readline()) or not lines[-1] or "Ctrl-C ends it" in lines[-1], 300)
    assert lines[-2] == "4 stages are up to date\n", lines
    assert (project / "last.txt").read_text().split()[::2][:4] == names(4)
    assert (project / ".prefect" / "prefect.db").exists()
    server = server_of(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and gone(server)
    ran = [line.split("'")[1] for line in output.splitlines() if line.startswith("Running")]
    assert sorted(ran) == ["first", "layers", "second", "zz_last"] and (ran[0], ran[-1]) == ("first", "zz_last")

    monkeypatch.chdir(project)
    assert flow.repro("zz_last") is True
    assert "didn't change, skipping" in capfd.readouterr().out


ENDS = ["SIGINT", "SIGKILL", "server"]


@pytest.mark.parametrize("end", ENDS)
def test_every_end_is_clean_and_resumable(project, end):
    """Stopped amid a layer: one line, nothing left running, and the next run computes the unfinished layers only."""
    store, log = project / ".spectrim" / "layers", project / "layers.log"
    subprocess.run(["rm", "-rf", str(store), str(log)], check=True)
    seconds = 2 + ENDS.index(end) / 100  # a command that DVC has not run yet
    (project / "dvc.yaml").write_text(GRAPH.replace("SECONDS", f"{seconds} --engine inline"))
    process = start(project)
    wait_for(lambda: len(finished(log)) == 1 and len(computed(log)) == 2, seconds=300)
    everyone = descendants(process)
    if end == "server":
        server_of(process).kill()
    else:
        process.send_signal(signal.Signals[end])
    output, errors = process.communicate(timeout=60)
    assert "zz_last" not in output + errors, "a stage ran after the end"
    wait_for(lambda: all(gone(child) for child in everyone), seconds=20)
    code, line = {
        "SIGINT": (130, "stopped by Ctrl-C"),
        "SIGKILL": (-9, ""),
        "server": (1, "error: the Prefect server ended (exit code -9"),
    }[end]
    assert process.returncode == code
    if line:
        assert last_line(errors).startswith(line) and "Traceback" not in errors
        assert errors.count("stopped by") + errors.count("error: ") == 1
    whole = sum(not path.name.startswith(".") for path in store.iterdir())
    assert 1 <= whole < 4
    log.unlink()
    result = subprocess.run(
        ["dvc", "repro", "-q", "layers"], cwd=project, env=with_warm_programs(), capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert computed(log) == names(4)[whole:]
