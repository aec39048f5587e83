"""Perplexity on WikiText-2 over the bytes in the file and in memory, of everything measured: the README's picture.

    python -m benchmarks.frontier          docs/frontier.csv -> docs/frontier.svg

The numbers are those of `dvc repro`, of the presets and of benchmarks/controls.py. A series is one method at several
ratios; what has no series stands by itself. Nothing here is computed: measure, then change the table.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.report.figures import ACCENT, INK, QUANTIZED, canvas, drawn, standalone
from pipeline.report.sizes import Label, place_labels

DOCS = Path(__file__).resolve().parents[1] / "docs"
SERIES = {"coded": ACCENT, "mixed": "#24a89a"}
TOP = 34.0
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


def measured(file: Path = DOCS / "frontier.csv") -> list[Measured]:
    """The rows of the table."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [Measured(row["model"], row["series"], *(float(row[name]) for name in Measured._fields[2:])) for row in rows]


@drawn("frontier")
def frontier(rows: Sequence[Measured]) -> Any:
    """Two panels on one axis of perplexity, logarithmic."""
    figure = canvas(11, 5.4)
    panels = figure.subplots(1, 2, sharey=True)
    sizes = ("file", "memory")
    for axes, size, title in zip(panels, sizes, ("in the file", "in memory"), strict=True):
        for row in rows:
            ours = row.series in SERIES
            color = SERIES.get(row.series, INK if row.name.startswith("dense") else QUANTIZED)
            axes.plot([getattr(row, size)], [row.wikitext2], "o", color=color, markersize=7 if ours else 5.5)
        for series, color in SERIES.items():
            line = sorted((getattr(row, size), row.wikitext2) for row in rows if row.series == series)
            axes.plot([x for x, _ in line], [y for _, y in line], color=color, linewidth=1.6, zorder=1)
        axes.set(title=f"Perplexity over MB of the linears {title}", yscale="log", xlim=(20, 230))
        axes.set_ylim(rows[0].wikitext2 * 0.975, TOP)
        axes.set_yticks(ticks := [23, 25, 28, 32], [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(visible=True)
    for axes, size in zip(panels, sizes, strict=True):
        shown = [row for row in rows if row.wikitext2 < TOP]
        place_labels(axes, [Label(row.name, getattr(row, size), row.wikitext2, row.series in SERIES) for row in shown])
    return figure


def main() -> None:
    """Draw it."""
    (DOCS / "frontier.svg").write_text(standalone(frontier(measured())), encoding="utf-8")


if __name__ == "__main__":
    main()
