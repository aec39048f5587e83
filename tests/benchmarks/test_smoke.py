"""Every benchmark of one process, run on the tiny model: rows with the keys it promises, and numbers that can be true.

benchmarks/presets.py and benchmarks/formats.py need what DVC has finished; tests/test_pipeline.py runs them.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import inference, ipca, products, rank_training, reference_table
from tests.tiny import Project

Rows = list[dict[str, Any]]
Run = Callable[..., Rows]


@pytest.fixture
def run(captured_llama: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """(main, arguments) -> the JSON rows it prints in the captured project's folder."""
    monkeypatch.chdir(captured_llama.folder)
    threads = torch.get_num_threads()

    def run(main: Callable[[], Any], *arguments: str) -> Rows:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        assert not main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    yield run
    torch.set_num_threads(threads)


def numbers(value: Any) -> list[float]:
    """Every number of a row, however deep."""
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers(entry)]
    return [value] if isinstance(value, int | float) else []


def positive(value: Any) -> bool:
    found = numbers(value)
    return bool(found) and all(math.isfinite(number) and number > 0 for number in found)


def test_inference_compares_every_kind_of_model(run: Run) -> None:
    options = ("--decode-tokens", "2", "--repeats", "1", "--threads", "1")
    rows = run(inference.main, "--ratios", "0.6", "--batches", "1", "2", "--contexts", "8", *options)
    kinds = [row["model"] for row in rows if row["batch"] == 1]
    assert kinds[0] == inference.REFERENCE and {f"{name} 0.6" for name in inference.FACTORS} < set(kinds)
    assert {"two products 0.6", "int8 0.6, bfloat16", *inference.ROUNDED_WEIGHTS} < set(kinds)
    assert [(row["model"], row["batch"]) for row in rows] == [(kind, batch) for batch in (1, 2) for kind in kinds]
    for row in rows:
        assert row["tokens_per_second"].keys() == {"prefill", "decode"} and row["context"] == 8
        assert positive({**row, "device": row["device"]}) and row["device"] == "cpu"
    size = {row["model"]: row["weight_bytes"] for row in rows}
    assert size["int8 0.6"] < size["pifa 0.6"] < size[inference.REFERENCE]
    assert size["dense_int4"] < size["dense_int8"] < size["dense bfloat16"] * 1.5


def test_products_are_right_and_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SECONDS", 1e-3)
    rows = run(products.main, "--shapes", "48x64", "20x33", "--rows", "1", "5", "--threads", "1")
    assert [(row["out"], row["in"], row["rows"]) for row in rows] == [
        (48, 64, 1),
        (48, 64, 5),
        (20, 33, 1),
        (20, 33, 5),
    ]
    for row in rows:
        assert {"dense", "int8", "int8 expanded"} <= row.keys() and positive(row)
        assert ("int8 of torch" in row) == (row["in"] == 64)


def test_a_wrong_product_is_not_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = products.product
    monkeypatch.setattr(products, "product", lambda x, weight, scale: 1.1 * right(x, weight, scale))
    with pytest.raises(SystemExit, match=r"int8: a relative error of 0\.\d+ at"):
        run(products.main, "--shapes", "48x64", "--rows", "1", "--threads", "1")


def test_the_steps_of_both_trainings_are_timed(run: Run) -> None:
    (row,) = run(rank_training.main, "--steps", "1", "--seq-len", "16")
    assert row.keys() == {"seq_len", "gates", "dobi", "dobi_over_gates"} and row["seq_len"] == 16
    assert positive(row) and row["dobi_over_gates"] == pytest.approx(row["dobi"] / row["gates"])


def test_the_reference_table_ranks_the_methods(run: Run, corpus_file: Path) -> None:
    text = ("--text", str(corpus_file), "--ratios", "0.8", "0.4")
    with pytest.raises(SystemExit, match="12 × 32 tokens were captured, the protocol needs 64 × 1024"):
        run(reference_table.main, *text)
    rows = run(reference_table.main, *text, "--windows", "12", "--seq-len", "32", "--test-windows", "4")
    assert [(row["method"], row["ratio"]) for row in rows] == [
        (m, r) for m in reference_table.METHODS for r in (0.8, 0.4)
    ]
    found = {(row["method"], row["ratio"]): row["perplexity"] for row in rows}
    assert all(positive(row) and row["perplexity"] != row["dense_perplexity"] for row in rows)
    assert abs(found["two-sided", 0.8] - rows[0]["dense_perplexity"]) < abs(
        found["svd", 0.8] - rows[0]["dense_perplexity"]
    )


def test_ipca_is_as_exact_as_the_exact_pool(run: Run) -> None:
    sizes = ("--out", "48", "--tokens", "32", "--windows", "3", "--rank", "12", "--threads", "1")
    (row,) = run(ipca.main, *sizes)
    methods = row["methods"]
    assert methods.keys() == {"exact", "spectrim", "sklearn_on_vectors", "sklearn_on_outputs"}
    assert all(math.isfinite(number) for number in numbers(row))
    error = {name: entry["error"] for name, entry in methods.items()}
    assert error["exact"] == 0 <= error["spectrim"] < 0.1 and error["spectrim"] < error["sklearn_on_outputs"]
