"""Coded weights from the parameters to the checkpoint: the budget is filled, the memory bounded, steps are refined."""

import json
from pathlib import Path
from typing import Any

import pytest

from spectrim.checkpoint.layout import read_bytes
from tests.tiny import Project

CODED = {"compression__format": "coded", "train_ranks__method": "step"}


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("ratio", [0.3, 0.4])
def test_the_code_fills_the_budget(ratio: float, captured_llama: Project, tmp_path: Path) -> None:
    project = captured_llama.copy(tmp_path / "project")
    project.change(**CODED, compression__ratio=ratio)
    project.stages("train_ranks", "update_weights", "remap")
    artifacts = project.folder / "artifacts"
    ranks, stored = read(artifacts / "train_ranks" / "ranks.json"), read_bytes(artifacts / "remap")
    assert 0.99 * ranks["budget_bytes"] < ranks["bytes"] <= ranks["budget_bytes"]
    assert stored["linears"] == ranks["bytes"] and stored["ratio"] <= ratio < 0.5 < stored["memory_ratio"]
    assert stored["multiply_adds"] == stored["dense_linears_16bit"] // 2
    assert {row["format"] for row in ranks["matrices"].values()} == {"coded"}
    summary = read(artifacts / "update_weights" / "summary.json")["refinement"]
    assert summary["after"] <= summary["before"]


def test_the_validation_windows_choose_the_damping_of_the_rows(captured_llama: Project, tmp_path: Path) -> None:
    project = captured_llama.copy(tmp_path / "project")
    found = {}
    for dampings in ([0.03, 1.0], [1.0, 0.03], [0.03], [1.0]):
        project.change(**CODED, compression__ratio=0.3, train_ranks__row_dampings=dampings)
        project.stages("train_ranks")
        found[tuple(dampings)] = read(project.folder / "artifacts" / "train_ranks" / "ranks.json")["coded"]
    losses = found[0.03, 1.0].pop("validation_loss")
    assert losses == found[1.0, 0.03].pop("validation_loss") and losses["0.03"] != losses["1"]
    assert found[0.03,].pop("validation_loss") == found[1.0,].pop("validation_loss") == {}
    assert found[0.03, 1.0] == found[1.0, 0.03] == found[0.03 if losses["0.03"] < losses["1"] else 1.0,]
    assert found[0.03,] != found[1.0,]


def test_memory_is_bounded_by_name(captured_llama: Project, tmp_path: Path) -> None:
    project = captured_llama.copy(tmp_path / "project")
    project.change(**CODED, compression__ratio=0.4, compression__memory_ratio=0.45)
    done = project.stage("train_ranks", check=False)
    assert done.returncode == 1
    assert "compression.memory_ratio: 0.45; coded weights take a byte a number in memory" in done.stderr


def test_a_budget_below_that_of_zeros_is_refused(captured_llama: Project, tmp_path: Path) -> None:
    project = captured_llama.copy(tmp_path / "project")
    project.change(**CODED, compression__ratio=0.01)
    done = project.stage("train_ranks", check=False)
    assert done.returncode == 1 and "raise compression.ratio" in done.stderr
