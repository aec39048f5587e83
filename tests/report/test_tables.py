"""Numbers and tables of the report."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipeline.report import figures, tables
from pipeline.report.matrices import by_kind, read_matrices
from pipeline.report.tables import Table, markdown
from spectrim.errors import DataError


def parsed(text: str) -> list[list[str]]:
    """The cells of a markdown table as a reader sees them."""
    rows: list[list[str]] = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows:
            rows[-1].append("".join(part.content for part in token.children or []))
    return rows


cells = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Z")) | st.sampled_from(" |\\`*<&_\n"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=3))
def test_a_markdown_table_shows_every_cell_as_the_text_it_is(rows: list[tuple[str, str]]) -> None:
    shown = parsed(markdown(Table(("name", "value"), tuple((f"x{a}", f"y{b}") for a, b in rows))))
    assert shown == [["name", "value"], *([" ".join(f"x{a}".split()), " ".join(f"y{b}".split())] for a, b in rows)]


def test_numbers_are_aligned_right_and_the_emphasised_row_is_bold() -> None:
    text = markdown(Table(("a", "b"), (("x", "1"), ("y", "2")), emphasis=1))
    assert text.splitlines()[1:] == ["| --- | ---: |", "| x | 1 |", "| **y** | **2** |"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(22.55, "22.55"), (141.83, "141.8"), (6312.4, "6,312"), (5.1e7, "5.1e+07"), (0.79994, "0.7999"), (0, "0.0000")],
)
def test_numbers_have_four_significant_digits(value: float, shown: str) -> None:
    assert tables.number(value) == shown


@pytest.mark.parametrize(
    ("new", "old", "shown"), [(30, 20, "+50.0 %"), (19, 20, "−5.0 %"), (400, 20, "×20.00"), (1, 0, "–")]
)
def test_changes_are_relative_to_the_old_value(new: float, old: float, shown: str) -> None:
    assert tables.change(new, old) == shown


def test_matrices_come_by_type_in_reading_order_and_by_layer_as_a_number(ranks: dict[str, Any]) -> None:
    shuffled = {**ranks, "matrices": dict(sorted(ranks["matrices"].items()))}
    groups = by_kind(read_matrices(shuffled, "float16"))
    assert list(groups) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert all([matrix.layer for matrix in group] == list(range(12)) for group in groups.values())


def test_types_with_the_same_last_name_keep_their_whole_name(ranks: dict[str, Any]) -> None:
    entry = ranks["matrices"]["model.layers.0.mlp.up_proj"]
    names = ["model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj"]
    groups = by_kind(read_matrices({"matrices": dict.fromkeys(names, entry)}, "float16"))
    assert list(groups) == ["mlp.experts.0.up_proj", "mlp.experts.1.up_proj"]


def test_a_matrix_outside_any_layer_is_refused_by_name(ranks: dict[str, Any]) -> None:
    entry = next(iter(ranks["matrices"].values()))
    with pytest.raises(DataError, match=r"'lm_head' has no layer number"):
        read_matrices({"matrices": {"lm_head": entry}}, "float16")


def test_bytes_of_all_matrices_add_up_to_those_of_the_rank_search(ranks: dict[str, Any]) -> None:
    found = read_matrices(ranks, "float16")
    assert sum(matrix.bytes for matrix in found) == ranks["bytes"]
    assert all(matrix.share == 1 if matrix.is_dense else 0 < matrix.share < 1 for matrix in found)


def test_matrices_have_the_format_they_are_stored_in(ranks: dict[str, Any]) -> None:
    budgeted, stored = (read_matrices(ranks, format) for format in ("float16", "int8"))
    assert {matrix.format for matrix in stored} == {"int8", "dense"}
    assert [matrix.is_dense for matrix in stored] == [matrix.is_dense for matrix in budgeted]
    assert sum(matrix.bytes for matrix in stored) < 0.85 * sum(matrix.bytes for matrix in budgeted)


def test_rounded_weights_are_told_from_factors_and_from_dense_ones(ranks: dict[str, Any]) -> None:
    kinds = ("dense", "dense_int8", "dense_int4", "int4_residual", "pifa_int8", "coded")
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(len(kinds))]
    shape = {"out_features": 1536, "in_features": 576, "rank": 96, "bytes": 1000}
    entries = {name: {"format": kind, **shape} for name, kind in zip(names, kinds, strict=True)}
    found = read_matrices({"matrices": entries}, None)
    assert [matrix.format for matrix in found] == list(kinds)
    assert [matrix.label for matrix in found] == ["", "i8", "i4", "i4+", "96", "c"]
    assert [matrix.is_factored for matrix in found] == [False, False, False, False, True, False]
    row = tables.ranks_table(found, dict.fromkeys(names, 0.0), "loss").rows[0]
    assert row[2:4] == ("96 – 96 – 96", "1 of 6")
    drawn = figures.ranks_figure(found)
    assert "rounded weights" in drawn and "rounded weights" not in figures.ranks_figure(read_matrices(ranks, None))


def test_models_are_listed_by_size_with_the_compressed_one_emphasised(metrics: dict[str, Any]) -> None:
    table = tables.perplexity_table(metrics)
    assert [row[0] for row in table.rows] == ["dense, 16 bit", "Spectrim", "RTN int8", "RTN int4"]
    assert table.emphasis == 1
    assert table.rows[1] == ("Spectrim", "169.9 MB", "0.800", "169.9 MB", "35.13", "+60.2 % (+55.2 to +65.1)")


def test_a_baseline_of_a_library_has_its_name(metrics: dict[str, Any]) -> None:
    metrics["baselines"]["bitsandbytes_nf4"] = {"ratio": 0.2592, "perplexity": {"wikipedia": 27.02}, "interval": {}}
    names = [row[0] for row in tables.perplexity_table(metrics).rows]
    assert names == ["dense, 16 bit", "Spectrim", "RTN int8", "RTN int4", "bitsandbytes nf4"]


def test_every_text_has_its_own_columns(metrics: dict[str, Any]) -> None:
    metrics["perplexity"]["news"] = metrics["perplexity"]["wikipedia"] | {"compressed": 50.0, "dense": 25.0}
    for entry in metrics["baselines"].values():
        entry["perplexity"]["news"] = 26.0
    table = tables.perplexity_table(metrics)
    assert table.columns[4:] == ("wikipedia", "against dense", "news", "against dense")
    assert table.rows[1][6:] == ("50.00", "+100.0 % (+55.2 to +65.1)")
    assert len(tables.headlines(metrics)) == 7


def test_candidates_are_ordered_by_validation_loss(ranks: dict[str, Any]) -> None:
    table = tables.candidates_table(ranks)
    assert table is not None
    assert [row[0] for row in table.rows] == ["gates (kept)", "fisher", "uniform"]
    assert tables.candidates_table(ranks | {"validation_loss": {}}) is None


def test_shares_of_the_discarded_energy_add_up_to_the_whole(ranks: dict[str, Any]) -> None:
    found = read_matrices(ranks, "float16")
    table = tables.ranks_table(found, {matrix.name: 1.0 for matrix in found}, "predicted loss")
    cut = [any(matrix.is_factored for matrix in group) for group in by_kind(found).values()]
    assert [row[-1] for row in table.rows] == ["14.3 %" if some else "–" for some in cut] and any(cut)
    none = tables.ranks_table(found, {matrix.name: 0.0 for matrix in found}, "predicted loss")
    assert {row[-1] for row in none.rows} == {"–"}


def test_tasks_show_percent_error_and_points(metrics: dict[str, Any]) -> None:
    assert tables.tasks_table(metrics) is None
    stderr = {"dense": 0.01, "compressed": None}
    metrics["tasks"] = {"piqa": {"dense": 0.671, "compressed": 0.621, "metric": "acc", "stderr": stderr}}
    table = tables.tasks_table(metrics)
    assert table is not None
    assert table.rows == (("piqa", "acc", "–", "67.1 ± 1.0", "62.1", "−5.0"),)


def test_what_models_ran_in_is_said(metrics: dict[str, Any]) -> None:
    assert tables.dtypes(metrics) == "dense in float32, compressed in bfloat16: each in what it is faster in"
    metrics["dtypes"] = dict.fromkeys(metrics["dtypes"], "bfloat16")
    assert tables.dtypes(metrics) == "both in bfloat16"
