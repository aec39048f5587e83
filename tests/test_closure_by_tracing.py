"""What runs is what is cached for: every project file of which a function ran is a dependency and in the store's keys.

Nothing is read here: each stage runs under a tracer on a tiny project whose choices reach most of the code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.conftest import ProjectFactory
from tests.tiny import Project

AFTER_CAPTURE = ("train_ranks", "update_weights", "remap", "evaluate")

CHOICES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "ipca": {
        "compression__format": "remap",
        "update_weights__method": "ipca",
        "train_ranks__method": "dobi",
        "train_ranks__objective": "kl",
    },
    "mixed": {
        "compression__alternatives": ["int8", "dense_int4", "int4_residual"],
        "compression__ratio": 0.35,
        "train_ranks__method": "fisher",
        "update_weights__block_refinement": {"steps": 2, "learning_rate": 1e-3},
    },
    "coded": {"compression__format": "coded", "compression__ratio": 0.4, "train_ranks__method": "step"},
}


def dependencies(stage: str) -> set[str]:
    """The files of code in DVC's deps of a stage, folders resolved."""
    graph = yaml.safe_load((tiny.REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    found = set()
    for name in graph[stage]["deps"]:
        path = tiny.REPOSITORY / name
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        found |= {file.relative_to(tiny.REPOSITORY).as_posix() for file in files}
    return found


@pytest.mark.parametrize("choice", CHOICES)
def test_what_runs_is_a_dependency_and_in_the_keys(
    choice: str, tiny_project: ProjectFactory, captured_llama: Project, tmp_path: Path
) -> None:
    whole = choice == "default"  # the others differ after `capture`
    project = tiny_project("llama") if whole else captured_llama.copy(tmp_path / "llama")
    project.change(**CHOICES[choice])
    rooms, traced = set(), 0
    for stage in tiny.STAGES if whole else AFTER_CAPTURE:
        trace = tmp_path / f"{stage}.json"
        project.stage(stage, trace=trace)
        found = json.loads(trace.read_text(encoding="utf-8"))
        ran, known = set(found["ran"]), dependencies(stage)
        assert f"stages/{stage}.py" in ran
        assert not ran - known, f"{stage}: {sorted(ran - known)} ran and are no dependencies"
        for key, commit in found["commits"].items():
            assert commit["ran"], f"{stage}: {key}"
            assert not set(commit["ran"]) - set(commit["key"]), f"{stage}: {set(commit['ran']) - set(commit['key'])}"
            traced += 1
        rooms |= {Path(name).parent.as_posix() for name in ran}
        for name in sorted(ran - {f"stages/{stage}.py"})[:1]:  # negative control: with one of them removed it fails
            assert ran - (known - {name}) == {name}
    assert traced >= (12 if whole else 4)
    assert rooms >= {"spectrim/maths", "spectrim/models", "spectrim/formats", "spectrim/checkpoint"}
    assert rooms >= {"spectrim/compression", "spectrim/evaluation", "pipeline/steps"}
    assert not whole or "pipeline/data" in rooms
