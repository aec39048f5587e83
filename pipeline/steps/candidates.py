"""The candidates of `train_ranks`: what each method proposes, trained and measured on one copy of the model."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.sections import Compression, TrainRanks
from pipeline.runtime.artifacts import read_json, write_json
from pipeline.runtime.progress import bar, progress, say
from pipeline.runtime.snapshots import Snapshots
from pipeline.steps import rounded_blocks as rounding
from pipeline.steps.model_folders import load_model
from pipeline.steps.rank_files import compared, read_rank_file
from pipeline.steps.ranks_table import described
from pipeline.steps.spectra_file import NAME as SPECTRA
from pipeline.steps.spectra_file import read_tokens
from spectrim.checkpoint.layout import Matrix
from spectrim.compression.methods import RANK_METHODS
from spectrim.compression.rank_training import RankTraining, Step, validation_loss
from spectrim.compression.statistics import gram_of, inputs_of
from spectrim.compression.truncated import GatedLinear, Truncated, TruncatedActivation, attach_truncated
from spectrim.maths import allocation, budget, joint_allocation
from spectrim.maths.budget import Format, Shape
from spectrim.maths.joint_allocation import Option
from spectrim.maths.lowrank import Factors, closed_form, truncate
from spectrim.maths.storage_formats import FORMATS, Grid
from spectrim.models.modules import linears_by_block

Ranks = dict[str, int]
STATE = "training.json"


def tied_linears(captured: Path, blocks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Names of the linears that read the same tensor, as `capture` saw it happen, block by block."""
    groups: dict[str, list[str]] = {}
    for index, block in enumerate(blocks.values()):
        input_of = inputs_of(captured / "inputs" / f"{index:03}.safetensors")
        for name in block:
            groups.setdefault(input_of[name], []).append(name)
    return list(groups.values())


def priced(module: Truncated, format: Format, shape: Shape) -> int:
    """Bytes of full rank in ``format``; tells ``module`` how those of its rank grow: see ``Truncated.share``."""
    module.pivoted = sum(shape) if FORMATS[format].pivoted else None
    return budget.matrix_bytes(format, *shape, module.full_rank)


class RankSearch:
    """Proposes ranks for every compressible linear of a prepared model under one byte budget.

    Args:
        lost: grid -> linear -> the spectrum, or the norm, of what rounding its weight lost; for the alternatives.
        storage_losses: format with int8 factors -> linear -> what rounding them loses; likewise.
    """

    def __init__(
        self,
        prepared: Path,
        captured: Path,
        shared: Compression,
        settings: TrainRanks,
        device: torch.device,
        lost: Mapping[Grid, Mapping[str, Tensor]],
        storage_losses: Mapping[Format, Mapping[str, float]],
    ) -> None:
        self.lost, self.storage_losses = lost, storage_losses
        self.captured, self.shared, self.settings, self.device = captured, shared, settings, device
        self.model = load_model(prepared, device).requires_grad_(False)
        self.blocks = linears_by_block(self.model, shared.exclude)
        self.linears = {name: module for block in self.blocks.values() for name, module in block.items()}
        self.shapes = [(module.out_features, module.in_features) for module in self.linears.values()]
        self.budget_bytes = budget.budget_bytes(self.shapes, shared.kept)
        self.optimality_gap: float | None = None
        self.formats: dict[str, Format] = {}  # of the matrices, where there are alternatives
        self.file: dict[str, Any] | None = None
        names = list(self.linears)
        self.tied = tied_linears(captured, self.blocks) if shared.tie else [[name] for name in names]
        self.groups = [[names.index(name) for name in group] for group in self.tied]

    def uniform(self) -> Ranks:
        """The same share of bytes for every matrix."""
        shared = self.shared
        found = allocation.uniform(self.shapes, shared.kept, shared.format, shared.align, self.groups)
        return dict(zip(self.linears, found, strict=True))

    def svd_llm_v2(self) -> Ranks:
        """Ratios inside each matrix type by the output error over all calibration tokens, as SVD-LLM V2 sets them."""
        kinds: dict[str, list[int]] = {}
        for index, (name, block) in enumerate((name, block) for block, part in self.blocks.items() for name in part):
            kinds.setdefault(name.removeprefix(block), []).append(index)
        spectra, n_tokens = load_file(self.captured / SPECTRA), read_tokens(self.captured).inputs
        energies = [spectra[f"input.{name}"] ** 2 * n_tokens for name in self.linears]
        shared = self.shared
        found = allocation.svd_llm_v2(
            energies, list(kinds.values()), self.shapes, shared.kept, shared.format, shared.align, self.groups
        )
        return dict(zip(self.linears, found, strict=True))

    def fisher(self) -> Ranks:
        """The least predicted loss under the budget, dense being a choice; sets ``optimality_gap`` and ``formats``."""
        spectra = load_file(self.captured / SPECTRA)
        shared = self.shared
        if shared.alternatives:
            return self._joint({name: spectra[f"two_sided.{name}"] for name in self.linears})
        energies = [spectra[f"two_sided.{name}"] ** 2 for name in self.linears]
        found = allocation.fisher(energies, self.shapes, self.budget_bytes, shared.format, shared.align, self.groups)
        self.optimality_gap = found.gap
        return dict(zip(self.linears, found.ranks, strict=True))

    def _joint(self, spectra: Mapping[str, Tensor]) -> Ranks:
        """A format and a rank for every matrix; sets ``optimality_gap`` and ``formats``."""
        allowed: list[Format] = [self.shared.format, *self.shared.alternatives]
        options = [self._options(name, spectra[name], allowed) for name in self.linears]
        chosen, self.optimality_gap = joint_allocation.joint(options, self.budget_bytes)
        found = dict(zip(self.linears, chosen, strict=True))
        self.formats = {name: option.format for name, option in found.items()}
        return {name: option.rank for name, option in found.items()}

    def _options(self, name: str, sigma: Tensor, allowed: list[Format]) -> list[Option]:
        shape, align = self._shape(name), self.shared.align
        options = [joint_allocation.dense_option(shape)]
        for format in dict.fromkeys(allowed):
            if FORMATS[format].factored:
                rounded = self.storage_losses[format][name] if FORMATS[format].needs_gram else 0.0
                options += joint_allocation.factored_options(format, sigma, shape, align, rounded)
            elif name in (lost := self.lost[budget.ROUNDED[format]]):
                largest = rounding.largest_rank(shape)
                options += joint_allocation.rounded_options(format, lost[name], shape, align, largest)
        return options

    def from_file(self) -> Ranks:
        """The ranks of ``train_ranks.file`` put onto the budget; sets ``file``, what that changed."""
        shared, settings = self.shared, self.settings
        shapes = {name: self._shape(name) for name in self.linears}
        read = read_rank_file(str(settings.file), settings.file_sha256, shapes)
        ranks = self._project(list(read.ranks.values()))
        self.file = compared(read, ranks, shapes, shared.format)
        return ranks

    def train(
        self, windows: Tensor, candidates: Mapping[str, Ranks], curve: list[Step], snapshots: Snapshots | None = None
    ) -> Ranks:
        """Ranks trained by the method of the parameters from those it starts from, projected onto the budget.

        Matrices that the starting point keeps dense stay dense: a gate cannot see what being dense is worth. The steps
        are added to ``curve``; with ``snapshots`` a killed training goes on from the newest.
        """
        settings, method = self.settings, RANK_METHODS[self.settings.method]
        start = candidates[str(method.starts_from)]
        modules: Mapping[str, Truncated] = getattr(self, str(method.modules))()
        for name, module in modules.items():
            module.open = self._format(name, start[name]) == "dense"
        attach_truncated(self.model, modules)
        costs = {name: priced(module, self.shared.format, self._shape(name)) for name, module in modules.items()}
        run = RankTraining(
            self.model,
            modules,
            costs,
            start,
            windows,
            groups=self.tied if method.ties else (),
            objective=settings.objective,
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            width=settings.width,
            beta=settings.beta,
            seed=self.shared.seed,
        )
        if snapshots and (newest := snapshots.newest()):
            kept = read_json(newest[1] / STATE)
            run.restore(kept["run"])
            curve += [Step(**step) for step in kept["curve"]]
            say(f"train_ranks: goes on after step {run.step} of {run.steps}")
        with bar("train_ranks: training", run.steps, initial=run.step, unit="step") as progress_bar:
            while run.step < run.steps:
                curve.append(run.advance())
                progress_bar.set_postfix(loss=f"{curve[-1].cross_entropy:.3f}")
                progress_bar.update()
                if snapshots:
                    snapshots.keep(run.step, partial(_keep, run, curve))
        trained = run.truncations()
        return self._project([trained.get(name, min(self._shape(name))) for name in self.linears])

    def validate(self, candidates: Mapping[str, Ranks], windows: Tensor) -> dict[str, float]:
        """Cross-entropy in nats per token of every candidate on the validation windows."""
        modules = self.gated()
        attach_truncated(self.model, modules)
        return {
            name: validation_loss(self.model, modules, ranks, windows)
            for name, ranks in progress(candidates.items(), "train_ranks: validation", len(candidates))
        }

    def describe(self, ranks: Ranks) -> dict[str, Any]:
        """ranks.json without its `chosen` and `validation_loss`."""
        matrices = {name: Matrix(self._format(name, rank), rank) for name, rank in ranks.items()}
        shapes = {name: self._shape(name) for name in ranks}
        n_bytes = {
            name: budget.matrix_bytes(matrix.format, *shapes[name], matrix.rank) for name, matrix in matrices.items()
        }
        return described(
            self.shared, self.settings.method, matrices, shapes, n_bytes,
            optimality_gap=self.optimality_gap, file=self.file,
        )  # fmt: skip

    def _project(self, truncations: list[float]) -> Ranks:
        shared = self.shared
        found = allocation.project(
            truncations, self.shapes, self.budget_bytes, shared.format, shared.align, self.groups
        )
        return dict(zip(self.linears, found, strict=True))

    def gated(self) -> dict[str, GatedLinear]:
        """Every linear with its full-rank whitened factors in the model's dtype."""
        modules = {}
        for index, block in enumerate(self.blocks.values()):
            factors = load_file(self.captured / "factors" / f"{index:03}.safetensors")
            for name, module in block.items():
                if self.settings.whitening == "two_sided":
                    pair = Factors(factors[f"left.{name}"], factors[f"right.{name}"])
                else:
                    full = closed_form(module.weight.double(), gram_of(self.captured, index, name).to(self.device))
                    pair = truncate(full, min(module.weight.shape))
                dtype, device = module.weight.dtype, self.device
                modules[name] = GatedLinear(
                    Factors(*(part.to(device, dtype) for part in pair)), module.weight, module.bias
                )
        return modules

    def truncated(self) -> dict[str, Truncated]:
        settings = self.settings
        return {
            name: TruncatedActivation(module, settings.taylor_terms, settings.taylor_threshold)
            for name, module in self.linears.items()
        }

    def _shape(self, name: str) -> tuple[int, int]:
        return self.linears[name].out_features, self.linears[name].in_features

    def _format(self, name: str, rank: int) -> Format:
        return self.formats.get(name) or budget.resolve_format(self.shared.format, *self._shape(name), rank)


def _keep(run: RankTraining, curve: list[Step], folder: Path) -> None:
    write_json(folder / STATE, {"run": run.state(), "curve": [asdict(step) for step in curve]})
