"""Every preset on a tiny model, from what `capture` left to the evaluation of the checkpoint."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import preset
from spectrim.maths.budget import FACTORED
from tests.config.test_preset import NAMES, write
from tests.tiny import REPOSITORY, Project

STAGES = ("train_ranks", "update_weights", "remap", "evaluate")


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_runs_to_the_evaluation(
    name: str, captured_llama: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = captured_llama.copy(tmp_path / "project")
    shutil.copytree(REPOSITORY / "presets", project.folder / "presets")
    monkeypatch.chdir(project.folder)
    write(name)
    values = preset.read(name)
    project.stages(*STAGES)

    artifacts = project.folder / "artifacts"
    ranks, summary = read(artifacts / "train_ranks" / "ranks.json"), read(artifacts / "update_weights" / "summary.json")
    config = read(artifacts / "remap" / "config.json")["quantization_config"]
    metrics = read(project.folder / "reports" / "metrics.json")
    assert ranks["method"] == values["train_ranks.method"] and ranks["format"] == values["compression.format"]
    factored = {matrix for matrix, entry in ranks["matrices"].items() if entry["format"] in FACTORED}
    assert set(summary["relative_error"]) == factored
    assert summary["method"] == values["update_weights.method"]
    damped = values["update_weights.method"] in ("two_sided", "svd_llm", "svd_llm_v2")
    assert set(summary["damping"]) == (factored if damped else set())
    formats = {matrix["format"] for matrix in config["matrices"].values()} - {"dense"}
    assert formats and formats <= {values["compression.format"], *values["compression.alternatives"]}
    if values["train_ranks.keep"] == "trained":
        assert ranks["chosen"] == ranks["method"]
    assert metrics["ratio"]["file"] <= metrics["ratio"]["target"] == 0.8
    text = metrics["perplexity"]["corpus"]
    assert math.isfinite(text["compressed"]) and text["compressed"] != text["dense"]
    assert torch.tensor(list(summary["relative_error"].values())).lt(1).all()
