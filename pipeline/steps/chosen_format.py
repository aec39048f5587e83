"""What a matrix of ranks.json is stored in: `remap` packs it so, the report counts it so."""

from collections.abc import Mapping
from typing import Any

from spectrim.maths.budget import Format, matrix_bytes, resolve_format


def stored_format(entry: Mapping[str, Any], format: Format | None) -> Format:
    """What a matrix of ranks.json is stored in: as chosen, or in ``format`` where its factors cost less than dense."""
    if format is None or entry["format"] == "dense":
        chosen: Format = entry["format"]
        return chosen
    return resolve_format(format, entry["out_features"], entry["in_features"], entry["rank"])


def stored_size(entry: Mapping[str, Any], format: Format) -> int:
    """Bytes of a matrix of ranks.json in ``format``: those it was chosen with, where that is its own."""
    if format == entry["format"]:
        chosen: int = entry["bytes"]
        return chosen
    return matrix_bytes(format, entry["out_features"], entry["in_features"], entry["rank"])
