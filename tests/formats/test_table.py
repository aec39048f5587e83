"""The tables in the docs are those that the declarations print."""

from dataclasses import replace

import pytest

from spectrim.formats.table import tables
from spectrim.maths.budget import CODED
from spectrim.maths.storage_formats import FORMATS
from tests.tiny import REPOSITORY


def test_the_docs_list_every_format_as_it_is_declared() -> None:
    page = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
    for table in tables():
        assert f"\n{table}\n" in page, f"docs/formats.md differs; python -m spectrim.formats.table prints:\n{table}"


def test_a_declaration_that_changes_changes_every_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables()
    monkeypatch.setitem(FORMATS, "int8", replace(FORMATS["int8"], keeps="something else", pivoted=True))
    assert all(one != other for one, other in zip(before, tables(), strict=True))
    listed = [len(table.splitlines()) - 2 for table in tables()]
    assert listed == [len(FORMATS), len(FORMATS) - len(CODED), len(FORMATS) - len(CODED)]
