"""pipeline/data/bos.py: one rule for what windows, prompts and questions begin with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pipeline.data.bos import added_bos, follow
from pipeline.data.text_file import file_windows
from pipeline.steps.behaviour import write_generation
from pipeline.steps.measure import Subject
from pipeline.steps.tasks import load_tasks, run_tasks
from spectrim.errors import DataError
from tests import tiny
from tests.steps.test_tasks import save_jsonl

BOS = 0
RULES = ("auto", "always", "never")


def fresh(folder: Path, *, adds: bool) -> PreTrainedTokenizerFast:
    """The tiny tokenizer from its files, with a BOS before every text or without."""
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(folder)
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    if adds:  # as Gemma's and Llama 3's files have it
        loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
        loaded.save_pretrained(folder)
        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    return loaded


def wanted(rule: str, adds: bool) -> bool:
    return {"auto": adds, "always": True, "never": False}[rule]


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_text_begins_as_the_rule_says(rule: Any, adds: bool, tmp_path: Path) -> None:
    tokenizer = fresh(tmp_path, adds=adds)
    assert added_bos(tokenizer) == (BOS if adds else None)
    bare = tokenizer("the river", add_special_tokens=False)["input_ids"]
    followed = follow(tokenizer, rule)
    assert added_bos(followed) == (BOS if wanted(rule, adds) else None)
    assert followed("the river")["input_ids"] == [BOS] * wanted(rule, adds) + bare
    assert followed("the river", add_special_tokens=False)["input_ids"] == bare


def test_always_needs_a_bos_token(tmp_path: Path) -> None:
    tokenizer = fresh(tmp_path, adds=False)
    tokenizer.bos_token = None
    for rule in ("auto", "never"):
        assert added_bos(follow(tokenizer, rule)) is None
    with pytest.raises(DataError, match=r"calibrate\.bos: always, but the tokenizer has no BOS token; set"):
        follow(tokenizer, "always")


def test_a_tokenizer_that_cannot_be_told_is_an_error() -> None:
    """One of transformers' own in plain Python, which ends a text and begins it in no way."""
    tokenizer = ByT5Tokenizer(bos_token="<s>")
    assert added_bos(tokenizer) is None
    with pytest.raises(
        DataError, match=r"calibrate\.bos: always, but a ByT5Tokenizer begins every text in its own way"
    ):
        follow(tokenizer, "always")


@pytest.mark.parametrize("rule", RULES)
def test_the_prompt_of_the_sample_follows(rule: Any, tmp_path: Path) -> None:
    fresh(tmp_path, adds=True)
    (tmp_path / "model.safetensors").write_bytes(b"")  # a model folder, of which only the tokenizer is read
    (tmp_path / "config.json").write_text("{}")
    model, seen = tiny.model("llama"), list[list[int]]()
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].tolist()))
    (tmp_path / "out").mkdir()
    write_generation(lambda: Subject(model), tmp_path, rule, "the river crosses", 3, tmp_path / "out")
    prompt = tiny.tokenizer()("the river crosses")["input_ids"]
    assert seen[0] == [BOS] * wanted(rule, adds=True) + prompt
    written = json.loads((tmp_path / "out" / "value.json").read_text())
    assert written.startswith("the river crosses")


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_questions_of_the_harness_follow(rule: Any, adds: bool, tmp_path: Path) -> None:
    tasks = load_tasks({"arc_easy": str(save_jsonl(tmp_path / "questions.jsonl"))})
    model, seen = tiny.model("llama"), list[list[int]]()
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].tolist()))
    run_tasks(model, follow(fresh(tmp_path, adds=adds), rule), tasks)
    assert seen and {row[0] == BOS for row in seen} == {wanted(rule, adds)}
    assert all(BOS not in row[1:] for row in seen)


def test_windows_of_a_file_follow(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(tiny.corpus(3)))
    bare = tiny.tokenizer()(file.read_text(), add_special_tokens=False)["input_ids"]
    tokenizer = fresh(tmp_path, adds=True)
    windows = file_windows(file, tokenizer, 16, 4)
    assert windows.shape == (4, 16) and (windows[:, 0] == BOS).all()
    assert windows[:, 1:].reshape(-1).tolist() == bare[: 4 * 15]
    assert torch.equal(file_windows(file, follow(tokenizer, "never"), 16, 4).reshape(-1), torch.tensor(bare[: 4 * 16]))
    with pytest.raises(DataError, match=f"{len(bare):,} tokens make {len(bare) // 15} windows of 16"):
        file_windows(file, fresh(tmp_path, adds=True), 16, len(bare) // 15 + 1)
