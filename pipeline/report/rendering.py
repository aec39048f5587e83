"""The files of a finished run -> both pages and all figures as files."""

from pathlib import Path

from pipeline.config.params import Params
from pipeline.report import pages
from pipeline.runtime.artifacts import artifact, read_json
from pipeline.steps import spectra_file

METRICS, SPEED = Path("reports", "metrics.json"), Path("reports", "speed.json")
RANKS = artifact("train_ranks", "ranks.json")
CALIBRATE, CAPTURE = artifact("calibrate", "calibrate.json"), artifact("capture", "capture.json")
SPECTRA = artifact("capture", spectra_file.NAME)
SUMMARY = artifact("update_weights", "summary.json")
CURVES = (artifact("train_ranks", "curve.csv"), artifact("update_weights", "refinement.csv"))
INPUTS = (RANKS, CALIBRATE, CAPTURE, SPECTRA, SUMMARY, *CURVES, METRICS, SPEED)


def write_pages(params: Params, folder: Path) -> None:
    """Write both pages and all figures into ``folder``."""
    ranks = read_json(RANKS)
    spectra = pages.read_spectra(SPECTRA, list(ranks["matrices"]), params.train_ranks.whitening)
    curve, refinement = map(pages.read_curve, CURVES)
    rendered = pages.render(
        params=params,
        metrics=read_json(METRICS) | read_json(SPEED) | {"walk": read_json(CAPTURE)["walk"]},
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
