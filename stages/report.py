"""The report of a run: tables, figures and a generation sample, as markdown and as one self-contained HTML page.

reads   reports/metrics.json, artifacts/train_ranks (ranks.json, curve.csv), artifacts/capture/spectra.safetensors,
        artifacts/calibrate/calibrate.json, artifacts/update_weights/refinement.csv
writes  reports/report.md, reports/report.html, reports/figures
params  report, model, compression, train_ranks, update_weights, remap, evaluate
"""

from pathlib import Path

from pipeline import report
from pipeline.artifacts import artifact, fresh_folder, read_json, write_text
from pipeline.console import run
from pipeline.params import load


def main() -> None:
    """Write reports/report.md, reports/report.html and reports/figures."""
    params, reports = load(), Path("reports")
    ranks = read_json(artifact("train_ranks", "ranks.json"))
    rendered = report.render(
        params=params,
        metrics=read_json(reports / "metrics.json"),
        ranks=ranks,
        calibrate=read_json(artifact("calibrate", "calibrate.json")),
        curve=report.read_curve(artifact("train_ranks", "curve.csv")),
        refinement=report.read_curve(artifact("update_weights", "refinement.csv")),
        spectra=report.read_spectra(
            artifact("capture", "spectra.safetensors"), list(ranks["matrices"]), params.train_ranks.whitening
        ),
    )
    with fresh_folder(reports / "figures") as folder:
        for name, svg in rendered.figures.items():
            (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    write_text(reports / "report.md", rendered.markdown)
    write_text(reports / "report.html", rendered.html)


if __name__ == "__main__":
    run(main)
