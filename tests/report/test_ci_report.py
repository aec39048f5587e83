"""`make ci-report`, on a real git and DVC repository with three commits: no metrics yet, a first run, another ratio."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from pipeline.report import ci_report
from spectrim.errors import ConfigError, StorageError
from tests import report_project
from tests.tiny import REPOSITORY, process_environment

SAMPLE = "The capital | of\nFrance is `Paris`"
REPORT = "# Spectrim\n\n![Sizes](figures/size.svg)\n\n![Ranks](figures/ranks.svg)\n\nThe report's own text.\n"
DVC_YAML = {
    "stages": {
        "evaluate": {
            "cmd": "python -m stages.evaluate",
            "params": ["compression"],
            "metrics": [{"reports/metrics.json": {"cache": False}}],
        }
    }
}


def command(folder: Path, *arguments: str) -> str:
    done = subprocess.run(arguments, cwd=folder, env=process_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder: Path, subject: str) -> str:
    command(folder, "git", "add", "--all")
    identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false")
    command(folder, "git", *identity, "commit", "--quiet", "--message", subject)
    return command(folder, "git", "rev-parse", "HEAD")


def write_run(folder: Path, ratio: float, perplexity: float) -> None:
    metrics: dict[str, Any] = report_project.metrics(2)
    metrics["ratio"] = {"target": ratio, "file": ratio - 0.0001, "memory": ratio - 0.0001}
    metrics["perplexity"]["wikipedia"]["compressed"] = perplexity
    metrics["generation"] = f"{SAMPLE} at {ratio}"
    (folder / "reports" / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "reports" / "metrics.json").write_text(json.dumps(metrics))
    (folder / "reports" / "report.md").write_text(REPORT)
    for name in ("size", "ranks"):
        (folder / "reports" / "figures" / f"{name}.svg").write_text(f"<svg><!-- {name} {ratio} --></svg>")
    (folder / "params.yaml").write_text(yaml.safe_dump({"compression": {"ratio": ratio, "exclude": ["*.down_proj"]}}))


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The repository and its commits, oldest first."""
    folder = tmp_path_factory.mktemp("repository")
    command(folder, "git", "init", "--quiet")
    (folder / "README.md").write_text("nothing yet\n")
    shas = [commit(folder, "Begin")]
    command(folder, sys.executable, "-m", "dvc", "init", "--quiet")
    (folder / "dvc.yaml").write_text(yaml.safe_dump(DVC_YAML))
    write_run(folder, 0.8, 36.0)
    shas.append(commit(folder, "Compress to 0.8"))
    write_run(folder, 0.6, 54.0)
    return folder, [*shas, commit(folder, "Compress to 0.6")]


@pytest.fixture
def repository(commits: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its folder, made the working directory."""
    monkeypatch.chdir(commits[0])
    return commits[0]


def tables(text: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    inside = False
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        if token.type in ("table_open", "table_close"):
            inside = token.type == "table_open"
            if inside:
                found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif inside and token.type == "inline":
            found[-1][-1].append("".join(part.content for part in token.children or []))
    return found


def test_what_moved_since_the_base_comes_first(repository: Path, commits: tuple[Path, list[str]]) -> None:
    text = ci_report.compose("HEAD^")
    metrics, parameters = tables(text)
    assert metrics[0] == ["metric", "HEAD^", "this commit", "change"]
    rows = {row[0]: row[1:] for row in metrics[1:]}
    assert rows["perplexity.wikipedia.compressed"] == ["36", "54", "+50.0 %"]
    assert rows["ratio.target"] == ["0.8", "0.6", "−25.0 %"]
    assert "perplexity.wikipedia.dense" not in rows
    assert parameters == [["parameter", "HEAD^", "this commit"], ["compression.ratio", "0.8", "0.6"]]
    assert text.startswith(f"# {commits[1][2][:7]} “Compress to 0.6” against HEAD^\n")
    assert f"Base: {commits[1][1][:7]} “Compress to 0.8”" in text
    assert text.index("## Parameters") < text.index("The report's own text.")


def test_a_generation_sample_cannot_break_the_table(repository: Path) -> None:
    metrics = tables(ci_report.compose("HEAD^"))[0]
    assert {len(row) for row in metrics} == {4}
    row = next(row for row in metrics if row[0] == "generation")
    assert row[1:] == ["The capital | of France is `Paris` at 0.8", "The capital | of France is `Paris` at 0.6", "–"]


def test_figures_are_embedded_byte_for_byte(repository: Path) -> None:
    text = ci_report.compose("HEAD^")
    embedded = re.findall(r"!\[(\w+)\]\(data:image/svg\+xml;base64,([\w+/=]+)\)", text)
    assert [label for label, _ in embedded] == ["Sizes", "Ranks"]
    for (_, data), name in zip(embedded, ("size", "ranks"), strict=True):
        assert base64.b64decode(data) == (repository / "reports" / "figures" / f"{name}.svg").read_bytes()
    assert "(figures/" not in text


def test_figures_are_charts_and_links_where_embedding_does_not_show(repository: Path) -> None:
    text = ci_report.compose("HEAD^", "https://example.org/run/1")
    assert "data:" not in text and "![" not in text
    for label, name in (("Sizes", "size"), ("Ranks", "ranks")):
        assert f"{label}: `figures/{name}.svg` in [the files of this run](https://example.org/run/1)" in text
    fences = [token.content for token in MarkdownIt().parse(text) if token.type == "fence" and token.info == "mermaid"]
    metrics = json.loads((repository / "reports/metrics.json").read_text())
    assert len(fences) == len(metrics["perplexity"])
    assert text.index("```mermaid") < text.index("figures/size.svg") < text.index("figures/ranks.svg")


def test_a_chart_holds_this_runs_perplexities_beside_the_bytes() -> None:
    metrics = report_project.metrics(2)
    metrics["perplexity"]["wikipedia"]["compressed"] = 5.1e7
    for values in metrics["baselines"].values():
        values["perplexity"]["wikipedia"] = 22.5849
    chart = next(chart for chart in ci_report.charts(metrics).split("\n\n") if "wikipedia" in chart)
    names = re.findall(r'"([^"]+): ([\d.]+)"', chart)
    bars = re.search(r"bar \[(.*)\]", chart)
    assert bars is not None
    found = dict(zip((name for name, _ in names), bars[1].split(", "), strict=True))
    assert found["Spectrim"] == "51000000" and found["RTN int8"] == "22.58"
    assert dict(names)["dense, 16 bit"] == "1.000"
    assert 'y-axis "perplexity" 0 --> 51000000' in chart
    assert all(re.fullmatch(r"\d+(\.\d+)?", value) for value in found.values())


def test_a_texts_name_cannot_end_a_charts_string() -> None:
    metrics = report_project.metrics(2)
    for values in (metrics["perplexity"], *(entry["perplexity"] for entry in metrics["baselines"].values())):
        values['my "own"\ntext`'] = values.pop("wikipedia")
    title = next(line for line in ci_report.charts(metrics).splitlines() if "own" in line)
    assert title.strip() == 'title "Perplexity on my own text , beside the bytes kept"'


def test_a_base_without_metrics_is_said_in_words(repository: Path, commits: tuple[Path, list[str]]) -> None:
    first = commits[1][0]
    text = ci_report.compose(first)
    assert f"{first[:12]} has no reports/metrics.json" in text
    assert f"{first[:12]} has no params.yaml" in text
    assert tables(text) == []
    assert "The report's own text." in text


@pytest.mark.parametrize("base", ["HEAD~3", "HEAD~2^", "0" * 40])
def test_before_the_first_commit_there_is_nothing_to_compare_with(repository: Path, base: str) -> None:
    text = ci_report.compose(base)
    assert "this is the first one, so there is nothing to compare with" in text
    assert "The report's own text." in text


def test_the_same_commit_differs_in_nothing(repository: Path) -> None:
    text = ci_report.compose("HEAD")
    assert "No metric differs from HEAD." in text
    assert "No parameter differs from HEAD." in text


@pytest.mark.parametrize("base", ["no-such-branch", "no-such-branch^", "-HEAD", "f" * 40])
def test_an_unknown_base_is_refused(repository: Path, base: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--base: {base} is no revision")):
        ci_report.compose(base)


def test_a_missing_figure_or_report_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"reports/report\.md: not found; run: dvc repro report"):
        ci_report.compose("HEAD")
    write_run(tmp_path, 0.8, 36.0)
    (tmp_path / "reports/figures/ranks.svg").unlink()
    with pytest.raises(StorageError, match=r"ranks\.svg: not found, but reports/report\.md shows it"):
        ci_report.compose("HEAD")


def test_the_command_writes_one_file_or_one_line(repository: Path, tmp_path: Path) -> None:
    def call(base: str, out: Path) -> subprocess.CompletedProcess[str]:
        environment = process_environment(PYTHONPATH=str(REPOSITORY), FILES_URL="https://example.org/run/1")
        arguments = [sys.executable, "-m", "pipeline.report.ci_report", "--base", base, "--out", str(out)]
        return subprocess.run(arguments, cwd=repository, env=environment, capture_output=True, text=True, check=False)

    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    assert call("HEAD^", good).returncode == 0
    assert "[the files of this run](https://example.org/run/1)" in good.read_text(encoding="utf-8")
    refused = call("nowhere", bad)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ") and "nowhere is no revision" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not bad.exists()


def workflow(name: str) -> dict[Any, Any]:
    """.github/NAME.yml; YAML reads its key `on` as True."""
    found: dict[Any, Any] = yaml.safe_load((REPOSITORY / ".github" / f"{name}.yml").read_text(encoding="utf-8"))
    return found


def commands(steps: list[dict[str, Any]]) -> list[str]:
    return [line.partition(" #")[0].strip() for step in steps for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("name", ["workflows/report", "workflows/tests", "actions/setup/action"])
def test_workflows_only_call_what_the_project_has(name: str) -> None:
    text = (REPOSITORY / ".github" / f"{name}.yml").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z.-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = set(re.findall(r"\bmake ([a-z.-]+)", text))
    assert called and called <= targets
    files = [f"{found.replace('.', '/')}.py" for found in re.findall(r"-m (pipeline[\w.]+)", text)]
    files += re.findall(r"(\.ci/\w+)(?=\n)", text)
    files += [f"{found}/action.yml" for found in re.findall(r"uses: \./(\S+)", text)]
    assert all((REPOSITORY / file).is_file() for file in files), files


@pytest.mark.parametrize("name", ["report", "tests"])
def test_a_pull_request_runs_each_workflow_once(name: str) -> None:
    found = workflow(f"workflows/{name}")
    assert found[True] == {"push": {"branches": ["main"]}, "pull_request": None}
    assert found["permissions"] == {"contents": "read"}
    assert found["concurrency"]["cancel-in-progress"] is True


def test_the_workflow_runs_what_a_commit_must_pass() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    local = re.findall(r"^(?:make \w+|\.ci/\w+)$", script, re.MULTILINE)
    remote = [command for job in workflow("workflows/tests")["jobs"].values() for command in commands(job["steps"])]
    assert sorted(remote) == sorted(local) == [".ci/graph", "make docs", "make lint", "make test"]


def test_packages_and_results_are_kept_between_runs() -> None:
    packages = next(
        step for step in workflow("actions/setup/action")["runs"]["steps"] if "cache" in step.get("uses", "")
    )
    assert packages["with"]["path"] == ".venv"
    assert "python-version" in packages["with"]["key"] and "requirements.lock" in packages["with"]["key"]
    steps = workflow("workflows/report")["jobs"]["report"]["steps"]
    restored, saved = (step for step in steps if "actions/cache/" in step.get("uses", ""))
    assert restored["with"]["path"] == saved["with"]["path"] == ".dvc/cache\n.spectrim\n"
    assert saved["with"]["key"].startswith(restored["with"]["key"])
    ran = next(index for index, step in enumerate(steps) if "dvc repro" in step.get("run", ""))
    assert steps.index(restored) < ran < steps.index(saved) and saved["if"].startswith("always()")


def test_only_the_job_that_runs_no_code_of_the_commit_may_write() -> None:
    jobs = workflow("workflows/report")["jobs"]
    writers = {name: job for name, job in jobs.items() if "write" in job.get("permissions", {}).values()}
    assert list(writers) == ["comment"]
    steps = writers["comment"]["steps"]
    assert not any("checkout" in step.get("uses", "") for step in steps)
    assert [step["run"].split()[:3] for step in steps if "run" in step] == [["gh", "pr", "comment"]]
