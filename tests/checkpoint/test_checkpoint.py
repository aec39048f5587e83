"""The format: exact bytes, and everything that must be refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from spectrim.checkpoint.layout import headers, read_bytes
from spectrim.errors import CheckpointError
from spectrim.maths.budget import CODED, RESIDUAL, ROUNDED, Format, dense_bytes, stored_bytes
from tests.checkpoints import CASES, UP, Folders, build, build_all, chosen


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every family in every format; read only."""
    return build_all(tmp_path_factory.mktemp("checkpoints"))


def _multiply_adds(format: Format, out: int, in_: int, rank: int) -> int:
    """Of one token, counted product by product."""
    if format in ROUNDED or format in (*CODED, "dense"):
        return out * in_ + (rank * in_ + out * rank if format in RESIDUAL else 0)
    return rank * in_ + (out - rank if format.startswith("pifa") else out) * rank


def _resident_bytes(module: torch.nn.Module) -> int:
    """Of its tensors without the bias."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return sum(tensor.nbytes for name, tensor in tensors.items() if name != "bias")


@pytest.mark.parametrize(("family", "format"), CASES)
def test_the_file_has_the_predicted_bytes(family: str, format: Format, folders: Folders) -> None:
    dense, folder = folders[family, "prepared"], folders[family, format]
    matrices, packed = chosen(dense, format)
    shapes = {name: headers([dense / "model.safetensors"])[f"{name}.weight"].shape for name in matrices}

    def bytes_of(name: str) -> int:
        if format in CODED and name in packed:  # which only the code itself can say
            return sum(tensor.nbytes for tensor in packed[name].tensors.values())
        return stored_bytes(matrices[name].format, *shapes[name], matrices[name].rank)

    predicted = sum(map(bytes_of, matrices))
    total = sum(dense_bytes(*shape) for shape in shapes.values())
    measured = read_bytes(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    in_memory = sum(_resident_bytes(model.get_submodule(name)) for name in matrices)
    assert (in_memory == predicted) == (format not in CODED)
    assert measured == {
        "file": (folder / "model.safetensors").stat().st_size,
        "linears": predicted,
        "memory": in_memory,
        "dense_linears_16bit": total,
        "ratio": predicted / total,
        "memory_ratio": in_memory / total,
        "multiply_adds": sum(
            _multiply_adds(matrices[name].format, *shapes[name], matrices[name].rank) for name in matrices
        ),
    }
    prepared, written = load_file(dense / "model.safetensors"), load_file(folder / "model.safetensors")
    others = sum(tensor.nbytes for tensor in prepared.values()) - total
    assert sum(tensor.nbytes for tensor in written.values()) == others + predicted
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["quantization_config"]["ratio"] == measured["ratio"]
    facts = json.loads((folder / "spectrim.json").read_text())
    assert facts["bytes"] == measured
    assert facts["provenance"] == {"made": "here"}
    assert sum(row["bytes"] for row in facts["matrices"].values()) == predicted


def change_config(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"][key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_matrix(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["matrices"]["model.layers.0.mlp.up_proj"].update(values)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "newer version": (change_config("version", 2), r"version is 2.*reads version 1.*upgrade"),
    "unknown key": (change_config("colour", "red"), "unknown key colour"),
    "unknown dtype": (change_config("stored_dtype", "float8"), "stored_dtype is 'float8'"),
    "unknown format": (change_matrix(format="int3"), f"{UP}: unknown format 'int3'.*remap"),
    "rank zero": (change_matrix(rank=0), f"{UP}: rank 0"),
    "other rank": (change_matrix(rank=9), rf"{UP}\.left: is I8 \(64, 7\), remap of rank 9 requires int8 \(64, 9\)"),
    "other format": (change_matrix(format="float16"), rf"{UP}\.left: is I8"),
    "dense format": (change_matrix(format="dense"), rf"{UP}\.left: not part of the format"),
    "extra matrix key": (change_matrix(offset=1), f"{UP}: must have exactly format, rank"),
    "no matrices": (change_config("matrices", {}), "requires|not the model's"),
    "missing factor": (change_tensors(lambda t: t.pop(f"{UP}.left_scale")), rf"{UP}\.left_scale: missing"),
    "extra factor": (change_tensors(lambda t: t.update({f"{UP}.more": torch.ones(1)})), rf"{UP}\.more: not part"),
    "missing norm": (change_tensors(lambda t: t.pop("model.norm.weight")), r"missing model\.norm\.weight"),
    "extra tensor": (change_tensors(lambda t: t.update(extra=torch.ones(1))), "unexpected extra"),
    "other dtype": (change_tensors(lambda t: t.update({f"{UP}.left": t[f"{UP}.left"].half()})), rf"{UP}\.left: is F16"),
    "rounded scale": (
        change_tensors(lambda t: t.update({f"{UP}.left_scale": t[f"{UP}.left_scale"].half()})),
        rf"{UP}\.left_scale: is F16",
    ),
    "other shape": (
        change_tensors(lambda t: t.update({f"{UP}.left": t[f"{UP}.left"][:, :6].clone()})),
        rf"{UP}\.left: is I8 \(64, 6\)",
    ),
    "truncated": (truncate, r"model\.safetensors: missing, truncated or not safetensors"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_one_clear_error(
    damage: Callable[[Path], None], message: str, folders: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["llama", "remap"], tmp_path / "damaged")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_entry_of_the_config_is_refused(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama", "remap"], tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["ratio"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="ratio is missing"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="ratio is missing"):
        read_bytes(folder)


def test_a_missing_shard_is_refused(folders: Folders, tmp_path: Path) -> None:
    build(folders["llama", "prepared"], tmp_path, "int8", shard="20KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises((CheckpointError, OSError), match=r"model-0000"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_nothing_in_the_folder_is_pickled(folders: Folders) -> None:
    suffixes = {file.suffix for file in folders["opt", "remap"].iterdir()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".jinja"}
