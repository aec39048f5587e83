"""What a run takes, from a model's shape alone: disk, memory and time of every stage.

    python -m pipeline.steps.plan --table            three sizes of model, on two processor cores and on one GPU
    python -m pipeline.steps.plan FOLDER             the model whose config.json is in FOLDER, on both

Both with the params.yaml of this folder, one stage after the other:

    seconds = start + operations / their rate + bytes / their rate
    memory  = what the process itself takes + the most that is there at once

The rates of ``CORES`` are fitted to runs of SmolLM2-135M on two cores of an AMD EPYC (Zen 3), those of ``GPU`` to one
run of it on an H100 with 16 cores, see each; a larger model was run on neither. Memory was compared with that of a
model of 54 million numbers in windows of 128 tokens: 0.74 GB computed and 0.74 measured in `prepare`, 0.78 and 0.93 in
`capture`, 1.13 and 1.13 in `train_ranks`, 1.38 and 1.40 in `update_weights`. The layers are Llama's: grouped-query
attention, a gated MLP, no biases. Tasks of lm-eval, downloads, and on a GPU the many small SVDs of `dobi` are not
counted, nor are rounded weights: the formulas are of low rank alone.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config.params import Params, load
from pipeline.runtime.console import run
from pipeline.steps.plan_shape import Plan, Shape
from pipeline.steps.plan_work import STAGES, Work


@dataclass(frozen=True)
class Machine:
    """Rates of a machine, per second, and what a process takes before it does anything."""

    single: float
    double: float
    memory: float
    disk: float
    start: float
    process: float
    device: float = 0
    """Bytes of the device's own memory; 0: it computes in the host's."""


CORES = Machine(
    single=8.5e10,  # `capture` with 64 instead of 32 gradient windows took 193 s more: 7e10; prefill makes 1e11
    double=4.2e10,  # what that leaves of the 690 s of `capture`
    memory=7e9,  # decode reads 538 MB 13 times a second
    disk=4e8,  # written, flushed, and hashed twice
    start=10,  # torch and transformers are imported, the model is read
    process=5.2e8,  # any stage of a tiny model
)
GPU = Machine(
    single=4e13,  # an H100 states 6.7e13 without 16-bit products
    double=1.2e11,  # `capture` took 58 s and `remap`, which packs on the host, 37 s: eigenproblems keep it waiting
    memory=2e12,  # it states 3.4e12
    disk=1e9,
    start=20,  # `evaluate`, `baseline` and `train_ranks` took 20 to 24 s
    process=2.5e9,  # with the host's part of CUDA
    device=8e10,
)
CONTEXT = 5e8  # bytes of the device that CUDA takes for itself


def peaks(work: Work, machine: Machine) -> tuple[float, float]:
    """Bytes of the host's memory and of the device's, which are 0 where nothing is computed there or both are one."""
    if not machine.device:
        return machine.process + work.host + work.device, 0
    return machine.process + max(work.host, work.loaded), (work.device + CONTEXT) * (work.device > 0)


def seconds(work: Work, machine: Machine) -> float:
    """Time of a stage."""
    computing = work.single / machine.single + work.double / machine.double
    return machine.start + computing + work.moved / machine.memory + work.disk / machine.disk


MODELS = {
    "0.1 B": Shape(30, 576, 1536, 9, 3, 64, 49152, True),  # SmolLM2-135M
    "1 B": Shape(16, 2048, 8192, 32, 8, 64, 128256, True),  # Llama-3.2-1B
    "7 B": Shape(32, 4096, 11008, 32, 32, 128, 32000, False),  # Llama-2-7B
}


def shown_bytes(value: float) -> str:
    """Two digits, in kB, MB or GB; a dash for nothing."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if value >= unit), (1e3, "kB"))
    return (f"{value / unit:.0f} {name}" if value >= 10 * unit else f"{value / unit:.1f} {name}") if value else "–"


def shown_seconds(value: float) -> str:
    """Seconds, minutes or hours, the first of them that makes fewer than a hundred."""
    unit, name = next(((unit, name) for unit, name in ((1, "s"), (60, "min")) if value < 100 * unit), (3600, "h"))
    return f"{value / unit:.0f} {name}"


def table(models: Mapping[str, Shape], params: Params, machine: Machine) -> Iterator[str]:
    """Markdown: a line per stage; of every model its memory and time, and on the CPU what it writes.

    What does not fit into the device is bold.
    """
    kinds = ["host memory", "GPU memory", "time"] if machine.device else ["disk", "memory", "time"]
    yield f"| stage | {' | '.join(f'{name}: {kind}' for name in models for kind in kinds)} |"
    yield f"|---|{'---|' * len(kinds) * len(models)}"
    plans = [Plan(shape, params) for shape in models.values()]
    for name, stage in STAGES.items():
        cells: list[str] = []
        for plan in plans:
            work = stage(plan)
            host, device = peaks(work, machine)
            taken = [host, device] if machine.device else [work.disk, host]
            cells += map(shown_bytes, taken)
            if device > machine.device:
                cells[-1] = f"**{cells[-1]}**"
            cells.append(shown_seconds(seconds(work, machine)))
        yield f"| `{name}` | {' | '.join(cells)} |"


def main(
    folder: Annotated[Path | None, typer.Argument(help="A model's folder.")] = None,
    table_: Annotated[bool, typer.Option("--table", help="The three sizes of the README.")] = False,
) -> None:
    """Print what every stage takes."""
    if folder is None and not table_:
        raise typer.BadParameter("give a model's FOLDER, or --table")
    models = dict(MODELS)
    if folder is not None:
        models = {folder.name: Shape.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))}
    params = load()
    print("Two cores, fitted to measured times:\n")
    print(*table(models, params, CORES), sep="\n")
    print(
        "\nOne H100, fitted to one run of the 0.1 B model, whose small matrices keep a GPU waiting: the times of "
        "larger ones are upper bounds. Bold: more than its 80 GB:\n"
    )
    print(*table(models, params, GPU), sep="\n")


if __name__ == "__main__":
    run(main)
