"""Measurements -> reports/metrics.json and the tables behind `dvc plots`; plain numbers in, plain numbers out."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime.artifacts import fresh_folder
from spectrim.evaluation.intervals import paired_interval

DIGITS = 5
Row = Sequence[str | float | int]


def collect(
    *,
    target_ratio: float,
    stored: Mapping[str, Any],
    model: Mapping[str, int],
    matrices: Mapping[str, Mapping[str, Any]],
    baseline: Mapping[str, Any],
    perplexity: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    generation: str,
) -> dict[str, Any]:
    """The content of reports/metrics.json: what equal inputs make equal, to ``DIGITS`` significant digits.

    Args:
        target_ratio: compression.ratio.
        stored: what ``spectrim.checkpoint.layout.read_bytes`` found in the file.
        model: n_parameters and n_block_parameters of the dense model.
        matrices: the table of the checkpoint's spectrim.json.
        baseline: the content of artifacts/baseline/baseline.json.
        perplexity: text -> ``TextPerplexity`` of the compressed model, on the texts of ``baseline``.
        tasks: task -> ``Score`` of the compressed model, on the tasks of ``baseline``.
        generation: what the compressed model wrote.
    """
    found = {
        "reach": _reach(stored, model),
        "ratio": {"target": target_ratio, "file": stored["ratio"], "memory": stored["memory_ratio"]},
        "bytes": {
            "dense_file_16bit": 2 * model["n_parameters"],
            **{name: stored[name] for name in ("file", "linears", "memory", "dense_linears_16bit")},
        },
        "multiply_adds": {"dense": stored["dense_linears_16bit"] // 2, "compressed": stored["multiply_adds"]},
        "pivoting": pivoting(matrices),
        "perplexity": {
            text: {
                "dense": baseline["perplexity"][text]["perplexity"],
                "compressed": entry["perplexity"],
                "interval": paired_interval(entry["losses"], baseline["perplexity"][text]["losses"]),
                **{name: entry[name] for name in ("n_tokens", "seq_len", "tokens_sha256")},
            }
            for text, entry in perplexity.items()
        },
        "tasks": {task: _task(baseline["tasks"][task], score) for task, score in tasks.items()},
        "baselines": {
            name: {
                "ratio": entry["ratio"],
                "perplexity": {text: found["perplexity"] for text, found in entry["perplexity"].items()},
                "interval": {
                    text: paired_interval(found["losses"], baseline["perplexity"][text]["losses"])
                    for text, found in entry["perplexity"].items()
                },
            }
            for name, entry in baseline["quantization"].items()
        },
        "generation": generation,
        "generation_dense": baseline["generation"],
    }
    rounded: dict[str, Any] = significant(found)
    return rounded


def significant(value: Any) -> Any:
    """``value`` with every float in it rounded to ``DIGITS`` significant digits: what is below is the machine's."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: significant(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [significant(item) for item in value]
    return value


def write_tables(metrics: Mapping[str, Any], folder: Path) -> None:
    """size_perplexity.csv and tasks.csv in ``folder``, one row per point of a figure."""
    tables: dict[str, tuple[Row, list[Row]]] = {
        "size_perplexity": (("text", "model", "ratio", "memory_ratio", "perplexity"), _size_perplexity(metrics)),
        "tasks": (("task", "model", "score"), _by_side(metrics["tasks"])),
    }
    with fresh_folder(folder) as out:
        for name, (header, rows) in tables.items():
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows([header, *rows])
            (out / f"{name}.csv").write_text(text.getvalue(), encoding="utf-8")


def pivoting(matrices: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """How well the rows of pivoted matrices were chosen, the worst one by name; None where none is stored like that."""
    pivoted = {name: row for name, row in matrices.items() if "condition" in row}
    if not pivoted:
        return None
    worst = max(pivoted, key=lambda name: pivoted[name]["condition"])
    return {
        "matrices": len(pivoted),
        "largest_condition": {"name": worst, "value": pivoted[worst]["condition"]},
        "exchanges": {name: row["exchanges"] for name, row in pivoted.items() if row["exchanges"]},
    }


def _reach(stored: Mapping[str, Any], model: Mapping[str, int]) -> dict[str, float]:
    """The share of all parameters, and of those in the blocks, that is in compressible linears."""
    count = stored["dense_linears_16bit"] // 2
    return {"of_parameters": count / model["n_parameters"], "of_blocks": count / model["n_block_parameters"]}


def _task(dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dense": dense["score"],
        "compressed": compressed["score"],
        "metric": compressed["metric"],
        "n_examples": compressed["n_examples"],
        "stderr": {"dense": dense["stderr"], "compressed": compressed["stderr"]},
        "metrics": {
            name: {"dense": dense["metrics"][name], "compressed": value}
            for name, value in compressed["metrics"].items()
        },
    }


def _size_perplexity(metrics: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for text, entry in metrics["perplexity"].items():
        ours = metrics["ratio"]
        rows.append((text, "dense", 1.0, 1.0, entry["dense"]))
        rows.append((text, "spectrim", ours["file"], ours["memory"], entry["compressed"]))
        rows += [
            (text, name, other["ratio"], other["ratio"], other["perplexity"][text])
            for name, other in metrics["baselines"].items()
        ]
    return rows


def _by_side(entries: Mapping[str, Mapping[str, float]]) -> list[Row]:
    return [(name, side, entry[side]) for name, entry in entries.items() for side in ("dense", "compressed")]
