"""ranks.json and the storage format -> one RankedMatrix per compressible linear, in the order a reader expects them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.steps.chosen_format import stored_format, stored_size
from spectrim.errors import DataError
from spectrim.maths.budget import CODED, FACTORED, RESIDUAL, ROUNDED, Format, dense_bytes

_PATH = re.compile(r"^.*?\.(?P<layer>\d+)\.(?P<kind>.+)$")
_READING_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class RankedMatrix:
    """One compressible linear: its layer and type, its shape, the rank that was chosen, the format it is stored in."""

    name: str
    layer: int
    kind: str
    out_features: int
    in_features: int
    rank: int
    format: Format
    bytes: int
    """Of the weight as stored, scales included."""

    @property
    def is_dense(self) -> bool:
        return self.format == "dense"

    @property
    def is_factored(self) -> bool:
        """Whether two factors of its rank are all that is stored."""
        return self.format in FACTORED

    @property
    def label(self) -> str:
        """The rank; i4, i8 for rounded weights, with + where factors correct them; c for coded; nothing for dense."""
        if self.is_factored:
            return str(self.rank)
        if self.format in CODED:
            return "c"
        return f"i{ROUNDED[self.format].n_bits}{'+' * (self.format in RESIDUAL)}" if self.format in ROUNDED else ""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same weight in 16 bit."""
        return dense_bytes(self.out_features, self.in_features)

    @property
    def share(self) -> float:
        """bytes / dense_bytes, in (0, 1]."""
        return self.bytes / self.dense_bytes


def read_matrices(ranks: Mapping[str, Any], format: Format | None) -> list[RankedMatrix]:
    """Every matrix of ranks.json as ``stored_format`` says, by type in reading order, then by layer.

    Raises:
        DataError: a name without a layer number.
    """
    found = []
    for name, entry in ranks["matrices"].items():
        match = _PATH.match(name)
        if match is None:
            raise DataError(
                f"artifacts/train_ranks/ranks.json: '{name}' has no layer number; every matrix must be "
                "named PREFIX.LAYER.TYPE; run: dvc repro -f train_ranks"
            )
        shape = {key: entry[key] for key in ("out_features", "in_features", "rank")}
        place = {"name": name, "layer": int(match["layer"]), "kind": match["kind"]}
        stored = stored_format(entry, format)
        found.append(RankedMatrix(**place, **shape, format=stored, bytes=stored_size(entry, stored)))
    return sorted(found, key=lambda matrix: (_place(matrix.kind), matrix.kind, matrix.layer))


def by_kind(found: Sequence[RankedMatrix]) -> dict[str, list[RankedMatrix]]:
    """Matrices grouped by type, under the shortest name that stays unique: q_proj, not self_attn.q_proj."""
    kinds = list(dict.fromkeys(matrix.kind for matrix in found))
    shorts = [kind.rsplit(".", 1)[-1] for kind in kinds]
    labels = {kind: short if shorts.count(short) == 1 else kind for kind, short in zip(kinds, shorts, strict=True)}
    return {labels[kind]: [matrix for matrix in found if matrix.kind == kind] for kind in kinds}


def _place(kind: str) -> int:
    short = kind.rsplit(".", 1)[-1]
    return _READING_ORDER.index(short) if short in _READING_ORDER else len(_READING_ORDER)
