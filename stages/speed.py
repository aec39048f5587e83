"""How fast the compressed model runs and what memory it takes, beside the dense one in the same run.

reads   artifacts/remap, artifacts/prepare (models)
writes  reports/speed.json: what differs from run to run and from machine to machine
params  speed
"""

from functools import partial
from pathlib import Path

from pipeline.config.params import load
from pipeline.runtime.artifacts import artifact, require_model, write_json
from pipeline.runtime.console import run
from pipeline.runtime.devices import resolve
from pipeline.runtime.progress import progress
from pipeline.steps.compressed import compressed_subject
from pipeline.steps.machine import described, process_peak, speed_dtypes
from pipeline.steps.metrics import significant
from pipeline.steps.model_folders import load_model
from spectrim.checkpoint.saving import half_dtype
from spectrim.evaluation.speed import peak_bytes, throughput, to_fastest, weight_bytes


def main() -> None:
    """Measure speed and memory of both models, in turns."""
    params = load()
    settings, device = params.speed, resolve(params.runtime.device)
    for stage in ("prepare", "remap"):
        require_model(artifact(stage))
    candidates = speed_dtypes(settings.dtype, half_dtype(artifact("prepare")), device)
    models = {
        "dense": load_model(artifact("prepare"), device),
        "compressed": compressed_subject(artifact("remap"), device).model,
    }
    lengths = {"prefill_tokens": settings.prefill_tokens, "decode_tokens": settings.decode_tokens}
    dtypes = {side: to_fastest(model, candidates, **lengths) for side, model in models.items()}
    bar = partial(progress, desc="speed")
    measured = {
        "speed": throughput(models, **lengths, repeats=settings.repeats, progress=bar),
        "memory": {
            "weights": {side: weight_bytes(model) for side, model in models.items()},
            "peak": {side: peak_bytes(model, **lengths) for side, model in models.items()},
        },
        "dtypes": {side: str(dtype).removeprefix("torch.") for side, dtype in dtypes.items()},
        "machine": described(device),
        "process": process_peak(device),
    }
    write_json(Path("reports", "speed.json"), significant(measured))


if __name__ == "__main__":
    run(main)
