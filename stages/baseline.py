"""What the compressed model is measured against, computed once for all ratios: the dense model and plain quantization.

reads   artifacts/prepare (model), artifacts/calibrate/test, artifacts/capture (Grams, for GPTQ); evaluate.tasks and
        artifacts/sources/tasks.json
writes  artifacts/baseline/baseline.json
params  baseline, evaluate (batch_size, tasks, task_limit, prompt, new_tokens), compression.{exclude,alternatives},
        capture.{damping,max_damping}, calibrate.bos
"""

from functools import partial
from typing import Any

from pipeline.config.params import load
from pipeline.runtime.artifacts import artifact, fresh_folder, read_json, sha256_file, write_json
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.runtime.store import LayerStore
from pipeline.steps.measure import evaluation_windows
from pipeline.steps.measurements import DENSE, Measurements
from pipeline.steps.model_folders import model_identity
from pipeline.steps.rounded_blocks import blocks_on
from pipeline.steps.subjects import N_BITS, dense_subject, quantized_subject, rounded_subject
from pipeline.steps.tasks import check_tasks
from spectrim.maths.storage_formats import Grid

GPTQ = {"gptq_int4": False, "gptq_int4_asym": True}
"""Whether there are zero points."""


def main() -> None:
    """Measure the dense model and its quantizations on the test texts."""
    params, prepared = load(), artifact("prepare")
    settings, device = params.evaluate, resolve(params.runtime.device)
    texts, identity, exclude = evaluation_windows(), model_identity(prepared), params.compression.exclude
    check_tasks(settings.tasks)
    wanted = Measurements("baseline", params.runtime, LayerStore(), device, settings, params.calibrate.bos)
    dense = partial(dense_subject, prepared, device)
    wanted.behaviour(dense, prepared, identity, read_json(artifact("sources", "tasks.json")))
    wanted.perplexities(dense, identity, texts)
    for name in params.baseline.quantization:
        group_size = params.baseline.group_size if name == "int4" else None
        quantized = partial(quantized_subject, prepared, name, group_size, exclude, device)
        made_of: list[Any] = [identity, name, group_size, exclude]
        if name in GPTQ:
            files = blocks_on(params, Grid(N_BITS["int4"], params.baseline.group_size, GPTQ[name]), device)
            quantized = partial(rounded_subject, prepared, files, N_BITS["int4"], exclude, device)
            made_of += [sha256_file(file) for file in files]
        wanted.perplexities(quantized, made_of, texts, name)
    measured = wanted.run()
    quantization = {
        name: {**measured[name]["size"], "perplexity": measured[name]["perplexity"]}
        for name in params.baseline.quantization
    }
    with fresh_folder(artifact("baseline")) as out:
        write_json(out / "baseline.json", {**measured[DENSE], "quantization": quantization})


if __name__ == "__main__":
    run(main)
