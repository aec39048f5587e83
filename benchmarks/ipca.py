"""Incremental IPCA against scikit-learn's IncrementalPCA on one stream of windows: time, memory, subspace error.

    python -m benchmarks.ipca [--out 1536] [--tokens 1024] [--windows 16] [--rank 328] [--threads 2]

prints one JSON line. The stream stands for the outputs of one linear of a small language model: windows Y_i = X_i Wᵀ,
(tokens, out), W (out, 576), inputs with a power-law spectrum, one large common mean and in every window directions of
its own. Each method runs in a process of its own. ``error`` = 1 − tr(Uᵀ P U) / max_U tr(Uᵀ P U): the share of the best
overlap with the exact mean projector P = mean_i V_i V_iᵀ that the basis U misses; 0 is exact.

    exact                 P itself, (out, out), and its top eigenvectors
    spectrim              V_i of each window, merged by one thin SVD (spectrim.maths.subspace.IncrementalPCA)
    sklearn_on_vectors    IncrementalPCA.partial_fit(V_iᵀ), the same V_i; it centres them, whose signs are arbitrary
    sklearn_on_outputs    IncrementalPCA.partial_fit(Y_i): it centres the outputs and pools their covariances, so that
                          windows and directions weigh by their energy: another subspace, shown for its cost

``seconds`` is the whole stream without its generation, ``seconds_vectors`` the part of it spent on V_i; ``peak_bytes``
is the peak resident memory beyond that of a process that generates the stream and throws it away.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import IncrementalPCA as SklearnIncrementalPCA
from threadpoolctl import threadpool_limits
from torch import Tensor

from spectrim.maths.subspace import IncrementalPCA, MeanProjector, top_right_singular_vectors

IN_FEATURES = 576
FORKED = multiprocessing.get_context("forkserver")


def stream(settings: argparse.Namespace) -> Iterator[Tensor]:
    """The same windows Y_i, (tokens, out) float32, in every process."""
    generator = torch.Generator().manual_seed(settings.seed)
    weight = torch.randn(settings.out, IN_FEATURES, generator=generator) / IN_FEATURES**0.5
    spectrum = torch.arange(1, IN_FEATURES + 1) ** -0.7
    mixing = torch.linalg.qr(torch.randn(IN_FEATURES, IN_FEATURES, generator=generator)).Q
    mean = torch.randn(IN_FEATURES, generator=generator)
    for _ in range(settings.windows):
        own = spectrum * torch.rand(IN_FEATURES, generator=generator).mul(2).exp()
        x = torch.randn(settings.tokens, IN_FEATURES, generator=generator) * own @ mixing
        yield (x + mean) @ weight.T


def nothing(settings: argparse.Namespace) -> dict[str, Any]:
    """The stream alone: what every method pays for its input."""
    return {"basis": None, "vectors": 0.0, "checksum": sum(float(outputs.sum()) for outputs in stream(settings))}


def spectrim(settings: argparse.Namespace) -> dict[str, Any]:
    """Incremental mean projector."""
    return pooled(IncrementalPCA(settings.out, settings.rank), settings)


def exact(settings: argparse.Namespace) -> dict[str, Any]:
    """Exact mean projector, (out, out)."""
    return pooled(MeanProjector(settings.out, settings.rank), settings)


def pooled(pool: IncrementalPCA | MeanProjector, settings: argparse.Namespace) -> dict[str, Any]:
    """The basis of a pool fed with every window's singular vectors, and the seconds those took."""
    vectors = 0.0
    for outputs in stream(settings):
        start = time.perf_counter()
        found = top_right_singular_vectors(outputs, settings.rank)
        vectors += time.perf_counter() - start
        pool.add(found)
    return {"basis": pool.basis().numpy(), "vectors": vectors}


def sklearn_on_vectors(settings: argparse.Namespace) -> dict[str, Any]:
    """scikit-learn on the rows of V_iᵀ."""
    model, vectors = SklearnIncrementalPCA(n_components=settings.rank), 0.0
    for outputs in stream(settings):
        start = time.perf_counter()
        found = top_right_singular_vectors(outputs, settings.rank).T.contiguous().numpy()
        vectors += time.perf_counter() - start
        model.partial_fit(found)
    return {"basis": model.components_.T, "vectors": vectors}


def sklearn_on_outputs(settings: argparse.Namespace) -> dict[str, Any]:
    """scikit-learn on the outputs themselves."""
    model = SklearnIncrementalPCA(n_components=settings.rank)
    for outputs in stream(settings):
        model.partial_fit(outputs.double().numpy())
    return {"basis": model.components_.T, "vectors": 0.0}


METHODS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    method.__name__: method for method in (nothing, exact, spectrim, sklearn_on_vectors, sklearn_on_outputs)
}


def measure(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Run one method in this process: its result, seconds and peak resident bytes above the start."""
    torch.set_num_threads(settings.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with threadpool_limits(settings.threads):  # numpy's and scipy's, which scikit-learn computes with
        start = time.perf_counter()
        result = METHODS[name](settings)
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    return {**result, "seconds": seconds, "peak_bytes": peak}


def run_alone(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """``measure`` in a process of its own, so that nobody inherits another's peak."""
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        return pool.submit(measure, name, settings).result()


def captured(bases: Mapping[str, np.ndarray], settings: argparse.Namespace) -> dict[str, float]:
    """tr(Uᵀ P U) = mean_i ‖V_iᵀ U‖² of every basis U, without forming P."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(basis)) for name, basis in bases.items()}
    totals = dict.fromkeys(tensors, 0.0)
    for outputs in stream(settings):
        vectors = top_right_singular_vectors(outputs, settings.rank)
        for name, basis in tensors.items():
            totals[name] += float((vectors.T @ basis).square().sum())
    return {name: total / settings.windows for name, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Incremental IPCA against scikit-learn's IncrementalPCA.")
    parser.add_argument("--out", type=int, default=1536, help="output features of the matrix")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per window; scikit-learn needs at least rank")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=328)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    if settings.rank > min(settings.tokens, settings.out, IN_FEATURES):
        parser.error(f"--rank {settings.rank} must be at most min(tokens, out, {IN_FEATURES})")

    results = {name: run_alone(name, settings) for name in METHODS}
    alone = results.pop("nothing")
    overlap = captured({name: result["basis"] for name, result in results.items()}, settings)
    methods = {
        name: {
            "seconds": round(result["seconds"] - alone["seconds"], 3),
            "seconds_vectors": round(result["vectors"], 3),
            "peak_bytes": max(0, result["peak_bytes"] - alone["peak_bytes"]),
            "error": max(0.0, 1 - overlap[name] / overlap["exact"]),
        }
        for name, result in results.items()
    }
    print(
        json.dumps(
            {
                "benchmark": "ipca",
                **{key: getattr(settings, key) for key in ("out", "tokens", "windows", "rank", "threads", "seed")},
                "seconds_stream": round(alone["seconds"], 3),
                "methods": methods,
                "note": "scikit-learn centres its input and pools covariances; spectrim averages uncentred projectors",
            }
        )
    )


if __name__ == "__main__":
    FORKED.set_forkserver_preload(["torch", "sklearn.decomposition"])  # loaded once, not by every process
    main()
