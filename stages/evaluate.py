"""The compressed model against the dense one, on the same windows and in the same run.

reads   artifacts/remap, artifacts/prepare (models), artifacts/calibrate/test, artifacts/baseline/baseline.json
writes  reports/metrics.json, reports/evaluate (a csv per figure); with --text: JSON on stdout and no file
params  evaluate, compression.ratio (with --text also calibrate.seq_len)
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.config.params import load
from pipeline.config.sections import Evaluate
from pipeline.data.text_file import file_windows
from pipeline.runtime.artifacts import artifact, read_json, write_json
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.runtime.progress import progress
from pipeline.steps import measure, metrics
from pipeline.steps.tasks import load_tasks, run_tasks
from spectrim.checkpoint.layout import read_bytes
from spectrim.errors import ConfigError
from spectrim.evaluation.perplexity import generate
from spectrim.evaluation.speed import n_parameters, peak_bytes, throughput, weight_bytes

FILE_WINDOWS = 16  # of a file given with --text: the protocol of the reference table
SIDES = {"dense": "prepare", "compressed": "remap"}


def main(
    text: Annotated[Path | None, typer.Option(help="Measure both models on this file instead and print JSON.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help=f"Windows of that file ({FILE_WINDOWS}).")] = None,
    column: Annotated[str, typer.Option(help="Column of the texts in a jsonl or parquet file.")] = "text",
) -> None:
    """Measure the compressed model against the dense one."""
    params = load()
    settings, device = params.evaluate, resolve(params.runtime.device)
    if text is not None:
        calibrate = params.calibrate
        tokenizer = measure.load_tokenizer(artifact("remap"))
        file = file_windows(text, tokenizer, calibrate.seq_len, windows or FILE_WINDOWS, column)
        print(json.dumps(_further(str(text), file, device, settings.batch_size), indent=2))
        return
    if windows is not None:
        raise ConfigError(["--windows: counts the windows of a file; give --text FILE too"])

    tasks, texts, baseline_file = (
        load_tasks(settings.tasks),
        measure.evaluation_windows(),
        artifact("baseline", "baseline.json"),
    )
    baseline = read_json(baseline_file)
    measure.require_same_tokens(baseline, texts, baseline_file)
    running, model = _running(settings, device)
    tokenizer = measure.load_tokenizer(artifact("remap"))
    measured = metrics.collect(
        target_ratio=params.compression.ratio,
        stored=read_bytes(artifact("remap")),
        matrices=read_json(artifact("remap", "spectrim.json"))["matrices"],
        baseline=baseline,
        perplexity=measure.text_perplexities(model, texts, batch_size=settings.batch_size, desc="compressed"),
        tasks=run_tasks(model, tokenizer, tasks, limit=settings.task_limit, batch_size=settings.batch_size),
        generation=generate(model, tokenizer, settings.prompt, settings.new_tokens),
        running={**running, "machine": measure.machine(device), "process": measure.process_peak(device)},
    )
    metrics.write_tables(measured, Path("reports", "evaluate"))
    write_json(Path("reports", "metrics.json"), measured)


def _running(settings: Evaluate, device: Any) -> tuple[dict[str, Any], Any]:
    """Speed, memory and parameters of both models in turns, and the compressed model; the dense one is let go."""
    models = {side: measure.load_model(artifact(stage), device) for side, stage in SIDES.items()}
    lengths = {"prefill_tokens": settings.speed_prefill_tokens, "decode_tokens": settings.speed_decode_tokens}
    bar = partial(progress, desc="speed")
    running = {
        "speed": throughput(models, **lengths, repeats=settings.speed_repeats, progress=bar),
        "memory": {
            "weights": {side: weight_bytes(model) for side, model in models.items()},
            "peak": {side: peak_bytes(model, **lengths) for side, model in models.items()},
        },
        "parameters": {side: n_parameters(model) for side, model in models.items()},
    }
    return running, models["compressed"]


def _further(name: str, windows: Any, device: Any, batch_size: int) -> dict[str, Any]:
    """Perplexity of both models, one after the other, on a text that is not in params.yaml."""
    found = {}
    for side, stage in SIDES.items():
        model = measure.load_model(artifact(stage), device)
        found[side] = measure.text_perplexities(model, {name: windows}, batch_size=batch_size, desc=side)[name]
        del model
    return {**found["dense"], "text": name, "perplexity": {side: entry["perplexity"] for side, entry in found.items()}}


if __name__ == "__main__":
    run(main)
