"""One block of `update_weights`: the factors by the chosen method, and how far they are from the original output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.sections import UpdateWeights
from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import artifact, read_json
from pipeline.runtime.chain import Onward
from pipeline.steps.factor_files import read_factors, write_factors
from spectrim.compression import weight_update
from spectrim.compression.block_refinement import Hidden, Refined, refine_block
from spectrim.compression.prefix import prefix_moments
from spectrim.compression.statistics import abs_mean_of, embedded, forward_block, gradient_gram_of, gram_of, inputs_of
from spectrim.maths.anchoring import anchored
from spectrim.maths.lowrank import Factors
from spectrim.maths.shrinkage import shrunk
from spectrim.models.blocks import BlockModel

Ranks = Mapping[str, int]
Made = tuple[dict[str, Factors], dict[str, float]]
SVD_LLM: dict[str, Literal["cholesky", "two_svds"]] = {"svd_llm": "cholesky", "svd_llm_v2": "two_svds"}


@dataclass(frozen=True)
class Variant:
    """One of the choices that are measured on the validation windows: ``anchor.alpha`` and the Grams' ``shrinkage``."""

    alpha: float
    shrinkage: float

    @property
    def name(self) -> str:
        """As it stands in summary.json."""
        return f"alpha {self.alpha:g}, shrinkage {self.shrinkage:g}"


class Update:
    """Computes and writes the factors of one block per call; where ``in_order``, block after block.

    Args:
        captured: the folder of `capture`; ``calibrate``: that of the windows, read where ``in_order``.
        damping: first and largest relative damping of a Gram, where one is decomposed.
        seed: of the order of the windows in block refinement.
        stored: index of a block -> the file that its factors were written to, for what goes on ``behind`` it.
    """

    def __init__(
        self,
        model: BlockModel,
        captured: Path,
        calibrate: Path,
        settings: UpdateWeights,
        variant: Variant,
        damping: tuple[float, float],
        seed: int,
        stored: Callable[[int], Path],
    ) -> None:
        self.model, self.captured, self.calibrate = model, captured, calibrate
        self.settings, self.variant, self.damping, self.seed = settings, variant, damping, seed
        self.anchored = variant.alpha > 0
        # two-sided factors that `capture` has not made
        self.anew = settings.method == "two_sided" and (self.anchored or variant.shrinkage > 0)
        self.behind = self.anchored or settings.block_refinement.steps > 0  # needs the blocks before it compressed
        self.in_order = self.behind or settings.method == "ipca"
        # What enters each block in the original model, and behind the compressed blocks. In memory alone: a killed run
        # walks again through the blocks whose factors it has.
        self._original = Onward(self._embed, lambda at, hidden: forward_block(model, at, hidden, 1))
        self._prefix = Onward(
            self._embed, lambda at, hidden: forward_block(model, at, hidden, 1, read_factors(stored(at)))
        )

    def inputs(self, index: int) -> list[Path]:
        """The captured files that block ``index`` depends on."""
        folders = ["inputs"]
        if self.settings.method == "two_sided":
            folders.append("gradients" if self.anew else "factors")
        return [self.captured / folder / f"{index:03}.safetensors" for folder in folders]

    def identity(self) -> list[Any]:
        """What else the factors depend on."""
        settings = self.settings
        identity = [read_json(artifact("prepare") / "prepare.json")["model_sha256"], settings.method]
        if settings.method in SVD_LLM or self.anew:
            identity += self.damping
        if self.in_order:
            tokens = read_json(artifact("calibrate") / "calibrate.json")
            identity += [settings.windows, tokens["calibration"]["tokens_sha256"]]
        if settings.method == "ipca":
            identity.append(settings.ipca)
        if self.anchored:
            identity += [self.variant.alpha, settings.anchor.damping]
        if self.variant.shrinkage:
            identity.append({"shrinkage": self.variant.shrinkage})
        if settings.block_refinement.steps:
            identity += [settings.block_refinement, tokens["validation"]["tokens_sha256"], self.seed]
        return identity

    def factors(self, index: int, ranks: Ranks, folder: Path) -> None:
        """Write LINEAR.left and LINEAR.right, float32, of block ``index``.

        Its metadata holds per linear the relative error of the output and, where a Gram was damped, the damping used;
        of a refined block its error on the validation windows before and after.
        """
        weights, input_of = self.model.weights(index), inputs_of(self.inputs(index)[0])
        owners = sorted({input_of[name] for name in ranks})
        grams = {owner: gram_of(self.captured, index, owner).to(self.model.device) for owner in owners}
        targets, metrics = self._behind(index, weights, input_of) if self.anchored else (weights, grams)
        metrics = {owner: shrunk(gram, self.variant.shrinkage) for owner, gram in metrics.items()}
        made, damping = self._make(index, targets, metrics, input_of, ranks)
        facts: dict[str, dict[str, float]] = {"damping": damping}
        if self.settings.block_refinement.steps and made:
            made, before, after = self._refined(index, made)
            block = self.model.names[index]
            facts |= {"block_error_before": {block: before}, "block_error": {block: after}}
        facts["relative_error"] = {
            name: weight_update.relative_error(weights[name], pair, grams[input_of[name]])
            for name, pair in made.items()
        }
        write_factors(folder / f"{index:03}.safetensors", made, facts)

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
            hidden = self._original[index][: self.settings.windows]
            return weight_update.ipca_factors(self.model, index, hidden, ranks, exact=exact), {}
        if self.anew:
            first, largest = self.damping
            own = {name: grams[input_of[name]] for name in ranks}
            gradient_grams = {name: self._gradient_gram(index, name) for name in ranks}
            return weight_update.two_sided_factors(
                weights, own, gradient_grams, ranks, damping=first, max_damping=largest
            )
        return self._captured(index, ranks)

    def _gradient_gram(self, index: int, name: str) -> Tensor:
        gram = gradient_gram_of(self.captured, index, name).to(self.model.device)
        return shrunk(gram, self.variant.shrinkage)

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
        anchor, windows = self.settings.anchor, self.settings.windows
        entering = (self._original[index][:windows], self._prefix[index][:windows])
        moments = prefix_moments(self.model, index, input_of, *entering)
        targets: dict[str, Tensor] = {}
        for owner, found in moments.items():  # one solution for all that read one input
            names = [name for name in weights if input_of[name] == owner]
            stacked = torch.cat([weights[name] for name in names])
            together = anchored(stacked, *found, self.variant.alpha, anchor.damping)
            targets |= zip(names, together.split([len(weights[name]) for name in names]), strict=True)
        return targets, {owner: found.gram for owner, found in moments.items()}

    def _refined(self, index: int, made: Mapping[str, Factors]) -> Refined:
        settings, windows = self.settings.block_refinement, self.settings.windows
        entering, leaving = self._prefix[index], self._original[index + 1]
        training = Hidden(entering[:windows], leaving[:windows])
        validation = Hidden(entering[windows:], leaving[windows:])
        return refine_block(
            self.model,
            index,
            made,
            training,
            validation,
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            seed=self.seed,
        )

    def _embed(self) -> Tensor:
        """Hidden states before the first block: of the calibration windows, then of the validation windows if used."""
        windows = load_windows(self.calibrate / "calibration.parquet")[: self.settings.windows]
        if self.settings.block_refinement.steps:
            windows = torch.cat([windows, load_windows(self.calibrate / "validation.parquet")])
        return embedded(self.model, windows)
