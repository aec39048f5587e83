"""Prefill and decode of compressed models against the dense one: tokens per second, and bytes of weights in memory.

    python -m benchmarks.inference [--ratios 0.9 0.8 0.6 0.5 0.4] [--batches 1 8] [--contexts 32 512] [--threads 2]

The model of `prepare`, dense in float32 and bfloat16, with every linear rounded to int8 or int4, and with every linear
as factors of one uniform ratio: two products each and nothing else; then as loaded models have them, with one first
product for q/k/v and for gate/up, in float factors, pivoted rows and int8. In float32 but where bfloat16 is said: on a
GPU all factors are. Speed does not depend on the numbers, so the factors are random. All take turns within one run; one
JSON line per model, batch and context, `prefill` and `decode` relative to dense float32, above 1 is faster: over the
ratios the break-even curve.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.params import load
from pipeline.runtime.artifacts import artifact
from pipeline.runtime.devices import resolve
from pipeline.runtime.progress import progress
from pipeline.steps.model_folders import load_model
from spectrim.errors import SpectrimError
from spectrim.evaluation.speed import throughput, weight_bytes
from spectrim.formats.kinds import kind_of
from spectrim.formats.lowrank_linear import LowRankLinear
from spectrim.formats.shared_input import share
from spectrim.formats.stored_linear import StoredLinear, stored_tensors
from spectrim.maths.allocation import uniform
from spectrim.maths.budget import Format, resolve_format
from spectrim.models.modules import compressible_linears, replace, same_input

REFERENCE = "dense float32"
ROUNDED_WEIGHTS: tuple[Format, ...] = ("dense_int8", "dense_int4")
FACTORS: tuple[Format, ...] = ("float16", "pifa", "int8")


def models(device: torch.device, ratios: list[float]) -> Iterator[tuple[str, Any]]:
    """Name and model of everything that is compared, the reference first."""
    params = load()
    exclude = params.compression.exclude
    dense = load_model(artifact("prepare"), device).float()
    yield REFERENCE, dense
    half: Any = load_model(artifact("prepare"), device)
    yield "dense bfloat16", half.to(torch.bfloat16)
    for format in ROUNDED_WEIGHTS:
        rounded = load_model(artifact("prepare"), device).float()
        for name, linear in compressible_linears(rounded, exclude).items():
            replace(rounded, name, filled(linear, format, min(linear.weight.shape)))
        yield format, rounded
        yield f"{format}, bfloat16", deepcopy(rounded).to(torch.bfloat16)
    dtype, kind = (torch.bfloat16, ", bfloat16") if device.type == "cuda" else (torch.float32, "")
    for ratio in ratios:
        for format in FACTORS:
            model = factored(device, format, ratio, dtype)
            if format == "float16":
                yield f"two products {ratio:g}{kind}", as_two_linears(deepcopy(model))
            share(same_input(model))
            yield f"{format} {ratio:g}{kind}", model
            if format == "int8" and dtype == torch.float32:
                yield f"int8 {ratio:g}, bfloat16", deepcopy(model).to(torch.bfloat16)


def factored(device: torch.device, format: Format, ratio: float, dtype: torch.dtype) -> Any:
    """The model with every linear in random factors of one ratio, or dense where they cost as much."""
    params = load()
    model: Any = load_model(artifact("prepare"), device)
    model = model.to(dtype)
    linears = compressible_linears(model, params.compression.exclude)
    shapes = [(linear.out_features, linear.in_features) for linear in linears.values()]
    ranks = uniform(shapes, ratio, format, params.compression.align)
    for (name, linear), shape, rank in zip(linears.items(), shapes, ranks, strict=True):
        if resolve_format(format, *shape, rank) != "dense":
            replace(model, name, filled(linear, format, rank))
    return model


def as_two_linears(model: Any) -> Any:
    """Every factored linear as two ``nn.Linear``, one after the other, which is how most methods ship theirs."""
    for name, module in [item for item in model.named_modules() if isinstance(item[1], LowRankLinear)]:
        right, left = (nn.utils.skip_init(nn.Linear, 1, 1, bias=False) for _ in range(2))
        right.weight, left.weight = nn.Parameter(module.weight.mT.contiguous()), nn.Parameter(module.left.contiguous())
        left.bias = module.bias
        replace(model, name, nn.Sequential(right, left))
    return model


def filled(linear: nn.Linear, format: Format, rank: int) -> StoredLinear:
    """A module of that format with random numbers, in the dtype and on the device of ``linear``."""
    out, in_ = linear.out_features, linear.in_features
    tensors: dict[str, Tensor] = {}
    for suffix, (shape, dtype) in stored_tensors(format, out, in_, rank).items():
        if suffix == "order":
            tensors[suffix] = torch.randperm(out).int()
        elif dtype in (torch.int8, torch.uint8):
            tensors[suffix] = torch.randint(0, 100, shape, dtype=dtype)
        else:
            tensors[suffix] = (torch.randn(shape) / 30).to(dtype)
    module = kind_of(format).from_tensors(tensors, format, out, in_, linear.bias)
    module = module.to(linear.weight.device, linear.weight.dtype)
    module.lay_out(linear.weight.dtype)
    return module


def shown(desc: str, turns: Sequence[int]) -> Iterable[int]:
    """A progress bar over the turns of one measurement."""
    return progress(turns, desc, len(turns))


def main() -> int:
    """Parse arguments and print the rows of every batch and context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.5, 0.4], help="of the factors")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="(default: 1 8)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 512], help="tokens of the prompt")
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        device = resolve(load().runtime.device)
        compared = dict(models(device, arguments.ratios))
        for batch_size in arguments.batches:
            for context in arguments.contexts:
                found = throughput(
                    compared, prefill_tokens=context, decode_tokens=arguments.decode_tokens, repeats=arguments.repeats,
                    batch_size=batch_size,
                    progress=partial(shown, f"batch {batch_size}, context {context}"),
                )  # fmt: skip
                for name, model in compared.items():
                    speeds = {"prefill": found["prefill"], "decode": found["decode"]}
                    row = {
                        "model": name,
                        "batch": batch_size,
                        "context": context,
                        **{kind: round(values[name] / values[REFERENCE], 3) for kind, values in speeds.items()},
                        "tokens_per_second": {kind: round(values[name], 1) for kind, values in speeds.items()},
                        "weight_bytes": weight_bytes(model),
                        "device": device.type,
                    }
                    print(json.dumps(row), flush=True)
    except SpectrimError as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
