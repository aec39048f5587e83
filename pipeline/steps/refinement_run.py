"""The refinement of `update_weights`: one run over all that is stored, which goes on where a killed run stopped.

Every ``validate_every`` steps the model is measured on the validation windows, and everything the run depends on is put
into the store. The best state seen is the result; the one it began with is among them.
"""

import csv
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.sections import Refinement as Settings
from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import read_json, sha256_file, write_json
from pipeline.runtime.layers import LayerTask, keyed
from pipeline.runtime.progress import bar, say
from pipeline.runtime.snapshots import Snapshots
from pipeline.runtime.store import LayerStore
from pipeline.steps.factor_files import (
    ROUNDED_FOLDER,
    VECTORS,
    read_factors,
    read_rounded,
    write_factors,
    write_rounded,
)
from pipeline.steps.model_folders import load_model
from pipeline.steps.teacher import Teacher
from spectrim.compression.refinement import (
    PARTS,
    LearningRates,
    StoredTraining,
    attach_factors,
    attach_rounded,
    checkpoint_blocks,
)
from spectrim.evaluation.perplexity import perplexity

CURVE = "refinement.csv"
SUMMARY = "refinement.json"
BEST = "best.safetensors"


@dataclass(frozen=True)
class Point:
    """One step of the curve: its training loss, and where it was measured the validation loss after it, nats per token.

    ``loss`` of step 0 is that of nothing, and empty.
    """

    step: int
    loss: float | None
    validation_loss: float | None


class RefinementRun:
    """Trains what is in ``files`` and ``rounded``, norms and biases, and writes the best state seen.

    Args:
        prepared: folder of the dense model.
        calibrate: folder of the windows to learn from, and of the validation windows, which are only measured on.
        captured: folder of what left the dense model's last block for the calibration windows.
        device: where it runs.
        files: the factors that the closed form left, one file per block.
        rounded: rounded weights and their factors, likewise; none where nothing is rounded.
    """

    def __init__(
        self,
        prepared: Path,
        calibrate: Path,
        captured: Path,
        device: torch.device,
        files: Sequence[Path],
        rounded: Sequence[Path],
        settings: Settings,
        seed: int,
        store: LayerStore,
    ) -> None:
        self.prepared, self.calibrate, self.captured = prepared, calibrate, captured
        self.device, self.files, self.rounded = device, files, rounded
        self.settings, self.seed, self.store = settings, seed, store
        self.curve: list[Point] = []

    @cached_property
    def name(self) -> str:
        """The key of the whole run, and part of those of its snapshots."""
        return self.task().key

    @cached_property
    def _snapshots(self) -> Snapshots:
        every, steps = self.settings.validate_every, self.settings.steps
        return Snapshots(self.store, self.name, {*range(every, steps, every), steps}, seconds=0.0)

    def task(self) -> LayerTask:
        """The run as one layer of `update_weights`."""
        tokens = read_json(self.calibrate / "calibrate.json")
        return keyed(
            "update_weights",
            "refinement",
            self,
            read_json(self.prepared / "prepare.json")["model_sha256"],
            [tokens[part]["tokens_sha256"] for part in ("calibration", "refinement", "validation") if part in tokens],
            [sha256_file(file) for file in [*self.files, *self.rounded]],
            self.settings,
            self.seed,
            str(self.device),
        )

    def __call__(self, folder: Path) -> None:
        """Train, and write what was read as it is then, VECTORS, the curve and a summary into ``folder``."""
        settings = self.settings
        teacher = Teacher(self.prepared, self.calibrate, self.captured, settings.seq_len, self.device)
        validation = load_windows(self.calibrate / "validation.parquet")
        student = load_model(self.prepared, self.device)
        if settings.checkpointing:
            checkpoint_blocks(student)
        rounded = {name: pair for file in self.rounded for name, pair in read_rounded(file).items()}
        run = StoredTraining(
            student,
            attach_factors(student, read_factors(*self.files)),
            attach_rounded(student, rounded),
            teacher.windows,
            teacher,
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rates=LearningRates(
                settings.learning_rate, settings.scale_learning_rate, settings.vector_learning_rate
            ),
            kl_weight=settings.kl_weight,
            seed=self.seed,
        )
        self._resume(run)
        if not self.curve:
            self.curve.append(Point(run.step, None, None))
            self._measure(run, validation)
        with bar("update_weights: refinement", settings.steps, initial=run.step, unit="step") as progress:
            while not self._ended(run.step):
                for _ in range(min(settings.validate_every, settings.steps - run.step)):
                    loss, before = run.advance(), self._measured()[-1][1]
                    self.curve.append(Point(run.step, loss, None))
                    progress.set_postfix(loss=f"{loss:.4f}", validation=f"{before:.4f}")
                    progress.update()
                self._measure(run, validation)
                self._keep(run)
        self._write(run, folder)

    def clear(self) -> None:
        """Drop what only an unfinished run needs: once the result is in the store, not before."""
        self._snapshots.clear()

    def _measure(self, run: StoredTraining, validation: Tensor) -> None:
        """Add the validation loss to the newest point of the curve."""
        measured = math.log(perplexity(run.model, validation)["perplexity"])
        self.curve[-1] = replace(self.curve[-1], validation_loss=measured)

    def _measured(self) -> list[tuple[int, float]]:
        """(step, validation loss) of every measurement."""
        return [(point.step, point.validation_loss) for point in self.curve if point.validation_loss is not None]

    def _best(self) -> int:
        """The step of the lowest validation loss."""
        return min(self._measured(), key=lambda measured: measured[1])[0]

    def _ended(self, step: int) -> bool:
        """Whether all steps are taken, or the last ``patience`` measurements brought nothing better."""
        losses = [loss for _, loss in self._measured()]
        worn = len(losses) - 1 - losses.index(min(losses)) >= self.settings.patience
        return worn or step >= self.settings.steps

    def _keep(self, run: StoredTraining) -> None:
        """Put the run into the store, its best state beside it, and drop what was there before."""
        before = self._snapshots.path(self._measured()[-2][0])

        def write(folder: Path) -> None:
            # an ended run goes on no more; one by one, because save_file copies what it writes
            for part, tensors in () if self._ended(run.step) else run.state().items():
                _save(tensors, folder / f"{part}.safetensors")
            if self._best() == run.step:
                _save(run.state()["parameter"], folder / BEST)
            elif (before / BEST).exists():
                shutil.copyfile(before / BEST, folder / BEST)
            write_json(folder / "curve.json", [asdict(point) for point in self.curve])

        self._snapshots.keep(run.step, write)

    def _resume(self, run: StoredTraining) -> None:
        """Go on from the newest snapshot, if there is one."""
        if newest := self._snapshots.newest():
            step, entry = newest
            self.curve = [Point(**point) for point in read_json(entry / "curve.json")]
            if self._ended(step):
                run.step = step
            else:
                run.restore({part: load_file(entry / f"{part}.safetensors") for part in PARTS}, step)
            say(f"update_weights: refinement: goes on after step {step} of {self.settings.steps}")

    def _write(self, run: StoredTraining, folder: Path) -> None:
        kept = self._best()
        (folder / ROUNDED_FOLDER).mkdir()
        if kept:
            run.set(load_file(self._snapshots.path(self.curve[-1].step) / BEST))
            _save(run.vectors(), folder / VECTORS)
            factors, rounded = run.factors(), run.rounded()
        for file in self.files:
            began = read_factors(file)
            write_factors(folder / file.name, {name: factors[name] for name in began} if kept else began)
        for file in self.rounded:
            read = read_rounded(file)
            write_rounded(folder / ROUNDED_FOLDER / file.name, {name: rounded[name] for name in read} if kept else read)
        write_curve(folder / CURVE, self.curve)
        losses = [loss for _, loss in self._measured()]
        write_json(folder / SUMMARY, {"steps": kept, "before": losses[0], "after": min(losses)})


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def write_curve(path: Path, curve: Sequence[Point]) -> None:
    """One line per step; the header alone when nothing was refined."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Point.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(point) for point in curve)
