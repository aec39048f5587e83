"""The numbers of a run -> report.md, report.html and their figures, as strings; nothing is read or written here."""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.params import Params
from pipeline.report import figures, notes, sizes, tables
from pipeline.report.matrices import RankedMatrix, read_matrices
from pipeline.steps.metrics import significant
from spectrim.errors import StorageError
from spectrim.maths.budget import CODED, RESIDUAL, ROUNDED, Format

if TYPE_CHECKING:
    import numpy as np

TEMPLATES = Path(__file__).parent / "templates"
WALKS = {"blocks": "block by block", "whole": "of the whole model at once"}
METRICS = {"two_sided": ("two-sided metric", "predicted loss"), "input": ("input metric", "output error²")}


@dataclass(frozen=True)
class RenderedReport:
    """Both documents and the SVG files that report.md links to as figures/NAME.svg."""

    markdown: str
    html: str
    figures: dict[str, str]


def render(
    params: Params,
    metrics: Mapping[str, Any],
    ranks: Mapping[str, Any],
    calibrate: Mapping[str, Any],
    curve: "Mapping[str, np.ndarray]",
    refinement: "Mapping[str, np.ndarray]",
    summary: Mapping[str, Any],
    spectra: "Mapping[str, np.ndarray]",
) -> RenderedReport:
    """The whole report; equal arguments give equal bytes.

    Args:
        params: the parameters of the run.
        metrics: reports/metrics.json, with reports/speed.json and the ``walk`` of artifacts/capture/capture.json.
        ranks: artifacts/train_ranks/ranks.json.
        calibrate: artifacts/calibrate/calibrate.json.
        curve: columns of artifacts/train_ranks/curve.csv by name; empty when nothing was trained.
        refinement: columns of artifacts/update_weights/refinement.csv; empty when nothing was refined.
        summary: artifacts/update_weights/summary.json.
        spectra: matrix name -> σ (k,), float64, descending, in the metric ``params.train_ranks.whitening``.
    """
    found = read_matrices(ranks, None if params.remap.format == "same" else params.remap.format)
    metric, meaning = METRICS[params.train_ranks.whitening]
    energies = {matrix.name: discarded(matrix, spectra[matrix.name]) for matrix in found}
    drawn = {
        "size": sizes.size_figure(tables.points(metrics), metrics["bytes"]["dense_linears_16bit"]),
        "ranks": figures.ranks_figure(found),
        "spectra": figures.spectra_figure(found, spectra, metric),
    }
    if len(curve.get("step", ())):
        drawn["training"] = figures.training_figure(curve, ranks["ratio"])
    if len(refinement.get("step", ())):
        drawn["refinement"] = figures.refinement_figure(refinement)
    context = {
        **_text(params, metrics, ranks, calibrate, found),
        "refined": notes.refined_note(refinement),
        "updated": notes.update_note(summary),
        "ranks": tables.ranks_table(found, energies, meaning),
    }
    inline = {name: _fluid(svg) for name, svg in drawn.items()}
    return RenderedReport(
        markdown=_fill(
            "report.md.j2",
            {
                **context,
                "figures": set(drawn),
                "fence": _fence(f"{metrics['generation']}{metrics.get('generation_dense')}"),
            },
        ),
        html=_fill("report.html.j2", {**context, "figures": inline}),
        figures={name: figures.standalone(svg) for name, svg in drawn.items()},
    )


def discarded(matrix: RankedMatrix, sigma: "np.ndarray") -> float:
    """Σ_{i>rank} σᵢ², the energy that the cut discards; 0 for a matrix that is not cut."""
    return float((sigma[matrix.rank :] ** 2).sum()) if matrix.is_factored else 0.0


def read_curve(path: Path) -> "dict[str, np.ndarray]":
    """Columns of a curve by name, as ``significant``, an empty cell as NaN; empty arrays when nothing was trained.

    Raises:
        StorageError: the file is missing, or a cell is not a number.
    """
    import numpy as np

    try:
        with Path(path).open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            return {
                name: np.array(significant([float("nan" if row[name] == "" else row[name]) for row in rows]))
                for name in reader.fieldnames or ()
            }
    except FileNotFoundError:
        raise StorageError(f"{path}: not found; run: dvc repro {Path(path).parent.name}") from None
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"{path}: not a table of numbers ({error}); run: dvc repro -f {Path(path).parent.name}"
        ) from error


def read_spectra(path: Path, names: list[str], metric: str) -> "dict[str, np.ndarray]":
    """σ of each named matrix in ``metric`` (two_sided or input), as ``significant``, float64, descending.

    Raises:
        StorageError: the file is missing or lacks a matrix.
    """
    import numpy as np
    from safetensors import safe_open

    if not Path(path).is_file():
        raise StorageError(f"{path}: not found; run: dvc repro capture")
    with safe_open(path, framework="numpy") as stored:
        held = set(stored.keys())
        missing = [name for name in names if f"{metric}.{name}" not in held]
        if missing:
            raise StorageError(
                f"{path}: no {metric} spectrum of {missing[0]} (and {len(missing) - 1} more); run: dvc repro -f capture"
            )
        tensors = {name: stored.get_tensor(f"{metric}.{name}") for name in names}
    return {name: np.array(significant(sigma.tolist())) for name, sigma in tensors.items()}


def _text(
    params: Params,
    metrics: Mapping[str, Any],
    ranks: Mapping[str, Any],
    calibrate: Mapping[str, Any],
    found: list[RankedMatrix],
) -> dict[str, Any]:
    """Everything that both documents print besides the figures."""
    return {
        "title": params.report.title,
        "model": re.split(r"[/:]", params.model.source.rstrip("/"))[-1],
        "ratio": params.compression.ratio,
        "subtitle": _subtitle(params, ranks),
        "headlines": tables.headlines(metrics),
        "perplexity": tables.perplexity_table(metrics),
        "reach_note": notes.reach_note(metrics),
        "verdict": notes.verdict(metrics),
        "caveat": notes.caveat(params.model.source, params.prepare.perturb),
        "n_matrices": len(found),
        "n_dense": sum(matrix.is_dense for matrix in found),
        "n_factored": sum(matrix.is_factored for matrix in found),
        "n_corrected": sum(matrix.format in RESIDUAL for matrix in found),
        "n_coded": sum(matrix.format in CODED for matrix in found),
        "n_rounded": sum(matrix.format in ROUNDED and matrix.format not in RESIDUAL for matrix in found),
        "chosen": ranks["chosen"],
        "candidates": tables.candidates_table(ranks),
        "kept_note": notes.kept_note(ranks),
        "file_note": notes.file_note(ranks),
        "n_drawn_layers": min(figures.MAX_DRAWN_LAYERS, len({matrix.layer for matrix in found})),
        "running": tables.running_table(metrics),
        "machine": f"{metrics['machine']}, {tables.dtypes(metrics)}",
        "tasks": tables.tasks_table(metrics),
        "prompt": params.evaluate.prompt,
        "generation": metrics["generation"],
        "generation_dense": metrics.get("generation_dense"),
        "recipe": _recipe(params, metrics, calibrate, ranks, found),
        "protocol": tables.protocol_table(metrics),
        "begun": notes.begun(calibrate),
    }


def _subtitle(params: Params, ranks: Mapping[str, Any]) -> str:
    model = re.split(r"[/:]", params.model.source.rstrip("/"))[-1]
    return (
        f"{model} · ratio {params.compression.ratio:g} · {_factors(params)} factors · "
        f"ranks from {ranks['chosen']} · weights by {params.update_weights.method}"
        if ranks["coded"] is None
        else f"{model} · ratio {params.compression.ratio:g} · coded weights"
    )


def _step(coded: Mapping[str, Any]) -> str:
    return f"{min(coded['steps']):.3g} – {max(coded['steps']):.3g} of a number that weighs 1"


def _row_damping(coded: Mapping[str, Any]) -> str:
    losses = ", ".join(f"{damping}: {loss:.4f}" for damping, loss in coded["validation_loss"].items())
    return f"{coded['row_damping']:g}" + (f", by the loss on the validation windows ({losses})" if losses else "")


def _factors(params: Params) -> Format:
    return params.compression.format if params.remap.format == "same" else params.remap.format


def _recipe(
    params: Params,
    metrics: Mapping[str, Any],
    calibrate: Mapping[str, Any],
    ranks: Mapping[str, Any],
    found: Sequence[RankedMatrix],
) -> tables.Table:
    coded = ranks["coded"]
    rows = [
        ("model", params.model.source),
        (
            "ratio asked for",
            f"{params.compression.ratio:g} of the 16-bit bytes, budgeted as {params.compression.format}",
        ),
        (
            "ranks",
            f"{params.train_ranks.method}, {params.train_ranks.whitening} whitening, "
            f"multiples of {params.compression.align}"
            f"{', one rank for linears that read the same input' if params.compression.tie else ''}",
        ),
        *([("knapsack", note)] if (note := notes.gap_note(ranks)) else []),
        ("statistics", WALKS[metrics["walk"]]),
        ("weights", params.update_weights.method),
        *([("step", _step(coded)), ("damping of rows", _row_damping(coded))] if coded else []),
        ("stored as", ", ".join(f"{name}: {count}" for name, count in Counter(m.format for m in found).most_common())),
        *([("rows", note)] if (note := notes.pivoting_note(metrics)) else []),
    ]
    rows += [
        (
            f"{split} windows",
            f"{calibrate[split]['n_windows']:,} × {calibrate[split]['seq_len']:,} tokens, "
            f"sha256 {calibrate[split]['tokens_sha256'][:16]}…",
        )
        for split in ("calibration", "validation")
    ]
    return tables.Table(("what", "value"), tuple(rows), n_text=2)


def _fill(template: str, context: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"markdown": tables.markdown, "plain": tables.plain}
    return environment.get_template(template).render(context)


def _fluid(svg: str) -> str:
    """The figure as wide as the page lets it be, up to its own size; the viewBox keeps the proportions."""
    end = svg.index(">")
    head = re.sub(r' height="[^"]*"', "", svg[:end])
    return re.sub(r' width="([\d.]+pt)"', r' style="max-width: \1"', head) + svg[end:]


def _fence(text: str) -> str:
    """A code fence longer than any run of backticks in ``text``."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
