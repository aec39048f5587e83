"""Perplexity on WikiText-2 over the bytes in the file and in memory, of everything measured: the README's picture.

    python -m benchmarks.frontier          docs/frontier.csv -> docs/frontier.svg

The numbers are those of `dvc repro`, of the presets and of benchmarks/controls.py. A series is one method at several
ratios; what has no series stands by itself; ``lift`` moves a name that would cover another one, in points. Nothing here
is computed: measure, then change the table.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.report.figures import ACCENT, INK, QUANTIZED, canvas, drawn, standalone

DOCS = Path(__file__).resolve().parents[1] / "docs"
SERIES = {"coded": ACCENT, "mixed": "#24a89a"}
TOP = 40.0
"""Perplexity beyond which nobody takes a model."""


class Measured(NamedTuple):
    """One model: its linears' megabytes, its perplexities."""

    name: str
    series: str
    file: float
    memory: float
    wikipedia: float
    news: float
    wikitext2: float
    lift: float


def measured(file: Path = DOCS / "frontier.csv") -> list[Measured]:
    """The rows of the table."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [Measured(row["model"], row["series"], *(float(row[name]) for name in Measured._fields[2:])) for row in rows]


@drawn("frontier")
def frontier(rows: Sequence[Measured]) -> Any:
    """Two panels on one axis of perplexity, logarithmic."""
    figure = canvas(10.5, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, size, title in zip(panels, ("file", "memory"), ("in the file", "in memory"), strict=True):
        for row in rows:
            _point(axes, getattr(row, size), row)
        for series, color in SERIES.items():
            line = sorted((getattr(row, size), row.wikitext2) for row in rows if row.series == series)
            axes.plot([x for x, _ in line], [y for _, y in line], color=color, linewidth=1.6, zorder=1)
        axes.set(title=f"Perplexity over MB of the linears {title}", yscale="log", xlim=(20, 245))
        axes.set_ylim(rows[0].wikitext2 * 0.975, TOP)
        axes.set_yticks(ticks := [23, 25, 28, 32, 36, 40], [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(visible=True)
    return figure


def _point(axes: Any, x: float, row: Measured) -> None:
    ours = row.series in SERIES
    color = SERIES.get(row.series, INK if row.name.startswith("dense") else QUANTIZED)
    axes.plot([x], [row.wikitext2], "o", color=color, markersize=7 if ours else 5.5)
    if row.wikitext2 < TOP:
        axes.annotate(
            row.name, (x, row.wikitext2), xytext=(7, row.lift), textcoords="offset points", va="center", fontsize=8,
            fontweight="bold" if ours else "normal",
        )  # fmt: skip


def main() -> None:
    """Draw it."""
    (DOCS / "frontier.svg").write_text(standalone(frontier(measured())), encoding="utf-8")


if __name__ == "__main__":
    main()
