"""params.yaml -> one frozen dataclass per section, every problem of the whole file reported at once.

The whole file is checked by every stage, so that a misspelt key of the last stage is found before the first one runs.
DVC tracks the values; this file only reads them, so it is in no stage's dependencies.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError, with_config

from pipeline.sections import (
    SPLITS,
    STRICT,
    Baseline,
    Calibrate,
    Capture,
    Compression,
    Evaluate,
    FileName,
    Model,
    Prepare,
    Remap,
    Report,
    Runtime,
    Text,
    TrainRanks,
    UpdateWeights,
)
from spectrim.errors import ConfigError


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
    report: Report

    def problems(self) -> Iterator[str]:
        """Complaints that no single section can raise, as ``section.key: complaint``."""
        for split in SPLITS:
            if not any(split in text.splits for text in self.data.values()):
                yield f"data: no text has a {split} split; give one a share of its documents"
        if self.capture.gradient_windows > self.calibrate.calibration_windows:
            yield (
                f"capture.gradient_windows: {self.capture.gradient_windows} is more than "
                f"calibrate.calibration_windows = {self.calibrate.calibration_windows}"
            )
        lengths = {
            "capture.gradient_seq_len": self.capture.gradient_seq_len,
            "train_ranks.seq_len": self.train_ranks.seq_len,
            "update_weights.refinement.seq_len": self.update_weights.refinement.seq_len,
        }
        for key, length in lengths.items():
            if length > self.calibrate.seq_len:
                yield f"{key}: {length} is more than calibrate.seq_len = {self.calibrate.seq_len}"
        if self.update_weights.ipca_windows > self.calibrate.calibration_windows:
            yield (
                f"update_weights.ipca_windows: {self.update_weights.ipca_windows} is more than "
                f"calibrate.calibration_windows = {self.calibrate.calibration_windows}"
            )


@cache
def load(path: str | Path = "params.yaml") -> Params:
    """Read and check ``path``; raises ConfigError with every problem, each naming file, section and key."""
    file = Path(path)
    try:
        raw: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{file}: not found; run from the project's folder"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError([f"{file}: must be a mapping of sections, found {type(raw).__name__}"])
    hints = get_type_hints(Params, include_extras=True)
    problems = [f"{name}: unknown section; remove it or correct its spelling" for name in raw.keys() - hints.keys()]
    sections: dict[str, Any] = {}
    for name, kind in hints.items():
        if name not in raw:
            problems.append(f"{name}: missing; every section must be given")
            continue
        try:  # through JSON: pydantic's strict mode takes a mapping for a dataclass, and 1 for 1.0, only there
            sections[name] = TypeAdapter(kind).validate_json(json.dumps(raw[name], default=str), strict=True)
        except ValidationError as error:
            problems += [_describe(name, item) for item in error.errors(include_url=False)]
            continue
        parts = (
            {f"{name}.{key}": text for key, text in sections[name].items()}
            if name == "data"
            else {name: sections[name]}
        )
        for part, section in parts.items():
            problems += [f"{part}.{problem}" for problem in getattr(section, "problems", tuple)()]
    if not problems:
        params = Params(**sections)
        problems = list(params.problems())
    if problems:
        raise ConfigError(f"{file}: {problem}" for problem in problems)
    return params


def _describe(section: str, item: Any) -> str:
    where = ".".join(str(part) for part in (section, *item["loc"]))
    what = {
        "unexpected_keyword_argument": "unknown key; remove it or correct its spelling",
        "missing": "missing; every key must be given",
        "missing_argument": "missing; every key must be given",
    }.get(item["type"], f"{item['msg'][0].lower()}{item['msg'][1:]}, found {item.get('input')!r}")
    return f"{where}: {what}"
