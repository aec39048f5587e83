"""params.yaml -> one frozen dataclass per section, every problem of the whole file reported at once.

    python -m pipeline.config.params       # checks the file and does nothing else

The whole file is checked by every stage, so that a misspelt key of the last stage is found before the first one runs.
DVC tracks the values; this file only reads them, so it is in no stage's dependencies.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError, with_config
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.config.sections import (
    SPLITS,
    STRICT,
    Baseline,
    Calibrate,
    Capture,
    Compression,
    Evaluate,
    Model,
    Prepare,
    Remap,
    Report,
    Runtime,
    Speed,
    Text,
    TrainRanks,
    UpdateWeights,
)
from pipeline.config.values import FileName
from pipeline.runtime.console import run
from spectrim.compression.methods import RANK_METHODS, UPDATE_METHODS
from spectrim.errors import ConfigError
from spectrim.maths.budget import CODED

FILE = Path("params.yaml")
HAS_ROWS = re.compile(r"\.(jsonl(\.bz2)?|parquet)$")
AT_MOST = {
    "capture.damping": "capture.max_damping",
    "capture.gradient_windows": "calibrate.calibration_windows",
    "capture.gradient_seq_len": "calibrate.seq_len",
    "train_ranks.seq_len": "calibrate.seq_len",
    "update_weights.windows": "calibrate.calibration_windows",
    "update_weights.refinement.seq_len": "calibrate.seq_len",
}


@with_config(STRICT)
@dataclass(frozen=True)
class Params:
    """The whole of params.yaml."""

    model: Model
    data: dict[FileName, Text]
    compression: Compression
    runtime: Runtime
    prepare: Prepare
    calibrate: Calibrate
    capture: Capture
    train_ranks: TrainRanks
    update_weights: UpdateWeights
    remap: Remap
    baseline: Baseline
    evaluate: Evaluate
    speed: Speed
    report: Report


def main() -> None:
    """Check params.yaml: every problem at once, or nothing."""
    load()


@cache
def load(path: str | Path = FILE) -> Params:
    """Read and check ``path``; raises ConfigError with every problem, each naming file, section and key."""
    file = Path(path)
    raw = read_yaml(file)
    hints = get_type_hints(Params, include_extras=True)
    problems = [f"{name}: unknown section; remove it or correct its spelling" for name in raw if name not in hints]
    sections: dict[str, Any] = {}
    refused: set[str] = set()
    for name, kind in hints.items():
        if name not in raw:
            problems.append(f"{name}: missing; every section must be given")
            continue
        try:  # through JSON: pydantic's strict mode takes a mapping for a dataclass, and 1 for 1.0, only there
            sections[name] = TypeAdapter(kind).validate_json(json.dumps(raw[name], default=str), strict=True)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                where = ".".join(str(part) for part in (name, *item["loc"]) if part != "[key]")
                refused.add(where)
                problems.append(f"{where}: {_complaint(item)}")
    accepted = {
        key: value for key, value in leaves(raw) if not any(key == bad or key.startswith(f"{bad}.") for bad in refused)
    }
    problems += _contradictions(accepted, sections.get("data"))
    if problems:
        raise ConfigError(f"{file}: {problem}" for problem in problems)
    return Params(**sections)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file, read as DVC reads it: 1e-3 is a number, a key given twice an error.

    Raises:
        ConfigError: not there, not YAML, or not a mapping.
    """
    try:
        raw: Any = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{file}: not found; run from the project's folder"]) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError([f"{file}: must be a mapping of sections, found {type(raw).__name__}"])
    return raw


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of everything that is no mapping."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _contradictions(values: Mapping[str, Any], texts: Mapping[str, Text] | None) -> Iterator[str]:
    """What no key can say alone, judged by what is acceptable by itself: dotted key -> value, and the texts."""
    for key, limit in AT_MOST.items():
        if key in values and limit in values and values[key] > values[limit]:
            yield f"{key}: {values[key]} is more than {limit} = {values[limit]}"
    method = UPDATE_METHODS.get(str(values.get("update_weights.method")))
    metric = ("update_weights.anchor.alpha", "update_weights.shrinkage")
    for key in (*metric, *(key for key in values if key.startswith("update_weights.variants."))):
        if method is not None and not method.metric and values.get(key):
            yield (
                f"{key}: {values[key]} with method {values['update_weights.method']}, which has no use for the inputs' "
                "Gram; set it to 0.0, or leave the variant out"
            )
    if values.get("train_ranks.method") == "file" and values.get("train_ranks.file", "") is None:
        yield "train_ranks.file: null; method file needs the path of a ranks.json or of a rank file of Dobi-SVD"
    yield from _of_coded(values)
    if values.get("compression.alternatives"):
        for key, wanted in (("train_ranks.method", "fisher"), ("compression.tie", False), ("remap.format", "same")):
            if key in values and values[key] != wanted:
                yield (
                    f"{key}: {values[key]!r} with compression.alternatives, which need {wanted!r} there; set that, or "
                    "alternatives to []"
                )
    for name, text in (texts or {}).items():
        if text.template == "chat" and not text.source.startswith("hf:") and not HAS_ROWS.search(text.source):
            yield (
                f"data.{name}.template: chat, but {text.source} has no rows that hold conversations; give a hub data "
                "set, a .jsonl or a .parquet file, or set none"
            )
    for split in SPLITS:
        if texts is not None and not any(split in text.splits for text in texts.values()):
            yield f"data: no text has a {split} split; give one a share of its documents"


def _of_coded(values: Mapping[str, Any]) -> Iterator[str]:
    """Coded weights have a method of their own, and nothing beside them."""
    format, method = values.get("compression.format"), RANK_METHODS.get(str(values.get("train_ranks.method")))
    if format in CODED:
        wanted = {"compression.alternatives": [], "compression.tie": False, "remap.format": "same"}
        for key, value in wanted.items():
            if key in values and values[key] != value:
                yield f"{key}: {values[key]!r} with compression.format {format}, which needs {value!r} there"
    if method is not None and format is not None and method.coded != (format in CODED):
        coded = ", ".join(name for name, other in RANK_METHODS.items() if other.coded)
        yield (
            f"train_ranks.method: {values['train_ranks.method']} with compression.format {format}; {coded} is for "
            f"{', '.join(CODED)}, and no other method is"
        )


def _complaint(item: Any) -> str:
    match item["type"]:
        case "unexpected_keyword_argument":
            return "unknown key; remove it or correct its spelling"
        case "missing" | "missing_argument":
            return "missing; every key must be given"
        case "value_error":
            return str(item["ctx"]["error"])
    return f"{item['msg'][0].lower()}{item['msg'][1:]}, found {item.get('input')!r}"


if __name__ == "__main__":
    run(main)
