"""A rank for every matrix under the byte budget; trained ones if they are the best on validation windows, or asked for.

reads   artifacts/prepare, artifacts/calibrate (calibration, validation), artifacts/capture; train_ranks.file
writes  artifacts/train_ranks: ranks.json, curve.csv
params  train_ranks, compression, capture.{damping,max_damping} where weights are rounded
"""

import csv
from dataclasses import asdict, fields
from pathlib import Path

from pipeline.config.params import load
from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import artifact, fresh_folder, write_json
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.steps import rounded_blocks as rounding
from pipeline.steps.candidates import RankSearch
from pipeline.steps.rounded_factors import storage_losses
from spectrim.compression.rank_training import Step


def main() -> None:
    """Choose ranks under the byte budget."""
    params = load()
    settings = params.train_ranks
    device, shared = resolve(params.runtime.device), params.compression
    rounded = rounding.rounded_blocks(params, shared.alternatives, device)
    lost = {n_bits: rounding.spectra(files) for n_bits, files in rounded.items()}
    stored = storage_losses(params, [shared.format, *shared.alternatives] if shared.alternatives else [], device)
    search = RankSearch(artifact("prepare"), artifact("capture"), shared, settings, device, lost, stored)
    proposals = {
        "uniform": search.uniform,
        "svd_llm_v2": search.svd_llm_v2,
        "fisher": search.fisher,
        "file": search.from_file,
    }
    trained = settings.method in ("gates", "dobi")
    candidates = {name: proposals[name]() for name in (("uniform", "fisher") if trained else (settings.method,))}
    curve: list[Step] = []
    losses: dict[str, float] = {}
    chosen: str = settings.method
    if trained:
        windows = load_windows(artifact("calibrate") / "calibration.parquet")[:, : settings.seq_len]
        candidates[settings.method] = search.train(windows, candidates, curve)
        losses = search.validate(candidates, load_windows(artifact("calibrate") / "validation.parquet"))
        if settings.keep == "best":
            chosen = min(losses, key=lambda name: losses[name])
    with fresh_folder(artifact("train_ranks")) as out:
        write_json(
            out / "ranks.json", search.describe(candidates[chosen]) | {"chosen": chosen, "validation_loss": losses}
        )
        write_curve(out / "curve.csv", curve)


def write_curve(path: Path, curve: list[Step]) -> None:
    """One line per training step, without the columns that no step has; the header alone when nothing was trained.

    Nor with the seconds it took: equal inputs are to be equal bytes.
    """
    rows = [asdict(step) for step in curve]
    columns = [field.name for field in fields(Step) if not rows or rows[0][field.name] is not None]
    columns.remove("seconds")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run(main)
