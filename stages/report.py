"""The report of a run: tables, figures and a generation sample, as markdown and as one self-contained HTML page.

reads   reports/metrics.json, artifacts/train_ranks (ranks.json, curve.csv), artifacts/capture/spectra.safetensors,
        artifacts/calibrate/calibrate.json, artifacts/update_weights (refinement.csv, summary.json)
writes  reports/report.md, reports/report.html, reports/figures
params  report, model, compression, train_ranks, update_weights, remap, evaluate
"""

import shutil
from functools import partial
from pathlib import Path

from pipeline.config.params import Params, load
from pipeline.report import figures, matrices, notes, tables
from pipeline.report import pages as report
from pipeline.runtime.artifacts import artifact, fresh_folder, read_json, sha256_file, write_text
from pipeline.runtime.console import run
from pipeline.runtime.store import LayerStore, code_digest, key
from pipeline.steps import spectra_file
from spectrim.maths import budget

METRICS, RANKS = Path("reports", "metrics.json"), artifact("train_ranks", "ranks.json")
CALIBRATE, SPECTRA = artifact("calibrate", "calibrate.json"), artifact("capture", spectra_file.NAME)
SUMMARY = artifact("update_weights", "summary.json")
CURVES = (artifact("train_ranks", "curve.csv"), artifact("update_weights", "refinement.csv"))


def main() -> None:
    """Write reports/report.md, reports/report.html and reports/figures.

    What was rendered before is taken from the store: DVC keeps no run cache for files that git holds.
    """
    params, store, reports = load(), LayerStore(), Path("reports")
    sources = [sha256_file(file) for file in (RANKS, CALIBRATE, SPECTRA, SUMMARY, *CURVES, METRICS)]
    values = [params.report, params.model, params.compression, params.train_ranks, params.update_weights, params.remap]
    code = [
        code_digest(figures, matrices, notes, report, tables, budget),
        *map(sha256_file, sorted(report.TEMPLATES.iterdir())),
    ]
    name = key("report", "page", code, sources, *values, params.evaluate.prompt)
    entry = store.lookup(name) or store.commit(name, partial(render, params))
    with fresh_folder(reports / "figures") as folder:
        for figure in entry.glob("*.svg"):
            shutil.copyfile(figure, folder / figure.name)
    for page in ("report.md", "report.html"):
        write_text(reports / page, (entry / page).read_text(encoding="utf-8"))


def render(params: Params, folder: Path) -> None:
    """Write both pages and all figures into ``folder``."""
    ranks = read_json(RANKS)
    spectra = report.read_spectra(SPECTRA, list(ranks["matrices"]), params.train_ranks.whitening)
    curve, refinement = map(report.read_curve, CURVES)
    rendered = report.render(
        params=params,
        metrics=read_json(METRICS),
        ranks=ranks,
        calibrate=read_json(CALIBRATE),
        curve=curve,
        refinement=refinement,
        summary=read_json(SUMMARY),
        spectra=spectra,
    )
    for figure, svg in rendered.figures.items():
        (folder / f"{figure}.svg").write_text(svg, encoding="utf-8")
    (folder / "report.md").write_text(rendered.markdown, encoding="utf-8")
    (folder / "report.html").write_text(rendered.html, encoding="utf-8")


if __name__ == "__main__":
    run(main)
