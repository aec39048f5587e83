"""Ranks from a file: what they would cost, what the budget makes of them, and everything wrong with them at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.artifacts import sha256_file
from pipeline.steps.rank_files import compared, read_rank_file
from spectrim.errors import ConfigError
from spectrim.maths import allocation
from spectrim.maths.budget import budget_bytes
from tests.tiny import Project

KINDS = {"q_proj": (4096, 4096), "up_proj": (11008, 4096), "k_proj": (1024, 4096)}
SHAPES = {f"model.layers.{layer}.{kind}": shape for layer in range(2) for kind, shape in KINDS.items()}
NOTES = {"ppl": [7.2, 7.6], "compression_ratio": 0.4, "lr": 5.0, "PPL_ORIG": 5.5}  # as the authors' files end


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ranks file.json"


def write(file: Path, content: Any) -> str:
    file.write_text(json.dumps(content), encoding="utf-8")
    return str(file)


def own(ranks: dict[str, int]) -> dict[str, Any]:
    entries = {
        name: {"rank": rank, "format": "float16", "out_features": SHAPES[name][0], "in_features": SHAPES[name][1]}
        for name, rank in ranks.items()
    }
    return {"version": 1, "matrices": entries}


def problems(path: str, sha256: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_rank_file(path, sha256, SHAPES)
    return caught.value.problems


def test_a_published_position_is_a_share_of_the_activations_2048_directions(file: Path) -> None:
    path = write(file, dict.fromkeys(reversed(SHAPES), 816.36) | NOTES)
    read = read_rank_file(path, None, SHAPES)
    assert list(read.ranks) == list(SHAPES) and read.layout == "Dobi-SVD"
    assert read.ranks["model.layers.0.q_proj"] == pytest.approx(1632.72)
    assert read.ranks["model.layers.0.up_proj"] == pytest.approx(1632.72)
    assert read.ranks["model.layers.0.k_proj"] == pytest.approx(408.18), "int(1024 / 2048) would be 0"


def test_our_own_file_gives_its_ranks_back_when_they_fill_the_budget(file: Path) -> None:
    shapes = list(SHAPES.values())
    budget = budget_bytes(shapes, 0.5)
    ranks = dict(zip(SHAPES, allocation.uniform(shapes, 0.5, "float16", 8), strict=True))
    ranks = dict(zip(SHAPES, allocation.project(list(ranks.values()), shapes, budget, "float16", 8), strict=True))
    read = read_rank_file(write(file, own(ranks)), sha256_file(Path(write(file, own(ranks)))), SHAPES)
    assert read.layout == "ranks.json" and read.ranks == ranks
    kept = allocation.project(list(read.ranks.values()), shapes, budget, "float16", 8)
    assert dict(zip(SHAPES, kept, strict=True)) == ranks
    told = compared(read, ranks, SHAPES, "float16")
    assert told["ratio"] <= 0.5 and told["largest_change"]["from"] == told["largest_change"]["to"]


def test_the_cost_of_the_file_and_the_largest_change_are_told(file: Path) -> None:
    read = read_rank_file(
        write(file, dict.fromkeys(SHAPES, 1024.0)), None, SHAPES
    )  # half the full rank: all of remap's
    told = compared(read, {name: min(shape) // 2 for name, shape in SHAPES.items()}, SHAPES, "remap")
    assert told["ratio"] == pytest.approx(0.5, rel=1e-3)
    assert told["largest_change"]["from"] == told["largest_change"]["to"]
    told = compared(read, {name: min(shape) // 4 for name, shape in SHAPES.items()}, SHAPES, "float16")
    # two factors of half the full rank of a square matrix cost as much as the matrix: it is dense
    assert told["largest_change"] == {"name": "model.layers.0.q_proj", "from": 4096, "to": 1024}
    dense = sum(2 * out * in_ for out, in_ in SHAPES.values())
    up, k = 2 * 2048 * (11008 + 4096), 2 * 512 * (1024 + 4096)
    assert told["bytes"] == 2 * (2 * 4096 * 4096 + up + k) and told["ratio"] == told["bytes"] / dense


def test_every_problem_of_a_published_file_is_reported_at_once(file: Path) -> None:
    content: dict[str, Any] = dict.fromkeys(SHAPES, 800.0)
    del content["model.layers.1.k_proj"]
    content |= {"model.layers.0.q_proj": "high", "model.layers.1.q_proj": 2049.0, "lm_head": 3.0, "gammas": 1}
    found = problems(write(file, content))
    assert len(found) == 4 and all(line.startswith(f"{file}: ") for line in found)
    text = "\n".join(found)
    for said in (
        "2 names that are no linear to compress (see compression.exclude): lm_head, gammas",
        "1 linears of the model without a rank: model.layers.1.k_proj",
        "a position must be a number: model.layers.0.q_proj: 'high'",
        "a position must lie in (0, 2048]: model.layers.1.q_proj: 2049.0",
    ):
        assert said in text


def test_every_problem_of_our_own_file_is_reported_at_once(file: Path) -> None:
    content = own(dict.fromkeys(SHAPES, 100))
    entries = content["matrices"]
    entries["model.layers.0.q_proj"]["in_features"] = 5120
    entries["model.layers.0.k_proj"]["rank"] = 1025
    entries["model.layers.1.q_proj"] = 100
    text = "\n".join(problems(write(file, content)))
    for said in (
        "the model's shape is 4096 × 4096: model.layers.0.q_proj: 4096 × 5120, rank 100",
        "a rank must be an integer in [1, 1024]: model.layers.0.k_proj: 1024 × 4096, rank 1025",
        "an entry needs rank, out_features and in_features: model.layers.1.q_proj: 100",
    ):
        assert said in text


@pytest.mark.parametrize("value", [True, None, float("nan"), float("inf"), 0, -3.0])
def test_what_is_no_position_is_refused(value: Any, file: Path) -> None:
    assert "a position must" in "\n".join(
        problems(write(file, dict.fromkeys(SHAPES, 800.0) | {next(iter(SHAPES)): value}))
    )


def test_many_names_are_counted_not_listed(file: Path) -> None:
    (unknown, missing) = problems(write(file, {f"encoder.{i}": 1.0 for i in range(50)}))
    assert "50 names" in unknown and unknown.endswith("encoder.4 and 45 more")
    assert "6 linears" in missing and missing.endswith("and 1 more")


def test_a_file_that_cannot_be_read_is_one_problem(file: Path) -> None:
    assert "is not there" in problems(str(file))[0]
    file.write_text("{", encoding="utf-8")
    assert "not JSON" in problems(str(file))[0]
    assert "a list; it must map" in problems(write(file, [1]))[0]
    path = write(file, dict.fromkeys(SHAPES, 800.0))
    (line,) = problems(path, "0" * 64)
    assert line.startswith("params.yaml: train_ranks.file_sha256: ") and sha256_file(file) in line


def test_the_stage_puts_a_published_file_onto_the_budget(captured_llama: Project, tmp_path: Path) -> None:
    project = captured_llama.copy(tmp_path / "llama")
    project.stage("train_ranks")
    ranks_file = project.folder / "artifacts" / "train_ranks" / "ranks.json"
    names = json.loads(ranks_file.read_text(encoding="utf-8"))["matrices"]
    published = project.folder / "published.json"
    write(published, {name: 1500.0 - 40 * place for place, name in enumerate(names)} | NOTES)
    project.change(train_ranks__method="file", train_ranks__file="published.json", compression__format="remap")
    project.stage("train_ranks")
    ranks = json.loads(ranks_file.read_text(encoding="utf-8"))
    assert ranks["chosen"] == "file" and ranks["file"]["layout"] == "Dobi-SVD"
    assert ranks["file"]["sha256"] == sha256_file(published)
    assert ranks["bytes"] <= ranks["budget_bytes"] and ranks["file"]["bytes"] != ranks["bytes"]
    project.change(train_ranks__file_sha256="0" * 64)
    done = project.stage("train_ranks", check=False)
    assert done.returncode != 0 and "train_ranks.file_sha256" in done.stderr and "Traceback" not in done.stderr
