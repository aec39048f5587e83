"""The stage `remap` on the artifacts of a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pipeline.config import params
from pipeline.steps import packed_blocks as packing
from spectrim.checkpoint.layout import read_bytes
from spectrim.compression.moments import pack_symmetric
from spectrim.errors import BudgetError
from spectrim.maths.budget import FACTORED, dense_bytes, resolve_format, stored_bytes
from spectrim.models.modules import linears_by_block
from stages import remap
from tests import reference, tiny
from tests.checkpoints import logits, prepare, truncated

RANK = 24


def make_artifacts(root: Path) -> dict[str, tuple[int, int]]:
    """prepare, capture, train_ranks and update_weights of a tiny Llama, matrices at RANK; returns the shapes."""
    prepare("llama", root / "prepare")
    (root / "prepare" / "prepare.json").write_text(json.dumps({"source": "tiny", "model_sha256": "0" * 64}))
    model = AutoModelForCausalLM.from_pretrained(root / "prepare")
    matrices, shapes = {}, {}
    (root / "update_weights").mkdir()
    (root / "capture" / "inputs").mkdir(parents=True)
    for index, linears in enumerate(linears_by_block(model).values()):
        tensors, grams = {}, {}
        for name, linear in linears.items():
            shapes[name] = tuple(linear.weight.shape)
            out_features, in_features = shapes[name]
            tokens = reference.draw(index, out_features, in_features, 3 * in_features)[1]
            grams[f"gram.{name}"] = pack_symmetric(reference.gram(tokens))
            stored = resolve_format("float16", out_features, in_features, RANK)
            rank = min(shapes[name]) if stored == "dense" else RANK
            matrices[name] = {
                "rank": rank, "format": stored, "out_features": out_features, "in_features": in_features,
                "bytes": stored_bytes("float16", out_features, in_features, RANK),
            }  # fmt: skip
            if stored != "dense":
                left, right = truncated(linear.weight.detach(), RANK)
                tensors |= {f"{name}.left": left.contiguous(), f"{name}.right": right.contiguous()}
        save_file(tensors, root / "update_weights" / f"{index:03}.safetensors")
        own = json.dumps({name: name for name in linears})
        save_file(grams, root / "capture" / "inputs" / f"{index:03}.safetensors", metadata={"input_of": own})
    budget = sum(dense_bytes(*shape) for shape in shapes.values())
    ranks = {"version": 1, "chosen": "uniform", "ratio": 0.8, "format": "float16", "matrices": matrices}
    ranks["budget_bytes"] = budget
    (root / "train_ranks").mkdir()
    (root / "train_ranks" / "ranks.json").write_text(json.dumps(ranks))
    return shapes


@pytest.mark.parametrize("format", ["same", *(format for format in FACTORED if format != "float16")])
def test_the_checkpoint_has_the_budgeted_bytes_and_a_resumed_run_gives_the_same(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    params.load.cache_clear()
    settings = tiny.tiny_params("tiny", "tiny")
    settings["remap"]["format"] = format
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    shapes = make_artifacts(tmp_path / "artifacts")
    remap.main()
    stored = "float16" if format == "same" else format
    folder = tmp_path / "artifacts" / "remap"
    listed = json.loads((folder / "config.json").read_text())["quantization_config"]["matrices"]
    assert {matrix["format"] for matrix in listed.values()} == {stored, "dense"}
    predicted = sum(stored_bytes(matrix["format"], *shapes[name], matrix["rank"]) for name, matrix in listed.items())
    measured = read_bytes(folder)
    assert measured["linears"] == predicted
    facts = json.loads((folder / "spectrim.json").read_text())
    assert facts["ratio"] == {"target": 0.8, "file": measured["ratio"]}
    assert facts["provenance"]["model"]["source"] == "tiny"
    assert not (folder / "prepare.json").exists()
    assert logits(AutoModelForCausalLM.from_pretrained(folder)).isfinite().all()

    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(folder)
    shutil.rmtree(next(path.parent for path in (tmp_path / ".spectrim").rglob("packed.safetensors")))
    remap.main()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first
    params.load.cache_clear()


def test_a_format_dearer_than_the_budget_is_refused() -> None:
    entry = {"rank": 8, "format": "int8", "out_features": 24, "in_features": 40, "bytes": 8 * 68 + 4 * 24}
    ranks = {"matrices": {"a": entry}, "budget_bytes": 8 * 68 + 4 * 24, "format": "int8", "ratio": 0.3}
    packing.require_within({"a": packing.choose(entry, "int8")}, ranks, "int8")
    with pytest.raises(
        BudgetError, match=r"remap\.format: float16 takes 1,024 bytes at ranks chosen for int8, .* is 640"
    ):
        packing.require_within({"a": packing.choose(entry, "float16")}, ranks, "float16")
