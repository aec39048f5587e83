"""One block of `update_weights`: the factors by the chosen method, and how far they are from the original output."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifacts import artifact, read_json
from pipeline.sections import UpdateWeights
from pipeline.texts import load_windows
from spectrim import weight_update
from spectrim.blocks import BlockModel
from spectrim.capture import abs_mean_of, batches, forward_block, gram_of, inputs_of
from spectrim.maths.lowrank import Factors

Ranks = Mapping[str, int]
Made = tuple[dict[str, Factors], dict[str, float]]
SVD_LLM: dict[str, Literal["cholesky", "two_svds"]] = {"svd_llm": "cholesky", "svd_llm_v2": "two_svds"}


class Update:
    """Computes and writes the factors of one block per call; `ipca` walks the blocks in order.

    Args:
        captured: the folder of `capture`; ``calibration``: the file of calibration windows, read by `ipca` only.
        damping: first and largest relative damping of a Gram, for `svd_llm` and `svd_llm_v2`.
    """

    def __init__(
        self,
        model: BlockModel,
        captured: Path,
        calibration: Path,
        settings: UpdateWeights,
        damping: tuple[float, float],
    ) -> None:
        self.model, self.captured, self.calibration = model, captured, calibration
        self.settings, self.damping = settings, damping
        self._hidden: tuple[int, Tensor] | None = None

    def inputs(self, index: int) -> list[Path]:
        """The captured files that block ``index`` depends on."""
        folders = ("inputs", "factors") if self.settings.method == "two_sided" else ("inputs",)
        return [self.captured / folder / f"{index:03}.safetensors" for folder in folders]

    def identity(self) -> list[Any]:
        """What else the factors depend on."""
        identity = [read_json(artifact("prepare") / "prepare.json")["model_sha256"], self.settings.method]
        if self.settings.method in SVD_LLM:
            return [*identity, *self.damping]
        if self.settings.method == "ipca":
            tokens = read_json(artifact("calibrate") / "calibrate.json")["calibration"]["tokens_sha256"]
            return [*identity, tokens, self.settings.ipca, self.settings.ipca_windows]
        return identity

    def factors(self, index: int, ranks: Ranks, folder: Path) -> None:
        """Write LINEAR.left and LINEAR.right, float32, of block ``index``.

        Its metadata holds per linear the relative error of the output and, where a Gram was damped, the damping used.
        """
        weights, input_of = self.model.weights(index), inputs_of(self.captured, index)
        owners = sorted({input_of[name] for name in ranks})
        grams = {owner: gram_of(self.captured, index, owner).to(self.model.device) for owner in owners}
        made, damping = self._make(index, weights, grams, input_of, ranks)
        tensors = {}
        for name, pair in made.items():
            tensors[f"{name}.left"] = pair.left.float().cpu().contiguous()
            tensors[f"{name}.right"] = pair.right.float().cpu().contiguous()
        errors = {
            name: weight_update.relative_error(weights[name], pair, grams[input_of[name]])
            for name, pair in made.items()
        }
        facts = {"relative_error": errors, "damping": damping}
        # one key: safetensors writes several in a random order, and equal layers are to be equal bytes
        metadata = {"facts": json.dumps(facts, sort_keys=True)}
        save_file(tensors, folder / f"{index:03}.safetensors", metadata=metadata)

    def _make(
        self,
        index: int,
        weights: Mapping[str, Tensor],
        grams: Mapping[str, Tensor],
        input_of: Mapping[str, str],
        ranks: Ranks,
    ) -> Made:
        method, device = self.settings.method, self.model.device
        if method == "svd":
            return weight_update.svd_factors(weights, ranks), {}
        if method == "asvd":
            abs_means = {name: abs_mean_of(self.captured, index, name).to(device) for name in ranks}
            return weight_update.asvd_factors(weights, abs_means, ranks), {}
        if method == "closed_form":
            return weight_update.closed_form_factors(weights, {n: grams[input_of[n]] for n in ranks}, ranks), {}
        if method in SVD_LLM:
            first, largest = self.damping
            return weight_update.svd_llm_factors(
                weights, grams, input_of, ranks, form=SVD_LLM[method], damping=first, max_damping=largest
            )
        if method == "ipca":
            exact = self.settings.ipca == "exact"
            return weight_update.ipca_factors(self.model, index, self._entering(index), ranks, exact=exact), {}
        return self._two_sided(index, ranks)

    def _two_sided(self, index: int, ranks: Ranks) -> Made:
        """The captured factors, cut; their damping is that of the side which `capture` decomposed."""
        stored = load_file(self.captured / "factors" / f"{index:03}.safetensors", device=str(self.model.device))
        full = {name: Factors(stored[f"left.{name}"], stored[f"right.{name}"]) for name in ranks}
        damping = {name: float(stored[f"damping.{name}"]) for name in ranks}
        return weight_update.truncated_factors(full, ranks), damping

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
