"""Ranks, spectra and training -> SVG that reads well on light and on dark paper.

Ink is drawn in one marker colour that becomes ``currentColor``, and the paper stays transparent: the page that embeds a
figure decides both. ``standalone`` gives a figure its own ink and paper for use as a file. The same inputs give the
same bytes.
"""

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

from pipeline.report.matrices import RankedMatrix, by_kind

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")

INK = "#010203"
ACCENT, QUANTIZED = "#2f7de1", "#d9822b"
DENSE: dict[str, Any] = {"facecolor": "#071d3a", "linewidth": 0}  # darkest: all bytes kept
SHARES = ("#dcecf9", "#a9cdee", "#71aae0", "#3f83c9", "#1f5da3", "#0d3b73")
DEPTHS = ("#24a89a", "#2f7de1", "#8a5cf0", "#d6539b")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.15,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **{"axes.titlecolor": INK, "grid.color": INK},
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}
TRAINED = {
    "cross_entropy": ("Cross-entropy on training windows", "nats per token"),
    "divergence": ("KL divergence from the dense model", "nats per token"),
    "ratio": ("Soft ratio of the gates", "bytes kept / 16-bit bytes"),
    "width": ("Width of the gates", "in units of the full rank"),
}
REFINED = {"validation_loss": "Loss on validation windows", "loss": "Training loss of each step"}
MAX_ANNOTATED_LAYERS = 48
MAX_DRAWN_LAYERS = 10
MAX_DRAWN_POINTS = 100


def drawn(name: str) -> "Callable[[Callable[Arguments, Figure]], Callable[Arguments, str]]":
    """Let a function that returns a matplotlib figure return SVG, drawn in STYLE, with ids that begin with ``name``."""

    def decorate(draw: "Callable[Arguments, Figure]") -> Callable[Arguments, str]:
        @functools.wraps(draw)
        def as_svg(*args: Arguments.args, **options: Arguments.kwargs) -> str:
            import matplotlib as mpl

            buffer = io.StringIO()
            with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
                draw(*args, **options).savefig(buffer, format="svg", metadata={"Date": None})
            return _neutral(buffer.getvalue(), name)

        return as_svg

    return decorate


def canvas(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _neutral(svg: str, name: str) -> str:
    text = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # several figures share one page: their ids must not clash
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    # two decimals are a 5,000th of an inch
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return text.replace(INK, "currentColor").strip() + "\n"


@drawn("ranks")
def ranks_figure(found: Sequence[RankedMatrix]) -> "Figure":
    """Heatmap of layers (across) and matrix types (down): rank or format in figures, share of bytes kept in colour."""
    groups = by_kind(found)
    layers = sorted({matrix.layer for matrix in found})
    figure = canvas(min(11, 3 + 0.3 * len(layers)), 1.3 + 0.34 * len(groups))
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch, Rectangle

    axes = figure.subplots()
    limits = [step / len(SHARES) for step in range(len(SHARES) + 1)]
    norm, colors = BoundaryNorm(limits, len(SHARES)), ListedColormap(SHARES)
    for row, group in enumerate(groups.values()):
        for matrix in group:
            step = min(int(matrix.share * len(SHARES)), len(SHARES) - 1)
            fill: dict[str, Any] = DENSE if matrix.is_dense else {"facecolor": SHARES[step], "linewidth": 0}
            column = layers.index(matrix.layer)
            axes.add_patch(Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, **fill))
            if len(layers) <= MAX_ANNOTATED_LAYERS:
                color = "white" if step >= 3 else "#12202f"
                axes.text(column, row, matrix.label, ha="center", va="center", fontsize=7, color=color)
    axes.set(xlim=(-0.6, len(layers) - 0.4), ylim=(len(groups) - 0.4, -0.6), xlabel="layer")
    every = 1 if len(layers) <= MAX_ANNOTATED_LAYERS else 5
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=7.5)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, fraction=0.02, pad=0.01, aspect=14, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"], fontsize=7.5)
    bar.outline.set_visible(False)
    bar.set_label("bytes kept", fontsize=8)
    handles = [Patch(**DENSE, label="left dense")]
    if not all(matrix.is_factored or matrix.is_dense for matrix in found):
        handles.append(Patch(alpha=0, label="i4, i8: rounded weights, with factors where there is a +"))
    figure.legend(handles=handles, loc="outside upper right", frameon=False, fontsize=8)
    return figure


@drawn("spectra")
def spectra_figure(found: Sequence[RankedMatrix], spectra: "Mapping[str, np.ndarray]", metric: str) -> "Figure":
    """One panel per matrix type: σ by component for layers spread over the depth; colour up to the cut, grey beyond."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    groups = by_kind(found)
    n_columns = min(4, len(groups))
    n_rows = -(-len(groups) // n_columns)
    figure = canvas(11, 0.5 + 2.35 * n_rows)
    panels = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False)
    depth = LinearSegmentedColormap.from_list("depth", DEPTHS)
    last = max((matrix.layer for matrix in found), default=0)
    drawn: set[int] = set()
    floor, ceiling = _range([spectra[matrix.name] for matrix in found])
    for axes, (kind, group) in zip(panels.flat, groups.items(), strict=False):
        axes.set(yscale="log", ylim=(floor, ceiling))
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for matrix in spread(group, MAX_DRAWN_LAYERS):
            drawn.add(matrix.layer)
            _spectrum(axes, spectra[matrix.name], matrix, depth(matrix.layer / max(last, 1)))
        axes.set(title=kind, xlim=(0, None))
        axes.grid(axis="y")
    for axes in list(panels.flat)[len(groups) :]:
        axes.set_visible(False)
    for row in panels:
        row[0].set_ylabel(f"σ, {metric}")
    figure.supxlabel("component", fontsize=9)
    _depth_legend(figure, depth, sorted(drawn))
    return figure


@drawn("training")
def training_figure(curve: "Mapping[str, np.ndarray]", ratio: float) -> "Figure":
    """One panel per series of TRAINED in ``curve``, the columns of curve.csv; ``ratio`` is the one asked for."""
    series = [name for name in TRAINED if name in curve]
    figure = canvas(5.5 * len(series), 2.7)
    panels = figure.subplots(1, len(series), squeeze=False, gridspec_kw={"wspace": 0.06})[0]
    for axes, name in zip(panels, series, strict=True):
        noisy = name in ("cross_entropy", "divergence")
        axes.plot(curve["step"], curve[name], color=ACCENT, alpha=0.35 if noisy else 1, linewidth=1 if noisy else 2)
        if noisy:
            axes.plot(curve["step"], smooth(curve[name]), color=ACCENT, linewidth=2)
        if name == "ratio":
            axes.axhline(ratio, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        title, unit = TRAINED[name]
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.margins(y=0.15)
        axes.grid()
    return figure


@drawn("refinement")
def refinement_figure(curve: "Mapping[str, np.ndarray]") -> "Figure":
    """The validation loss where it was measured, and the training loss of each step; columns of refinement.csv."""
    figure = canvas(11, 2.7)
    panels = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    for axes, (name, title) in zip(panels, REFINED.items(), strict=True):
        there = curve[name] == curve[name]  # NaN: nothing measured at that step
        axes.plot(curve["step"][there], curve[name][there], color=ACCENT, linewidth=2, marker="o", markersize=4)
        axes.set(title=title, xlabel="step", ylabel="nats per token")
        axes.margins(y=0.15)
        axes.grid()
    return figure


def smooth(values: "np.ndarray") -> "np.ndarray":
    """Centred running mean over a tenth of the curve; windows shrink at both ends instead of padding."""
    import numpy as np

    half = max(1, len(values) // 20)
    return np.array([values[max(0, at - half) : at + half + 1].mean() for at in range(len(values))])


def spread(group: Sequence[RankedMatrix], limit: int) -> list[RankedMatrix]:
    """At most ``limit`` of the group, evenly spaced, first and last among them."""
    if len(group) <= limit:
        return list(group)
    return [group[round(place * (len(group) - 1) / (limit - 1))] for place in range(limit)]


def standalone(svg: str) -> str:
    """The figure as a file of its own: dark ink on white paper, and the reverse where the viewer prefers dark."""
    style = (
        "<style>svg{color:#1c2430}.paper{fill:#fff}"
        "@media(prefers-color-scheme:dark){svg{color:#dbe2ea}.paper{fill:#12171e}}</style>"
        '<rect class="paper" width="100%" height="100%" fill="#fff"/>'
    )
    head = '<?xml version="1.0" encoding="utf-8" standalone="no"?>\n'
    return head + re.sub(r"(<svg\b[^>]*>)", lambda match: match[1] + style, svg, count=1)


def _range(curves: "Sequence[np.ndarray]") -> tuple[float, float]:
    """Limits of the σ axis: from a little under the 2 % quantile of positive values to over the largest."""
    import numpy as np

    positive = np.concatenate([curve[curve > 0] for curve in curves])
    return (float(np.quantile(positive, 0.02)) / 2, float(positive.max()) * 2) if len(positive) else (0.1, 1.0)


def _spectrum(axes: "Axes", sigma: "np.ndarray", matrix: RankedMatrix, color: Any) -> None:
    import numpy as np

    at = np.unique(np.linspace(0, len(sigma) - 1, MAX_DRAWN_POINTS).round().astype(int))
    rank = min(matrix.rank, len(sigma)) if matrix.is_factored else len(sigma)
    kept, cut = np.append(at[at < rank - 1], rank - 1), np.append(rank - 1, at[at >= rank])
    axes.plot(cut + 1, sigma[cut], color=INK, alpha=0.2, linewidth=0.8)
    axes.plot(kept + 1, sigma[kept], color=color, linewidth=1.3)
    if matrix.is_factored:
        axes.plot([rank], [sigma[rank - 1]], "o", color=color, markersize=3.5)


def _depth_legend(figure: "Figure", depth: Any, layers: Sequence[int]) -> None:
    from matplotlib.lines import Line2D

    last = max([1, *layers])
    handles = [Line2D([], [], color=depth(layer / last), label=f"layer {layer}") for layer in layers]
    handles.append(Line2D([], [], color=INK, alpha=0.3, label="cut away"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=8)
