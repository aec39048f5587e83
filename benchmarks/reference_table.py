"""Training-free factors against the reference table of the design: one JSON object per method and ratio.

Protocol: calibration 64 × 1,024 tokens, gradient Grams from 64 × 512 of them (the defaults of params.yaml, captured by
`dvc repro capture`); test 16 contiguous windows of 1,024 tokens of FILE taken as one text; all linears inside the
blocks; factors in full precision; uniform means rank = int(ratio·mn/(m+n)), unaligned. Other numbers of windows and
tokens are another protocol, and are refused unless they are given here as they were captured.

    svd                   plain truncated SVD of the weight, uniform
    svd-llm               closed form on the input Gram, uniform
    two-sided             input and gradient Grams, uniform
    two-sided-fisher      the same factors, ranks by water-filling of the predicted loss, dense as a choice
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.params import load
from pipeline.data.bos import follow
from pipeline.data.text_file import file_windows
from pipeline.runtime.artifacts import artifact, read_json
from pipeline.runtime.devices import resolve
from pipeline.steps.model_folders import load_model, load_tokenizer
from spectrim.compression.statistics import gram_of
from spectrim.compression.truncated import GatedLinear, attach_truncated
from spectrim.errors import ConfigError
from spectrim.evaluation.perplexity import perplexity
from spectrim.maths import allocation, budget
from spectrim.maths.lowrank import Factors, closed_form, plain_svd
from spectrim.models.modules import linears_by_block

CAPTURED = artifact("capture")
Protocol = dict[str, int]
PROTOCOL: Protocol = {"windows": 64, "seq_len": 1024, "test_windows": 16}


def svd(index: int, name: str, weight: Tensor) -> Factors:
    """Plain SVD at full rank."""
    left, _, right = plain_svd(weight.double())
    return Factors(left, right)


def svd_llm(index: int, name: str, weight: Tensor) -> Factors:
    """Closed form on the captured Gram at full rank."""
    left, _, right = closed_form(weight.double(), gram_of(CAPTURED, index, name).to(weight.device))
    return Factors(left, right)


def two_sided(index: int, name: str, weight: Tensor) -> Factors:
    """The captured two-sided factors."""
    stored = load_file(CAPTURED / "factors" / f"{index:03}.safetensors")
    return Factors(stored[f"left.{name}"], stored[f"right.{name}"])


METHODS: dict[str, tuple[Callable[[int, str, Tensor], Factors], str]] = {
    "svd": (svd, "uniform"),
    "svd-llm": (svd_llm, "uniform"),
    "two-sided": (two_sided, "uniform"),
    "two-sided-fisher": (two_sided, "fisher"),
}


class Table:
    """The dense model, its linears, and the test windows; ``rows`` measures one method at every ratio."""

    def __init__(self, text: Path, device: torch.device, protocol: Protocol) -> None:
        check_protocol(protocol)
        self.model = load_model(artifact("prepare"), device).requires_grad_(False)
        tokenizer = follow(load_tokenizer(artifact("prepare")), load().calibrate.bos)
        self.windows = file_windows(text, tokenizer, protocol["seq_len"], protocol["test_windows"])
        self.blocks = linears_by_block(self.model)
        self.linears = {name: linear for block in self.blocks.values() for name, linear in block.items()}
        self.shapes = [(linear.out_features, linear.in_features) for linear in self.linears.values()]
        self.dense = perplexity(self.model, self.windows)["perplexity"]

    def rows(self, method: str, ratios: list[float]) -> None:
        """Print one JSON object per ratio."""
        started = time.perf_counter()
        make, ranking = METHODS[method]
        gated: dict[str, GatedLinear] = {}
        for index, block in enumerate(self.blocks.values()):
            for name, linear in block.items():
                pair = make(index, name, linear.weight)
                pair = Factors(*(part.to(linear.weight.device, linear.weight.dtype) for part in pair))
                gated[name] = GatedLinear(pair, linear.weight, linear.bias)
        shared = time.perf_counter() - started
        for ratio in ratios:
            started = time.perf_counter()
            for (name, module), rank in zip(gated.items(), self._ranks(ranking, ratio), strict=True):
                module.rank = rank
                attach_truncated(self.model, {name: module})
            measured = perplexity(self.model, self.windows)["perplexity"]
            row = {"method": method, "ratio": ratio, "perplexity": measured, "dense_perplexity": self.dense}
            print(json.dumps(row | {"seconds": round(shared + time.perf_counter() - started, 3)}), flush=True)

    def _ranks(self, ranking: str, ratio: float) -> list[int]:
        if ranking == "uniform":
            return allocation.uniform(self.shapes, ratio, "float16", 1)
        spectra = load_file(CAPTURED / "spectra.safetensors")
        energies = [spectra[f"two_sided.{name}"] ** 2 for name in self.linears]
        return allocation.fisher(energies, self.shapes, budget.budget_bytes(self.shapes, ratio), "float16", 1).ranks


def check_protocol(protocol: Protocol) -> None:
    """Raise ConfigError unless the captured statistics are those of the protocol."""
    if not CAPTURED.exists():
        raise ConfigError([f"{CAPTURED}: not there; run `dvc repro capture` first"])
    found = read_json(artifact("calibrate") / "calibrate.json")["calibration"]
    if (found["n_windows"], found["seq_len"]) != (protocol["windows"], protocol["seq_len"]):
        raise ConfigError(
            [
                f"params.yaml: calibrate: {found['n_windows']} × {found['seq_len']} tokens were captured, the "
                f"protocol needs {protocol['windows']} × {protocol['seq_len']}; set them and run `dvc repro capture`"
            ]
        )


def main() -> None:
    """Parse arguments and print the rows as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.4], help="default: %(default)s")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="test text, taken as one text")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    for name, value in PROTOCOL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        protocol = {name: getattr(arguments, name) for name in PROTOCOL}
        table = Table(arguments.text, resolve(load().runtime.device), protocol)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    for method in arguments.methods:
        table.rows(method, arguments.ratios)


if __name__ == "__main__":
    main()
