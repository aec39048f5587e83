"""What `baseline` and `evaluate` measure, one result of the store each: a perplexity, a task, a generated text.

A model is loaded when the first measurement that the store lacks needs it. A kill costs the seconds since the last
snapshot of the measurement that was under way.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.sections import Evaluate
from pipeline.data.bos import Rule
from pipeline.runtime.artifacts import read_json
from pipeline.runtime.layers import LayerTask, Workers, keyed, run_layers
from pipeline.runtime.snapshots import Snapshots
from pipeline.runtime.store import LayerStore
from pipeline.steps.behaviour import write_generation, write_scores
from pipeline.steps.measure import HELD, VALUE, Load, tokens_sha256, write_perplexity

if TYPE_CHECKING:
    import torch
    from torch import Tensor
DENSE = "dense"


class Measurements:
    """A list of measurements on one device, in the order they are asked for; ``run`` takes or makes them all.

    Args:
        stage: named in the progress bar.
        workers: section `runtime`.
        settings: section `evaluate`.
        bos: ``calibrate.bos``, of what tasks and the generated text begin with.
    """

    def __init__(
        self, stage: str, workers: Workers, store: LayerStore, device: "torch.device", settings: Evaluate, bos: Rule
    ) -> None:
        self.stage, self.workers, self.store = stage, workers, store
        self.device, self.settings, self.bos = device, settings, bos
        self._tasks: dict[tuple[str, str, str], LayerTask] = {}
        self._unfinished: list[Snapshots] = []

    def perplexities(self, load: Load, identity: Any, texts: Mapping[str, "Tensor"], name: str = DENSE) -> None:
        """Ask for the ``TextPerplexity`` of a model on every text; ``identity`` is what the model depends on."""
        batch_size = self.settings.batch_size
        for text, windows in texts.items():
            compute = partial(write_perplexity, load, f"{text}, {name}", windows, batch_size)
            made = keyed(
                "measure", "perplexity", compute, identity, tokens_sha256(windows), batch_size, str(self.device)
            )
            snapshots = Snapshots(self.store, made.key, range(1, len(windows) + 1))
            self._unfinished.append(snapshots)
            self._add(name, "perplexity", text, LayerTask("", made.key, partial(compute, snapshots)))

    def behaviour(self, load: Load, folder: Path, identity: Any, tasks: Mapping[str, Any], name: str = DENSE) -> None:
        """Ask for the scores on all tasks, and for a generated text.

        Args:
            folder: of the model, for its tokenizer.
            tasks: entry of ``evaluate.tasks`` -> what its data is, from `sources`.
        """
        settings, device = self.settings, str(self.device)
        for task, data in settings.tasks.items():
            limit, batch_size = settings.task_limit, settings.batch_size
            compute = partial(write_scores, load, folder, self.bos, task, data, limit, batch_size)
            made = keyed("measure", "task", compute, identity, self.bos, task, tasks[task], limit, batch_size, device)
            answers = self.store.root / f".answers-{made.key}"
            self._add(name, "tasks", task, LayerTask("", made.key, partial(compute, answers)))
        values = (self.bos, settings.prompt, settings.new_tokens)
        sample = keyed("measure", "text", partial(write_generation, load, folder, *values), identity, *values, device)
        self._add(name, "generation", "", sample)

    def run(self) -> dict[str, dict[str, Any]]:
        """Model's name -> ``perplexity`` by text, ``tasks`` by task, ``generation``; ``size`` of a quantized one."""
        entries = run_layers(self.stage, list(self._tasks.values()), self.workers, self.store, ordered=True)
        for snapshots in self._unfinished:
            snapshots.clear()
        HELD.release()
        found: dict[str, dict[str, Any]] = {}
        for (name, kind, what), task in self._tasks.items():
            value = read_json(entries[task.name] / VALUE)
            of_model = found.setdefault(name, {"perplexity": {}, "tasks": {}})
            if kind == "generation":
                of_model[kind] = value
            elif kind == "tasks":
                of_model[kind] |= value  # a group of tasks has several
            else:
                of_model["size"] = value.pop("size")
                of_model[kind][what] = value
        return found

    def _add(self, name: str, kind: str, what: str, task: LayerTask) -> None:
        label = " ".join(part for part in (name, kind, what) if part)
        self._tasks[name, kind, what] = LayerTask(label, task.key, task.compute)
