"""The content of artifacts/train_ranks/ranks.json: what every matrix is stored in, at which rank, in how many bytes."""

from collections.abc import Mapping
from typing import Any

from pipeline.config.sections import Compression
from spectrim.checkpoint.layout import Matrix
from spectrim.maths import budget
from spectrim.maths.budget import Shape


def described(
    shared: Compression,
    method: str,
    matrices: Mapping[str, Matrix],
    shapes: Mapping[str, Shape],
    n_bytes: Mapping[str, int],
    *,
    optimality_gap: float | None = None,
    file: Mapping[str, Any] | None = None,
    coded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """ranks.json without its `chosen` and `validation_loss`.

    Args:
        method: of `train_ranks`.
        matrices, shapes, n_bytes: of every linear, by name.
        optimality_gap: of a knapsack.
        file: what the budget has changed of the ranks of a file.
        coded: of coded weights, the ``steps``, one per block, the ``row_damping``, and the ``validation_loss`` of each
            that was tried.
    """
    kept = shared.ratio if shared.format in budget.CODED else shared.kept
    rows = {
        name: {
            "rank": matrix.rank,
            "format": matrix.format,
            "out_features": shapes[name][0],
            "in_features": shapes[name][1],
            "bytes": n_bytes[name],
        }
        for name, matrix in matrices.items()
    }
    return {
        "version": 1,
        "method": method,
        "ratio": shared.ratio,
        "format": shared.format,
        "align": shared.align,
        "tie": shared.tie,
        "budget_bytes": budget.budget_bytes(shapes.values(), kept),
        "bytes": sum(n_bytes.values()),
        "optimality_gap": optimality_gap,
        "file": file,
        "coded": coded,
        "matrices": rows,
    }
