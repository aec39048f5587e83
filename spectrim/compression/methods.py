"""Every method of `update_weights` and of `train_ranks`, declared once: what it reads, what it takes, who computes it.

What params.yaml takes, its checks, the stages, the keys of the store, the tables of the docs
(`python -m spectrim.compression.methods`) and the tests read these two tables. A method is one more entry, and the
function that it names. Words alone, no torch: whoever names a method imports no mathematics.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Statistic = Literal["factors", "gram", "gradient_gram", "abs_mean", "activations"]


@dataclass(frozen=True)
class UpdateMethod:
    """One way to find the factors of a matrix at its rank.

    Args:
        meaning: what the factors minimise, in words.
        reads: statistics of `capture`: its own two-sided ``factors``, the ``gram`` of the inputs, that of the output
            gradients, the mean of |x|; or ``activations``, for which calibration windows walk through the blocks.
        metric: whether the inputs' Gram is its metric, which anchoring and shrinkage change.
        damped: whether it decomposes a Gram, with capture.damping and capture.max_damping.
        computed_by: function of compression/weight_update.py.
        changed_by: the one that computes it where the metric is not the captured one, if that is another.
        parameters: keys of `update_weights` that it alone reads.
        source: author, year and arXiv id.
    """

    meaning: str
    reads: tuple[Statistic, ...]
    metric: bool
    damped: bool
    computed_by: str
    changed_by: str | None = None
    parameters: tuple[str, ...] = ()
    source: str = "–"

    def function(self, changed: bool) -> str:
        """The function that computes it, with the captured metric or a ``changed`` one."""
        return self.changed_by if changed and self.changed_by else self.computed_by

    def files(self, changed: bool) -> tuple[Statistic, ...]:
        """What it reads, with the captured metric or a ``changed`` one."""
        return ("gram", "gradient_gram") if changed and self.changed_by else self.reads


@dataclass(frozen=True)
class RankMethod:
    """One way to choose the ranks.

    Args:
        meaning: in words.
        reads: what it needs beside shapes and budget: ``spectra``, ``factors``, ``grams``, ``windows``, ``file``.
        proposed_by: method of ``RankSearch`` that proposes the ranks; None of a trained method.
        modules: method of ``RankSearch`` that makes the linears to train, of a trained one.
        starts_from: the method whose ranks a training begins with, of a trained one.
        coded: whether it is that of coded weights, which have no ranks.
        ties: whether linears that read one input share their trained position.
        source: author, year and arXiv id.
    """

    meaning: str
    reads: tuple[Literal["spectra", "factors", "grams", "windows", "file"], ...]
    proposed_by: str | None = None
    modules: str | None = None
    starts_from: str | None = None
    coded: bool = False
    ties: bool = False
    source: str = "–"

    @property
    def trained(self) -> bool:
        """Whether the ranks are learned by gradient."""
        return self.modules is not None


UPDATE_METHODS: dict[str, UpdateMethod] = {
    "two_sided": UpdateMethod(
        "the predicted loss, ‖D^½ (W − W') G^½‖",
        reads=("factors",),
        metric=True,
        damped=False,
        computed_by="captured",
        changed_by="two_sided_anew",
        source="Martens and Grosse 2015, arXiv:1503.05671 (the metric)",
    ),
    "closed_form": UpdateMethod(
        "the output error ‖X (W − W')ᵀ‖, by one eigendecomposition",
        reads=("gram",),
        metric=True,
        damped=False,
        computed_by="closed_form_of",
    ),
    "svd": UpdateMethod("the weight error ‖W − W'‖", reads=(), metric=False, damped=False, computed_by="plain_svd_of"),
    "asvd": UpdateMethod(
        "the weight error, columns scaled by the root of their mean size",
        reads=("abs_mean",),
        metric=False,
        damped=False,
        computed_by="asvd_of",
        source="Yuan et al. 2023, arXiv:2312.05821",
    ),
    "svd_llm": UpdateMethod(
        "the output error, whitened by Cholesky",
        reads=("gram",),
        metric=True,
        damped=True,
        computed_by="svd_llm_of",
        source="Wang et al. 2024, arXiv:2403.07378",
    ),
    "svd_llm_v2": UpdateMethod(
        "the output error, whitened by two SVDs",
        reads=("gram",),
        metric=True,
        damped=True,
        computed_by="svd_llm_v2_of",
        source="Wang et al. 2025, arXiv:2503.12340",
    ),
    "ipca": UpdateMethod(
        "the distance from the mean of each window's top output subspace",
        reads=("activations",),
        metric=False,
        damped=False,
        computed_by="ipca_of",
        parameters=("ipca",),
        source="Wang et al. 2025, arXiv:2502.02723",
    ),
}

RANK_METHODS: dict[str, RankMethod] = {
    "gates": RankMethod(
        "learned positions of gates on fixed whitened factors",
        reads=("spectra", "factors", "windows"),
        modules="gated",
        starts_from="fisher",
        ties=True,
        source="arXiv:2510.19389",
    ),
    "dobi": RankMethod(
        "learned positions in the SVD of every activation",
        reads=("spectra", "factors", "windows"),
        modules="truncated",
        starts_from="uniform",
        source="Wang et al. 2025, arXiv:2502.02723",
    ),
    "uniform": RankMethod("the same share of bytes for every matrix", reads=(), proposed_by="uniform"),
    "svd_llm_v2": RankMethod(
        "ratios by truncation loss inside each type of matrix",
        reads=("spectra",),
        proposed_by="svd_llm_v2",
        source="Wang et al. 2025, arXiv:2503.12340",
    ),
    "fisher": RankMethod("least predicted loss under the budget", reads=("spectra",), proposed_by="fisher"),
    "step": RankMethod(
        "none: one step for all coded weights, so large that their code fills the budget",
        reads=("grams", "windows"),
        coded=True,
    ),
    "file": RankMethod("ranks from a file, put onto the budget", reads=("file",), proposed_by="from_file"),
}


def tables() -> Iterator[str]:
    """Both tables as markdown, for the docs."""
    yield "| `update_weights.method` | minimises | reads | source |"
    yield "|---|---|---|---|"
    for name, update in UPDATE_METHODS.items():
        yield f"| `{name}` | {update.meaning} | {', '.join(update.reads) or 'the weight'} | {update.source} |"
    yield ""
    yield "| `train_ranks.method` | ranks | reads | source |"
    yield "|---|---|---|---|"
    for name, ranks in RANK_METHODS.items():
        yield f"| `{name}` | {ranks.meaning} | {', '.join(ranks.reads) or 'the shapes'} | {ranks.source} |"


if __name__ == "__main__":
    print("\n".join(tables()))
