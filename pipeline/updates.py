"""One block of `update_weights`: the factors by the chosen method, and how far they are from the original output."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.artifacts import artifact, read_json
from pipeline.chain import Onward
from pipeline.factor_files import write_factors
from pipeline.prefix_walk import Prefix
from pipeline.sections import UpdateWeights
from pipeline.texts import load_windows
from spectrim import weight_update
from spectrim.blocks import BlockModel
from spectrim.capture import abs_mean_of, embedded, forward_block, gradient_gram_of, gram_of, inputs_of
from spectrim.maths.anchoring import anchored
from spectrim.maths.lowrank import Factors

Ranks = Mapping[str, int]
Made = tuple[dict[str, Factors], dict[str, float]]
SVD_LLM: dict[str, Literal["cholesky", "two_svds"]] = {"svd_llm": "cholesky", "svd_llm_v2": "two_svds"}


class Update:
    """Computes and writes the factors of one block per call; where ``in_order``, block after block.

    Args:
        captured: the folder of `capture`; ``calibration``: the file of calibration windows, read where ``in_order``.
        damping: first and largest relative damping of a Gram, where one is decomposed.
        stored: index of a block -> the file that its factors were written to, for anchoring.
    """

    def __init__(
        self,
        model: BlockModel,
        captured: Path,
        calibration: Path,
        settings: UpdateWeights,
        damping: tuple[float, float],
        stored: Callable[[int], Path],
    ) -> None:
        self.model, self.captured, self.calibration = model, captured, calibration
        self.settings, self.damping, self.stored = settings, damping, stored
        self.anchored = settings.anchor.alpha > 0
        self.in_order = self.anchored or settings.method == "ipca"
        self._entering = Onward(self._embed, lambda at, hidden: forward_block(self.model, at, hidden, 1))
        self._prefix: Prefix | None = None

    def inputs(self, index: int) -> list[Path]:
        """The captured files that block ``index`` depends on."""
        folders = ["inputs"]
        if self.settings.method == "two_sided":
            folders.append("gradients" if self.anchored else "factors")
        return [self.captured / folder / f"{index:03}.safetensors" for folder in folders]

    def identity(self) -> list[Any]:
        """What else the factors depend on."""
        settings = self.settings
        identity = [read_json(artifact("prepare") / "prepare.json")["model_sha256"], settings.method]
        if settings.method in SVD_LLM or (settings.method == "two_sided" and self.anchored):
            identity += self.damping
        if self.in_order:
            identity.append(read_json(artifact("calibrate") / "calibrate.json")["calibration"]["tokens_sha256"])
        if settings.method == "ipca":
            identity += [settings.ipca, settings.ipca_windows]
        return [*identity, settings.anchor] if self.anchored else identity

    def factors(self, index: int, ranks: Ranks, folder: Path) -> None:
        """Write LINEAR.left and LINEAR.right, float32, of block ``index``.

        Its metadata holds per linear the relative error of the output and, where a Gram was damped, the damping used.
        """
        weights, input_of = self.model.weights(index), inputs_of(self.inputs(index)[0])
        owners = sorted({input_of[name] for name in ranks})
        grams = {owner: gram_of(self.captured, index, owner).to(self.model.device) for owner in owners}
        targets = (weights, grams)
        if self.anchored:
            targets = self._behind(index, weights, input_of)
        made, damping = self._make(index, *targets, input_of, ranks)
        errors = {
            name: weight_update.relative_error(weights[name], pair, grams[input_of[name]])
            for name, pair in made.items()
        }
        write_factors(folder / f"{index:03}.safetensors", made, {"relative_error": errors, "damping": damping})

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
            return weight_update.ipca_factors(self.model, index, self._entering[index], ranks, exact=exact), {}
        if self.anchored:
            first, largest = self.damping
            own = {name: grams[input_of[name]] for name in ranks}
            gradient_grams = {name: gradient_gram_of(self.captured, index, name).to(device) for name in ranks}
            return weight_update.two_sided_factors(
                weights, own, gradient_grams, ranks, damping=first, max_damping=largest
            )
        return self._captured(index, ranks)

    def _captured(self, index: int, ranks: Ranks) -> Made:
        """The captured factors, cut; their damping is that of the side which `capture` decomposed."""
        stored = load_file(self.captured / "factors" / f"{index:03}.safetensors", device=str(self.model.device))
        full = {name: Factors(stored[f"left.{name}"], stored[f"right.{name}"]) for name in ranks}
        damping = {name: float(stored[f"damping.{name}"]) for name in ranks}
        return weight_update.truncated_factors(full, ranks), damping

    def _behind(
        self, index: int, weights: Mapping[str, Tensor], input_of: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights to factorise behind the compressed blocks, and the Grams of the inputs there."""
        anchor = self.settings.anchor
        if self._prefix is None:
            self._prefix = Prefix(self.model, load_windows(self.calibration)[: anchor.windows], self.stored)
        moments = self._prefix.moments(index, input_of)
        targets: dict[str, Tensor] = {}
        for owner, found in moments.items():  # one solution for all that read one input
            names = [name for name in weights if input_of[name] == owner]
            together = anchored(torch.cat([weights[name] for name in names]), *found, anchor.alpha, anchor.damping)
            targets |= zip(names, together.split([len(weights[name]) for name in names]), strict=True)
        return targets, {owner: found.gram for owner, found in moments.items()}

    def _embed(self) -> Tensor:
        """Hidden states of the original model before its first block."""
        return embedded(self.model, load_windows(self.calibration)[: self.settings.ipca_windows])
