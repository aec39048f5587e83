"""A rank for every matrix under the byte budget; trained ones if they are the best on validation windows, or asked for.

Of coded weights the one step whose code fills the budget.

reads   artifacts/prepare, artifacts/calibrate (calibration, validation), artifacts/capture; train_ranks.file and
        artifacts/sources/ranks.json
writes  artifacts/train_ranks: ranks.json, curve.csv
params  train_ranks, compression, capture.{damping,max_damping} where weights are rounded
"""

from pipeline.config.params import load
from pipeline.runtime.artifacts import artifact, fresh_folder, write_json
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.runtime.layers import run_layers
from pipeline.runtime.store import LayerStore, link_or_copy
from pipeline.steps.coded_choice import coded_choice
from pipeline.steps.rank_choice import RankChoice, write_curve
from pipeline.steps.rounded_blocks import rounded_blocks
from pipeline.steps.rounded_factors import storage_losses
from spectrim.compression.methods import RANK_METHODS


def main() -> None:
    """Choose ranks under the byte budget."""
    params, store = load(), LayerStore()
    device, shared = resolve(params.runtime.device), params.compression
    if RANK_METHODS[params.train_ranks.method].coded:
        with fresh_folder(artifact("train_ranks")) as out:
            write_json(out / "ranks.json", coded_choice(params, device, store))
            write_curve(out / "curve.csv", [])
        return
    rounded = rounded_blocks(params, shared.alternatives, device)
    lost = storage_losses(params, [shared.format, *shared.alternatives] if shared.alternatives else [], device)
    choice = RankChoice(params, device, store, rounded, lost)
    entries = run_layers("train_ranks", [choice.task()], params.runtime, store, ordered=True)
    with fresh_folder(artifact("train_ranks")) as out:
        link_or_copy(entries["ranks"], out)
    choice.clear()


if __name__ == "__main__":
    run(main)
