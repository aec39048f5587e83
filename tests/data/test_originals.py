"""pipeline/data/originals.py: pickled checkpoints become plain weights, and no pickle is run."""

import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.sections import Model, Prepare
from pipeline.data.originals import load_original, write_prepared
from spectrim.errors import SourceError
from tests import tiny
from tests.data.folders import pickle_weights


@pytest.fixture
def folder(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama's folder, to be changed."""
    return Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))


@pytest.mark.parametrize("n_shards", [0, 3])
def test_bin_files_are_read_and_prepared_as_safetensors(n_shards: int, folder: Path, tmp_path: Path) -> None:
    tensors = pickle_weights(folder, n_shards)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    write_prepared(Model(str(folder), None), Prepare("float32", "float32", 0.0), None, prepared)
    written = load_file(prepared / "model.safetensors")
    assert set(written) == set(tensors) and not list(prepared.glob("*.bin"))
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


class Hostile:
    """Opens ``trace`` for writing when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("way", ["torch.save", "pickle", "shard"])
def test_a_hostile_pickle_is_refused_and_never_run(way: str, folder: Path, tmp_path: Path) -> None:
    tensors, trace = pickle_weights(folder, 2 if way == "shard" else 0), tmp_path / "trace"
    file = folder / ("pytorch_model-00002-of-00002.bin" if way == "shard" else "pytorch_model.bin")
    if way == "pickle":
        file.write_bytes(pickle.dumps(Hostile(trace), protocol=2))
    else:
        torch.save({**tensors, "extra": Hostile(trace)}, file)
    with pytest.raises(SourceError, match=rf"{file.name}: not tensors alone: it names posix\.system.* as safetensors"):
        load_original(folder, torch.float32)
    assert not trace.exists()
    with suppress(RuntimeError):  # a plain pickle is run before torch finds that it is none of its own
        torch.load(file, weights_only=False)
    assert trace.exists(), "the pickle is hostile indeed"


def test_safetensors_go_before_bin_files(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"whatever this is")
    original = load_original(folder, torch.float32)
    assert torch.equal(original.get_input_embeddings().weight, tiny.model("llama").get_input_embeddings().weight)
