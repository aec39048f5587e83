"""The ranks of `train_ranks` as one result of the store; a training in it goes on where a killed run stopped."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.params import Params
from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import artifact, read_json, write_json
from pipeline.runtime.layers import LayerTask, keyed
from pipeline.runtime.snapshots import Snapshots
from pipeline.runtime.store import LayerStore
from pipeline.steps import rounded_blocks
from pipeline.steps.candidates import Ranks, RankSearch
from pipeline.steps.spectra_file import NAME as SPECTRA
from spectrim.compression.methods import RANK_METHODS
from spectrim.compression.rank_training import Step
from spectrim.maths.budget import Format
from spectrim.maths.storage_formats import Grid

COMPARED = ("uniform", "fisher")
"""What trained ranks are measured beside: on the validation windows the best of all is kept."""


class RankChoice:
    """Writes ranks.json and curve.csv: the proposal of the method, or the best of the trained ranks and two others.

    Args:
        rounded: grid -> the store's files of rounded weights, for the alternatives.
        storage_losses: format with int8 factors -> linear -> what rounding them loses; likewise.
    """

    def __init__(
        self,
        params: Params,
        device: torch.device,
        store: LayerStore,
        rounded: Mapping[Grid, Sequence[Path]],
        storage_losses: Mapping[Format, Mapping[str, float]],
    ) -> None:
        self.params, self.device, self.store = params, device, store
        self.rounded, self.storage_losses = rounded, storage_losses
        self._state: Snapshots | None = None

    def task(self) -> LayerTask:
        """The choice as one layer of `train_ranks`."""
        params, tokens = self.params, read_json(artifact("calibrate", "calibrate.json"))
        method = RANK_METHODS[params.train_ranks.method]
        captured = read_json(artifact("capture", "capture.json"))["files"]
        used = captured if "factors" in method.reads or params.compression.tie else {SPECTRA}
        made = keyed(
            "train_ranks",
            "ranks",
            self,
            read_json(artifact("prepare", "prepare.json"))["model_sha256"],
            {name: sha256 for name, sha256 in captured.items() if name in used},
            [tokens[part]["tokens_sha256"] for part in ("calibration", "validation")]
            if "windows" in method.reads
            else [],
            params.train_ranks,
            params.compression,
            read_json(artifact("sources", "ranks.json")),
            {str(grid): [file.parent.name for file in files] for grid, files in self.rounded.items()},
            self.storage_losses,
            str(self.device),
        )
        self._state = Snapshots(self.store, made.key, range(1, params.train_ranks.steps + 1))
        return made

    def __call__(self, folder: Path) -> None:
        """Write ranks.json and curve.csv into ``folder``."""
        settings = self.params.train_ranks
        lost = {grid: rounded_blocks.spectra(files) for grid, files in self.rounded.items()}
        search = RankSearch(
            artifact("prepare"),
            artifact("capture"),
            self.params.compression,
            settings,
            self.device,
            lost,
            self.storage_losses,
        )
        trained = RANK_METHODS[settings.method].trained
        candidates: dict[str, Ranks] = {}
        for name in COMPARED if trained else (settings.method,):
            candidates[name] = getattr(search, str(RANK_METHODS[name].proposed_by))()
        curve: list[Step] = []
        losses: dict[str, float] = {}
        chosen: str = settings.method
        if trained:
            windows = load_windows(artifact("calibrate") / "calibration.parquet")[:, : settings.seq_len]
            candidates[settings.method] = search.train(windows, candidates, curve, self._state)
            losses = search.validate(candidates, self._validation())
            if settings.keep == "best":
                chosen = min(losses, key=lambda name: losses[name])
        about: dict[str, Any] = {"chosen": chosen, "validation_loss": losses}
        write_json(folder / "ranks.json", search.describe(candidates[chosen]) | about)
        write_curve(folder / "curve.csv", curve)

    def clear(self) -> None:
        """Drop what only an unfinished training needs: once the result is in the store, not before."""
        if self._state is not None:
            self._state.clear()

    def _validation(self) -> Tensor:
        return load_windows(artifact("calibrate") / "validation.parquet")


def write_curve(path: Path, curve: Sequence[Step]) -> None:
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
