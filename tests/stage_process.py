"""One stage in a process of its own, forked from a server that has torch and transformers loaded already.

A fresh `python -m stages.X` spends most of its seconds on those imports; the project's own modules are imported anew in
every child, from the project's folder. `dvc repro` in the tests runs the real command.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "transformers.models.qwen2.modeling_qwen2",
    "accelerate",
    "pyarrow.parquet",
    "scipy",
    "matplotlib.pyplot",
    "pydantic",
    "typer",
]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(PRELOADED)


def run_stage(
    name: str, folder: Path, environment: Mapping[str, str], kill_after: int | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m stages.NAME` in a folder; with `kill_after`, SIGKILL in the middle of the commit after so many."""
    with tempfile.TemporaryDirectory() as outputs:
        files = [Path(outputs, stream) for stream in ("stdout", "stderr")]
        process = FORKED.Process(target=_child, args=(name, folder, dict(environment), kill_after, files))
        process.start()
        process.join()
        stdout, stderr = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files)
    return subprocess.CompletedProcess(["python", "-m", f"stages.{name}"], process.exitcode or 0, stdout, stderr)


def _child(name: str, folder: Path, environment: dict[str, str], kill_after: int | None, files: list[Path]) -> None:
    import torch

    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # OpenMP read its own when it was loaded
    repository = Path(__file__).resolve().parent.parent
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry or ".").resolve() != repository)]
    own = ("spectrim", "pipeline", "stages")
    assert not [module for module in sys.modules if module.split(".")[0] in own], "loaded before the fork"
    sys.argv = [f"stages.{name}"]
    if kill_after is not None:
        _kill_in_a_commit(kill_after)
    runpy.run_module(f"stages.{name}", run_name="__main__")


def _kill_in_a_commit(left: int) -> None:
    from pipeline.runtime.store import LayerStore

    commit = LayerStore.commit

    def counting(self: Any, key: str, writer: Callable[[Path], None]) -> Path:
        def counted(folder: Path) -> None:
            nonlocal left
            writer(folder)  # which may commit entries of its own: they are finished, and count, before it is
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return commit(self, key, counted)

    LayerStore.commit = counting  # type: ignore[method-assign]
