"""pipeline/data/documents.py and pipeline/data/texts.py: documents, splits, tokens, windows."""

import bz2
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.config.sections import Text
from pipeline.data import texts
from pipeline.data.documents import documents, plain_text, read, split
from spectrim.errors import ConfigError, DataError, SourceError, StorageError
from tests import tiny

WIKITEXT = " \n = First = \n \n Some words . \n \n = = Part = = \n \n More . \n \n = Second = \n \n Others = many . \n"
THREE = {"calibration": 0.6, "validation": 0.2, "test": 0.2}


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece's way: spaces as part of the next word, and one put before the text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace()
    bpe.train_from_iterator(
        tiny.corpus(), trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


def once(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_plain_file_whole_is_verbatim(tmp_path: Path) -> None:
    file = tmp_path / "a.raw"
    content = " \r\n = Title = \n\n\ntext é\n"
    file.write_bytes(content.encode())
    assert documents(file, "text", whole=True) == [content]


def test_plain_file_is_divided_at_titles_or_blank_lines(tmp_path: Path) -> None:
    titled, plain = tmp_path / "a.raw", tmp_path / "b.txt.bz2"
    titled.write_text(WIKITEXT)
    plain.write_bytes(bz2.compress(b"one\ntwo\n\nthree\n \n\nfour\n"))
    parts = documents(titled, "text", whole=False)
    assert "".join(parts) == WIKITEXT
    assert [part.split("\n")[0] for part in parts[1:]] == [" = First = ", " = Second = "]
    assert [part.strip() for part in documents(plain, "text", whole=False)] == ["one\ntwo", "three", "four"]


def test_rows(tmp_path: Path) -> None:
    rows = ["first\n\nstill first", "", "third é"]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps({"body": row, "n": 1}) + "\n" for row in rows))
    pq.write_table(pa.table({"body": rows, "n": [1, 2, 3]}), table)
    for file in (lines, table):
        for whole in (False, True):
            assert documents(file, "body", whole=whole) == rows
        with pytest.raises(SourceError, match="body"):
            documents(file, "text", whole=False)
        with pytest.raises(SourceError, match="'n'"):
            documents(file, "n", whole=False)


def test_lines_of_a_corpus(tmp_path: Path) -> None:
    file = tmp_path / "news.cor"
    file.write_text("one \u2028 still one\n\ntwo\n")
    for whole in (False, True):
        assert documents(file, "text", whole=whole) == ["one \u2028 still one", "", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 has no string"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.txt.bz2", bz2.compress(b"abc" * 100)[:-9], "not a readable"),
        ("a.txt.bz2", b"no archive", "not a readable"),
        ("a.parquet", b"PAR1 no", "not a readable"),
        ("a.xml", b"<mediawiki><page>", "not a readable"),
        ("a.pdf", b"", "not a text Spectrim reads"),
    ],
)
def test_unreadable_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        documents(tmp_path / name, "text", whole=True)


def test_mediawiki_articles(tmp_path: Path) -> None:
    def page(title: str, namespace: int, text: str, redirect: str = "") -> str:
        return (
            f"<page><title>{title}</title><ns>{namespace}</ns>{redirect}<revision><text>{text}</text></revision></page>"
        )

    pages = (
        page("One", 0, "'''One''' is [[Number|a number]].")
        + page("Uno", 0, "#REDIRECT [[One]]", '<redirect title="One" />')
        + page("Talk", 1, "chatter")
        + page("Two", 0, "Two &amp; more.")
    )
    file = tmp_path / "wiki-articles1.xml-p1p2.bz2"
    file.write_bytes(
        bz2.compress(f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{pages}</mediawiki>'.encode())
    )
    assert documents(file, "text", whole=False) == ["One\n\nOne is a number.", "Two\n\nTwo & more."]


def test_markup_removal() -> None:
    markup = (
        "{{Infobox|a=[[b]]}}The '''river'''<ref name=x>{{cite|t}}</ref> runs [[north|up]] &ndash; see [http://a.b c d]."
        '<!-- hidden -->\n\n== Course ==\n* [[Lake]]\n{| class="wikitable"\n|-\n| cell\n|}\n[[Category:Rivers]]'
    )
    expected = "River The river runs up – see c d. Course Lake cell Category:Rivers"
    assert " ".join(plain_text("River", markup).split()) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=3), min_size=1, max_size=40), st.sampled_from([{"test": 0.5}, THREE]))
def test_split_is_disjoint_and_keeps_order(rows: list[str], shares: dict[str, float]) -> None:
    different = {row for row in rows if row.strip()}
    try:
        parts = split(rows, shares, "a")
    except DataError as error:
        assert len(different) < 5 and f"{len(different)} different documents" in str(error)
        return
    assert list(parts) == list(shares)
    seen: set[str] = set()
    for part, chosen in parts.items():
        assert not seen & set(chosen)
        seen |= set(chosen)
        assert abs(len(set(chosen)) - shares[part] * len(different)) <= 1
        assert chosen == [row for row in rows if row in set(chosen)]
    assert parts == split(rows, dict(reversed(shares.items())), "a")


def test_split_of_one_takes_everything_verbatim() -> None:
    rows = ["b", "", "a", "b"]
    assert split(rows, {"test": 1.0}, "a") == {"test": rows}


def test_read_divides_only_what_is_shared(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\n")
    assert read("a", Text(str(file), None, "text", "none", {"test": 1.0})) == ["one\n\ntwo\n"]
    assert len(read("a", Text(str(file), None, "text", "none", {"test": 0.5}))) == 2
    for name in ("../a", ".a", "a/b", ""):
        with pytest.raises(ConfigError, match="names a file"):
            read(name, Text(str(file), None, "text", "none", {"test": 1.0}))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_tokenise_equals_tokenising_once(data: st.DataObject) -> None:
    words = st.sampled_from(
        ["river", "the", " ", "  ", "\n", "\n\n", "é", "漢字", "🙂", "1873", "don't", "</s>", "\t", "."]
    )
    text = " ".join(data.draw(st.lists(words, min_size=1, max_size=400)))
    chunk, margin = data.draw(st.integers(40, 300)), data.draw(st.sampled_from([16, 40]))
    for tokenizer in (tiny.tokenizer(), METASPACE):
        ids = texts.tokenise(tokenizer, text, chunk, margin)
        assert ids.dtype == np.int32
        assert ids.tolist() == once(tokenizer, text)


def test_tokenise_in_chunks_is_used_and_naive_chunks_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(tiny.corpus())
    lengths: list[int] = []
    encode = texts._encode

    def spy(tokenizer: Any, piece: str, **options: Any) -> Any:
        lengths.append(len(piece))
        return encode(tokenizer, piece, **options)

    monkeypatch.setattr(texts, "_encode", spy)
    assert texts.tokenise(tiny.tokenizer(), text, 1000, 100).tolist() == once(tiny.tokenizer(), text)
    assert max(lengths) <= 1200  # never the whole text
    naive = [
        token for start in range(0, len(text), 1000) for token in once(tiny.tokenizer(), text[start : start + 1000])
    ]
    assert naive != once(tiny.tokenizer(), text)


def test_tokenise_falls_back_where_neighbours_disagree() -> None:
    bpe = Tokenizer(models.BPE(vocab={"a": 0, "aa": 1}, merges=[("a", "a")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    text = "a" * 501  # pairs are counted from the first character: a seam at an odd place differs
    assert texts.tokenise(tokenizer, text, 101, 30).tolist() == once(tokenizer, text)


def test_drawn_windows() -> None:
    tokens = {"b": np.arange(1000, 1107, dtype=np.int32), "a": np.arange(0, 55, dtype=np.int32)}
    windows, names = texts.draw_windows(tokens, 10, 15, 3, "calibration")
    assert windows.shape == (15, 10) and windows.dtype == np.int32
    assert (np.diff(windows, axis=1) == 1).all()  # contiguous
    assert len(np.unique(windows)) == windows.size  # not overlapping
    assert names == ["b" if window[0] >= 1000 else "a" for window in windows]
    again = texts.draw_windows(dict(reversed(tokens.items())), 10, 15, 3, "calibration")
    assert np.array_equal(again[0], windows)
    for seed, part in ((4, "calibration"), (3, "validation")):
        assert not np.array_equal(texts.draw_windows(tokens, 10, 15, seed, part)[0], windows)


def test_windows_behind_bos() -> None:
    """The text fills the other places: no token of it is lost between two windows, and none is in two."""
    tokens = {"b": np.arange(1000, 1107, dtype=np.int32), "a": np.arange(100, 155, dtype=np.int32)}
    windows, names = texts.draw_windows(tokens, 10, 16, 3, "calibration", {"b": 7})
    assert windows.shape == (16, 10) and windows.dtype == np.int32 and sorted(set(names)) == ["a", "b"]
    begun = np.array(names) == "b"
    assert (windows[begun, 0] == 7).all() and (windows[~begun, 0] >= 100).all()
    text = np.sort(windows[begun][:, 1:].reshape(-1))
    assert text.size == 11 * 9 and (np.diff(text) == 1).all() and text[0] >= 1000
    first = texts.first_windows("b", tokens["b"], 10, 11, 7)
    assert (first[:, 0] == 7).all() and first[:, 1:].reshape(-1).tolist() == list(range(1000, 1099))
    with pytest.raises(DataError, match=r"107 tokens \(11 windows of 10\), calibrate.test_windows = 12 needs 108"):
        texts.first_windows("b", tokens["b"], 10, 12, 7)


def test_too_short() -> None:
    tokens = {"a": np.zeros(55, np.int32)}
    with pytest.raises(DataError) as caught:
        texts.draw_windows(tokens, 10, 6, 0, "validation")
    assert all(
        part in str(caught.value) for part in ("data.a", "validation split", "55 tokens", "validation_windows", "60")
    )
    with pytest.raises(DataError, match=r"data\.a: the test split has 55 tokens .* needs 60"):
        texts.first_windows("a", tokens["a"], 10, 6)
    assert texts.first_windows("a", np.arange(55, dtype=np.int32), 10, 5).reshape(-1).tolist() == list(range(50))


def test_window_files(tmp_path: Path) -> None:
    windows = np.arange(60, dtype=np.int32).reshape(6, 10)
    file = tmp_path / "test" / "a.parquet"
    summary = texts.save_windows(file, windows, ["b", "a", "a", "b", "b", "b"])
    assert summary["texts"] == {"a": 2, "b": 4}
    assert (summary["n_windows"], summary["seq_len"], summary["n_tokens"]) == (6, 10, 60)
    loaded = texts.load_windows(file)
    assert loaded.dtype == torch.int64 and torch.equal(loaded, torch.arange(60).reshape(6, 10))
    first = file.read_bytes()
    texts.save_windows(file, windows, ["b", "a", "a", "b", "b", "b"])
    assert file.read_bytes() == first


def test_damaged_window_files(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    with pytest.raises(StorageError, match="not found"):
        texts.load_windows(file)
    windows = np.arange(60, dtype=np.int32).reshape(6, 10)
    texts.save_windows(file, windows, ["a"] * 6)
    table = pq.read_table(file)
    other = pa.FixedSizeListArray.from_arrays(pa.array(windows.reshape(-1)[::-1]), 10)
    pq.write_table(table.set_column(0, "input_ids", other), file)
    with pytest.raises(StorageError, match="tokens have sha256"):
        texts.load_windows(file)
    pq.write_table(pa.table({"input_ids": [1, 2]}), file)
    with pytest.raises(StorageError, match="not a file of windows"):
        texts.load_windows(file)
    file.write_bytes(b"nothing")
    with pytest.raises(StorageError, match="not a file of windows"):
        texts.load_windows(file)


METASPACE = metaspace_tokenizer()
