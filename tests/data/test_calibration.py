"""pipeline/data/calibration.py: what windows begin with, and windows of conversations, on tiny models' tokenizers."""

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

BOS, END, SEQ = 0, 1, 32
PARTS = ("calibration", "refinement", "validation", "test/a", "test/b")
SPLITS = {"calibration": 0.5, "validation": 0.25, "test": 0.25}
TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def texts_of(tmp_path: Path) -> dict[str, Text]:
    """Two texts of plain strings."""
    file = tiny.save_corpus(tmp_path / "corpus.jsonl")
    return {name: Text(str(file), None, "text", "none", SPLITS) for name in ("a", "b")}


@pytest.fixture
def talk(tmp_path: Path) -> Text:
    file = tmp_path / "talk.jsonl"
    rows = [
        [{"role": "user", "content": f"the river {i}?"}, {"role": "assistant", "content": tiny.document(i)}]
        for i in range(24)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return Text(str(file), None, "messages", "chat", SPLITS)


def prepared(folder: Path, *, adds: bool = False, template: str | None = None) -> Path:
    """A tiny model whose tokenizer puts a BOS before a text, or does not."""
    tiny.save_model("llama", folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def written(model: Path, data: dict[str, Text], bos: Any, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Part -> its windows, and calibrate.json."""
    write_windows(model, data, Calibrate(SEQ, bos, 12, 5, 3, 4), 0, {}, out)
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


@pytest.mark.parametrize(
    ("template", "adds", "rule", "begun"),
    [
        (TURNS, False, "auto", False),
        ("{{ bos_token }}" + TURNS, False, "auto", True),
        ("{{ bos_token }}" + TURNS, True, "auto", True),
        ("<s>" + TURNS, True, "auto", True),
        (TURNS, True, "auto", True),
        ("{{ bos_token }}" + TURNS, False, "always", True),
        ("{{ bos_token }}" + TURNS, True, "never", False),
    ],
)
def test_windows_of_conversations_have_one_bos_or_none(
    template: str, adds: bool, rule: str, begun: bool, talk: Text, texts_of: dict[str, Text], tmp_path: Path
) -> None:
    """Beside a text of plain strings, which follows the tokenizer alone."""
    folder = prepared(tmp_path / "model", adds=adds, template=template)
    windows, summary = written(folder, {"a": talk, "b": texts_of["b"]}, rule, tmp_path / "out")
    plain = {"auto": adds, "always": True, "never": False}[rule]
    assert summary["bos"] == {name: "<s>" for name, has in (("a", begun), ("b", plain)) if has}
    for part, has in (("test/a", begun), ("test/b", plain)):
        assert (windows[part][:, 0] == BOS).all() == has and (windows[part][:, 1:] == BOS).sum() == 0
    tokenizer = tiny.tokenizer()
    stream = [
        token
        for conversation in split(read("a", talk), SPLITS, "a")["test"]
        for message in json.loads(conversation)
        for token in [*tokenizer(f"[{message['role']}] {message['content']}")["input_ids"], END]
    ]
    assert windows["test/a"][:, int(begun) :].reshape(-1).tolist() == stream[: 4 * (SEQ - begun)]


def test_conversations_need_a_template(talk: Text, texts_of: dict[str, Text], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.talk\.template: chat, but .* no chat template"):
        written(prepared(tmp_path / "model"), {**texts_of, "talk": talk}, "auto", tmp_path / "out")
