"""reports/metrics.json and ranks.json -> the headline numbers, tables and plain statements of the report.

Nothing here draws or writes: a Table is data, ``markdown`` prints it, and the HTML template walks the same rows.
1 MB is 10^6 bytes everywhere.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from pipeline.report.matrices import RankedMatrix, by_kind

Metrics = Mapping[str, Any]

_MEMORY = {"weights": "Weights in memory", "peak": "Peak memory"}


@dataclass(frozen=True)
class Table:
    """``rows`` of printed cells under ``columns``; all but the first ``n_text`` columns hold numbers.

    ``emphasis`` is the index of the row that the report is about, or None.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    n_text: int = 1
    emphasis: int | None = None


@dataclass(frozen=True)
class Headline:
    """One big number of the report's top: what it is, the number, and what it stands against."""

    label: str
    value: str
    detail: str


def markdown(table: Table) -> str:
    """The table in GitHub's markdown; every cell shows as the plain text it is."""
    rows = [tuple(map(plain, row)) for row in table.rows]
    if table.emphasis is not None:
        rows[table.emphasis] = tuple(f"**{cell}**" for cell in rows[table.emphasis])
    rule = tuple("---" if index < table.n_text else "---:" for index in range(len(table.columns)))
    return "\n".join(f"| {' | '.join(row)} |" for row in (tuple(map(plain, table.columns)), rule, *rows))


def plain(text: str) -> str:
    """``text`` on one line, with everything that markdown or HTML would act on escaped."""
    return re.sub(r"[\\`*\[\]|~]", r"\\\g<0>", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")


def number(value: float) -> str:
    """Four significant digits: 22.55, 141.8, 6,312, 5.1e+07."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 4 - len(str(int(abs(value)))) if abs(value) >= 1 else 4
        return f"{value:,.{max(digits, 0)}f}"
    return f"{value:.2g}"


def megabytes(n_bytes: float) -> str:
    """Bytes as MB, 10^6: 169.9 MB."""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e6:,.4f} MB"


def change(new: float, old: float) -> str:
    """The relative change from ``old`` to ``new`` in percent, or × beyond a factor of ten."""
    if old == 0:
        return "–"
    if new / old >= 10:
        return f"×{number(new / old)}"
    return f"{100 * (new / old - 1):+.1f} %".replace("-", "−")


def headlines(metrics: Metrics) -> list[Headline]:
    """What a person wants to know first: size, perplexity on each text, speed, memory."""
    linears, dense = metrics["bytes"]["linears"], metrics["bytes"]["dense_linears_16bit"]
    top = [
        Headline(
            "Linear weights kept",
            f"{100 * metrics['ratio']['file']:.1f} %",
            f"{megabytes(linears)} of {megabytes(dense)} in the file; asked for {100 * metrics['ratio']['target']:g} %",
        ),
        Headline(
            "Whole file",
            f"{100 * metrics['bytes']['file'] / metrics['bytes']['dense_file_16bit']:.1f} %",
            f"{megabytes(metrics['bytes']['file'])} of {megabytes(metrics['bytes']['dense_file_16bit'])}",
        ),
        Headline(
            "Linear weights in memory",
            f"{100 * metrics['ratio']['memory']:.1f} %",
            f"{megabytes(metrics['bytes']['memory'])} of {megabytes(dense)}",
        ),
    ]
    top += [
        Headline(
            f"Perplexity, {text}",
            number(entry["compressed"]),
            f"dense {number(entry['dense'])}, {_against(entry['compressed'], entry['dense'], entry['interval'])}",
        )
        for text, entry in metrics["perplexity"].items()
    ]
    speed, weights = metrics["speed"]["decode"], metrics["memory"]["weights"]
    top.append(
        Headline(
            "Decode speed",
            f"{speed['compressed'] / speed['dense']:.2f}×",
            f"{number(speed['dense'])} → {number(speed['compressed'])} tokens/s",
        )
    )
    top.append(
        Headline(
            "Weights in memory",
            megabytes(weights["compressed"]),
            f"dense {megabytes(weights['dense'])} ({change(weights['compressed'], weights['dense'])})",
        )
    )
    return top


class SizePoint(NamedTuple):
    """One model: the shares of its 16-bit bytes in the file and in memory; on each text its perplexity, and the
    interval of what that is of the dense model's.
    """

    name: str
    ratio: float
    memory_ratio: float
    perplexity: Mapping[str, float]
    interval: Mapping[str, Sequence[float] | None]


def points(metrics: Metrics) -> list[SizePoint]:
    """The dense model, the baselines and the compressed one, the largest file first."""
    texts, ours = metrics["perplexity"], metrics["ratio"]
    found = [
        SizePoint("dense, 16 bit", 1.0, 1.0, {text: entry["dense"] for text, entry in texts.items()}, {}),
        SizePoint(
            "Spectrim",
            ours["file"],
            ours["memory"],
            {text: entry["compressed"] for text, entry in texts.items()},
            {text: entry["interval"] for text, entry in texts.items()},
        ),
    ]
    found += [
        SizePoint(_baseline(name), entry["ratio"], entry["ratio"], entry["perplexity"], entry["interval"])
        for name, entry in metrics["baselines"].items()
    ]
    return sorted(found, key=lambda point: (-point.ratio, point.name))


def _baseline(name: str) -> str:
    """RTN int8, or the library before its own kind: bitsandbytes nf4."""
    library, _, kind = name.partition("_") if "_" in name else ("RTN", "", name)
    return f"{library.upper() if library == 'gptq' else library} {kind.replace('_', ' ')}"


def perplexity_table(metrics: Metrics) -> Table:
    """Size and perplexity of the compressed model beside the dense one and plain quantization."""
    texts, dense = list(metrics["perplexity"]), metrics["bytes"]["dense_linears_16bit"]
    columns = ["model", "in the file", "ratio", "in memory"]
    for text in texts:
        columns += [text, "against dense"]
    rows = []
    listed = points(metrics)
    for name, ratio, memory_ratio, perplexity, intervals in listed:
        row = [name, megabytes(ratio * dense), f"{ratio:.3f}", megabytes(memory_ratio * dense)]
        for text in texts:
            reference = metrics["perplexity"][text]["dense"]
            row += [number(perplexity[text]), _against(perplexity[text], reference, intervals.get(text))]
        rows.append(tuple(row))
    emphasis = next(index for index, point in enumerate(listed) if point[0] == "Spectrim")
    return Table(tuple(columns), tuple(rows), emphasis=emphasis)


def _against(new: float, old: float, interval: Sequence[float] | None) -> str:
    """The change, and the interval of it where there is one: +5.5 % (+4.9 to +6.1)."""
    if new == old:
        return "–"
    if interval is None or new / old >= 10:
        return change(new, old)
    low, high = (f"{100 * (end - 1):+.1f}".replace("-", "−") for end in interval)
    return f"{change(new, old)} ({low} to {high})"


def candidates_table(ranks: Mapping[str, Any]) -> Table | None:
    """Validation loss of each way to choose the ranks, best first, the kept one emphasised; None without a choice."""
    if not ranks["validation_loss"]:
        return None
    listed = sorted(ranks["validation_loss"].items(), key=lambda item: (item[1], item[0]))
    rows = tuple(
        (
            f"{name} (kept)" if name == ranks["chosen"] else name,
            f"{loss:.4f}",
            change(loss, listed[0][1]) if place else "best",
        )
        for place, (name, loss) in enumerate(listed)
    )
    emphasis = next((index for index, (name, _) in enumerate(listed) if name == ranks["chosen"]), None)
    return Table(("ranks from", "validation loss", "against best"), rows, emphasis=emphasis)


def ranks_table(found: Sequence[RankedMatrix], discarded: Mapping[str, float], meaning: str) -> Table:
    """Per matrix type: shape, the ranks, how many stay dense, the bytes kept and the share of the discarded energy.

    ``discarded`` maps a matrix to the energy that its cut drops; ``meaning`` says what that energy predicts.
    """
    whole = sum(discarded.values())
    rows = []
    for kind, group in by_kind(found).items():
        low_rank = [matrix.rank for matrix in group if matrix.is_factored]
        dense = sum(matrix.dense_bytes for matrix in group)
        energy = sum(discarded[matrix.name] for matrix in group)
        rows.append(
            (
                kind,
                " / ".join(dict.fromkeys(f"{matrix.out_features} × {matrix.in_features}" for matrix in group)),
                f"{min(low_rank)} – {median(low_rank):g} – {max(low_rank)}" if low_rank else "–",
                f"{sum(matrix.is_dense for matrix in group)} of {len(group)}",
                f"{100 * sum(matrix.bytes for matrix in group) / dense:.1f} %",
                f"{100 * energy / whole:.1f} %" if whole and low_rank else "–",
            )
        )
    share = f"share of the cuts' {meaning}"
    columns = ("matrix", "shape", "rank: least – median – most", "left dense", "bytes kept", share)
    return Table(columns, tuple(rows), n_text=2)


def tasks_table(metrics: Metrics) -> Table | None:
    """lm-eval scores in percent ± standard error, dense and compressed; None when no task was asked for."""
    if not metrics["tasks"]:
        return None
    rows = tuple(
        (
            task,
            entry.get("metric", "score"),
            f"{entry['n_examples']:,}" if "n_examples" in entry else "–",
            _score(entry, "dense"),
            _score(entry, "compressed"),
            f"{100 * (entry['compressed'] - entry['dense']):+.1f}".replace("-", "−"),
        )
        for task, entry in metrics["tasks"].items()
    )
    return Table(("task", "metric", "examples", "dense, %", "compressed, %", "points"), rows, n_text=2)


def running_table(metrics: Metrics) -> Table:
    """Speed and memory of the compressed model against the dense one, measured in the same run."""
    rows = [
        (f"{phase.capitalize()}, tokens/s", number(entry["dense"]), number(entry["compressed"]), _factor(entry))
        for phase, entry in metrics["speed"].items()
    ]
    rows += [
        (_MEMORY.get(part, part), megabytes(entry["dense"]), megabytes(entry["compressed"]), _factor(entry))
        for part, entry in metrics["memory"].items()
    ]
    entry = metrics["multiply_adds"]
    rows.append(("Multiply-adds a token, linears", f"{entry['dense']:,}", f"{entry['compressed']:,}", _factor(entry)))
    return Table(("", "dense", "compressed", "compressed / dense"), tuple(rows))


def dtypes(metrics: Metrics) -> str:
    """What the models ran in where their speed was measured."""
    found = metrics["dtypes"]
    if found["dense"] == found["compressed"]:
        return f"both in {found['dense']}"
    return f"dense in {found['dense']}, compressed in {found['compressed']}: each in what it is faster in"


def protocol_table(metrics: Metrics) -> Table:
    """What each perplexity was measured on."""
    rows = tuple(
        (text, f"{entry['tokens_sha256'][:16]}…", f"{entry['n_tokens']:,}", f"{entry['seq_len']:,}")
        for text, entry in metrics["perplexity"].items()
    )
    return Table(("text", "sha256 of the tokens", "tokens predicted", "tokens per window"), rows, n_text=2)


def _score(entry: Mapping[str, Any], side: str) -> str:
    error = entry.get("stderr", {}).get(side)
    return f"{100 * entry[side]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _factor(entry: Mapping[str, float]) -> str:
    return f"{entry['compressed'] / entry['dense']:.2f}×"
