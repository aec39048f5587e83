"""pipeline/data/conversations.py: rows of messages, and the tokens that a chat template makes of them."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.config.sections import Text
from pipeline.data.conversations import chat_tokens, document, require_template, written_bos
from pipeline.data.documents import documents, hub_documents, read
from spectrim.errors import DataError, SourceError
from tests import tiny

BOS, END = 0, 1
TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "the river?"}, {"role": "assistant", "content": "crosses the capital"}]
BAD = ["text", [], [{"role": "user"}], [{"role": "user", "content": 1}], [{"content": "x"}], ["x"], None, {"role": "x"}]


def templated(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def conversations(n: int) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": f"the river {i}?"}, {"role": "assistant", "content": tiny.document(i, 3)}]
        for i in range(n)
    ]


def as_documents(n: int) -> list[str]:
    return [json.dumps(messages) for messages in conversations(n)]


def test_tokens_are_those_of_the_template() -> None:
    tokenizer = templated(TURNS)
    expected = [
        token
        for messages in conversations(4)
        for message in messages
        for token in [*tokenizer(f"[{message['role']}] {message['content']}")["input_ids"], END]
    ]
    assert chat_tokens(tokenizer, as_documents(4), "talk", None).tolist() == expected


def test_a_bos_of_the_template_is_taken_off_and_no_other() -> None:
    bare = chat_tokens(templated(TURNS), as_documents(3), "talk", None).tolist()
    for template in ("{{ bos_token }}" + TURNS, "{% set x = bos_token %}{{ x }}" + TURNS):
        tokenizer = templated(template)
        assert written_bos(tokenizer, as_documents(1)[0], "talk") == BOS
        assert chat_tokens(tokenizer, as_documents(3), "talk", BOS).tolist() == bare
    assert written_bos(templated(TURNS), as_documents(1)[0], "talk") is None
    # of SmolLM2 and others: the BOS token is the mark of a message, and no text begins with it
    marked = templated(TURNS.replace("[", "<s>[", 1))
    assert written_bos(marked, as_documents(1)[0], "talk") is None
    kept = chat_tokens(marked, as_documents(3), "talk", None).tolist()
    assert kept[0] == BOS and kept.count(BOS) == 6


def test_the_day_that_a_template_writes_is_always_the_same() -> None:
    tokenizer = templated("{{ strftime_now('%d %b %Y') }}\n" + TURNS)
    written = tokenizer.decode(chat_tokens(tokenizer, as_documents(1), "talk", None))
    assert written.startswith("26 Jul 2024\n[user] the river 0?")
    # negative control: transformers itself writes today's
    assert not tokenizer.apply_chat_template(MESSAGES, tokenize=False).startswith("26 Jul 2024")


def test_what_is_no_conversation() -> None:
    assert json.loads(str(document(MESSAGES, "chat"))) == MESSAGES
    assert [document(value, "chat") for value in BAD] == [None] * len(BAD)
    assert document("text", "none") == "text"
    assert document(MESSAGES, "none") is None


def test_a_tokenizer_without_a_template_is_an_error_that_names_the_texts() -> None:
    require_template(templated(None), [])
    require_template(templated(TURNS), ["talk"])
    with pytest.raises(DataError, match=r"^data\.a\.template, data\.b\.template: chat, but .* has no chat template"):
        require_template(templated(None), ["a", "b"])


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    tokenizer = templated("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"data\.talk: .*\(roles must alternate\).* of user, assistant, .*the river 0"):
        chat_tokens(tokenizer, as_documents(1), "talk", None)
    with pytest.raises(DataError, match=r"data\.talk: the chat template refuses"):
        written_bos(tokenizer, as_documents(1)[0], "talk")


def test_rows_of_messages(tmp_path: Path) -> None:
    rows = [[*messages, {"role": "user", "content": "é\n\n"}] for messages in conversations(3)]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps({"messages": row, "text": "x"}) + "\n" for row in rows))
    pq.write_table(pa.table({"messages": rows, "text": ["x"] * 3}), table)
    for file in (lines, table):
        assert [json.loads(found) for found in documents(file, "messages", "chat", whole=False)] == rows
        for column, template in (("text", "chat"), ("messages", "none"), ("missing", "chat")):
            with pytest.raises(SourceError, match=rf"{column!r}.* set the text's column or template"):
                documents(file, column, template, whole=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", BAD, ids=json.dumps)
def test_a_row_that_is_no_conversation_is_named(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES}) + "\n" + json.dumps({"messages": value}) + "\n")
    message = rf"^data\.talk: {file}: line 2 has no list of \{{role, content\}} messages 'messages', found "
    with pytest.raises(SourceError, match=message):
        read("talk", Text(str(file), None, "messages", "chat", {"test": 1.0}))


def test_rows_of_a_hub_data_set() -> None:
    talk = Text("hf:org/name@v1/test", None, "messages", "chat", {"test": 1.0})
    assert [json.loads(found) for found in hub_documents([MESSAGES] * 2, talk, "data.talk")] == [MESSAGES] * 2
    wanted = (
        "data.talk.column: row 2 of hf:org/name@v1/test holds a str, a list of {role, content} messages is required"
    )
    with pytest.raises(SourceError, match=re.escape(wanted)):
        list(hub_documents([MESSAGES, "text"], talk, "data.talk"))
    plain = Text("hf:org/name@v1/test", None, "text", "none", {"test": 1.0})
    assert list(hub_documents(["one", "two"], plain, "data.a")) == ["one", "two"]
    with pytest.raises(
        SourceError, match=r"data\.a\.column: row 1 .* holds a list of \{'content': 'str', 'role': 'str'\}"
    ):
        list(hub_documents([MESSAGES], plain, "data.a"))


def test_a_file_without_rows_holds_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(SourceError, match=r"a\.txt: template chat, but a \.txt file holds no conversations"):
        documents(tmp_path / "a.txt", "text", "chat", whole=True)
