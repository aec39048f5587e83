"""What the compressed model is measured against, computed once for all ratios: the dense model and plain quantization.

reads   artifacts/prepare (model), artifacts/calibrate/test
writes  artifacts/baseline/baseline.json
params  baseline, evaluate (batch_size, tasks, task_limit, prompt, new_tokens), compression.exclude
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config.params import Params, load
from pipeline.runtime.artifacts import artifact, fresh_folder, write_json
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.steps.measure import evaluation_windows, load_model, load_tokenizer, text_perplexities
from pipeline.steps.tasks import load_tasks, run_tasks
from spectrim.evaluation.perplexity import generate, quantize_model_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

N_BITS = {"int8": 8, "int4": 4}


def main() -> None:
    """Measure the dense model and its quantizations on the test texts."""
    params, prepared = load(), artifact("prepare")
    settings, device = params.evaluate, resolve(params.runtime.device)
    texts, tasks = evaluation_windows(), load_tasks(settings.tasks)
    quantization = {}
    for name in params.baseline.quantization:
        model = load_model(prepared, device)
        size = quantize_(model, name, params)
        found = text_perplexities(model, texts, batch_size=settings.batch_size, desc=name)
        quantization[name] = {**size, "perplexity": {text: entry["perplexity"] for text, entry in found.items()}}
        del model
    model, tokenizer = load_model(prepared, device), load_tokenizer(prepared)
    baseline = {
        "perplexity": text_perplexities(model, texts, batch_size=settings.batch_size, desc="dense"),
        "tasks": run_tasks(model, tokenizer, tasks, limit=settings.task_limit, batch_size=settings.batch_size),
        "generation": generate(model, tokenizer, settings.prompt, settings.new_tokens),
        "quantization": quantization,
    }
    with fresh_folder(artifact("baseline")) as out:
        write_json(out / "baseline.json", baseline)


def quantize_(model: "PreTrainedModel", name: str, params: Params) -> Mapping[str, Any]:
    """Quantize in place as an entry of ``baseline.quantization`` says; returns what it takes, see ``Quantized``."""
    if name not in N_BITS:
        from spectrim.evaluation.library_baselines import quantize_by_library_  # needs an extra

        return quantize_by_library_(model, name, exclude=params.compression.exclude)
    group_size = params.baseline.group_size if name == "int4" else None  # int8 has one scale per output channel
    return quantize_model_(model, N_BITS[name], group_size=group_size, exclude=params.compression.exclude)


if __name__ == "__main__":
    run(main)
