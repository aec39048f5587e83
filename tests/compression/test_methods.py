"""Every declared method is one that exists, and the docs list it as it is declared."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.steps.candidates import RankSearch
from spectrim.compression import weight_update
from spectrim.compression.methods import RANK_METHODS, UPDATE_METHODS, tables
from tests.tiny import REPOSITORY


def test_the_docs_list_every_method_as_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    text = "\n".join(tables())
    assert text in page, f"docs/methods.md differs; python -m spectrim.compression.methods prints:\n{text}"
    monkeypatch.setitem(UPDATE_METHODS, "svd", replace(UPDATE_METHODS["svd"], meaning="something else"))
    assert "\n".join(tables()) != text


@pytest.mark.parametrize("name", UPDATE_METHODS)
def test_a_method_of_factors_is_computed_by_the_function_it_names(name: str) -> None:
    method = UPDATE_METHODS[name]
    for changed in (False, True):
        assert callable(getattr(weight_update, method.function(changed)))
    assert method.metric or method.changed_by is None, "only what has the inputs' Gram for its metric can change it"


@pytest.mark.parametrize("name", RANK_METHODS)
def test_a_method_of_ranks_is_proposed_or_trained(name: str) -> None:
    method: Any = RANK_METHODS[name]
    assert method.trained == (method.modules is not None) == (method.starts_from is not None)
    if method.coded:  # there is nothing to choose for each matrix
        assert not method.trained and method.proposed_by is None
        return
    assert callable(getattr(RankSearch, method.modules if method.trained else method.proposed_by))
    assert not method.trained or RANK_METHODS[method.starts_from].proposed_by
