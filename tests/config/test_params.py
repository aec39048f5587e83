"""params.yaml is checked as a whole: every problem at once, each naming file, section and key."""

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import params as parameters
from spectrim.errors import ConfigError
from tests.config.refused_values import REFUSED
from tests.tiny import REPOSITORY, process_environment

Problems = Callable[..., list[str]]


@pytest.fixture
def content() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def problems(tmp_path: Path) -> Problems:
    """content -> the lines of the ConfigError that reading it raises."""

    def read(content: Any) -> list[str]:
        file = tmp_path / "params.yaml"
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        file.write_text(text, encoding="utf-8")
        parameters.load.cache_clear()
        with pytest.raises(ConfigError) as caught:
            parameters.load(file)
        assert all(line.startswith(f"{file}: ") for line in caught.value.problems)
        assert all(line in str(caught.value) for line in caught.value.problems)
        return [line.removeprefix(f"{file}: ") for line in caught.value.problems]

    return read


def test_the_repository_file_is_valid() -> None:
    assert parameters.load(REPOSITORY / "params.yaml").compression.ratio <= 1


def test_the_table_of_refused_values_covers_every_key() -> None:
    keys = {
        f"{section}.{field.name}"
        for section, kind in typing.get_type_hints(parameters.Params).items()
        if dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind)
    }
    assert keys == set(REFUSED)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_a_refused_value_is_named_by_section_and_key(
    key: str, value: Any, content: dict[str, Any], problems: Problems
) -> None:
    section, name = key.split(".")
    content[section][name] = value
    found = problems(content)
    # damping and max_damping are judged together, under the first name
    names = {key, "capture.damping"} if name == "max_damping" else {key}
    assert any(line.startswith(f"{each}:") or line.startswith(f"{each}.") for line in found for each in names), found


@pytest.mark.parametrize(("section", "key"), [key.split(".") for key in REFUSED])
def test_a_missing_key_is_named(section: str, key: str, content: dict[str, Any], problems: Problems) -> None:
    del content[section][key]
    assert any(line.startswith(f"{section}.{key}: missing") for line in problems(content))


def test_every_problem_of_the_file_is_reported_at_once(content: dict[str, Any], problems: Problems) -> None:
    """A wrong type, an unknown key or an unknown section hides neither a wrong range nor a contradiction."""
    content["compression"].update(ratio=1.2, align=0, rato=0.5)
    content["train_ranks"].update(steps="many", seq_len=2000)
    content["calibrate"]["test_windows"] = "all"
    content["data"]["wikipedia"]["splits"] = {"calibration": 0.9, "test": 0.5}
    content["model"]["source"] = "ftp://host/model"
    content["speed"]["repeats"] = 0
    content["reprot"] = content.pop("report")
    assert {line.split(": ")[0] for line in problems(content)} == {
        "compression.ratio",
        "compression.align",
        "compression.rato",
        "train_ranks.steps",
        "train_ranks.seq_len",
        "calibrate.test_windows",
        "data.wikipedia.splits",
        "model.source",
        "speed.repeats",
        "reprot",
        "report",
    }


def test_out_of_range_values_of_one_section_are_reported_together(content: dict[str, Any], problems: Problems) -> None:
    content["compression"].update(ratio=1.2, align=0, seed=-1)
    assert [line.split(":")[0] for line in problems(content)] == [
        "compression.ratio",
        "compression.align",
        "compression.seed",
    ]


def test_values_that_contradict_each_other_are_reported_together(content: dict[str, Any], problems: Problems) -> None:
    content["calibrate"].update(seq_len=16, calibration_windows=2)
    assert {line.split(":")[0] for line in problems(content)} == {
        "capture.gradient_windows",
        "capture.gradient_seq_len",
        "train_ranks.seq_len",
        "update_weights.windows",
        "update_weights.refinement.seq_len",
    }


def test_a_baseline_of_a_library_that_is_not_installed_is_one_problem(
    content: dict[str, Any], problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    content["baseline"]["quantization"] = ["int8", "bitsandbytes_nf4"]
    monkeypatch.setattr("pipeline.config.values.find_spec", lambda name: None)
    assert problems(content) == [
        "baseline.quantization: bitsandbytes_nf4 found, which the package bitsandbytes makes, and that is not "
        "installed; run `pip install 'spectrim[bitsandbytes]'`, or leave out what needs it"
    ]
    monkeypatch.setattr("pipeline.config.values.find_spec", lambda name: name)
    content["evaluate"]["new_tokens"] = 0  # the one problem that is left
    assert [line.split(":")[0] for line in problems(content)] == ["evaluate.new_tokens"]


def test_the_method_file_needs_a_file(content: dict[str, Any], problems: Problems) -> None:
    content["train_ranks"]["method"] = "file"
    content["compression"]["alternatives"] = []
    (line,) = problems(content)
    assert line.startswith("train_ranks.file: null; method file needs the path")


BAD_SPLITS: list[Any] = [{}, {"train": 0.5}, {"test": 0}, {"test": 1.5}, {"calibration": 0.7, "test": 0.7}]


@pytest.mark.parametrize(("key", "value"), [*(("splits", shares) for shares in BAD_SPLITS), ("template", "chatml")])
def test_a_bad_value_names_the_text(key: str, value: Any, content: dict[str, Any], problems: Problems) -> None:
    content["data"]["wikipedia"][key] = value
    assert any(line.startswith(f"data.wikipedia.{key}") for line in problems(content))


def test_conversations_need_rows(content: dict[str, Any], problems: Problems, tmp_path: Path) -> None:
    for text in content["data"].values():
        text["template"] = "chat"
    found = {line.split(" but ")[0] for line in problems(content)}
    assert found == {f"data.{name}.template: chat," for name in content["data"]}
    for source in ("hf:org/name@v1/train", "talk.jsonl", "talk.jsonl.bz2", "pypi:a==1/a/talk.parquet"):
        for text in content["data"].values():
            text["source"] = source
        parameters.load.cache_clear()
        (tmp_path / "good.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        assert parameters.load(tmp_path / "good.yaml").data["news"].template == "chat"


@pytest.mark.parametrize("name", ["../outside", "a/b", ""])
def test_a_text_name_that_is_no_file_name_is_reported(name: str, content: dict[str, Any], problems: Problems) -> None:
    """The name becomes artifacts/calibrate/test/NAME.parquet."""
    content["data"][name] = content["data"]["wikipedia"]
    assert any(line.startswith(f"data.{name}") for line in problems(content))


def test_no_text_at_all_is_reported(content: dict[str, Any], problems: Problems) -> None:
    content["data"] = {}
    assert len(problems(content)) == len(parameters.SPLITS)


@pytest.mark.parametrize("split", parameters.SPLITS)
def test_a_split_that_no_text_has_is_reported(split: str, content: dict[str, Any], problems: Problems) -> None:
    for text in content["data"].values():
        del text["splits"][split]
    assert problems(content) == [f"data: no text has a {split} split; give one a share of its documents"]


@pytest.mark.parametrize("method", ["svd", "asvd", "ipca"])
def test_only_what_uses_the_inputs_gram_can_be_anchored_or_shrunk(
    method: str, content: dict[str, Any], problems: Problems
) -> None:
    content["update_weights"] |= {"method": method, "shrinkage": 0.1}
    content["update_weights"]["anchor"]["alpha"] = 0.5
    content["update_weights"]["variants"] = {"other": {"alpha": 0.25, "shrinkage": 0.0}}
    assert problems(content) == [
        f"update_weights.{key} with method {method}, which has no use for the inputs' Gram; "
        "set it to 0.0, or leave the variant out"
        for key in ("anchor.alpha: 0.5", "shrinkage: 0.1", "variants.other.alpha: 0.25")
    ]


def test_only_the_knapsack_chooses_among_formats(content: dict[str, Any], problems: Problems) -> None:
    content["compression"] |= {"alternatives": ["dense_int8"], "tie": True}
    content["train_ranks"]["method"] = "gates"
    content["remap"]["format"] = "int8"
    assert [line.split(" with compression.alternatives")[0] for line in problems(content)] == [
        "train_ranks.method: 'gates'", "compression.tie: True", "remap.format: 'int8'"
    ]  # fmt: skip


def test_coded_weights_have_a_method_of_their_own(content: dict[str, Any], problems: Problems) -> None:
    content["compression"] |= {"format": "coded", "tie": True, "alternatives": []}
    content["remap"]["format"] = "int8"
    assert [line.split(" with compression.format")[0] for line in problems(content)] == [
        "compression.tie: True", "remap.format: 'int8'", "train_ranks.method: fisher"
    ]  # fmt: skip
    content["compression"] |= {"format": "pifa", "tie": False}
    content["remap"]["format"], content["train_ranks"]["method"] = "same", "step"
    assert problems(content) == [
        "train_ranks.method: step with compression.format pifa; step is for coded, and no other method is"
    ]


@pytest.mark.parametrize("text", ["compression: [", "- a list", "", "\tx: 1", "model: {}\nmodel: {}"])
def test_a_file_that_is_no_mapping_is_one_problem(text: str, problems: Problems) -> None:
    assert len(problems(text)) == 1


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    """YAML 1.2: 1e-3 is a number, which YAML 1.1 takes for a word."""
    file = tmp_path / "params.yaml"
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    assert "damping: 1.0e-6" in text
    file.write_text(text.replace("damping: 1.0e-6", "damping: 1e-6"), encoding="utf-8")
    assert parameters.load(file).capture.damping == 1e-6


def test_the_file_can_be_checked_alone(tmp_path: Path) -> None:
    """`make repro` and `make flow` do, so that DVC has not yet removed the output of the stage that would refuse."""
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    command, environment = (
        [sys.executable, "-m", "pipeline.config.params"],
        process_environment(PYTHONPATH=str(REPOSITORY)),
    )
    for good in (True, False):
        (tmp_path / "params.yaml").write_text(text if good else text.replace("  ratio:", "  rato:"), encoding="utf-8")
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == good and done.stdout == ""
        lines = done.stderr.splitlines()
        assert (not lines) if good else ("compression.rato: unknown key" in done.stderr and "Trace" not in done.stderr)


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found; run from the project's folder"):
        parameters.load(tmp_path / "absent.yaml")


def test_an_integer_is_taken_where_a_float_is_asked(content: dict[str, Any], tmp_path: Path) -> None:
    content["compression"]["ratio"] = 1
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert parameters.load(file).compression.ratio == 1.0
