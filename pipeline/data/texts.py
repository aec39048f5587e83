"""Text -> tokens -> windows, and the window files of artifacts/calibrate.

The documents of a text stand one behind the other in one stream of tokens, which is cut into windows of one length:
there is no padding, so none is ever scored, and a window may hold the end of one document and the beginning of another.
Where windows begin with a BOS token, the text fills their other ``seq_len`` - 1 places.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectrim.errors import DataError, StorageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CHUNK, MARGIN = 1 << 19, 1 << 12  # characters
NONE: Mapping[str, int] = {}


def tokenise(tokenizer: "PreTrainedTokenizerBase", text: str, chunk: int = CHUNK, margin: int = MARGIN) -> np.ndarray:
    """ids = tokenizer(text, add_special_tokens=False), (tokens,) int32; the memory of encoding does not grow.

    The text is encoded in chunks of ``chunk`` characters plus ``margin`` on both sides. Two neighbours must agree on
    every token within half a margin of their seam; where they do not, the text is encoded in one piece after all.
    """
    if len(text) <= chunk or not tokenizer.is_fast:
        return _encode(tokenizer, text)[0]
    parts: list[np.ndarray] = []
    before: np.ndarray | None = None
    for start in range(0, len(text), chunk):
        low, end = max(0, start - margin), start + chunk
        ids, begins = _encode(tokenizer, text[low : end + margin], offsets=True)
        begins += low
        tokens = np.stack([ids, begins])  # (2, tokens)
        after = tokens[:, abs(begins - start) < margin // 2]
        if before is not None and not np.array_equal(before, after):
            return _encode(tokenizer, text)[0]
        before = tokens[:, abs(begins - end) < margin // 2]
        parts.append(ids[(begins >= start) & (begins < end)])
    return np.concatenate(parts).astype(np.int32)


def draw_windows(
    tokens: Mapping[str, np.ndarray], seq_len: int, count: int, seed: int, part: str, bos: Mapping[str, int] = NONE
) -> tuple[np.ndarray, list[str]]:
    """``count`` random windows that do not overlap, (count, seq_len) int32, and the text that each comes from.

    Every text is cut into contiguous windows from a random first token; the draw is uniform over all of them.
    ``bos``: the token that every window of a text begins with, of the texts where there is one.

    Raises:
        DataError: too few tokens.
    """
    generator = np.random.default_rng([seed, *part.encode()])
    grids, names = [np.empty((0, seq_len), np.int32)], []
    for name, ids in sorted(tokens.items()):
        _, rest = divmod(len(ids), _n_text(seq_len, bos.get(name)))
        grids.append(_cut(ids[generator.integers(rest + 1) :], seq_len, bos.get(name)))
        names += [name] * len(grids[-1])
    _enough(tokens, len(names), seq_len, count, part, bos)
    chosen = generator.permutation(len(names))[:count]
    return np.concatenate(grids)[chosen], [names[i] for i in chosen]


def first_windows(name: str, ids: np.ndarray, seq_len: int, count: int, bos: int | None = None) -> np.ndarray:
    """The first ``count`` contiguous windows, (count, seq_len) int32, each behind ``bos`` where there is one.

    Raises:
        DataError: too few tokens.
    """
    windows = _cut(ids, seq_len, bos)
    _enough({name: ids}, len(windows), seq_len, count, "test", NONE if bos is None else {name: bos})
    return windows[:count]


def save_windows(path: Path, windows: np.ndarray, texts: Sequence[str]) -> dict[str, Any]:
    """Write one row per window, ``input_ids`` (seq_len,) int32 and ``text``; returns what load_windows will check."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, seq_len = windows.shape
    summary = {"n_windows": count, "seq_len": seq_len, "n_tokens": windows.size, "tokens_sha256": _sha256(windows)}
    ids = pa.FixedSizeListArray.from_arrays(pa.array(windows.reshape(-1), pa.int32()), seq_len)
    table = pa.table({"input_ids": ids, "text": pa.array(texts, pa.string())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"tokens_sha256": summary["tokens_sha256"]}), path)
    return {**summary, "texts": {name: texts.count(name) for name in sorted(set(texts))}}


def load_windows(path: Path) -> "torch.Tensor":
    """The windows in ``path``, (n_windows, seq_len) int64, checked against the sha256 of their tokens.

    Raises:
        StorageError: missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    try:
        table = pq.read_table(path)
        column = table["input_ids"].combine_chunks()
        windows = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
        required = (table.schema.metadata or {})[b"tokens_sha256"].decode()
    except FileNotFoundError:
        raise StorageError(f"{path}: not found; run `dvc repro calibrate`") from None
    except (OSError, KeyError, AttributeError, pa.ArrowInvalid) as error:
        raise StorageError(f"{path}: not a file of windows ({error}); run `dvc repro --force calibrate`") from error
    if (found := _sha256(windows)) != required:
        raise StorageError(
            f"{path}: tokens have sha256 {found}, required {required}; run `dvc repro --force calibrate`"
        )
    return torch.from_numpy(windows.astype(np.int64))


def _sha256(windows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(windows, "<i4").tobytes()).hexdigest()


def _n_text(seq_len: int, bos: int | None) -> int:
    """Tokens of the text in a window."""
    return seq_len - (bos is not None)


def _cut(ids: np.ndarray, seq_len: int, bos: int | None) -> np.ndarray:
    """Contiguous windows from the first token on, (windows, seq_len) int32; the rest of the tokens is left."""
    n_text = _n_text(seq_len, bos)
    windows = ids[: len(ids) // n_text * n_text].reshape(-1, n_text)
    return windows if bos is None else np.insert(windows, 0, bos, axis=1)


def _enough(
    tokens: Mapping[str, np.ndarray], found: int, seq_len: int, count: int, part: str, bos: Mapping[str, int]
) -> None:
    if found < count:
        total, n_text = sum(map(len, tokens.values())), seq_len - all(name in bos for name in tokens)
        raise DataError(
            f"data.{', data.'.join(sorted(tokens))}: the {part} split has {total:,} tokens ({found} windows of "
            f"{seq_len:,}), calibrate.{part}_windows = {count} needs {count * n_text:,}; "
            f"lower calibrate.{part}_windows or calibrate.seq_len, or give more text"
        )


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, *, offsets: bool = False) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )
    begins = [begin for begin, _ in encoded["offset_mapping"]] if offsets else []
    return np.array(encoded["input_ids"], np.int32), np.array(begins, np.int64)
