"""What the rank search knows of a model: which linears share an input, and what a rank costs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.steps.candidates import priced, tied_linears
from spectrim.compression.statistics import input_statistics
from spectrim.compression.truncated import Truncated
from spectrim.maths.budget import FACTORED, Format, matrix_bytes
from spectrim.models.blocks import BlockModel
from spectrim.models.modules import linears_by_block
from tests import tiny
from tests.tiny import Project

SHARED = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "opt": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
    "qwen2": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
}


def capture_inputs(folder: Path, model: BlockModel) -> None:
    """The part of `capture` that says which linear reads which input."""
    (folder / "inputs").mkdir()
    hidden = model.embed(torch.arange(24).reshape(2, 12) + 3)
    for index in range(len(model.names)):
        tensors, owners, hidden = input_statistics(model, index, hidden, 2)
        save_file(tensors, folder / "inputs" / f"{index:03}.safetensors", metadata={"input_of": json.dumps(owners)})


@pytest.mark.parametrize("family", SHARED)
def test_linears_that_read_one_tensor_are_tied(family: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    capture_inputs(tmp_path, BlockModel(model_folders[family]))
    blocks = linears_by_block(tiny.model(family))
    groups = tied_linears(tmp_path, blocks)
    every = sorted(name for group in groups for name in group)
    assert every == sorted(name for block in blocks.values() for name in block)
    for layer, _ in enumerate(blocks):
        own = [{name.rsplit(".", 1)[1] for name in group} for group in groups if f".{layer}." in group[0]]
        assert sorted(map(sorted, own)) == sorted(map(sorted, SHARED[family]))
    assert all(len({name.split(".layers.")[1].split(".")[0] for name in group}) == 1 for group in groups)


def test_an_excluded_linear_is_in_no_group(model_folders: dict[str, Path], tmp_path: Path) -> None:
    model = BlockModel(model_folders["llama"], exclude=("*.q_proj",))
    capture_inputs(tmp_path, model)
    groups = tied_linears(tmp_path, linears_by_block(tiny.model("llama"), ("*.q_proj",)))
    kinds = [[name.rsplit(".", 1)[1] for name in group] for group in groups[:1]]
    assert kinds == [["k_proj", "v_proj"]]


@pytest.mark.parametrize("format", FACTORED)
@pytest.mark.parametrize("rank", [300, 500])
@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (576, 1536)])
def test_a_rank_costs_in_training_what_it_costs_in_bytes(format: Format, rank: int, shape: tuple[int, int]) -> None:
    """d bytes / d rank by finite differences; what any rank takes, scales and row indices, is spread over all ranks."""
    module = Truncated(min(shape), torch.empty(0), None)
    cost = priced(module, format, shape)
    trained = cost * (module.share(rank + 1) - module.share(rank - 1)) / 2
    stored = (matrix_bytes(format, *shape, rank + 1) - matrix_bytes(format, *shape, rank - 1)) / 2
    assert trained == pytest.approx(stored, rel=0.02)


def stage_ranks(project: Project, **changes: Any) -> dict[str, Any]:
    """ranks.json of `train_ranks` with some parameters changed."""
    project.change(**changes)
    project.stage("train_ranks")
    return json.loads((project.folder / "artifacts" / "train_ranks" / "ranks.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["uniform", "svd_llm_v2", "fisher", "gates", "dobi"])
def test_tied_ranks_come_out_of_every_method(method: str, captured_llama: Project, tmp_path: Path) -> None:
    ranks = stage_ranks(
        captured_llama.copy(tmp_path / "llama"),
        compression__tie=True, compression__ratio=0.5, compression__align=2, train_ranks__method=method,
    )  # fmt: skip
    assert ranks["tie"] is True and ranks["bytes"] <= ranks["budget_bytes"]
    factored = 0
    for layer in range(3):
        for group in SHARED["llama"]:
            entries = [
                entry
                for name, entry in ranks["matrices"].items()
                if f".{layer}." in name and name.rsplit(".", 1)[1] in group
            ]
            tied = {entry["rank"] for entry in entries if entry["format"] != "dense"}
            assert len(entries) == len(group) and len(tied) <= 1
            factored += len(group) > 1 and len(tied)
    assert factored, "nothing was tied"


@pytest.mark.parametrize(
    ("method", "compared"),
    [
        ("uniform", set()),
        ("svd_llm_v2", set()),
        ("fisher", set()),
        ("gates", {"uniform", "fisher", "gates"}),
        ("dobi", {"uniform", "fisher", "dobi"}),
    ],
)
def test_trained_ranks_are_kept_only_where_they_are_best(
    method: str, compared: set[str], captured_llama: Project, tmp_path: Path
) -> None:
    ranks = stage_ranks(captured_llama.copy(tmp_path / "llama"), train_ranks__method=method)
    losses = ranks["validation_loss"]
    assert set(losses) == compared
    assert ranks["chosen"] == (min(losses, key=losses.__getitem__) if compared else method)
    solved = "fisher" in compared or method == "fisher"
    assert (0 <= ranks["optimality_gap"] <= 1e-4) if solved else ranks["optimality_gap"] is None


@pytest.mark.parametrize("method", ["gates", "dobi"])
def test_the_curve_holds_the_divergence_where_it_was_minimised(
    method: str, captured_llama: Project, tmp_path: Path
) -> None:
    project = captured_llama.copy(tmp_path / "llama")
    header = {}
    file = project.folder / "artifacts" / "train_ranks" / "curve.csv"
    for objective in ("cross_entropy", "kl"):
        stage_ranks(project, train_ranks__method=method, train_ranks__objective=objective)
        curve = file.read_text(encoding="utf-8").splitlines()
        header[objective] = curve[0]
        assert len(curve) == 1 + 3 and all("," in line and ",," not in line for line in curve)
    assert header == {
        "cross_entropy": "step,cross_entropy,width",
        "kl": "step,cross_entropy,divergence,width",
    }
    first = file.read_bytes()
    stage_ranks(project)
    assert file.read_bytes() == first
