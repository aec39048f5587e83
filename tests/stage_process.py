"""One stage in a process of its own, forked from a server that has torch and transformers loaded already.

A fresh `python -m stages.X` spends most of its seconds on those imports; the project's own modules are imported anew in
every child, from the project's folder. Where the command itself is tested, DVC starts it as a user's does.
"""

import gc
import inspect
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
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
    "matplotlib.backends.backend_svg",
    "pydantic.dataclasses",
    "pydantic.type_adapter",
    "ruamel.yaml",
    "typer",
    "dvc.cli",
    "dvc.repo.reproduce",
    "lm_eval.evaluator",
]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(PRELOADED)


def run_stage(
    name: str,
    folder: Path,
    environment: Mapping[str, str],
    kill_after: int | None = None,
    trace: Path | None = None,
    kill_at: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python -m stages.NAME` in a folder.

    Args:
        kill_after: SIGKILL in the middle of the commit after so many; every snapshot is then kept.
        kill_at: count those commits alone whose folder holds a file of that name.
        trace: a file for what `tests.trace` sees: the project's files of which a function body ran.
    """
    with tempfile.TemporaryDirectory() as outputs:
        files = [Path(outputs, stream) for stream in ("stdout", "stderr")]
        process = FORKED.Process(
            target=_child, args=(name, folder, dict(environment), kill_after, files, trace, kill_at)
        )
        process.start()
        process.join()
        stdout, stderr = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files)
    return subprocess.CompletedProcess(["python", "-m", f"stages.{name}"], process.exitcode or 0, stdout, stderr)


def _child(
    name: str,
    folder: Path,
    environment: dict[str, str],
    kill_after: int | None,
    files: list[Path],
    trace: Path | None,
    kill_at: str | None,
) -> None:
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    enter(folder, environment)
    sys.argv = [f"stages.{name}"]
    if kill_after is not None:
        _kill_in_a_commit(kill_after, kill_at)
    write = _trace(folder, trace) if trace is not None else lambda: None
    try:
        runpy.run_module(f"stages.{name}", run_name="__main__")
    finally:
        sys.setprofile(None)
        write()


def enter(folder: Path, environment: Mapping[str, str]) -> None:
    """Make this forked process one that was started in ``folder``."""
    import torch

    gc.freeze()  # what was loaded before the fork is not searched for garbage again and again
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = False  # the next child finds the project's modules compiled
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # OpenMP read its own when it was loaded
    repository = Path(__file__).resolve().parent.parent
    further = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [str(folder), *further, *(entry for entry in sys.path if Path(entry or ".").resolve() != repository)]
    own = ("spectrim", "pipeline", "stages")
    assert not [module for module in sys.modules if module.split(".")[0] in own], "loaded before the fork"


def _kill_in_a_commit(left: int, at: str | None) -> None:
    from pipeline.runtime import snapshots
    from pipeline.runtime.store import LayerStore

    commit = LayerStore.commit
    snapshots.SECONDS = 0.0

    def counting(self: Any, key: str, writer: Callable[[Path], None]) -> Path:
        def counted(folder: Path) -> None:
            nonlocal left
            writer(folder)  # which may commit entries of its own: they are finished, and count, before it is
            if at is None or (folder / at).exists():
                left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return commit(self, key, counted)

    LayerStore.commit = counting  # type: ignore[method-assign]


def _trace(folder: Path, file: Path) -> Callable[[], None]:
    """Watch of which project files function bodies run, in the stage and in every commit; returns what writes them."""
    from pipeline.runtime import layers
    from pipeline.runtime.closure import closure, module_file
    from pipeline.runtime.closure import modules_of as modules
    from pipeline.runtime.store import LayerStore

    root, seen, inside = str(folder.resolve()) + os.sep, set[str](), threading.local()
    commits: dict[str, set[str]] = {}
    allowed: dict[str, list[str]] = {}
    keyed, commit = layers.keyed, LayerStore.commit

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # a function's body: neither a module's nor a class's is optimized
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(root):
            name = code.co_filename.removeprefix(root)
            seen.add(name)
            for key in getattr(inside, "keys", ()):
                commits[key].add(name)

    def watched(self: Any, key: str, writer: Callable[[Path], None]) -> Path:
        def write(into: Path) -> None:
            inside.keys = [*getattr(inside, "keys", ()), key]
            commits.setdefault(key, set())
            try:
                writer(into)
            finally:
                inside.keys = inside.keys[:-1]

        return commit(self, key, write)

    def noted(stage: str, name: str, compute: Callable[[Path], None], *parts: Any) -> Any:
        task = keyed(stage, name, compute, *parts)
        files = [found for module in modules(compute) if (found := module_file(module))]
        allowed[task.key] = sorted(path.as_posix() for path in closure(*files))
        return task

    def write() -> None:
        of_keys = {key: {"ran": sorted(commits[key]), "key": names} for key, names in allowed.items() if key in commits}
        file.write_text(json.dumps({"ran": sorted(seen), "commits": of_keys}), encoding="utf-8")

    layers.keyed, LayerStore.commit = noted, watched  # type: ignore[method-assign]
    threading.setprofile(profile)
    sys.setprofile(profile)
    return write
