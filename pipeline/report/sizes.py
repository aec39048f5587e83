"""Perplexity over bytes, every model named at its point."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.report.figures import ACCENT, INK, QUANTIZED, canvas, drawn
from pipeline.report.tables import SizePoint, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACING_STEPS = 500
"""A count and not a time, so that equal inputs give equal bytes."""


class Label(NamedTuple):
    """What a point of a figure is called."""

    text: str
    x: float
    y: float
    bold: bool = False


@drawn("size")
def size_figure(points: Sequence[SizePoint], dense_bytes: int) -> "Figure":
    """Perplexity (log) over the bytes of the linears, one panel per text, every model named at its point.

    A disc stands at the bytes in the file, a ring at those in memory where they are others.
    """
    texts = list(points[0].perplexity)
    n_columns = min(2, len(texts))
    n_rows = -(-len(texts) // n_columns)
    figure = canvas(5.6 * n_columns, 3.4 * n_rows)
    panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axes, text in zip(panels, texts, strict=False):
        _panel(axes, text, points, dense_bytes / 1e6)
    for axes in panels[len(texts) :]:
        axes.set_visible(False)
    for axes, text in zip(panels, texts, strict=False):
        place_labels(axes, _labels(text, points, dense_bytes / 1e6))
    return figure


def place_labels(axes: "Axes", labels: Iterable[Label]) -> None:
    """Names beside their points, moved apart, with a line to the point where one had to go far.

    Everything that moves the axes must be drawn before.
    """
    from adjustText import adjust_text

    labels = list(labels)
    names = [
        axes.text(label.x, label.y, label.text, fontsize=8, fontweight="bold" if label.bold else "normal")
        for label in labels
    ]
    line: dict[str, Any] = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.6, "shrinkB": 3}
    places = [label.x for label in labels], [label.y for label in labels]
    adjust_text(names, *places, ax=axes, iter_lim=PLACING_STEPS, expand=(1.1, 1.5), min_arrow_len=7, arrowprops=line)


def _panel(axes: "Axes", text: str, points: Sequence[SizePoint], dense: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, ratio, memory_ratio, values, _ in points:
        plain = name.startswith("dense")
        color = ACCENT if name == "Spectrim" else INK if plain else QUANTIZED
        if plain:
            axes.axhline(values[text], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.5)
        size = 10 if name == "Spectrim" else 7
        axes.plot([ratio * dense], [values[text]], "o", color=color, markersize=size)
        if memory_ratio != ratio:
            axes.plot([memory_ratio * dense], [values[text]], "o", color=color, markersize=size, fillstyle="none")
    values_here = [point.perplexity[text] for point in points]
    axes.set(title=text, yscale="log", xlabel="bytes of the compressed linears, MB", ylabel="perplexity (log)")
    axes.set(xlim=(0, 1.14 * dense), ylim=(min(values_here) / 1.06, max(values_here) * 1.12))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid()


def _labels(text: str, points: Sequence[SizePoint], dense: float) -> list[Label]:
    labels = []
    for name, ratio, memory_ratio, values, _ in points:
        ours = name == "Spectrim"
        labels.append(Label(f"{name} {number(values[text])}", ratio * dense, values[text], ours))
        if memory_ratio != ratio:
            labels.append(Label("in memory", memory_ratio * dense, values[text]))
    return labels
