"""The parts of benchmarks/gpu.sh that are not shell: params.yaml on another machine, a stage's memory, the one JSON.

    python -m benchmarks.gpu_report params MODEL TEXTS       params.yaml with local sources, '' leaves them as they are
    python -m benchmarks.gpu_report stages                   the stages of dvc.yaml, one a line
    python -m benchmarks.gpu_report stage NAME FOLDER        runs it; FOLDER/stage.NAME.json says what memory it took
    python -m benchmarks.gpu_report write FOLDER OUT         everything found, as JSON

Runs in the project's folder. FOLDER holds steps.jsonl, and of every step NAME.out and NAME.err.
"""

import json
import os
import platform
import resource
import runpy
import sys
import xml.etree.ElementTree as ET
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

PACKAGES = (
    *("accelerate", "gguf", "huggingface_hub", "numpy", "pyarrow", "pydantic", "safetensors", "scipy", "tokenizers"),
    *("torch", "transformers", "triton"),
)
SHOWN = 40  # last lines of the log of a step that failed
RESULTS = ("metrics", "speed")  # files of reports/


def local_sources(params: dict[str, Any], model: str, texts: str) -> dict[str, Any]:
    """params.yaml with the model ``model`` and, by its own name, every text's file in the folder ``texts``.

    An empty string leaves the sources as they are. ``runtime.device: auto`` becomes cuda, so that a machine without a
    GPU is an error.

    Raises:
        FileNotFoundError: the folder lacks a text.
    """
    params = json.loads(json.dumps(params))
    if params["runtime"]["device"] == "auto":
        params["runtime"]["device"] = "cuda"
    if model:
        params["model"] |= {"source": model, "sha256": None}
    for name, text in params["data"].items() if texts else ():
        file = Path(texts, PurePosixPath(text["source"]).name)
        if not file.is_file():
            raise FileNotFoundError(f"data.{name}: {file}: no such file; the folder must hold the file of every text")
        text |= {"source": str(file), "sha256": None}
    return params


def run_stage(name: str, folder: Path) -> None:
    """Run a stage as ``python -m stages.NAME`` does; its largest memories, in bytes, stay in ``folder``."""
    sys.argv = [f"stages.{name}"]
    try:
        runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
    finally:
        peak = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            peak |= {
                "peak_device_bytes": torch.cuda.max_memory_allocated(),
                "peak_device_reserved_bytes": torch.cuda.max_memory_reserved(),
            }
        (folder / f"stage.{name}.json").write_text(json.dumps(peak), encoding="utf-8")


def machine() -> dict[str, Any]:
    """Versions of what computes, and the device."""
    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device: dict[str, Any] = {"processors": os.cpu_count(), "machine": platform.machine(), "gpu": None}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        capability = f"{found.major}.{found.minor}"
        device |= {"gpu": found.name, "gpu_bytes": found.total_memory, "capability": capability}
    return {"versions": versions, "device": device}


def test_counts(file: Path) -> dict[str, Any]:
    """Numbers of tests of a JUnit file, and the names of those that failed."""
    if not file.is_file():
        return {}
    suites = list(ET.parse(file).getroot().iter("testsuite"))
    counts = {kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in ("tests", "failures", "errors")}
    skipped = sum(int(suite.get("skipped", 0)) for suite in suites)
    bad = [
        f"{case.get('classname')}.{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "skipped": skipped, "failed": bad}


def read(file: Path) -> Any:
    """The JSON of a file, None where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def rows(file: Path) -> list[Any]:
    """The JSON objects of a file with one a line, other lines left out."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def report(folder: Path) -> dict[str, Any]:
    """All steps with their times, exit codes and memories, the tests, the last metrics, and the rows of inference."""
    steps = {step.pop("step"): step for step in rows(folder / "steps.jsonl")}
    for name, step in steps.items():
        step |= read(folder / f"{name}.json") or {}
        if step["exit_code"]:
            written = [folder / f"{name}.{stream}" for stream in ("out", "err")]
            text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in written if file.is_file())
            step["log"] = [line for line in text.splitlines() if line and "%|" not in line][-SHOWN:]  # no bars
    return {
        **machine(),
        "ok": all(step["exit_code"] == 0 for step in steps.values()),
        "seconds": round(sum(step["seconds"] for step in steps.values()), 1),
        "steps": steps,
        "tests": test_counts(folder / "tests.xml"),
        **{name: read(Path("reports", f"{name}.json")) for name in RESULTS},
        "inference": rows(folder / "inference.out"),
    }


def main(command: str, *arguments: str) -> None:
    """One of the four commands above."""
    if command == "params":
        params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
        changed = yaml.safe_dump(local_sources(params, *arguments), sort_keys=False)
        Path("params.yaml").write_text(changed, encoding="utf-8")
    elif command == "stages":
        print(*yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"], sep="\n")
    elif command == "stage":
        run_stage(arguments[0], Path(arguments[1]))
    elif command == "write":
        Path(arguments[1]).write_text(json.dumps(report(Path(arguments[0])), indent=1) + "\n", encoding="utf-8")
    else:
        sys.exit(f"error: {command}: no such command; there are: params, stages, stage, write")


if __name__ == "__main__":
    main(*sys.argv[1:])
