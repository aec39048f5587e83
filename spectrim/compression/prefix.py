"""What enters a block behind compressed blocks, beside what enters it in the original model.

For a linear with inputs x_t in the original model and x'_t behind the compressed prefix: cross = Σ_t x_t x'_tᵀ and gram
= Σ_t x'_t x'_tᵀ, of which ``maths.anchoring`` makes the weight to factorise. Inside the block its own linears are still
the original ones: only the blocks before it are compressed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.models.blocks import BlockModel
from spectrim.models.hooks import observed


class Moments(NamedTuple):
    """``cross`` Σ x x'ᵀ and ``gram`` Σ x' x'ᵀ, both (in, in) float64."""

    cross: Tensor
    gram: Tensor


@torch.no_grad()
def prefix_moments(
    model: BlockModel, index: int, input_of: Mapping[str, str], original: Tensor, behind: Tensor
) -> dict[str, Moments]:
    """Input name -> its moments for block ``index``.

    Args:
        input_of: linear name -> the linear under whose name their common input stands.
        original, behind: (windows, seq, hidden), what enters the block in the original model and behind the prefix.

    Raises:
        NumericalError: an input behind the prefix that is not finite, naming the linear and the window.
    """
    owners = {name: module for name, module in model.linears[index].items() if name in set(input_of.values())}
    sums: dict[str, Moments] = {}
    seen: dict[str, Tensor] = {}
    with model.resident(index), observed(owners, lambda name, x: seen.update({name: x.flatten(0, -2).float()})):
        for window in range(len(original)):
            model.run(index, original[window : window + 1].to(model.device))
            before = dict(seen)
            model.run(index, behind[window : window + 1].to(model.device))
            for name, x in seen.items():
                found = Moments((before[name].T @ x).double(), (x.T @ x).double())
                if not torch.isfinite(found.gram.diagonal().sum()):
                    raise NumericalError(
                        f"{name}: non-finite input behind the compressed blocks in calibration window {window}; "
                        "keep more of them (compression.ratio), or do not anchor (update_weights.anchor.alpha 0)"
                    )
                sums[name] = Moments(*map(torch.add, sums[name], found)) if name in sums else found
    return sums
