"""A program ends with one clear line and the right exit code, whatever its threads and children are doing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.runtime import progress
from tests.layer_runs import gone, last_line, wait_for

PROJECT = Path(__file__).parents[2]
HEAD = (
    "import hashlib, subprocess, sys, threading, time\nfrom pathlib import Path\nfrom pipeline.runtime import console\n"
)
READY = "Path('ready').write_text('')"


def program(folder: Path, body: str) -> list[str]:
    """A command line whose ``main(text, count)`` has ``body``."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    script = (
        f'{HEAD}def main(text: str = "", count: int = 1) -> None:\n    """Do a thing."""\n{lines}\nconsole.run(main)\n'
    )
    (folder / "program.py").write_text(script)
    return [sys.executable, str(folder / "program.py")]


def start(folder: Path, body: str, *options: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*program(folder, body), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_done(tmp_path):
    assert outcome(start(tmp_path, "print(text * count)", "--text", "ab", "--count", "2")) == (0, "abab\n", "")


def test_help_and_wrong_usage(tmp_path):
    code, output, _ = outcome(start(tmp_path, "pass", "--help"))
    assert code == 0 and "Do a thing." in output and "--count" in output
    code, _, errors = outcome(start(tmp_path, "pass", "--cuont", "2"))
    assert code == 2 and "--cuont" in errors


def test_an_error_is_one_line_without_traceback(tmp_path):
    body = "from spectrim.errors import DataError\nprint('half')\nraise DataError('text: 3 tokens; give it 1,024')"
    assert outcome(start(tmp_path, body)) == (1, "half\n", "error: text: 3 tokens; give it 1,024\n")
    code, _, errors = outcome(start(tmp_path, body, SPECTRIM_DEBUG="1"))
    assert code == 1 and "Traceback" in errors and last_line(errors).startswith("error:")


def test_a_defect_keeps_its_traceback(tmp_path):
    code, _, errors = outcome(start(tmp_path, "[][1]"))
    assert code == 1 and "Traceback" in errors and "IndexError" in last_line(errors)


STOPS = pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
LINE = "stopped by {}; finished layers are kept, run again to resume\n"
STUCK = {
    "sleeping": f"{READY}\ntime.sleep(600)",
    # the interpreter cannot run a signal handler while the main thread is in here
    "in C": f"{READY}\nhashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)",
    "waiting for a thread": (
        "thread = threading.Thread(target=hashlib.pbkdf2_hmac, args=('sha256', b'a', b'b', 10**9))\n"
        f"thread.start()\n{READY}\nthread.join()"
    ),
    "swallowing it": f"{READY}\nwhile True:\n    try: time.sleep(600)\n    except BaseException: pass",
}


@STOPS
@pytest.mark.parametrize("where", STUCK)
def test_a_stop_ends_a_program(tmp_path, number, code, word, where):
    process = start(tmp_path, STUCK[where])
    wait_for((tmp_path / "ready").exists)
    process.send_signal(number)
    assert outcome(process) == (code, "", LINE.format(word))


def test_a_stop_unwinds_and_a_second_one_does_not_disturb(tmp_path):
    body = (
        f"try:\n    {READY}\n    time.sleep(600)\nfinally:\n    Path('unwinding').write_text('')\n    time.sleep(1)\n"
    )
    process = start(tmp_path, body + "    Path('unwound').write_text('')")
    wait_for((tmp_path / "ready").exists)
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "unwinding").exists)
    process.send_signal(signal.SIGINT)
    assert outcome(process) == (130, "", LINE.format("Ctrl-C"))
    assert (tmp_path / "unwound").exists()


def test_a_stop_is_the_reason_even_when_unwinding_breaks(tmp_path):
    body = f"try:\n    {READY}\n    time.sleep(600)\nfinally:\n    [][1]"
    process = start(tmp_path, body)
    wait_for((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert outcome(process) == (143, "", LINE.format("SIGTERM"))


def test_a_stop_takes_the_children_along(tmp_path):
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    body = (
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, start_new_session=True)\n"
        f"child.stdout.readline()\nPath('pid').write_text(str(child.pid))\n{READY}\ntime.sleep(600)"
    )
    process = start(tmp_path, body)
    wait_for((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    orphan = psutil.Process(int((tmp_path / "pid").read_text()))
    assert outcome(process)[0] == 143
    assert gone(orphan)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_dvc_that_is_killed_takes_its_stage_along(tmp_path, number):
    """DVC dies of a SIGTERM without telling the command it runs."""
    command = " ".join(
        program(tmp_path, f"{READY}\nPath('pid').write_text(str(__import__('os').getpid()))\ntime.sleep(600)")
    )
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  one:\n    cmd: {command}\n    outs: [out]\n")
    quiet = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(PROJECT)}
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, env=quiet, check=True)
    process = subprocess.Popen([*dvc, "repro", "-q"], cwd=tmp_path, env=quiet, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    stage = psutil.Process(int((tmp_path / "pid").read_text()))
    process.send_signal(number)
    assert process.wait() == -number
    wait_for(lambda: gone(stage), seconds=30)
    assert process.stderr
    assert "stopped by the end of the DVC that started it" in process.stderr.read()


def test_progress_passes_everything_through(capsys):
    assert list(progress.progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    shown = capsys.readouterr()
    assert shown.out == "" and "letters: 100%" in shown.err and "3/3" in shown.err
