"""The graph on models whose matrices are no plain linears, and on one whose blocks cannot be run one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families import small_config
from spectrim.models.linearise import matrices_of
from tests import tiny

MIXED = {
    "train_ranks__method": "fisher",
    "compression__format": "pifa_int8",
    "compression__ratio": 0.5,
    "compression__align": 2,
    "compression__alternatives": ["dense_int8", "dense_int4_asym", "int4_residual_asym"],
}
CODED = {
    "train_ranks__method": "step",
    "compression__format": "coded",
    "compression__ratio": 0.45,
    "compression__alternatives": [],
}


def saved(kind: str, folder: Path) -> int:
    """A model with the tiny tokenizer, under the names of the original architecture; returns its matrices' number."""
    config = small_config(kind)
    config.vocab_size, config.max_position_embeddings, config.initializer_range = len(tiny.tokenizer()), 128, 0.1
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = config.vocab_size
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return len(matrices_of(model))


GRAPHS = [
    ("mixtral", MIXED, "blocks"),
    ("qwen3_moe", CODED, "blocks"),
    ("gpt2", MIXED, "blocks"),
    ("gemma4_text", MIXED, "whole"),
]


@pytest.mark.parametrize(("kind", "values", "walk"), GRAPHS)
def test_the_graph_compresses_all_of_them(kind: str, values: dict[str, Any], walk: str, tmp_path: Path) -> None:
    n_matrices = saved(kind, tmp_path / "model")
    corpus = tiny.save_corpus(tmp_path / "corpus.jsonl")
    project = tiny.make_project(tmp_path / "project", tmp_path / "model", corpus)
    project.change(baseline__quantization=["int8", "gptq_int4_asym"], **values)
    project.stages(*tiny.STAGES[1:-2])
    artifacts = project.folder / "artifacts"
    assert json.loads((artifacts / "capture" / "capture.json").read_text())["walk"] == walk
    ranks = json.loads((artifacts / "train_ranks" / "ranks.json").read_text())
    assert len(ranks["matrices"]) == n_matrices
    metrics = json.loads((project.folder / "reports" / "metrics.json").read_text())
    assert metrics["ratio"]["file"] <= metrics["ratio"]["target"]
    assert metrics["reach"]["of_blocks"] > 0.9
    text = metrics["perplexity"]["corpus"]
    assert text["dense"] != text["compressed"] < 1.2 * text["dense"]
