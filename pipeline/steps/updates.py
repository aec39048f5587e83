"""One block of `update_weights`: the factors by the chosen method, and how far they are from the original output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.sections import UpdateWeights
from pipeline.runtime.artifacts import artifact, read_json
from pipeline.steps.block_statistics import BlockStatistics
from pipeline.steps.factor_files import write_factors
from pipeline.steps.hidden_states import HiddenStates
from spectrim.compression import weight_update
from spectrim.compression.block_refinement import refine_block
from spectrim.compression.methods import UPDATE_METHODS
from spectrim.models.blocks import BlockModel

AS_SET = "as set"  # the variant that the keys themselves are
FOLDERS = {"factors": "factors", "gradient_gram": "gradients"}  # of `capture`, beside inputs/, which all read


@dataclass(frozen=True)
class Variant:
    """One of the choices that are measured on the validation windows: ``anchor.alpha`` and the Grams' ``shrinkage``."""

    name: str
    alpha: float
    shrinkage: float


def variants_of(settings: UpdateWeights) -> list[Variant]:
    """The values as set, then every entry of ``variants`` in their place."""
    alpha, shrinkage = settings.anchor.alpha, settings.shrinkage
    others = [
        Variant(
            name,
            alpha if values.alpha is None else values.alpha,
            shrinkage if values.shrinkage is None else values.shrinkage,
        )
        for name, values in settings.variants.items()
    ]
    return [Variant(AS_SET, alpha, shrinkage), *others]


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
        self.model, self.captured, self.settings, self.variant = model, captured, settings, variant
        self.damping, self.seed = damping, seed
        self.method = UPDATE_METHODS[settings.method]
        self.refined = settings.block_refinement.steps > 0
        self.changed = variant.alpha > 0 or variant.shrinkage > 0  # another metric than the captured one
        self.behind = variant.alpha > 0 or self.refined  # needs the blocks before it compressed
        self.in_order = self.behind or "activations" in self.method.reads
        self._states = HiddenStates(model, calibrate, settings.windows, self.refined, stored)

    def inputs(self, index: int) -> list[Path]:
        """The captured files that block ``index`` depends on."""
        read = self.method.files(self.changed)
        folders = ["inputs", *(folder for statistic, folder in FOLDERS.items() if statistic in read)]
        return [self.captured / folder / f"{index:03}.safetensors" for folder in folders]

    def identity(self) -> list[Any]:
        """What else the factors depend on."""
        settings, method = self.settings, self.method
        identity = [read_json(artifact("prepare") / "prepare.json")["model_sha256"], settings.method]
        identity += [{key: getattr(settings, key)} for key in method.parameters]
        if method.damped or "gradient_gram" in method.files(self.changed):
            identity += self.damping
        if self.in_order:
            tokens = read_json(artifact("calibrate") / "calibrate.json")
            identity += [settings.windows, tokens["calibration"]["tokens_sha256"]]
        if self.variant.alpha:
            identity += [self.variant.alpha, settings.anchor.damping]
        if self.variant.shrinkage:
            identity.append({"shrinkage": self.variant.shrinkage})
        if self.refined:
            identity += [settings.block_refinement, tokens["validation"]["tokens_sha256"], self.seed]
        return identity

    def factors(self, index: int, ranks: Mapping[str, int], folder: Path) -> None:
        """Write LINEAR.left and LINEAR.right, float32, of block ``index``.

        Its metadata holds per linear the relative error of the output and, where a Gram was damped, the damping used;
        of a refined block its error on the validation windows before and after.
        """
        block = BlockStatistics(
            self.model,
            index,
            self.captured,
            ranks,
            shrinkage=self.variant.shrinkage,
            damping=self.damping,
            hidden=lambda: self._states.original(index),
            exact_ipca=self.settings.ipca == "exact",
        )
        weights = block.weights
        if self.variant.alpha:
            anchor = (self.variant.alpha, self.settings.anchor.damping)
            block.replace(*self._states.anchored(index, weights, block.input_of, *anchor))
        compute: weight_update.Compute = getattr(weight_update, self.method.function(self.changed))
        made, damping = compute(block, ranks)
        facts: dict[str, dict[str, float]] = {"damping": damping}
        if self.refined and made:
            settings, windows = self.settings.block_refinement, self._states.around(index)
            made, before, after = refine_block(
                self.model,
                index,
                made,
                *windows,
                steps=settings.steps,
                learning_rate=settings.learning_rate,
                seed=self.seed,
            )
            name = self.model.names[index]
            facts |= {"block_error_before": {name: before}, "block_error": {name: after}}
        facts["relative_error"] = {
            name: weight_update.relative_error(weights[name], pair, block.captured_gram(name))
            for name, pair in made.items()
        }
        write_factors(folder / f"{index:03}.safetensors", made, facts)
