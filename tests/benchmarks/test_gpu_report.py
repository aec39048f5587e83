"""benchmarks/gpu.sh's Python: local sources, a stage with its memory, and what becomes of failed steps."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import gpu_report
from tests import tiny
from tests.conftest import ProjectFactory


def test_local_files_take_the_place_of_all_sources(tmp_path: Path) -> None:
    params = yaml.safe_load((tiny.REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    before = json.dumps(params)
    names = [text["source"].rsplit("/", 1)[1] for text in params["data"].values()]
    for name in names[1:]:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=f"{names[0]}: no such file; the folder must hold"):
        gpu_report.local_sources(params, "model.gguf", str(tmp_path))
    (tmp_path / names[0]).touch()
    found = gpu_report.local_sources(params, "model.gguf", str(tmp_path))
    assert found["model"] == {"source": "model.gguf", "sha256": None} and found["runtime"]["device"] == "cuda"
    assert [text["source"] for text in found["data"].values()] == [str(tmp_path / name) for name in names]
    assert not any(text["sha256"] for text in found["data"].values())
    unchanged = gpu_report.local_sources(params, "", "")
    assert (unchanged["model"], unchanged["data"]) == (params["model"], params["data"])
    assert json.dumps(params) == before


def test_a_stage_runs_as_itself_and_says_its_memory(tiny_project: ProjectFactory, tmp_path: Path) -> None:
    project = tiny_project("llama")
    names = project.run(sys.executable, "-m", "benchmarks.gpu_report", "stages", PYTHONPATH=str(tiny.REPOSITORY))
    first, second = names.stdout.split()[:2]
    assert set(tiny.STAGES) <= set(names.stdout.split())
    if first != "prepare":
        project.stage(first)
    assert "prepare" in (first, second)
    command = (sys.executable, "-m", "benchmarks.gpu_report", "stage", "prepare", str(tmp_path))
    project.run(*command, PYTHONPATH=str(tiny.REPOSITORY))
    assert (project.folder / "artifacts" / "prepare" / "model.safetensors").is_file()
    peak = json.loads((tmp_path / "stage.prepare.json").read_text(encoding="utf-8"))
    assert 10**8 < peak["peak_host_bytes"] < 10**10


def test_a_failed_step_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = [
        {"step": "stage.prepare", "seconds": 2.5, "exit_code": 0},
        {"step": "stage.capture", "seconds": 1.0, "exit_code": 1},
        {"step": "inference", "seconds": 4.0, "exit_code": 0},
    ]
    files = {
        "steps.jsonl": "".join(json.dumps(step) + "\n" for step in steps),
        "stage.prepare.json": '{"peak_host_bytes": 7}',
        "stage.prepare.err": "all is well",
        "stage.capture.err": "capture:  50%|#####     | 1/2\n\nerror: disk full\n",
        "inference.out": 'loading\n{"model": "dense", "decode": 1}\n{"model": "cut o',
        "tests.xml": '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase classname="a" '
        'name="right"/><testcase classname="b" name="wrong"><failure/></testcase></testsuite></testsuites>',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    gpu_report.main("write", str(tmp_path), "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert (found["ok"], found["seconds"], found["metrics"]) == (False, 7.5, None)
    assert found["steps"]["stage.prepare"] == {"seconds": 2.5, "exit_code": 0, "peak_host_bytes": 7}
    assert found["steps"]["stage.capture"]["log"] == ["error: disk full"]
    assert found["inference"] == [{"model": "dense", "decode": 1}]
    assert found["tests"] == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["b.wrong"]}
    assert found["versions"]["torch"] and {"gpu", "processors"} <= found["device"].keys()
