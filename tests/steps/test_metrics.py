"""The stages baseline and evaluate on a tiny project whose earlier artifacts are made by hand."""

import csv
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import params
from pipeline.config.sections import Baseline
from pipeline.data.texts import save_windows
from pipeline.runtime.artifacts import read_json
from pipeline.steps.metrics import pivoting, significant
from pipeline.steps.model_folders import load_model
from spectrim.checkpoint.layout import Matrix, read_bytes
from spectrim.checkpoint.saving import assemble
from spectrim.errors import ConfigError, DataError, SourceError, StorageError
from spectrim.evaluation.perplexity import perplexity
from spectrim.formats.packing import pack
from spectrim.maths.lowrank import Factors
from spectrim.models.modules import compressible_linears
from stages import baseline, evaluate, sources, speed
from tests import tiny

RANK = 12
CPU = torch.device("cpu")


def draw_windows(seed: int, n_windows: int = 3, seq_len: int = 24) -> torch.Tensor:
    return torch.randint(0, tiny.VOCABULARY, (n_windows, seq_len), generator=torch.Generator().manual_seed(seed))


def save_compressed(prepared: Path, destination: Path) -> None:
    linears = compressible_linears(tiny.model("llama"))
    packed = {}
    for name, linear in linears.items():
        left, sigma, right = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        packed[name] = pack(Factors(left[:, :RANK] * sigma[:RANK], right[:RANK]), "float16")
    matrices = {name: Matrix("float16", RANK) for name in linears}
    provenance = {"model": {"n_parameters": 4_000, "n_block_parameters": 2_000}}
    assemble(prepared, destination, packed, matrices, ratio_target=0.5, provenance=provenance)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folders: dict[str, Path]) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    params.load.cache_clear()
    settings = tiny.tiny_params(str(model_folders["llama"]), str(tiny.save_corpus(tmp_path / "corpus.jsonl")))
    settings["calibrate"].update(seq_len=24, test_windows=3)
    settings["compression"]["ratio"] = 0.5
    settings["baseline"]["quantization"] = ["int8", "int4"]  # what needs no capture
    settings["train_ranks"]["seq_len"] = settings["capture"]["gradient_seq_len"] = 16
    Path("params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    tiny.save_model("llama", Path("artifacts/prepare"))
    for seed, text in enumerate(("alpha", "beta")):
        save_windows(Path(f"artifacts/calibrate/test/{text}.parquet"), draw_windows(seed).int().numpy(), [text] * 3)
    save_compressed(Path("artifacts/prepare"), Path("artifacts/remap"))
    yield tmp_path
    params.load.cache_clear()


def run(stage: ModuleType) -> None:
    """The stage behind `sources`, as DVC runs them."""
    params.load.cache_clear()
    sources.main()
    stage.main()


def set_tasks(tmp_path: Path) -> None:
    row = {"goal": "the river", "sol1": "crosses two valleys", "sol2": "recalls", "label": 0}
    (tmp_path / "piqa.jsonl").write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["evaluate"]["tasks"] = {"piqa": str(tmp_path / "piqa.jsonl")}
    Path("params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def rows(name: str) -> list[dict[str, str]]:
    with Path("reports/evaluate", f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_metrics_hold_both_models_on_the_same_tokens(project: Path) -> None:
    set_tasks(project)
    run(baseline)
    run(evaluate)
    run(speed)
    metrics, measured = read_json(Path("reports/metrics.json")), read_json(Path("reports/speed.json"))

    stored = read_bytes(Path("artifacts/remap"))
    of_file = pytest.approx(stored["ratio"], rel=1e-5)
    assert metrics["ratio"] == {"target": 0.5, "file": of_file, "memory": of_file}
    assert metrics["bytes"] == {
        "dense_file_16bit": 8_000,
        **{name: stored[name] for name in ("file", "linears", "memory", "dense_linears_16bit")},
    }
    numbers = stored["dense_linears_16bit"] / 2
    reach = {"of_parameters": numbers / 4_000, "of_blocks": numbers / 2_000}
    assert metrics["reach"] == pytest.approx(reach, rel=1e-4)
    adds = {"dense": stored["dense_linears_16bit"] // 2, "compressed": stored["multiply_adds"]}
    assert metrics["multiply_adds"] == adds and adds["compressed"] < adds["dense"]
    models = {"dense": Path("artifacts/prepare"), "compressed": Path("artifacts/remap")}
    for seed, text in enumerate(("alpha", "beta")):
        entry = metrics["perplexity"][text]
        for side, folder in models.items():
            expected = perplexity(load_model(folder, CPU), draw_windows(seed))["perplexity"]
            assert entry[side] == float(f"{expected:.5g}")
        assert (entry["n_tokens"], entry["seq_len"], len(entry["tokens_sha256"])) == (3 * 23, 24, 64)
        assert abs(entry["compressed"] / entry["dense"] - 1) > 1e-3
        assert metrics["baselines"]["int8"]["perplexity"][text] == pytest.approx(entry["dense"], rel=0.05)
    assert metrics["pivoting"] is None  # none of the matrices is stored as rows
    assert set(metrics["baselines"]) == {"int8", "int4"}
    assert set(metrics["tasks"]["piqa"]) >= {"dense", "compressed"}
    assert not {"speed", "memory", "machine", "process"} & set(metrics), "what another run would not repeat"
    assert set(measured["dtypes"].values()) <= {"float32", "bfloat16"} and measured["machine"]
    for entry in (*measured["speed"].values(), *measured["memory"].values()):
        assert set(entry) == {"dense", "compressed"} and all(value > 0 for value in entry.values())
    assert measured["memory"]["weights"]["compressed"] < measured["memory"]["weights"]["dense"]
    assert metrics["generation"].startswith("The capital of France is")

    assert {(row["text"], row["model"]) for row in rows("size_perplexity")} == {
        (text, model) for text in ("alpha", "beta") for model in ("dense", "spectrim", "int8", "int4")
    }
    assert [row["task"] for row in rows("tasks")] == ["piqa", "piqa"]


def test_a_further_text_is_measured_without_touching_the_reports(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = project / "further.txt"
    text.write_text("\n\n".join(tiny.corpus(6)), encoding="utf-8")
    evaluate.main(text=text, windows=4)
    printed = json.loads(capsys.readouterr().out)
    ids = tiny.tokenizer()(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][: 4 * 24]
    windows = torch.tensor(ids).view(4, 24)
    for side, folder in (("dense", "prepare"), ("compressed", "remap")):
        expected = perplexity(load_model(Path("artifacts", folder), CPU), windows)["perplexity"]
        assert printed["perplexity"][side] == pytest.approx(expected)
    assert (printed["text"], printed["n_tokens"], printed["seq_len"]) == (str(text), 4 * 23, 24)
    assert not Path("reports").exists()


def test_a_further_text_that_is_missing_or_too_short_is_refused(project: Path) -> None:
    short = project / "short.txt"
    short.write_text("the river", encoding="utf-8")
    with pytest.raises(DataError, match=r"short\.txt: .* make 0 windows of 24, 16 are asked for"):
        evaluate.main(text=short)
    with pytest.raises(SourceError, match=r"gone\.txt: not found"):
        evaluate.main(text=project / "gone.txt")
    with pytest.raises(ConfigError, match="--windows"):
        evaluate.main(windows=3)


def test_every_baseline_of_the_parameters_is_measured_on_the_same_tokens(project: Path) -> None:
    pytest.importorskip("bitsandbytes")
    names = [str(name) for name in typing.get_args(kinds_of_baselines())]
    settings: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["baseline"]["quantization"] = names
    settings["compression"]["exclude"] = ["*.k_proj"]
    Path("params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run(baseline)
    measured = read_json(Path("artifacts/baseline/baseline.json"))["quantization"]
    assert set(measured) == set(names) > {"int8", "int4"}
    assert len({entry["dense_bytes"] for entry in measured.values()}) == 1
    assert len({entry["perplexity"]["alpha"] for entry in measured.values()}) == len(names)
    for name, entry in measured.items():
        assert entry["ratio"] == entry["bytes"] / entry["dense_bytes"] < (0.6 if "int8" in name else 0.5)
    run(evaluate)
    metrics = read_json(Path("reports/metrics.json"))
    for name in names:
        assert metrics["baselines"][name] == significant({key: measured[name][key] for key in ("ratio", "perplexity")})
        assert [row["text"] for row in rows("size_perplexity") if row["model"] == name] == ["alpha", "beta"]


def kinds_of_baselines() -> Any:
    """The Literal of what ``baseline.quantization`` takes."""
    hint = typing.get_type_hints(Baseline)["quantization"]  # without its validator
    return typing.get_args(hint)[0]


def test_a_baseline_of_other_tokens_is_refused(project: Path) -> None:
    run(baseline)
    save_windows(Path("artifacts/calibrate/test/beta.parquet"), draw_windows(7).int().numpy(), ["beta"] * 3)
    with pytest.raises(DataError, match=r"baseline\.json: measured on other tokens of beta "):
        run(evaluate)
    assert not Path("reports").exists()


def test_missing_models_name_the_folder(project: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/config\.json: not found"):
        load_model(Path("nowhere"), CPU)


def test_the_worst_choice_of_rows_and_every_exchange_are_kept() -> None:
    rows = {"a": {"condition": 3.0, "exchanges": 0}, "b": {"condition": 7.5, "exchanges": 2}, "c": {"bytes": 4}}
    expected = {"matrices": 2, "largest_condition": {"name": "b", "value": 7.5}, "exchanges": {"b": 2}}
    assert pivoting(rows) == expected
    assert pivoting({"c": {"bytes": 4}}) is None


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_five_digits_are_kept(value: float) -> None:
    found = significant({"a": [value, 3, "text", True, None]})["a"]
    assert found[0] == pytest.approx(value, rel=5e-5) and found[1:] == [3, "text", True, None]
    assert significant(found) == found
    assert significant(value * (1 + 1e-9)) == pytest.approx(found[0], rel=1.1e-4)
