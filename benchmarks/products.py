"""What the product of one linear costs when its weight is kept in integers: microseconds per call, by rows.

    python -m benchmarks.products [--shapes 1536x576 4096x4096 11008x4096] [--rows 1 16 64 256] [--dtype bfloat16]

For every shape (out x in) and number of rows one JSON line: `dense` in the dtype, what
`spectrim.formats.products.product` does with int8, and what torch keeps: the integers expanded in the call, the same
compiled (--compile), its own kernels for int8 and, on a GPU, for int4 in groups of 64. Weights take turns, so that they
come from memory and not from a cache.
On a GPU the calls are replayed as one CUDA graph, which leaves out what launching them costs. Nothing is timed that
computes something else: a relative error above one per cent ends the run.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.benchmark import Timer

from pipeline.config.params import load
from pipeline.runtime.devices import resolve
from spectrim.errors import NumericalError, SpectrimError
from spectrim.formats.products import product

BYTES = 120_000_000
"""Of int8 weights that take turns: more than the second-level cache of any GPU or CPU."""
MOST, GROUP, SECONDS = 60, 64, 0.2

Run = Callable[[Tensor, Any, Any], Tensor]


def expanded(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Integers of 8 bits in the dtype of ``x`` for the length of the call."""
    return functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)


def torch_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The kernel that torch keeps for int8 weights."""
    y: Tensor = torch._weight_int8pack_mm(x, weight, scale.to(x.dtype))
    return y


def torch_int4(x: Tensor, weight: Tensor, scale_and_zero: Tensor) -> Tensor:
    """The kernel that torch keeps for int4 weights on a GPU."""
    y: Tensor = torch._weight_int4pack_mm(x, weight, GROUP, scale_and_zero)
    return y


def int4_weights(count: int, out: int, in_: int, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
    """Packed weights in the GPU kernel's order, its scales with zeros, and the first weight expanded."""
    values = [torch.randint(0, 16, (out, in_), dtype=torch.int32, device=device) for _ in range(count)]
    scale = torch.rand(in_ // GROUP, out, device=device, dtype=torch.bfloat16) / 100
    packed = [torch._convert_weight_to_int4pack((one[:, ::2] << 4 | one[:, 1::2]).to(torch.uint8), 2) for one in values]
    exact = (values[0] - 8).float() * scale.float().mT.repeat_interleave(GROUP, 1)
    return packed, torch.stack([scale, torch.zeros_like(scale)], -1), exact


def microseconds(run: Run, arguments: Sequence[tuple[Tensor, Any, Any]]) -> float:
    """Median time of a call, over rounds through all ``arguments``."""

    def work() -> None:
        for one in arguments:
            run(*one)

    work()
    replay: Callable[[], Any] = work
    if arguments[0][0].device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replay = graph.replay
    timer = Timer("replay()", globals={"replay": replay}, num_threads=torch.get_num_threads())
    return 1e6 * timer.blocked_autorange(min_run_time=SECONDS).median / len(arguments)


def timed(name: str, run: Run, x: Tensor, weights: Sequence[Tensor], scale: Any, exact: Tensor) -> float:
    """Microseconds of ``run``, which must give x exactᵀ with the first weight."""
    expected = x.float() @ exact.mT
    error = float((run(x, weights[0], scale).float() - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise NumericalError(f"{name}: a relative error of {error:.2g} at {tuple(x.shape)}; at most 0.01 is rounding")
    return round(microseconds(run, [(x, weight, scale) for weight in weights]), 2)


def row(
    out: int, in_: int, rows: int, dtype: torch.dtype, device: torch.device, compiled: Run | None
) -> dict[str, Any]:
    """Every product of one shape and number of rows."""
    count = max(2, min(MOST, BYTES // (out * in_)))
    weights = [torch.randint(-127, 128, (out, in_), dtype=torch.int8, device=device) for _ in range(count)]
    scale, x = torch.rand(out, device=device) / 2000, torch.randn(rows, in_, device=device).to(dtype)
    dense = [weight.to(dtype) / 2000 for weight in weights]
    found: dict[str, Any] = {"out": out, "in": in_, "rows": rows, "dtype": str(dtype).removeprefix("torch.")}
    found["dense"] = timed("dense", lambda x, weight, _: functional.linear(x, weight), x, dense, None, dense[0].float())
    exact = weights[0].float() * scale[:, None]
    runs: dict[str, Run] = {"int8": product, "int8 expanded": expanded}
    if compiled is not None:
        runs["int8 compiled"] = compiled
    # on a CPU it reads 32 inputs at once, also beyond the end of a row
    if dtype == torch.bfloat16 and (device.type == "cuda" or in_ % 32 == 0):
        runs["int8 of torch"] = torch_int8
    with torch.inference_mode():
        found |= {name: timed(name, run, x, weights, scale, exact) for name, run in runs.items()}
        if dtype == torch.bfloat16 and device.type == "cuda" and in_ % GROUP == 0:
            packed, zeros, exact = int4_weights(count, out, in_, device)
            found["int4 of torch"] = timed("int4 of torch", torch_int4, x, packed, zeros, exact)
    return found


def main() -> int:
    """Parse arguments and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "4096x4096", "11008x4096"], help="out x in")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="time what torch.compile makes of the expanded product")
    parser.add_argument("--threads", type=int, default=2, help="of torch on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compiled = torch.compile(expanded, dynamic=False) if arguments.compile else None
    try:
        device = resolve(load().runtime.device)
        for shape in arguments.shapes:
            out, in_ = (int(side) for side in shape.split("x"))
            for rows in arguments.rows:
                print(json.dumps(row(out, in_, rows, getattr(torch, arguments.dtype), device, compiled)), flush=True)
    except SpectrimError as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
