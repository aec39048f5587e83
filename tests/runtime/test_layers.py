"""A stage resumes where it died, never uses a damaged layer, and gives the same bytes on every engine."""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from pipeline.config.sections import Runtime
from pipeline.runtime.layers import LayerTask, run_layers
from pipeline.runtime.store import LayerStore
from spectrim.errors import NumericalError, OrchestrationError, StorageError
from tests.layer_runs import INLINE, computed, finished, last_line, resume, wait_for, worker
from tests.layer_worker import content, names, tasks_of
from tests.runtime.test_artifacts import largest_file, tree


def test_results_are_named_ordered_and_whole(tmp_path, capsys):
    log = tmp_path / "log"
    entries = run_layers("worker", tasks_of(names(5), log), INLINE, LayerStore(tmp_path / "layers"))
    assert list(entries) == names(5)
    assert all((entry / "a.bin").read_bytes() == content(name) for name, entry in entries.items())
    assert Counter(computed(log)) == Counter(names(5))
    assert "0 cached" in capsys.readouterr().err
    assert run_layers("worker", tasks_of(names(5), log), INLINE, LayerStore(tmp_path / "layers")) == entries
    assert len(computed(log)) == 5
    assert "5 cached" in capsys.readouterr().err


def test_no_layers_is_no_work(tmp_path):
    assert run_layers("worker", [], INLINE, LayerStore(tmp_path)) == {}


def test_two_layers_of_one_name_are_a_defect(tmp_path):
    with pytest.raises(ValueError, match="same name"):
        run_layers("worker", [LayerTask("a", "1", print), LayerTask("a", "2", print)], INLINE, LayerStore(tmp_path))


def test_sigkill_amid_the_layers(tmp_path, reference):
    log = tmp_path / "log"
    process = worker(tmp_path / "layers", log, "--seconds", "1", "--workers", "1")
    wait_for(lambda: len(computed(log)) == 3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    whole = {path.name for path in (tmp_path / "layers").iterdir() if not path.name.startswith(".")}
    assert whole and len(whole) < 4
    resume(tmp_path, reference, [task.name for task in tasks_of(names(4), log) if task.key not in whole])


@pytest.mark.parametrize("die", [1, 3, 4, 6, 9])
def test_sigkill_at_any_step_of_a_commit(tmp_path, reference, die):
    """Flushes of one commit: two files, the folder, the manifest, its folder, the store."""
    log = tmp_path / "log"
    process = worker(tmp_path / "layers", log, "--workers", "1", "--die", str(die))
    assert process.wait() == -signal.SIGKILL
    whole = die // 6  # the last flush comes after the rename
    resume(tmp_path, reference, names(4)[whole:])


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_only_the_damaged_layer_is_computed_again(tmp_path, reference, capsys, damage):
    tasks = tasks_of(names(4), tmp_path / "log")
    victim = run_layers("worker", tasks, INLINE, LayerStore(tmp_path / "layers"))["layers.2"] / "b.bin"
    victim.chmod(0o644)
    if damage == "truncate":
        os.truncate(victim, victim.stat().st_size // 2)
    elif damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 3] ^= 4
        victim.write_bytes(data)
    else:
        victim.unlink()
    capsys.readouterr()
    resume(tmp_path, reference, ["layers.2"])
    assert capsys.readouterr().err.count("warning:") == 1


def test_a_layer_is_tried_again(tmp_path, capsys):
    attempts = []

    def flaky(folder: Path) -> None:
        attempts.append(folder)
        (folder / "x").write_text("x")
        if len(attempts) < 3:
            raise RuntimeError("a cold")

    runtime = Runtime("inline", 1, 2, "cpu")
    run_layers("worker", [LayerTask("a", "1" * 64, flaky)], runtime, LayerStore(tmp_path))
    assert len(attempts) == len(set(attempts)) == 3  # each in an empty folder of its own
    assert capsys.readouterr().err.count("trying again") == 2
    attempts.clear()
    with pytest.raises(OrchestrationError, match=r"worker: a: RuntimeError: a cold; tried 2 times"):
        run_layers("worker", [LayerTask("a", "2" * 64, flaky)], Runtime("inline", 1, 1, "cpu"), LayerStore(tmp_path))


def test_an_error_of_the_input_is_not_tried_again(tmp_path):
    attempts = []

    def broken(folder: Path) -> None:
        attempts.append(folder)
        raise NumericalError("layers.0: NaN in window 3")

    with pytest.raises(NumericalError, match="window 3"):
        run_layers("worker", [LayerTask("a", "1" * 64, broken)], Runtime("inline", 1, 5, "cpu"), LayerStore(tmp_path))
    assert len(attempts) == 1


def test_after_a_failure_nothing_starts_and_the_finished_stays(tmp_path):
    log = tmp_path / "log"
    tasks = tasks_of(names(6), log, broken="layers.1")
    with pytest.raises(OrchestrationError, match=r"layers\.1"):
        run_layers("worker", tasks, INLINE, LayerStore(tmp_path / "layers"), ordered=True)
    assert computed(log) == ["layers.0", "layers.1"]
    assert [path.name for path in (tmp_path / "layers").iterdir()] == [tasks[0].key]


def test_ordered_is_one_after_the_other(tmp_path):
    log = tmp_path / "log"
    run_layers(
        "worker", tasks_of(names(6), log), Runtime("inline", 4, 0, "cpu"), LayerStore(tmp_path / "l"), ordered=True
    )
    assert log.read_text().split("\n")[:-1] == [f"{what} {name}" for name in names(6) for what in ("start", "end")]


def test_workers_bound_the_concurrency_and_divide_the_threads(tmp_path):
    lock, inside, most, threads = threading.Lock(), [0], [0], set()

    def compute(folder: Path) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        threads.add(torch.get_num_threads())
        time.sleep(0.05)
        (folder / "x").write_text("x")
        with lock:
            inside[0] -= 1

    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        tasks = [LayerTask(str(index), f"{index:064}", compute) for index in range(9)]
        run_layers("worker", tasks, Runtime("inline", 3, 0, "cpu"), LayerStore(tmp_path))
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)
    assert most[0] == 3 and threads == {2}


def test_a_full_disk_ends_the_run_and_keeps_what_was_finished(tmp_path):
    store = LayerStore(tmp_path)

    def big(folder: Path) -> None:
        (folder / "x").write_bytes(bytes(100_000))

    small = tasks_of(names(1), tmp_path.parent / "log")[0]
    run_layers("worker", [small], INLINE, store)
    before = tree(tmp_path)
    with largest_file(80_000), pytest.raises(StorageError, match="free"):
        run_layers("worker", [small, LayerTask("big", "1" * 64, big)], INLINE, store)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_stop_is_one_line_and_resumable(tmp_path, reference, number, code, word):
    log = tmp_path / "log"
    process = worker(tmp_path / "layers", log, "--seconds", "1", "--workers", "1")
    wait_for(lambda: len(finished(log)) == 2 and len(computed(log)) == 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert last_line(errors) == f"stopped by {word}; finished layers are kept, run again to resume"
    assert "Traceback" not in errors
    resume(tmp_path, reference, names(4)[2:])


def test_a_stop_does_not_wait_for_a_layer(tmp_path):
    log = tmp_path / "log"
    process = worker(tmp_path / "layers", log, "--seconds", "600")
    wait_for(lambda: len(computed(log)) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
