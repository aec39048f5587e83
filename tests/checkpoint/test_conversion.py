"""Checkpoints from one storage format into another, and the command that does it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spectrim import cli
from spectrim.checkpoint.conversion import convert
from spectrim.checkpoint.layout import read_bytes, read_config
from spectrim.errors import CheckpointError
from spectrim.maths.budget import CODED, FACTORED, ROUNDED, Format
from tests.checkpoints import FORMATS, Folders, build_all, logits

ALLOWED = {"float16": 2e-3, "pifa": 5e-3}  # of the logits' norm; int8 rounds more


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every family in every format; read only."""
    return build_all(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("source", FACTORED)
@pytest.mark.parametrize("target", FACTORED)
def test_a_converted_checkpoint_computes_the_same(
    source: Format, target: Format, folders: Folders, tmp_path: Path
) -> None:
    folder = folders["qwen2", source]
    measured = convert(folder, tmp_path / "made", target)
    assert measured == read_bytes(tmp_path / "made")
    assert {matrix.format for matrix in read_config(tmp_path / "made").listed.values()} == {target, "dense"}
    before, after = (logits(AutoModelForCausalLM.from_pretrained(at)) for at in (folder, tmp_path / "made"))
    error = float((after - before).norm() / before.norm())
    assert error < ALLOWED.get(target, 5e-2) and (error > 0 or source == target)
    if source == target:
        assert (tmp_path / "made" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("source", FORMATS)
def test_dense_is_the_plain_matrix(source: Format, folders: Folders, tmp_path: Path) -> None:
    measured = convert(folders["opt", source], tmp_path / "made", "dense")
    kinds = {matrix.format for matrix in read_config(tmp_path / "made").listed.values()}
    assert kinds == ({source, "dense"} if source in (*ROUNDED, *CODED) else {"dense"})  # rounded weights stay
    assert measured["ratio"] <= 1
    before, after = (
        logits(AutoModelForCausalLM.from_pretrained(at)) for at in (folders["opt", source], tmp_path / "made")
    )
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)


def test_what_is_no_matrix_stays_bit_for_bit(folders: Folders, tmp_path: Path) -> None:
    convert(folders["opt", "pifa"], tmp_path / "made", "int8")
    before, after = (load_file(at / "model.safetensors") for at in (folders["opt", "pifa"], tmp_path / "made"))
    listed = read_config(tmp_path / "made").listed
    others = {name for name in before if name.rpartition(".")[0] not in listed or name.endswith(".bias")}
    assert others and all(torch.equal(before[name], after[name]) for name in others)


def test_a_destination_with_files_and_a_folder_that_is_no_checkpoint_are_refused(
    folders: Folders, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        convert(folders["llama", "pifa"], tmp_path, "int8")
    with pytest.raises(CheckpointError, match="no Spectrim quantization_config"):
        convert(folders["llama", "prepared"], tmp_path / "made", "int8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(tmp_path / "nowhere", tmp_path / "made", "int8")


def test_the_command_says_what_it_wrote_or_what_is_wrong(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "--format", "int8", str(folders["llama", "float16"]), str(tmp_path / "made")]
    assert cli.main(command) == 0
    assert f"{read_bytes(tmp_path / 'made')['ratio']:.4f} of their 16-bit bytes" in capsys.readouterr().out
    assert cli.main(command) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'made'}: not empty")


def test_a_folder_of_save_pretrained_is_converted_too(folders: Folders, tmp_path: Path) -> None:
    """It has no spectrim.json, which nothing needs."""
    AutoModelForCausalLM.from_pretrained(folders["llama", "float16"]).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "spectrim.json").exists()
    convert(tmp_path / "saved", tmp_path / "made", "pifa")
    before, after = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / at)) for at in ("saved", "made"))
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)
