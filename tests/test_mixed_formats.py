"""Formats chosen together with ranks, from the knapsack to a checkpoint that loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spectrim.checkpoint.layout import read_bytes
from spectrim.maths.budget import FACTORED, RESIDUAL, ROUNDED
from tests.tiny import Project

ALL = [*FACTORED, *ROUNDED]


def compressed(project: Project, ratio: float, alternatives: list[str]) -> Path:
    """The checkpoint of one ratio, through the stages that a ratio changes."""
    project.change(
        compression__ratio=ratio, compression__format="pifa_int8", compression__alternatives=alternatives,
        compression__align=1, train_ranks__method="fisher",
    )  # fmt: skip
    project.stages("train_ranks", "update_weights", "remap")
    return project.folder / "artifacts" / "remap"


def formats(folder: Path) -> set[str]:
    return {matrix["format"] for matrix in json.loads((folder / "spectrim.json").read_text())["matrices"].values()}


@pytest.mark.parametrize("ratio", [0.8, 0.45, 0.36])
def test_the_budget_holds_and_the_checkpoint_loads(ratio: float, captured_llama: Project, tmp_path: Path) -> None:
    project = captured_llama.copy(tmp_path / "project")
    folder = compressed(project, ratio, ALL)
    assert 0.9 * ratio < read_bytes(folder)["ratio"] <= ratio
    assert formats(folder) & set(ROUNDED)
    model, dense = (
        AutoModelForCausalLM.from_pretrained(project.folder / "artifacts" / at) for at in ("remap", "prepare")
    )
    tokens = torch.arange(5, 25)[None]
    with torch.inference_mode():
        found, expected = model(input_ids=tokens).logits, dense(input_ids=tokens).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.5


def test_a_residual_is_cut_to_its_rank_and_lies_beside_the_rounded_weight(
    captured_llama: Project, tmp_path: Path
) -> None:
    project = captured_llama.copy(tmp_path / "project")
    folder = compressed(project, 0.4, ["int4_residual"])
    matrices = json.loads((folder / "spectrim.json").read_text())["matrices"]
    residual = {name: matrix["rank"] for name, matrix in matrices.items() if matrix["format"] in RESIDUAL}
    assert residual
    stored = load_file(folder / "model.safetensors")
    for name, rank in residual.items():
        assert stored[f"{name}.left"].shape[1] == stored[f"{name}.right"].shape[1] == rank


def test_nothing_is_rounded_without_alternatives(captured_llama: Project, tmp_path: Path) -> None:
    project = captured_llama.copy(tmp_path / "project")
    folder = compressed(project, 0.5, [])
    assert formats(folder) <= {"pifa_int8", "dense"}
    assert not (project.folder / "artifacts" / "update_weights" / "rounded").exists()
