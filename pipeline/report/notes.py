"""The sentences of the report: what a reader should know beside the numbers, and when nothing is to be said."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.report.tables import Metrics, megabytes, number

if TYPE_CHECKING:
    import numpy as np

_GGUF_QUANTIZATION = re.compile(r"(?:^|[._-])(?P<type>I?Q\d\w*)\.gguf$", re.IGNORECASE)

ENOUGH_REACHED = 0.9
"""Share of the blocks' parameters from which on the report does not speak of the rest."""


def verdict(metrics: Metrics) -> str | None:
    """The sentence that says when plain quantization is both smaller and better on every text; None when it is not."""
    texts, ratio = metrics["perplexity"], metrics["ratio"]["file"]
    better = [
        f"{name} ({entry['ratio']:.3f} of the bytes, "
        + ", ".join(f"{text} {number(entry['perplexity'][text])}" for text in texts)
        + ")"
        for name, entry in metrics["baselines"].items()
        if entry["ratio"] <= ratio and all(entry["perplexity"][text] <= texts[text]["compressed"] for text in texts)
    ]
    if not better:
        return None
    ours = ", ".join(f"{text} {number(texts[text]['compressed'])}" for text in texts)
    return (
        f"Plain quantization is smaller and at least as good here: {' and '.join(better)}, "
        f"against {ratio:.3f} of the bytes and {ours} for this checkpoint."
    )


def reach_note(metrics: Metrics) -> str | None:
    """What compression does not reach, where that is more than a tenth of the blocks; None where it is less."""
    reach = metrics["reach"]
    if reach["of_blocks"] >= ENOUGH_REACHED:
        return None
    return (
        f"What is compressed holds {100 * reach['of_blocks']:.1f} % of the parameters in the decoder blocks and "
        f"{100 * reach['of_parameters']:.1f} % of all. The rest stays as it was, and the ratio does not count it: "
        "compare whole files."
    )


def caveat(source: str, perturb: float) -> str | None:
    """Why quantization baselines are flattered when ``source`` is a quantized GGUF file; None when it is not one.

    Args:
        perturb: `prepare.perturb`; above 0, the sentence that says what has become of the model.
    """
    if perturb:
        return (
            f"The weights of this model were moved by normal noise of {perturb:g} of a 4-bit step (prepare.perturb), "
            "in every row of the tables: they lie on no grid, and the model is not the published one."
        )
    match = _GGUF_QUANTIZATION.search(source)
    if match is None:
        return None
    kind = match["type"].upper()
    layout = (
        " (groups of 32 along the input, 16-bit scale and minimum; quantizing in exactly that layout again "
        "is lossless at 0.3125 of the bytes)"
        if kind == "Q4_1"
        else ""
    )
    return (
        f"The weights of this model come from a {kind} file, so they already lie on a coarse grid{layout}. "
        "The quantization baselines are flattered by that, the low-rank results are not: "
        "confirm conclusions on a model whose weights were never quantized, or with prepare.perturb: 0.3."
    )


def kept_note(ranks: Mapping[str, Any]) -> str | None:
    """The sentence that says training did not earn its keep and which ranks were kept; None otherwise."""
    losses = ranks["validation_loss"]
    best = min(losses, key=lambda name: losses[name], default=ranks["chosen"])
    if ranks["chosen"] == ranks["method"]:
        if best == ranks["chosen"]:
            return None
        return (
            f"Training did not earn its keep: the ranks by “{ranks['method']}” were asked for and kept, those of "
            f"“{best}” have a lower loss on the validation windows ({losses[ranks['method']]:.4f}, {losses[best]:.4f})."
        )
    numbers = [f"{name} {losses[name]:.4f}" for name in (ranks["chosen"], ranks["method"]) if name in losses]
    return (
        f"Training did not earn its keep: asked for ranks by “{ranks['method']}”, kept those of “{ranks['chosen']}”, "
        f"which have the lowest loss on the validation windows ({', '.join(numbers)})."
    )


def refined_note(curve: "Mapping[str, np.ndarray]") -> str:
    """What the refinement brought on the validation windows, or that there was none."""
    losses = zip(curve.get("validation_loss", ()), curve.get("step", ()), strict=True)
    measured = [(loss, int(step)) for loss, step in losses if loss == loss]  # NaN: a step that was not measured
    if not measured:
        return "Nothing was refined."
    (before, _), (after, step) = measured[0], min(measured)
    if (after, step) == measured[0]:
        return f"No measurement was better than the start ({before:.4f} nats per token): nothing was kept of it."
    return f"Validation loss {before:.4f} → {after:.4f} nats per token; what was stored after step {step} was kept."


def update_note(summary: Mapping[str, Any]) -> str | None:
    """What validation chose among variants of the factors and what block refinement brought; None without either."""
    said = []
    if losses := summary["validation_loss"]:
        others = [f"{name}: {loss:.4f}" for name, loss in losses.items() if name != summary["chosen"]]
        said.append(
            f"The validation windows chose {summary['chosen']} ({losses[summary['chosen']]:.4f} nats per token; "
            f"{'; '.join(others)})."
        )
    if after := summary.get("block_error"):
        before = summary["block_error_before"]
        means = [sum(errors.values()) / len(errors) for errors in (before, after)]
        better = sum(after[block] < before[block] for block in after)
        said.append(
            f"Each block was refined by itself first: mean relative squared error {means[0]:.3g} → {means[1]:.3g}, "
            f"better in {better} of {len(after)} blocks."
        )
    return " ".join(said) or None


def file_note(ranks: Mapping[str, Any]) -> str | None:
    """How far the ranks of a file were from the budget; None when they come from elsewhere."""
    file = ranks["file"]
    if file is None:
        return None
    moved = file["largest_change"]
    return (
        f"The ranks come from {file['path']} ({file['layout']}, sha256 {file['sha256'][:16]}…): stored as "
        f"{ranks['format']} they would take {megabytes(file['bytes'])}, {file['ratio']:.4f} of the 16-bit bytes; put "
        f"onto the budget they take {megabytes(ranks['bytes'])}, asked for {ranks['ratio']:g}. "
        f"Largest change: {moved['name']} from rank {moved['from']} to {moved['to']}."
    )


def gap_note(ranks: Mapping[str, Any]) -> str | None:
    """How far the knapsack's ranks can be from the least predicted loss; None when no knapsack was solved."""
    gap = ranks["optimality_gap"]
    if gap is None:
        return None
    return f"predicted loss of fisher's ranks proven within {100 * gap:.2g} % of the optimum"


def pivoting_note(metrics: Metrics) -> str | None:
    """How well the rows that stand for pivoted matrices were chosen; None where no matrix is stored like that."""
    pivoting = metrics["pivoting"]
    if pivoting is None:
        return None
    worst, exchanges = pivoting["largest_condition"], pivoting["exchanges"]
    said = (
        "no matrix needed the stronger pivoting"
        if not exchanges
        else f"the stronger pivoting exchanged {sum(exchanges.values())} rows of {', '.join(exchanges)}"
    )
    return (
        f"{pivoting['matrices']} matrices as rows of their own, largest condition {worst['value']:.3g} "
        f"({worst['name']}); {said}"
    )


def begun(calibrate: Mapping[str, Any]) -> dict[str, str]:
    """BOS token -> the texts whose windows begin with it, in words."""
    found: dict[str, list[str]] = {}
    for name, token in calibrate["bos"].items():
        found.setdefault(token, []).append(name)
    return {token: ", ".join(names) for token, names in found.items()}
