"""Whatever is done to a checkpoint's files, loading ends in one clear error or in the model that was stored."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from spectrim.checkpoint.layout import read_bytes
from spectrim.errors import CheckpointError
from spectrim.maths.budget import Format
from tests.checkpoints import FORMATS, Folders, build, build_all, logits

FILE = "model.safetensors"
SOME = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
formats = st.sampled_from(FORMATS)
numbers = st.one_of(st.integers(-2, 300), st.just(2**62), st.just(2**63 - 1))
values = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), st.just([]), st.just({}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every family in every format; read only."""
    return build_all(tmp_path_factory.mktemp("checkpoints"))


class Expected(dict[str, Tensor]):
    """Format -> logits; hypothesis prints arguments, and these are long."""

    def __repr__(self) -> str:
        return "expected"


@pytest.fixture(scope="module")
def expected(folders: Folders) -> Expected:
    return Expected({at: logits(AutoModelForCausalLM.from_pretrained(folders["llama", at])) for at in FORMATS})


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "mutated"


def copied(folders: Folders, format: Format, scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    return shutil.copytree(folders["llama", format], scratch)


def load(folder: Path) -> Tensor | None:
    """The logits of the model in a folder, or None where it is refused as it should be."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except CheckpointError as error:
        assert str(error)
        return None
    return logits(model)


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / FILE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(folder: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@SOME
@given(formats, st.floats(0, 0.9999))
def test_a_truncated_file_is_refused(folders: Folders, scratch: Path, format: Format, kept: float) -> None:
    folder = copied(folders, format, scratch)
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: int(kept * len(content))])
    assert load(folder) is None
    with pytest.raises(CheckpointError):
        read_bytes(folder)


@SOME
@given(formats, st.integers(0, 2**64 - 1))
def test_an_absurd_header_length_is_refused(folders: Folders, scratch: Path, format: Format, length: int) -> None:
    folder = copied(folders, format, scratch)
    header, data = header_of(folder)
    if length == len(json.dumps(header).encode()):
        return
    write_header(folder, header, data, length)
    assert load(folder) is None


@SOME
@given(formats, st.data())
def test_a_changed_header_is_refused_or_changes_nothing(
    folders: Folders, scratch: Path, expected: Expected, format: Format, data: st.DataObject
) -> None:
    folder = copied(folders, format, scratch)
    header, content = header_of(folder)
    name = data.draw(st.sampled_from(sorted(key for key in header if key != "__metadata__")))
    entry = header[name]
    match data.draw(st.sampled_from(["dtype", "shape", "offsets", "name", "gone", "twice", "junk"])):
        case "dtype":
            entry["dtype"] = data.draw(
                st.sampled_from(["F16", "BF16", "F32", "I8", "U8", "I32", "I64", "F8_E4M3", "?"])
            )
        case "shape":
            entry["shape"] = data.draw(st.lists(numbers, max_size=3))
        case "offsets":
            entry["data_offsets"] = data.draw(st.lists(numbers, min_size=2, max_size=2))
        case "name":
            header[data.draw(st.sampled_from([f"{name}x", f"../{name}", ""]))] = header.pop(name)
        case "gone":
            del header[name]
        case "twice":
            header[f"{name}_copy"] = entry
        case "junk":
            header[name] = data.draw(values)
    write_header(folder, header, content)
    found = load(folder)
    assert found is None or torch.equal(found, expected[format])


@SOME
@given(formats, st.data())
def test_a_changed_config_is_refused_or_changes_nothing(
    folders: Folders, scratch: Path, expected: Expected, format: Format, data: st.DataObject
) -> None:
    folder = copied(folders, format, scratch)
    config = json.loads((folder / "config.json").read_text())
    stored = config["quantization_config"]
    name = data.draw(st.sampled_from(sorted(stored["matrices"])))
    match data.draw(st.sampled_from(["version", "rank", "format", "matrix", "gone", "more", "dtype", "key"])):
        case "version":
            stored["version"] = data.draw(values)
        case "rank":
            stored["matrices"][name]["rank"] = data.draw(values)
        case "format":
            stored["matrices"][name]["format"] = data.draw(st.one_of(values, formats))
        case "matrix":
            stored["matrices"][name] = data.draw(values)
        case "gone":
            del stored["matrices"][name]
        case "more":
            stored["matrices"][data.draw(st.sampled_from(["lm_head", "model.norm", "..", "model.layers.9.x"]))] = {
                "format": format, "rank": 4,
            }  # fmt: skip
        case "dtype":
            stored["stored_dtype"] = data.draw(st.one_of(values, st.just("bfloat16")))
        case "key":
            stored[data.draw(st.text(max_size=5))] = data.draw(values)
    (folder / "config.json").write_text(json.dumps(config))
    found = load(folder)
    assert found is None or torch.equal(found, expected[format])


@pytest.mark.parametrize("stored_dtype", [[], {}, None, "float32"])
def test_a_stored_dtype_that_is_none_is_refused(stored_dtype: Any, folders: Folders, scratch: Path) -> None:
    folder = copied(folders, "int8", scratch)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["stored_dtype"] = stored_dtype
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="stored_dtype is"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "required"),
    [
        ("model.embed_tokens.weight", "stored_dtype of the checkpoint is float16"),
        ("model.layers.0.mlp.up_proj.left", "float16 of rank .* requires float16"),
    ],
)
def test_the_other_16_bit_dtype_of_one_tensor_is_refused(
    name: str, required: str, folders: Folders, scratch: Path
) -> None:
    folder = copied(folders, "float16", scratch)
    header, content = header_of(folder)
    assert header[name]["dtype"] == "F16"
    header[name]["dtype"] = "BF16"
    write_header(folder, header, content)
    with pytest.raises(CheckpointError, match=f"{name}: is BF16.*{required}"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="is BF16"):
        read_bytes(folder)


@pytest.mark.parametrize("trick", ["../outside/{}", "{absolute}/{}", "nested/../../outside/{}"])
def test_an_index_cannot_point_out_of_its_folder(trick: str, folders: Folders, tmp_path: Path) -> None:
    build(folders["llama", "prepared"], tmp_path / "made", "int8", shard="20KB")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "made" / "nested").mkdir()
    index_file = tmp_path / "made" / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    moved = index["weight_map"]["model.norm.weight"]
    shutil.move(tmp_path / "made" / moved, outside / moved)
    pointed = trick.format(moved, absolute=outside)
    index["weight_map"] = {name: pointed if file == moved else file for name, file in index["weight_map"].items()}
    index_file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "made")
