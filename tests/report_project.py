"""A made-up finished run with the shapes of a 30-block model of 135M parameters and plausible numbers."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipeline.steps.spectra_file import Tokens, write_spectra
from spectrim.maths.budget import dense_bytes, matrix_bytes

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
GENERATION = (
    "The capital of France is Paris, and the city is the largest in the country. It stands on the Seine; "
    "a | b\n<b>Markup</b> & ```fences``` in the sample stay what they are: text."
)


def spectra(n_blocks: int) -> dict[str, np.ndarray]:
    """σ (k,) per matrix: a steep head, a long power-law tail, stronger in later blocks."""
    noise = np.random.default_rng(0)
    found = {}
    for block in range(n_blocks):
        for place, (kind, shape) in enumerate(SHAPES.items()):
            k = min(shape)
            at = np.arange(1, k + 1)
            decay = 0.55 + 0.12 * place / len(SHAPES) + 0.25 * noise.random()
            level = np.exp(0.6 * np.sin(block / 5) + 0.5 * noise.standard_normal() - (place in (0, 1)) * 0.9)
            sigma = level * at**-decay * np.exp(-((at / (0.95 * k)) ** 6)) * (1 + 2 * np.exp(-at / 4))
            found[f"model.layers.{block}.{kind}"] = np.sort(sigma)[::-1].copy()
    return found


def ranks(sigmas: dict[str, np.ndarray], ratio: float, chosen: str = "gates") -> dict[str, Any]:
    """Ranks of one level of σ²/(m+n) for all matrices, the level bisected until the bytes fit."""
    shapes = {name: SHAPES[name.split(".", 3)[3]] for name in sigmas}
    budget = int(ratio * sum(dense_bytes(*shape) for shape in shapes.values()))
    low, high = -20.0, 20.0
    for _ in range(60):
        level = (low + high) / 2
        entries = {name: _entry(sigma, shapes[name], np.exp(level)) for name, sigma in sigmas.items()}
        total = sum(matrix_bytes(e["format"], *shapes[name], e["rank"]) for name, e in entries.items())
        low, high = (level, high) if total > budget else (low, level)
    return {
        "version": 1,
        "method": "gates",
        "chosen": chosen,
        "ratio": ratio,
        "format": "float16",
        "align": 8,
        "budget_bytes": budget,
        "bytes": total,
        "optimality_gap": 4.8e-7,
        "file": None,
        "coded": None,
        "validation_loss": {"uniform": 5.4312, "fisher": 3.7204, "gates": 3.6581 if chosen == "gates" else 3.7711},
        "matrices": entries,
    }


def metrics(n_blocks: int) -> dict[str, Any]:
    dense = n_blocks * sum(dense_bytes(*shape) for shape in SHAPES.values())
    return {
        "reach": {"of_blocks": 0.9997, "of_parameters": 0.7892},
        "ratio": {"target": 0.8, "file": 0.79994, "memory": 0.79994},
        "bytes": {
            "dense_file_16bit": dense + 56_700_000,
            "file": int(dense * 0.8) + 56_700_000,
            "linears": int(dense * 0.79994),
            "memory": int(dense * 0.79994),
            "dense_linears_16bit": dense,
        },
        "multiply_adds": {"dense": dense // 2, "compressed": int(dense * 0.79994) // 2},
        "pivoting": None,
        "perplexity": {
            "wikipedia": {
                "dense": 21.9312,
                "compressed": 35.1277,
                "interval": [1.552, 1.651],
                "n_tokens": 16368,
                "seq_len": 1024,
                "tokens_sha256": "3f" * 32,
            }
        },
        "tasks": {},
        "speed": {"prefill": {"dense": 412.5, "compressed": 447.2}, "decode": {"dense": 18.31, "compressed": 17.64}},
        "memory": {
            "weights": {"dense": 538_060_032, "compressed": 453_100_032},
            "peak": {"dense": 1_103_000_000, "compressed": 1_021_000_000},
        },
        "baselines": {
            "int8": {"ratio": 0.5027, "perplexity": {"wikipedia": 21.96}, "interval": {"wikipedia": [1.0, 1.003]}},
            "int4": {"ratio": 0.2659, "perplexity": {"wikipedia": 30.8}, "interval": {"wikipedia": [1.38, 1.43]}},
        },
        "dtypes": {"dense": "float32", "compressed": "bfloat16"},
        "machine": "AMD EPYC Processor, 2 threads, torch 2.13.0+cpu",
        "generation": GENERATION,
        "generation_dense": "The capital of France is Paris, the city of light.",
    }


def write(root: Path, *, n_blocks: int = 30, chosen: str = "gates", trained: bool = True, **changes: Any) -> None:
    """Everything stages/report.py reads, below ``root``; ``changes`` replace top-level keys of metrics.json."""
    sigmas = spectra(n_blocks)
    for folder in (
        "reports",
        "artifacts/train_ranks",
        "artifacts/update_weights",
        "artifacts/capture",
        "artifacts/calibrate",
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
    found = metrics(n_blocks) | changes
    apart = ("speed", "memory", "dtypes", "machine", "process")
    _json(root / "reports/metrics.json", {name: value for name, value in found.items() if name not in apart})
    _json(root / "reports/speed.json", {name: value for name, value in found.items() if name in apart})
    _json(root / "artifacts/train_ranks/ranks.json", ranks(sigmas, 0.8, chosen))
    with (root / "artifacts/train_ranks/curve.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("step", "cross_entropy", "width"), *_curve(trained)])
    with (root / "artifacts/update_weights/refinement.csv").open("w", newline="") as stream:
        measured = {0: 3.6581, 16: 3.5102, 32: 3.5217}
        losses = [(step, 0.3 - 0.002 * step if step else None, measured.get(step)) for step in range(33)]
        points = losses if trained else []
        csv.writer(stream).writerows([("step", "loss", "validation_loss"), *points])
    _json(root / "artifacts/update_weights/summary.json", {"chosen": "as set", "validation_loss": {}})
    stored = {
        f"{metric}.{name}": torch.tensor(sigma) for name, sigma in sigmas.items() for metric in ("two_sided", "input")
    }
    write_spectra(root / "artifacts/capture", stored, Tokens(65536, 16384))
    _json(root / "artifacts/capture/capture.json", {"walk": "blocks"})
    splits = {"calibration": 64, "validation": 8}
    _json(
        root / "artifacts/calibrate/calibrate.json",
        {
            split: {"n_windows": n, "seq_len": 1024, "n_tokens": n * 1024, "tokens_sha256": "a7" * 32}
            for split, n in splits.items()
        }
        | {"bos": {}},
    )


def write_params(root: Path, **sections: dict[str, Any]) -> None:
    """The project's own params.yaml for low rank alone, by gates at 0.8, with some keys of some sections replaced."""
    params = yaml.safe_load(Path(__file__).parents[1].joinpath("params.yaml").read_text(encoding="utf-8"))
    params["compression"] |= {"ratio": 0.8, "format": "pifa", "alternatives": []}
    params["train_ranks"] |= {"method": "gates"}
    for section, keys in sections.items():
        params[section] |= keys
    (root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def _entry(sigma: np.ndarray, shape: tuple[int, int], level: float) -> dict[str, Any]:
    rank = max(8, 8 * int((sigma**2 / sum(shape) > level * 1e-6).sum() / 8))
    dense = matrix_bytes("float16", *shape, rank) >= dense_bytes(*shape)
    kept, format = (min(shape), "dense") if dense else (rank, "float16")
    return {
        "rank": kept,
        "format": format,
        "out_features": shape[0],
        "in_features": shape[1],
        "bytes": matrix_bytes(format, *shape, kept),
    }


def _curve(trained: bool) -> list[tuple[float, ...]]:
    noise = np.random.default_rng(1)
    steps = range(40 if trained else 0)
    loss = [3.2 + 1.4 * np.exp(-step / 9) + 0.25 * noise.standard_normal() for step in steps]
    return [(step, x, 0.002 + 0.048 * (1 - step / 39)) for step, x in enumerate(loss)]


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")
