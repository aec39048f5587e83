"""Ranks from a file, for `train_ranks.method: file`.

    ranks.json    of artifacts/train_ranks: {"matrices": {LINEAR: {"rank", "out_features", "in_features", …}}, …}
    Dobi-SVD      as its authors publish them: {LINEAR: position, …}, the truncation of the activation of a window of
                  2,048 tokens, so that the weight's rank is position · min(out, in) / 2048; the keys of NOTES are no
                  linears

A file speaks of one model: every linear to compress must stand in it, and nothing else.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.runtime.artifacts import sha256_file
from spectrim.errors import ConfigError
from spectrim.maths.budget import Format, Shape, dense_bytes, resolve_format, stored_bytes

DOBI_TOKENS = 2048
NOTES = {"ppl", "compression_ratio", "lr", "PPL_ORIG"}
SHOWN = 5  # names per kind of problem


@dataclass(frozen=True)
class RankFile:
    """``ranks``: linear -> rank, fractional where it was learned, in the model's order; ``layout`` of the file."""

    path: str
    sha256: str
    layout: Literal["ranks.json", "Dobi-SVD"]
    ranks: dict[str, float]


def read_rank_file(path: str, sha256: str | None, shapes: Mapping[str, Shape]) -> RankFile:
    """The ranks in the file ``path`` for linears of these (out, in) ``shapes``.

    Raises:
        ConfigError: the file is missing, has another sha256 than the one required, is neither layout, or does not fit
            the model: every problem at once.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError([f"params.yaml: train_ranks.file: {path} is not there; give a ranks.json or a Dobi-SVD file"])
    found = sha256_file(file)
    if sha256 is not None and found != sha256:
        raise ConfigError(
            [f"params.yaml: train_ranks.file_sha256: {path} has {found}, required is {sha256}; correct it, or set null"]
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not JSON ({error}); give a ranks.json or a Dobi-SVD file"]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: a {type(content).__name__}; it must map linears to ranks"])
    ours = isinstance(content.get("matrices"), dict)
    entries = content["matrices"] if ours else {name: value for name, value in content.items() if name not in NOTES}
    problems = list(_name_problems(entries, shapes))
    ranks = {}
    faults: dict[str, list[str]] = {}
    for name in [name for name in shapes if name in entries]:
        rank, fault = _own_rank(entries[name], shapes[name]) if ours else _dobi_rank(entries[name], shapes[name])
        if fault is None:
            ranks[name] = rank
        else:
            faults.setdefault(fault, []).append(f"{name}: {_short(entries[name])}")
    problems += [f"{fault}: {_some(names)}" for fault, names in faults.items()]
    if problems:
        raise ConfigError(f"{path}: {problem}" for problem in problems)
    return RankFile(path, found, "ranks.json" if ours else "Dobi-SVD", ranks)


def compared(read: RankFile, kept: Mapping[str, int], shapes: Mapping[str, Shape], format: Format) -> dict[str, Any]:
    """What the file's ranks, rounded, would cost in ``format``, and how far the ``kept`` ones are from them.

    ``ratio`` is their bytes / 16-bit bytes; a matrix whose factors would cost as much as its weight counts as dense, at
    full rank. ``largest_change`` is that of the matrix whose rank moved most.
    """
    rounded = {name: min(max(round(rank), 1), min(shapes[name])) for name, rank in read.ranks.items()}
    dense = {name for name, rank in rounded.items() if resolve_format(format, *shapes[name], rank) == "dense"}
    asked = {name: min(shapes[name]) if name in dense else rank for name, rank in rounded.items()}
    n_bytes = sum(stored_bytes(format, *shapes[name], rank) for name, rank in rounded.items())
    moved = max(asked, key=lambda name: abs(kept[name] - asked[name]))
    return {
        "path": read.path,
        "sha256": read.sha256,
        "layout": read.layout,
        "bytes": n_bytes,
        "ratio": n_bytes / sum(dense_bytes(*shape) for shape in shapes.values()),
        "largest_change": {"name": moved, "from": asked[moved], "to": kept[moved]},
    }


def _name_problems(entries: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Iterator[str]:
    unknown = [name for name in entries if name not in shapes]
    missing = [name for name in shapes if name not in entries]
    if unknown:
        yield f"{len(unknown)} names that are no linear to compress (see compression.exclude): {_some(unknown)}"
    if missing:
        yield f"{len(missing)} linears of the model without a rank: {_some(missing)}"


def _own_rank(entry: Any, shape: Shape) -> tuple[float, str | None]:
    full = min(shape)
    if not isinstance(entry, dict) or not {"rank", "out_features", "in_features"} <= entry.keys():
        return 0, "an entry needs rank, out_features and in_features"
    if (entry["out_features"], entry["in_features"]) != shape:
        return 0, f"the model's shape is {shape[0]} × {shape[1]}"
    rank = entry["rank"]
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= full:
        return 0, f"a rank must be an integer in [1, {full}]"
    return rank, None


def _dobi_rank(position: Any, shape: Shape) -> tuple[float, str | None]:
    if not isinstance(position, int | float) or isinstance(position, bool) or not math.isfinite(position):
        return 0, "a position must be a number"
    if not 0 < position <= DOBI_TOKENS:
        return 0, f"a position must lie in (0, {DOBI_TOKENS}]"
    return position * min(shape) / DOBI_TOKENS, None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _short(entry: Any) -> str:
    if isinstance(entry, dict) and {"rank", "out_features", "in_features"} <= entry.keys():
        return f"{entry['out_features']} × {entry['in_features']}, rank {entry['rank']!r}"
    return repr(entry)[:40]
