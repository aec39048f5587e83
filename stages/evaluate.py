"""The compressed model against the dense one, on the same windows.

reads   artifacts/remap, artifacts/prepare (model), artifacts/calibrate/test, artifacts/baseline/baseline.json;
        evaluate.tasks and artifacts/sources/tasks.json
writes  reports/metrics.json, reports/evaluate (a csv per figure); with --text: JSON on stdout and no file
params  evaluate, compression.ratio, calibrate.bos (with --text also calibrate.seq_len)
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.config.params import load
from pipeline.data.bos import follow
from pipeline.data.text_file import file_windows
from pipeline.runtime.artifacts import artifact, read_json, write_json
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.runtime.store import LayerStore
from pipeline.steps import measure, metrics
from pipeline.steps.compressed import compressed_subject
from pipeline.steps.measurements import Measurements
from pipeline.steps.model_folders import load_tokenizer, model_identity
from pipeline.steps.subjects import dense_subject
from pipeline.steps.tasks import check_tasks
from spectrim.checkpoint.layout import read_bytes
from spectrim.errors import ConfigError

FILE_WINDOWS = 16  # of a file given with --text: the protocol of the reference table
COMPRESSED = "compressed"


def main(
    text: Annotated[Path | None, typer.Option(help="Measure both models on this file instead and print JSON.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help=f"Windows of that file ({FILE_WINDOWS}).")] = None,
    column: Annotated[str, typer.Option(help="Column of the texts in a jsonl or parquet file.")] = "text",
) -> None:
    """Measure the compressed model against the dense one."""
    params, remap = load(), artifact("remap")
    settings, device = params.evaluate, resolve(params.runtime.device)
    if text is not None:
        tokenizer = follow(load_tokenizer(remap), params.calibrate.bos)
        file = file_windows(text, tokenizer, params.calibrate.seq_len, windows or FILE_WINDOWS, column)
        print(json.dumps(_further(str(text), file, device, settings.batch_size), indent=2))
        return
    if windows is not None:
        raise ConfigError(["--windows: counts the windows of a file; give --text FILE too"])

    texts, baseline_file = measure.evaluation_windows(), artifact("baseline", "baseline.json")
    baseline = read_json(baseline_file)
    check_tasks(settings.tasks)
    measure.require_same_tokens(baseline, texts, baseline_file)
    wanted = Measurements("evaluate", params.runtime, LayerStore(), device, settings, params.calibrate.bos)
    compressed, identity = partial(compressed_subject, remap, device), model_identity(remap)
    wanted.behaviour(compressed, remap, identity, read_json(artifact("sources", "tasks.json")), COMPRESSED)
    wanted.perplexities(compressed, identity, texts, COMPRESSED)
    found = wanted.run()[COMPRESSED]
    about = read_json(remap / "spectrim.json")
    measured = metrics.collect(
        target_ratio=params.compression.ratio,
        stored=read_bytes(remap),
        model=about["provenance"]["model"],
        matrices=about["matrices"],
        baseline=baseline,
        perplexity=found["perplexity"],
        tasks=found["tasks"],
        generation=found["generation"],
    )
    metrics.write_tables(measured, Path("reports", "evaluate"))
    write_json(Path("reports", "metrics.json"), measured)


def _further(name: str, windows: Any, device: Any, batch_size: int) -> dict[str, Any]:
    """Perplexity of both models, one after the other, on a text that is not in params.yaml."""
    found = {}
    for side, load_side in (
        ("dense", partial(dense_subject, artifact("prepare"), device)),
        (COMPRESSED, partial(compressed_subject, artifact("remap"), device)),
    ):
        found[side] = measure.measured(measure.HELD(load_side).model, name, windows, batch_size=batch_size, desc=side)
    perplexity = {side: entry["perplexity"] for side, entry in found.items()}
    return {**found["dense"], "text": name, "perplexity": perplexity}


if __name__ == "__main__":
    run(main)
