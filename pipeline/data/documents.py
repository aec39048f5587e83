"""Text sources -> documents -> splits.

A document is a row of a jsonl, parquet or hub data set, a line of a .cor file, an article of a MediaWiki dump, or a
part of a plain file: what stands under a WikiText title, or a paragraph where there are no titles. No document lies in
two splits. A row that holds a conversation is a document of JSON.
"""

import bz2
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.config.sections import SPLITS, Text
from pipeline.data.conversations import WANTED, Template, document
from pipeline.data.fetching import fetch, hub_rows
from spectrim.errors import ConfigError, DataError, SourceError

NAME = re.compile(r"\w[\w.-]*")
ROWS = (".jsonl", ".parquet")
KINDS = (".txt", ".raw", ".cor", *ROWS, ".xml")
TITLE = re.compile(r"^(?= ?= [^=\s](?:.*[^=\s])? = ?$)", re.MULTILINE)  # WikiText: " = Title = "
BLANK = re.compile(r"\n[ \t\r]*\n")


def read(name: str, text: Text, commit: str | None = None) -> list[str]:
    """The documents of the text ``name``; a plain file that goes whole into one split is one document, verbatim.

    A hub data set is read at ``commit``, where that is given.

    Raises:
        ConfigError: a name that cannot be that of a file.
        SourceError: unreachable, malformed, or another sha256.
        StorageError: no room or no right to keep it.
    """
    key = f"data.{name}"
    if not NAME.fullmatch(name):
        raise ConfigError([f"{key}: must be made of letters, digits, '_', '-' and '.', because it names a file"])
    if text.source.startswith("hf:"):
        return list(hub_documents(hub_rows(text.source, text.sha256, text.column, key, commit), text, key))
    path = fetch(text.source, text.sha256, key).path
    try:
        return documents(path, text.column, text.template, whole=list(text.splits.values()) == [1.0])
    except SourceError as error:
        raise SourceError(f"{key}: {error}") from error


def hub_documents(rows: Iterable[Any], text: Text, key: str) -> Iterator[str]:
    """The documents in the column of a hub data set. Raises SourceError: a row that holds none; names ``key``."""
    for number, row in enumerate(rows, start=1):
        found = document(row, text.template)
        if found is None:
            raise SourceError(
                f"{key}.column: row {number:,} of {text.source} holds a {_shape(row)}, a {WANTED[text.template]} is "
                f"required; set {key}.column or {key}.template"
            )
        yield found


def documents(path: Path, column: str, template: Template = "none", *, whole: bool) -> list[str]:
    """The documents of a .txt, .raw, .cor, .jsonl, .parquet or MediaWiki .xml file, each possibly .bz2.

    ``whole``: nothing will be divided, so that a plain file is one document, taken verbatim.
    ``column`` is that of the texts in jsonl and parquet; with ``template`` chat it holds conversations.

    Raises:
        SourceError: another kind of file, damaged, not UTF-8, or without that column of strings or conversations.
    """
    kind = _kind(path)
    if template == "chat" and kind not in ROWS:
        raise SourceError(
            f"{path}: template chat, but a {kind} file holds no conversations; give one of {', '.join(ROWS)} or a hub "
            "data set, or set the text's template to none"
        )
    try:
        if kind == ".parquet":
            return _parquet(path, column, template)
        with _open(path) as stream:
            if kind == ".xml":
                return list(_articles(stream))
            if kind == ".jsonl":
                return list(_jsonl(path, stream, column, template))
            text = stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 at byte {error.start:,}; convert it to UTF-8") from error
    except (OSError, EOFError, SyntaxError) as error:
        raise SourceError(f"{path}: not a readable {kind} file ({error}); get it again") from error
    if kind == ".cor":
        return text.removesuffix("\n").split("\n")
    if whole:
        return [text]
    return TITLE.split(text) if TITLE.search(text) else BLANK.split(text)


def split(texts: Sequence[str], shares: Mapping[Any, float], name: str) -> dict[str, list[str]]:
    """Each split's documents in their order; a share of 1 takes all of them, others leave out empty documents.

    Documents go to splits by the order of their sha256: the same for every seed, and equal documents stay together.

    Raises:
        DataError: fewer documents than a share needs.
    """
    if list(shares.values()) == [1.0]:
        return {part: list(texts) for part in shares}
    parts = [part for part in SPLITS if part in shares]
    by_hash = {text: hashlib.sha256(text.encode()).digest() for text in texts if text.strip()}
    order = sorted(by_hash, key=by_hash.__getitem__)
    ends = np.rint(np.cumsum([0.0, *(shares[part] for part in parts)]) * len(order)).astype(int)
    found: dict[str, list[str]] = {}
    for part, first, last in zip(parts, ends[:-1], ends[1:], strict=True):
        chosen = set(order[first:last])
        if not chosen:
            raise DataError(
                f"data.{name}: {len(order)} different documents are too few for a {part} share of {shares[part]}; "
                f"give a longer text, or a larger data.{name}.splits.{part}"
            )
        found[part] = [text for text in texts if text in chosen]
    return found


def plain_text(title: str, markup: str) -> str:
    """A MediaWiki page as text: its title, then what mwparserfromhell leaves of it."""
    import mwparserfromhell

    return f"{title}\n\n{str(mwparserfromhell.parse(markup).strip_code()).strip()}"


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".bz2")
    for kind in KINDS:
        # dumps carry a page range after their suffix: …-articles1.xml-p000000010p000030302.bz2
        if name.endswith(kind) or (kind == ".xml" and ".xml-p" in name):
            return kind
    raise SourceError(f"{path}: not a text Spectrim reads; give one of {', '.join(KINDS)} (.bz2 too, but for .parquet)")


def _open(path: Path) -> IO[bytes]:
    return bz2.open(path) if path.suffix == ".bz2" else path.open("rb")


def _parquet(path: Path, column: str, template: Template) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        values: list[Any] = (
            pq.read_table(path, columns=[column])[column].to_pylist() if column in schema.names else [None]
        )
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path}: not a readable .parquet file ({error}); get it again") from error
    rows = [row for value in values if (row := document(value, template)) is not None]
    if len(rows) < len(values):
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise SourceError(
            f"{path}: needs a {WANTED[template]} {column!r} in every row, found {found}; set the text's column or "
            "template"
        )
    return rows


def _jsonl(path: Path, stream: IO[bytes], column: str, template: Template) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}: line {number:,} is not JSON ({error})") from error
        found = document(row.get(column), template) if isinstance(row, dict) else None
        if found is None:
            raise SourceError(
                f"{path}: line {number:,} has no {WANTED[template]} {column!r}, found {_shape(row)}; set the text's "
                "column or template"
            )
        yield found


def _shape(value: Any) -> str:
    """What a value is, in a few words: the keys of a row, the kind of anything else."""
    if isinstance(value, dict):
        return str({key: type(item).__name__ for key, item in sorted(value.items())})
    if isinstance(value, list):
        return f"list of {', '.join(sorted({_shape(item) for item in value})) or 'nothing'}"
    return type(value).__name__


def _articles(stream: IO[bytes]) -> Iterator[str]:
    from xml.etree import ElementTree

    for _, page in ElementTree.iterparse(stream):
        if page.tag.rpartition("}")[2] != "page":
            continue
        if page.findtext("{*}ns", "0") == "0" and page.find("{*}redirect") is None:
            yield plain_text(page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", ""))
        page.clear()
