"""pipeline/data/calibration.py: what windows begin with; on tiny models' tokenizers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pipeline.config.sections import Calibrate, Text
from pipeline.data.calibration import write_windows
from pipeline.data.documents import read, split
from pipeline.data.texts import load_windows
from spectrim.errors import DataError
from spectrim.evaluation.perplexity import perplexity
from tests import tiny

BOS, SEQ = 0, 32
PARTS = ("calibration", "validation", "test/a", "test/b")
SPLITS = {"calibration": 0.5, "validation": 0.25, "test": 0.25}


@pytest.fixture
def texts_of(tmp_path: Path) -> dict[str, Text]:
    """Two texts of plain strings."""
    file = tiny.save_corpus(tmp_path / "corpus.jsonl")
    return {name: Text(str(file), None, "text", SPLITS) for name in ("a", "b")}


def prepared(folder: Path, *, adds: bool = False) -> Path:
    """A tiny model whose tokenizer puts a BOS before a text, or does not."""
    tiny.save_model("llama", folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    tokenizer.save_pretrained(folder)
    return folder


def written(model: Path, data: dict[str, Text], bos: Any, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Part -> its windows, and calibrate.json."""
    write_windows(model, data, Calibrate(SEQ, bos, 12, 3, 4), 0, {}, out)
    files = {file.relative_to(out).with_suffix("").as_posix(): file for file in out.rglob("*.parquet")}
    return {part: load_windows(file) for part, file in files.items()}, json.loads((out / "calibrate.json").read_text())


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("rule", ["auto", "always", "never"])
def test_every_window_begins_as_the_rule_says(rule: str, adds: bool, texts_of: dict[str, Text], tmp_path: Path) -> None:
    begun = {"auto": adds, "always": True, "never": False}[rule]
    windows, summary = written(prepared(tmp_path / "model", adds=adds), texts_of, rule, tmp_path / "out")
    assert set(windows) == set(PARTS)
    assert summary["bos"] == ({"a": "<s>", "b": "<s>"} if begun else {})
    for part, found in windows.items():
        assert found.shape[1] == SEQ and (found == BOS).sum() == len(found) * begun, part
        assert (found[:, 0] == BOS).all() == begun
    chosen = split(read("a", texts_of["a"]), SPLITS, "a")["test"]
    ids = tiny.tokenizer()("\n\n".join(chosen), add_special_tokens=False)["input_ids"][: 4 * (SEQ - begun)]
    assert windows["test/a"][:, int(begun) :].reshape(-1).tolist() == ids
    assert summary["test"]["a"]["n_bytes"] == len(tiny.tokenizer().decode(ids).encode())


def test_behind_bos_every_token_of_the_text_is_predicted(texts_of: dict[str, Text], tmp_path: Path) -> None:
    windows, _ = written(prepared(tmp_path / "model", adds=True), texts_of, "auto", tmp_path / "out")
    model, test = tiny.model("llama"), windows["test/a"]
    found = perplexity(model, test)
    assert found["n_tokens"] == test[:, 1:].numel()
    losses = []
    with torch.no_grad():
        for window in test:
            odds = model(input_ids=window[None]).logits[0].log_softmax(-1)
            losses += [-float(odds[i - 1, window[i]]) for i in range(1, SEQ)]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_without_a_bos_token_always_is_an_error(texts_of: dict[str, Text], tmp_path: Path) -> None:
    folder = prepared(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in settings.items() if key != "bos_token"}))
    with pytest.raises(DataError, match=r"calibrate\.bos: always, but the tokenizer has no BOS token"):
        written(folder, texts_of, "always", tmp_path / "out")
    assert written(folder, texts_of, "auto", tmp_path / "out")[1]["bos"] == {}
