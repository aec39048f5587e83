"""The graph on a trained model of one megabyte: its compressed stories still read as stories.

The texts are stories that the model writes itself.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectrim  # noqa: F401 - registers the checkpoint format
from spectrim.evaluation.perplexity import perplexity
from spectrim.maths.quantization import dequantize, round_to_nearest
from spectrim.models.modules import compressible_linears
from tests import tiny

FOLDER = Path(os.environ.get("SPECTRIM_EVAL_DATA", "")) / "stories260K"
RATIO, SEQ = 0.3, 256

pytestmark = pytest.mark.skipif(
    not os.environ.get("SPECTRIM_EVAL_DATA"), reason="SPECTRIM_EVAL_DATA names no folder with a model"
)


def loaded(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def written(model: Any, count: int, seed: int) -> Tensor:
    """Stories (count, SEQ) that ``model`` writes."""
    torch.manual_seed(seed)
    start = torch.full((count, 1), 1)  # the tokenizer's BOS
    return model.generate(start, do_sample=True, top_k=0, min_new_tokens=SEQ - 1, max_new_tokens=SEQ - 1)


def strangeness(stories: Tensor) -> float:
    """The original model's perplexity of them."""
    return float(perplexity(loaded(FOLDER), stories)["perplexity"])


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """The model behind the graph, and what the graph measured."""
    folder, tokenizer = tmp_path_factory.mktemp("stories"), AutoTokenizer.from_pretrained(FOLDER)
    texts = tokenizer.batch_decode(written(loaded(FOLDER), 160, seed=0), skip_special_tokens=True)
    corpus = folder / "stories.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    project = tiny.make_project(folder / "project", FOLDER, corpus)
    project.change(
        calibrate__seq_len=SEQ, calibrate__calibration_windows=64, calibrate__test_windows=8,
        capture__gradient_windows=64, capture__gradient_seq_len=SEQ, capture__batch_size=8,
        compression__ratio=RATIO, compression__format="pifa_int8", compression__align=4,
        compression__alternatives=["dense_int8", "dense_int4_asym", "dense_int3_asym", "int4_residual_asym"],
        train_ranks__method="fisher", update_weights__method="two_sided",
    )  # fmt: skip
    project.stages(*tiny.STAGES[1:-2])
    metrics = json.loads((project.folder / "reports" / "metrics.json").read_text(encoding="utf-8"))
    return loaded(project.folder / "artifacts" / "remap"), metrics


@pytest.fixture(scope="module")
def allowed() -> float:
    """How strange a story may be: a quarter stranger than the original model's own."""
    return 1.25 * strangeness(written(loaded(FOLDER), 16, seed=1))


def test_stories_still_read_as_stories(compressed: tuple[Any, dict[str, Any]], allowed: float) -> None:
    model, metrics = compressed
    assert metrics["ratio"]["file"] <= RATIO
    text = metrics["perplexity"]["corpus"]
    assert text["compressed"] < 1.1 * text["dense"]
    assert strangeness(written(model, 16, seed=1)) < allowed


def test_a_model_that_is_rounded_to_the_nearest_writes_others(allowed: float) -> None:
    model = loaded(FOLDER)
    with torch.no_grad():
        for linear in compressible_linears(model).values():
            linear.weight.copy_(dequantize(round_to_nearest(linear.weight.detach(), 4, 64)))
    assert strangeness(written(model, 16, seed=1)) > allowed
