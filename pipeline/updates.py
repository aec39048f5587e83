"""One block of `update_weights`: the factors by the chosen method, and how far they are from the original output."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifacts import artifact, read_json
from pipeline.sections import UpdateWeights
from pipeline.texts import load_windows
from spectrim.blocks import BlockModel
from spectrim.capture import batches, forward_block, gram_of
from spectrim.maths.lowrank import Factors
from spectrim.weight_update import closed_form_factors, ipca_factors, relative_error, truncated_factors


class Update:
    """Computes and writes the factors of one block per call; `ipca` walks the blocks in order."""

    def __init__(self, model: BlockModel, captured: Path, calibration: Path, settings: UpdateWeights) -> None:
        self.model, self.captured, self.calibration, self.settings = model, captured, calibration, settings
        self._hidden: tuple[int, Tensor] | None = None

    def inputs(self, index: int) -> list[Path]:
        """The captured files that block ``index`` depends on."""
        folders = ("inputs", "factors") if self.settings.method == "two_sided" else ("inputs",)
        return [self.captured / folder / f"{index:03}.safetensors" for folder in folders]

    def identity(self) -> list[Any]:
        """What else the factors depend on."""
        model = read_json(artifact("prepare") / "prepare.json")["model_sha256"]
        if self.settings.method != "ipca":
            return [model, self.settings.method]
        tokens = read_json(artifact("calibrate") / "calibrate.json")["calibration"]["tokens_sha256"]
        return [model, tokens, self.settings.method, self.settings.ipca, self.settings.ipca_windows]

    def factors(self, index: int, ranks: Mapping[str, int], folder: Path) -> None:
        """Write LINEAR.left and LINEAR.right, float32, of block ``index``; relative errors in its metadata."""
        weights = self.model.weights(index)
        grams = {name: gram_of(self.captured, index, name).to(self.model.device) for name in ranks}
        made = self._make(index, weights, grams, ranks)
        tensors = {}
        for name, pair in made.items():
            tensors[f"{name}.left"] = pair.left.float().cpu().contiguous()
            tensors[f"{name}.right"] = pair.right.float().cpu().contiguous()
        errors = {name: relative_error(weights[name], made[name], grams[name]) for name in made}
        save_file(
            tensors, folder / f"{index:03}.safetensors", metadata={"relative_error": json.dumps(errors, sort_keys=True)}
        )

    def _make(
        self, index: int, weights: Mapping[str, Tensor], grams: Mapping[str, Tensor], ranks: Mapping[str, int]
    ) -> dict[str, Factors]:
        if self.settings.method == "closed_form":
            return closed_form_factors(weights, grams, ranks)
        if self.settings.method == "ipca":
            return ipca_factors(self.model, index, self._entering(index), ranks, exact=self.settings.ipca == "exact")
        stored = load_file(self.captured / "factors" / f"{index:03}.safetensors", device=str(self.model.device))
        full = {name: Factors(stored[f"left.{name}"], stored[f"right.{name}"]) for name in ranks}
        return truncated_factors(full, ranks)

    def _entering(self, index: int) -> Tensor:
        """Hidden states of the original model before block ``index``; only ever walks forward."""
        if self._hidden is None or self._hidden[0] > index:
            windows = load_windows(self.calibration)[: self.settings.ipca_windows]
            parts = [self.model.embed(windows[part]).cpu() for part in batches(len(windows), 1)]
            self._hidden = (0, torch.cat(parts))
        while self._hidden[0] < index:
            at, hidden = self._hidden
            self._hidden = (at + 1, forward_block(self.model, at, hidden, 1))
        return self._hidden[1]
