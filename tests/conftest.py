"""Fixtures shared by all tests: tiny models as local folders, a text, and whole tiny projects."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.layers import run_layers
from pipeline.runtime.store import LayerStore
from tests import report_project, tiny
from tests.layer_runs import INLINE
from tests.layer_worker import names, tasks_of
from tests.tiny import tree

WHOLE_PROJECTS = {"finished_llama", "captured_llama", "tiny_project", "prefect_server"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run whole projects first: they take minutes, and a long one that starts last keeps one core idle."""
    slow = {item.path for item in items if WHOLE_PROJECTS & set(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in slow)


ProjectFactory = Callable[[str], tiny.Project]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> Hugging Face folder with model and tokenizer; read only."""
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save_model(family, root / family) for family in tiny.FAMILIES}


@pytest.fixture
def metrics() -> dict[str, Any]:
    """The metrics.json of a finished run."""
    return report_project.metrics(30)


@pytest.fixture(scope="module")
def ranks() -> dict[str, Any]:
    """The ranks.json of a finished run; read only."""
    return report_project.ranks(report_project.spectra(12), 0.8)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus as jsonl; read only."""
    return tiny.save_corpus(tmp_path_factory.mktemp("text") / "corpus.jsonl")


@pytest.fixture
def tiny_project(tmp_path: Path, model_folders: dict[str, Path], corpus_file: Path) -> ProjectFactory:
    """family -> a fresh project of that family in this test's own folder; no stage has run."""

    def build(family: str = "llama") -> tiny.Project:
        return tiny.make_project(tmp_path / f"project-{family}", model_folders[family], corpus_file)

    return build


@pytest.fixture(scope="session")
def finished_llama(
    tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus_file: Path
) -> tiny.Project:
    """A Llama project after one `dvc repro`; read only, change a `.copy()`."""
    project = tiny.make_project(tmp_path_factory.mktemp("finished") / "llama", model_folders["llama"], corpus_file)
    assert project.repro() == set(tiny.STAGES)
    return project


@pytest.fixture(scope="session")
def captured_llama(
    tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus_file: Path
) -> tiny.Project:
    """A Llama project after everything that no compressing parameter touches; read only, change a `.copy()`."""
    project = tiny.make_project(tmp_path_factory.mktemp("captured") / "llama", model_folders["llama"], corpus_file)
    project.stages("prepare", "calibrate", "capture", "baseline")
    return project


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the layer store after an uninterrupted run of four toy layers."""
    folder = tmp_path_factory.mktemp("reference")
    store = LayerStore(folder / "layers")
    run_layers("worker", tasks_of(names(4), folder / "log"), INLINE, store)
    return tree(folder / "layers")
