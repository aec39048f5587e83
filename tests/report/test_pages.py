"""The report: one page without the network, everything a reader needs on it, the same bytes every time."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import params
from pipeline.report import pages as report
from pipeline.runtime.artifacts import read_json
from spectrim.errors import StorageError
from stages import report as stage
from tests import report_project
from tests.tiny import REPOSITORY, process_environment, tree

BLOCKS = 2
VOID = {"meta", "br", "img", "link", "input", "hr"}
Project = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A finished run without its report; ``sections`` change params.yaml, everything else metrics.json."""

    def build(sections: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Path:
        report_project.write(tmp_path, n_blocks=BLOCKS, **changes)
        report_project.write_params(tmp_path, **(sections or {}))
        return tmp_path

    return build


def rendered(root: Path) -> report.RenderedReport:
    ranks = read_json(root / "artifacts/train_ranks/ranks.json")
    loaded = params.load(root / "params.yaml")
    metric = loaded.train_ranks.whitening
    return report.render(
        loaded,
        read_json(root / "reports/metrics.json")
        | read_json(root / "reports/speed.json")
        | read_json(root / "artifacts/capture/capture.json"),
        ranks,
        read_json(root / "artifacts/calibrate/calibrate.json"),
        report.read_curve(root / "artifacts/train_ranks/curve.csv"),
        report.read_curve(root / "artifacts/update_weights/refinement.csv"),
        read_json(root / "artifacts/update_weights/summary.json"),
        report.read_spectra(root / "artifacts/capture/spectra.safetensors", list(ranks["matrices"]), metric),
    )


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> report.RenderedReport:
    """The report of the run that no test changes."""
    root = tmp_path_factory.mktemp("usual")
    report_project.write(root, n_blocks=BLOCKS)
    report_project.write_params(root)
    return rendered(root)


class Page(HTMLParser):
    """Checks that tags close in order; collects ids, addresses and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.addresses += [str(value) for name, value in attrs if name in ("href", "src", "xlink:href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def test_the_page_is_whole_and_needs_nothing_but_itself(usual: report.RenderedReport) -> None:
    html = usual.html
    page = Page(html)
    assert not page.tags & {"script", "link", "iframe", "img", "object"}
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", html)
    assert html.count("<svg") == 5
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_both_documents_hold_the_numbers_and_the_samples(usual: report.RenderedReport) -> None:
    for text in (usual.markdown, Page(usual.html).text):
        for shown in (
            "35.13",
            "21.93",
            "+60.2 %",
            "80.0 %",
            "RTN int8",
            "RTN int4",
            "453.1 MB",
            "0.96×",
            "down_proj",
            "within 4.8e-05 %",
        ):
            assert shown in text, shown
        for shown in (*report_project.GENERATION.splitlines(), "the city of light", "16,368", "3f3f3f3f"):
            assert shown in text, shown


def test_each_figure_of_the_markdown_is_a_file(usual: report.RenderedReport) -> None:
    assert set(re.findall(r"\]\(figures/(\w+)\.svg\)", usual.markdown)) == set(usual.figures)
    assert set(usual.figures) == {"size", "ranks", "spectra", "training", "refinement"}


def test_generated_markup_stays_text(project: Project) -> None:
    sample = "The capital of France is </blockquote><script>alert(1)</script>\n```\n# no heading"
    found = rendered(project(generation=sample))
    assert "<script" not in found.html
    assert "````text\n" + sample + "\n````" in found.markdown


def test_quantization_is_called_flattered_only_for_weights_from_a_quantized_file(
    project: Project, usual: report.RenderedReport
) -> None:
    assert "come from a Q4_1 file" in usual.html
    assert (
        usual.markdown.index("RTN int4") < usual.markdown.index("come from a Q4_1") < usual.markdown.index("## Ranks")
    )
    other = rendered(project(sections={"model": {"source": "hf:org/model@main", "sha256": None}}))
    assert "flattered" not in other.html and "flattered" not in other.markdown


def test_a_kept_candidate_other_than_the_trained_one_is_said(project: Project, usual: report.RenderedReport) -> None:
    assert "kept those of" not in usual.html
    other = rendered(project(chosen="fisher"))
    for text in (other.html, other.markdown):
        assert "Training did not earn its keep: asked for ranks by “gates”, kept those of “fisher”" in text


def test_the_refinement_says_what_was_kept(usual: report.RenderedReport) -> None:
    for text in (usual.markdown, Page(usual.html).text):
        assert "Validation loss 3.6581 → 3.5102 nats per token; what was stored after step 16 was kept." in text


def test_without_training_there_is_no_curve_and_the_report_says_so(project: Project) -> None:
    root = project(trained=False, sections={"train_ranks": {"method": "uniform"}})
    file = root / "artifacts/train_ranks/ranks.json"
    ranks = read_json(file) | {"method": "uniform", "chosen": "uniform", "validation_loss": {}}
    file.write_text(json.dumps(ranks))
    found = rendered(root)
    assert not {"training", "refinement"} & set(found.figures)
    for text in (found.html, found.markdown):
        assert "No ranks were trained: the ranks come from “uniform”." in text
        assert "validation loss" not in text and "Nothing was refined." in text


def test_the_input_metric_is_named_where_it_is_used(project: Project, usual: report.RenderedReport) -> None:
    assert "share of the cuts' predicted loss" in usual.markdown
    other = rendered(project(sections={"train_ranks": {"whitening": "input"}}))
    assert "share of the cuts' output error²" in other.markdown and "input metric" in other.html


def test_ranks_from_a_file_are_compared_with_it(project: Project, usual: report.RenderedReport) -> None:
    assert "The ranks come from" not in usual.html
    root = project()
    ranks_file = root / "artifacts/train_ranks/ranks.json"
    change = {"name": "model.layers.0.mlp.up_proj", "from": 300, "to": 248}
    file = {"path": "best.json", "sha256": "ab" * 32, "layout": "Dobi-SVD", "bytes": 9 * 10**7, "ratio": 0.5221}
    ranks_file.write_text(json.dumps(read_json(ranks_file) | {"file": file | {"largest_change": change}}))
    found = rendered(root)
    for text in (found.markdown, Page(found.html).text):
        assert "best.json (Dobi-SVD, sha256 abababababababab…): stored as float16 they would take 90.0 MB" in text


def test_tied_ranks_are_said(project: Project, usual: report.RenderedReport) -> None:
    said = "one rank for linears that read the same input"
    assert said not in usual.markdown
    assert said in rendered(project(sections={"compression": {"tie": True}})).markdown


def test_the_discarded_energy_is_the_tail_beyond_the_rank(project: Project) -> None:
    from pipeline.report.matrices import RankedMatrix

    sigma = report_project.spectra(1)["model.layers.0.mlp.up_proj"]
    shape = ("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", 1536, 576)
    assert report.discarded(RankedMatrix(*shape, 576, "dense", 0), sigma) == 0
    assert report.discarded(RankedMatrix(*shape, 575, "int8", 0), sigma) == pytest.approx(sigma[-1] ** 2)
    assert report.discarded(RankedMatrix(*shape, 8, "float16", 0), sigma) == pytest.approx(
        sum(x * x for x in sigma[8:])
    )


def test_the_stage_writes_the_same_bytes_in_another_process(project: Project, usual: report.RenderedReport) -> None:
    root, expected = project(), usual
    done = subprocess.run(
        [sys.executable, "-m", "stages.report"],
        cwd=root,
        env=process_environment(PYTHONPATH=str(REPOSITORY), PYTHONHASHSEED="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (root / "reports/report.md").read_text(encoding="utf-8") == expected.markdown
    assert (root / "reports/report.html").read_text(encoding="utf-8") == expected.html
    written = {file.stem: file.read_text(encoding="utf-8") for file in (root / "reports/figures").iterdir()}
    assert written == expected.figures
    assert {path.name for path in (root / "reports").iterdir()} == {
        "metrics.json",
        "speed.json",
        "report.md",
        "report.html",
        "figures",
    }


def test_a_page_rendered_before_is_taken_from_the_store(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    root, times = project(), []
    monkeypatch.chdir(root)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    render = report.render
    monkeypatch.setattr(report, "render", lambda **kwargs: times.append(1) or render(**kwargs))

    def run() -> None:
        params.load.cache_clear()
        stage.main()

    run()
    first = tree(root / "reports")
    report_project.write_params(root, report={"title": "Another"})
    run()
    assert len(times) == 2 and "Another" in (root / "reports/report.md").read_text()
    report_project.write_params(root)
    shutil.rmtree(root / "reports" / "figures")
    run()
    assert len(times) == 2 and tree(root / "reports") == first
    metrics = read_json(root / "reports/metrics.json") | {"generation": "Another sample"}
    (root / "reports/metrics.json").write_text(json.dumps(metrics))
    run()
    assert len(times) == 3 and "Another sample" in (root / "reports/report.md").read_text()


def test_a_missing_input_names_the_file(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    root = project()
    monkeypatch.chdir(root)
    params.load.cache_clear()
    (root / "artifacts/capture/spectra.safetensors").unlink()
    with pytest.raises(StorageError, match=r"capture/spectra\.safetensors: not found; run the stage that writes it"):
        stage.main()


def test_a_curve_that_is_no_table_of_numbers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train_ranks" / "curve.csv"
    file.parent.mkdir()
    with pytest.raises(StorageError, match=r"curve\.csv: not found; run: dvc repro train_ranks"):
        report.read_curve(file)
    for content in ("step,cross_entropy\n1,high\n", "step,cross_entropy\n1\n"):
        file.write_text(content)
        with pytest.raises(StorageError, match="not a table of numbers"):
            report.read_curve(file)
    file.write_text("step,cross_entropy\n")
    assert {name: len(values) for name, values in report.read_curve(file).items()} == {"step": 0, "cross_entropy": 0}


def test_a_missing_spectrum_is_named(project: Project) -> None:
    root = project()
    file = root / "artifacts/capture/spectra.safetensors"
    with pytest.raises(StorageError, match=r"no two_sided spectrum of model\.layers\.9\.x \(and 0 more\)"):
        report.read_spectra(file, ["model.layers.0.mlp.up_proj", "model.layers.9.x"], "two_sided")
    with pytest.raises(StorageError, match="not found; run: dvc repro capture"):
        report.read_spectra(root / "nowhere.safetensors", [], "two_sided")


def test_the_report_says_what_windows_begin_with(usual: report.RenderedReport, project: Project) -> None:
    root = project()
    file = root / "artifacts/calibrate/calibrate.json"
    file.write_text(json.dumps(read_json(file) | {"bos": {"news": "<bos>", "wikipedia": "<bos>"}}))
    found = rendered(root)
    assert "\nEvery window of news, wikipedia begins with `<bos>`.\n" in found.markdown
    assert "Every window of news, wikipedia begins with <bos>." in Page(found.html).text
    assert "begins with" not in usual.markdown + usual.html
