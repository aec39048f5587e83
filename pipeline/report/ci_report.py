"""One markdown file about this commit against another: what moved in metrics and parameters, then the whole report.

    python -m pipeline.report.ci_report --base REV --out ci-report.md

DVC compares, this file prints: cells are escaped (a generation sample may hold anything), and a base without metrics,
or no base at all because this is the first commit, is said in words. Figures are embedded as data URIs. GitHub shows
none in summaries and comments: with --files-url (or FILES_URL), the address where the files of this run can be had,
each figure is named with that link, and perplexity over bytes is a Mermaid chart, which GitHub draws.
"""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.report.tables import Metrics, Table, change, markdown, points
from pipeline.runtime.artifacts import write_text
from pipeline.runtime.console import run
from spectrim.errors import ConfigError, OrchestrationError, StorageError

REPORT = Path("reports/report.md")
METRICS = Path("reports/metrics.json")
FIGURE = re.compile(r"^!\[(?P<label>[^\]]*)\]\((?P<path>figures/[\w-]+\.svg)\)$", re.MULTILINE)
LONGEST_TEXT = 60


def main(
    base: Annotated[str, typer.Option(help="The git revision to compare with.")],
    out: Annotated[Path, typer.Option(help="The markdown file to write.")],
    files_url: Annotated[
        str | None, typer.Option(envvar="FILES_URL", help="Link to this address instead of embedding figures.")
    ] = None,
) -> None:
    """Write one markdown file: metrics and parameters against BASE, then reports/report.md with its figures."""
    write_text(out, compose(base, files_url))
    print(out)


def compose(base: str, files_url: str | None = None) -> str:
    """The file's text, for the project in the working directory.

    Raises:
        ConfigError: ``base`` is no revision of this repository.
        StorageError: the report or one of its figures is missing.
        OrchestrationError: git or DVC failed.
    """
    for file in (REPORT, METRICS):
        if not file.is_file():
            raise StorageError(f"{file}: not found; run: dvc repro report")
    report = _with_figures(REPORT.read_text(encoding="utf-8"), files_url)
    parts = [f"# {_described('HEAD')} against {_short(base)}", *_comparison(_short(base), _resolved(base))]
    return "\n\n".join([*parts, "---", report.strip()]) + "\n"


def metrics_table(changes: Mapping[str, Mapping[str, Any]], base: str) -> Table:
    """`dvc metrics diff --json` as a table: every number that moved, with its relative change; texts are cut short."""
    rows = []
    for values in changes.values():
        for name, pair in sorted(values.items()):
            old, new = pair.get("old"), pair.get("new")
            numeric = all(isinstance(value, int | float) for value in (old, new))
            rows.append((name, _cell(old), _cell(new), change(new, old) if numeric else "–"))
    return Table(("metric", base, "this commit", "change"), tuple(rows))


def params_table(changes: Mapping[str, Mapping[str, Any]], base: str) -> Table:
    """`dvc params diff --json` as a table."""
    rows = [
        (name, _cell(pair.get("old"), exact=True), _cell(pair.get("new"), exact=True))
        for values in changes.values()
        for name, pair in sorted(values.items())
    ]
    return Table(("parameter", base, "this commit"), tuple(rows), n_text=3)


def charts(metrics: Metrics) -> str:
    """Perplexity of the dense, the quantized and the compressed model, one Mermaid bar chart per text.

    Beside each bar stands the share of bytes kept. The axis begins at 0: by itself Mermaid begins at the least value.
    """
    found = points(metrics)
    names = ", ".join(_quoted(f"{name}: {ratio:.3f}") for name, ratio, *_ in found)
    return "\n\n".join(
        _chart(text, names, [point.perplexity[text] for point in found]) for text in metrics["perplexity"]
    )


def _chart(text: str, names: str, perplexities: list[float]) -> str:
    lines = (
        "```mermaid",
        "xychart-beta horizontal",
        f"    title {_quoted(f'Perplexity on {text}, beside the bytes kept')}",
        f"    x-axis [{names}]",
        f'    y-axis "perplexity" 0 --> {_decimal(max(perplexities))}',
        f"    bar [{', '.join(map(_decimal, perplexities))}]",
        "```",
    )
    return "\n".join(lines)


def _comparison(base: str, commit: str | None) -> list[str]:
    if commit is None:
        return [f"There is no commit {base}: this is the first one, so there is nothing to compare with."]
    parts = [f"Base: {_described(commit)}. This commit is compared as it stands in the working tree."]
    if _git("cat-file", "-e", f"{commit}:./{METRICS}") is None:
        metrics = (
            f"{base} has no {METRICS}, so there are no metrics to compare with; this commit's are in the report below."
        )
    else:
        found = metrics_table(_dvc("metrics", "diff", commit), base)
        metrics = markdown(found) if found.rows else f"No metric differs from {base}."
    if _git("cat-file", "-e", f"{commit}:./params.yaml") is None:
        parameters = f"{base} has no params.yaml, so there are no parameters to compare with."
    else:
        listed = params_table(_dvc("params", "diff", commit), base)
        parameters = markdown(listed) if listed.rows else f"No parameter differs from {base}."
    return [*parts, "## Metrics", metrics, "## Parameters", parameters]


def _resolved(base: str) -> str | None:
    """The commit ``base`` names; None when it lies before the first commit (REV^, REV~N, or forty zeros)."""
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}")
    if commit is not None:
        return commit
    child = re.sub(r"(\^|~\d*)+$", "", base)
    before = child != base and _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{child}^{{commit}}")
    if before or re.fullmatch(r"0{40}|0{64}", base):
        return None
    raise ConfigError(
        [f"--base: {base} is no revision of this repository; fetch it (a shallow clone lacks it) or correct it"]
    )


def _short(base: str) -> str:
    return base[:12] if re.fullmatch(r"[0-9a-f]{40,64}", base) else base


def _with_figures(report: str, files_url: str | None) -> str:
    def shown(match: re.Match[str]) -> str:
        file = REPORT.parent / match["path"]
        if not file.is_file():
            raise StorageError(f"{file}: not found, but {REPORT} shows it; run: dvc repro -f report")
        if files_url:
            link = f"{match['label']}: `{match['path']}` in [the files of this run]({files_url})"
            return (
                f"{charts(json.loads(METRICS.read_text(encoding='utf-8')))}\n\n{link}" if file.stem == "size" else link
            )
        return f"![{match['label']}](data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()})"

    return FIGURE.sub(shown, report)


def _quoted(text: str) -> str:
    """A string of Mermaid's: it knows no escapes, and a backtick would begin markdown."""
    return '"' + re.sub(r'["`\s]+', " ", text).strip() + '"'


def _decimal(value: float) -> str:
    """Four significant digits, as Mermaid reads them, without an exponent: 22.55, 51000000."""
    return f"{Decimal(f'{value:.4g}'):f}"


def _described(commit: str) -> str:
    found = _git("log", "-1", "--format=%h “%s”", commit)
    if found is None:
        raise OrchestrationError(
            f"git knows no commit {commit} here; run inside the project's repository, after a commit"
        )
    return found


def _cell(value: Any, *, exact: bool = False) -> str:
    if value is None:
        return "–"
    if isinstance(value, int | float) and not isinstance(value, bool) and not exact:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if exact or len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


def _git(*arguments: str) -> str | None:
    """What git prints, or None when it refuses."""
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OrchestrationError("git: not found; the comparison needs it: install git") from None
    return result.stdout.strip() if result.returncode == 0 else None


def _dvc(*arguments: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "dvc", *arguments, "--json"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode != 0:
        reason = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise OrchestrationError(f"dvc {' '.join(arguments)} failed: {reason}")
    found: dict[str, dict[str, Any]] = json.loads(result.stdout or "{}")
    return found


if __name__ == "__main__":
    run(main)
