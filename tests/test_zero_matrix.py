"""A model with matrices of zeros, as one that was grown by blocks that change nothing yet, through every stage.

Before a matrix of zeros no gradient arrives and behind it no input, so that Grams are zero as well.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spectrim.checkpoint.layout import read_config
from spectrim.checkpoint.loading import to_dense
from spectrim.maths.budget import FACTORED, ROUNDED
from tests import tiny
from tests.tiny import Project, make_project

ZEROS = (
    "model.layers.1.self_attn.o_proj",  # before it no gradient reaches q, k and v
    "model.layers.1.mlp.down_proj",  # and none gate and up
    "model.layers.2.self_attn.v_proj",  # nothing enters o_proj behind it
    "model.layers.2.mlp.up_proj",  # nor down_proj
)
METHODS: dict[str, dict[str, Any]] = {
    "dobi": {"train_ranks__method": "dobi", "update_weights__method": "ipca", "compression__format": "remap"},
    "svd_llm": {
        "train_ranks__method": "svd_llm_v2", "update_weights__method": "svd_llm", "compression__format": "int8",
    },
    "coded": {"train_ranks__method": "step", "compression__format": "coded"},
}  # fmt: skip


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Project:
    """A project whose model has ZEROS, captured; read only."""
    root = tmp_path_factory.mktemp("zeros")
    model = tiny.model("llama")
    with torch.no_grad():
        for name in ZEROS:
            model.get_parameter(f"{name}.weight").zero_()
    model.save_pretrained(root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    project = make_project(root / "project", root / "model", corpus_file)
    project.stages("prepare", "calibrate", "capture")
    return project


def compressed(project: Project) -> dict[str, str]:
    """The format of every matrix of the checkpoint that its stages make; it loads and computes."""
    project.stages("train_ranks", "update_weights", "remap")
    folder = project.folder / "artifacts" / "remap"
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model(input_ids=torch.arange(5, 25)[None]).logits.isfinite().all()
    return {name: matrix.format for name, matrix in read_config(folder).listed.items()}


def unrefined(grown: Project, folder: Path, **values: Any) -> Project:
    """A copy with other parameters, in which no training moves what the update of the weights has found."""
    project = grown.copy(folder)
    file = project.folder / "params.yaml"
    refinement = yaml.safe_load(file.read_text(encoding="utf-8"))["update_weights"]["refinement"]
    project.change(update_weights__refinement={**refinement, "steps": 0}, **values)
    return project


def require_zeros(project: Project) -> None:
    model = AutoModelForCausalLM.from_pretrained(project.folder / "artifacts" / "remap")
    for name in ZEROS:
        assert not to_dense(model).get_parameter(f"{name}.weight").any(), name


def test_every_stage_ends_with_finite_numbers(grown: Project, tmp_path: Path) -> None:
    project = grown.copy(tmp_path / "project")
    spectra = load_file(project.folder / "artifacts" / "capture" / "spectra.safetensors")
    for name in ZEROS:
        assert not spectra[f"two_sided.{name}"].any() and not spectra[f"input.{name}"].any()
    assert not spectra["two_sided.model.layers.1.self_attn.q_proj"].any()  # no gradient: nothing is at stake
    assert spectra["input.model.layers.1.self_attn.q_proj"].all()
    compressed(project)
    project.stages("baseline", "evaluate", "speed", "report")
    metrics = json.loads((project.folder / "reports" / "metrics.json").read_text(encoding="utf-8"))
    assert all(math.isfinite(number) for number in numbers(metrics))


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in numbers(item)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_zeros(method: str, grown: Project, tmp_path: Path) -> None:
    project = unrefined(grown, tmp_path / "project", compression__ratio=0.5, **METHODS[method])
    assert METHODS[method]["compression__format"] in compressed(project).values()
    require_zeros(project)


def test_every_format_is_priced_for_zeros_and_the_cheapest_is_taken(grown: Project, tmp_path: Path) -> None:
    project = unrefined(
        grown, tmp_path / "project", compression__ratio=0.35, compression__format="pifa_int8",
        compression__alternatives=[*FACTORED, *ROUNDED], compression__align=2, train_ranks__method="fisher",
    )  # fmt: skip
    formats = compressed(project)
    require_zeros(project)
    ranks = json.loads((project.folder / "artifacts" / "train_ranks" / "ranks.json").read_text(encoding="utf-8"))
    for name in ZEROS:  # one direction more would cost bytes that save nothing
        assert formats[name] in FACTORED and ranks["matrices"][name]["rank"] == 2, name
