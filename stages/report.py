"""The report of a run: tables, figures and a generation sample, as markdown and as one self-contained HTML page.

reads   reports/metrics.json, reports/speed.json, artifacts/train_ranks (ranks.json, curve.csv),
        artifacts/capture (capture.json, spectra.safetensors), artifacts/calibrate/calibrate.json,
        artifacts/update_weights (refinement.csv, summary.json)
writes  reports/report.md, reports/report.html, reports/figures
params  report, model, compression, train_ranks, update_weights, remap, evaluate
"""

import shutil
from functools import partial
from pathlib import Path

from pipeline.config.params import load
from pipeline.report.rendering import INPUTS, write_pages
from pipeline.runtime.artifacts import fresh_folder, sha256_file, write_text
from pipeline.runtime.console import run
from pipeline.runtime.layers import keyed
from pipeline.runtime.store import LayerStore


def main() -> None:
    """Write reports/report.md, reports/report.html and reports/figures.

    What was rendered before is taken from the store: DVC keeps no run cache for files that git holds.
    """
    params, store, reports = load(), LayerStore(), Path("reports")
    sources = [sha256_file(file) for file in INPUTS]
    values = [params.report, params.model, params.compression, params.train_ranks, params.update_weights, params.remap]
    task = keyed("report", "page", partial(write_pages, params), sources, *values, params.evaluate.prompt)
    entry = store.lookup(task.key) or store.commit(task.key, task.compute)
    with fresh_folder(reports / "figures") as folder:
        for figure in entry.glob("*.svg"):
            shutil.copyfile(figure, folder / figure.name)
    for page in ("report.md", "report.html"):
        write_text(reports / page, (entry / page).read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
