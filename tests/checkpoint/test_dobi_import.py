"""A folder in the layout that Dobi-SVD releases, made for a tiny model, becomes one of ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from spectrim import cli
from spectrim.checkpoint.dobi_import import dynamic_type, import_dobi
from spectrim.checkpoint.layout import read_bytes, read_config
from spectrim.errors import CheckpointError
from spectrim.models.modules import compressible_linears
from tests import tiny
from tests.checkpoints import logits

RANK = 12


def coded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the nearest of the 256 numbers, in units of its largest value, and that."""
    largest = matrix.abs().amax(1).half()
    return (matrix[..., None] / largest.float()[:, None, None] - dynamic_type()).abs().argmin(-1).to(
        torch.uint8
    ), largest


def released(family: str, folder: Path, rank: int = RANK) -> dict[str, Tensor]:
    """Write the release; returns linear -> the weight it stands for, in float32."""
    model = tiny.model(family)
    model.config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    remapped: dict[str, Any] = {}
    weights = {}
    for name, linear in compressible_linears(model).items():
        out, in_ = linear.weight.shape
        u, s, v = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
        us, vt = (u * s)[:, :rank], v[:rank]
        short = min(out, in_)
        (us_quan, us_absmax), (vt_quan, vt_absmax) = coded(us[:short].T.contiguous()), coded(vt[:, :short].contiguous())
        rest = ("us", us[short:].half()) if out > in_ else ("vt", vt[:, short:].half()) if in_ > out else None
        remapped[name] = {
            "us_quan": us_quan, "vt_quan": vt_quan, "us_absmax": us_absmax, "vt_absmax": vt_absmax, "tuple_info": rest,
        }  # fmt: skip
        left, right = us.clone(), vt.clone()
        left[:short] = (dynamic_type()[us_quan.long()] * us_absmax.float()[:, None]).T
        right[:, :short] = dynamic_type()[vt_quan.long()] * vt_absmax.float()[:, None]
        if rest:
            (left if out > in_ else right.T)[short:] = (rest[1] if out > in_ else rest[1].T).float()
        weights[name] = left @ right
    torch.save(remapped, folder / "remapping_weight.pt")
    others = {
        name: value.half()
        for name, value in model.state_dict().items()
        if "self_attn." not in name and "mlp." not in name
    }
    torch.save(others, folder / "pytorch_model.bin")
    return weights


@pytest.mark.parametrize("format", ["float16", "remap", "int8", "pifa"])
def test_the_imported_model_computes_what_the_release_stands_for(format: Any, tmp_path: Path) -> None:
    weights = released("llama", tmp_path / "released")
    measured = import_dobi(tmp_path / "released", tmp_path / "made", format)
    assert measured == read_bytes(tmp_path / "made")
    kinds = {matrix.format for matrix in read_config(tmp_path / "made").listed.values()}
    assert kinds <= {format, "dense"} and format in kinds
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    expected = tiny.model("llama").half().float()
    for name, weight in weights.items():
        expected.get_submodule(name).weight.data = weight
    expected_logits = logits(expected.eval())
    error = float((logits(model) - expected_logits).norm() / expected_logits.norm())
    assert error < (5e-3 if format in ("float16", "pifa") else 5e-2)
    assert float((logits(tiny.model("llama").eval()) - expected_logits).norm() / expected_logits.norm()) > 5e-2


def test_the_dynamic_type_has_256_numbers_of_either_sign() -> None:
    table = dynamic_type()
    assert len(table) == 256 == len(set(table.tolist())) and table[-1] == 1 and 0 in table
    assert torch.equal(table.sort().values, table) and float(table[0]) == pytest.approx(-0.99296875)
    negative = table[table < 0]
    assert torch.equal(-negative.flip(0), table[table > 0][:-1]) and float(table[table > 0][0]) == pytest.approx(5.5e-7)


def test_what_could_run_code_is_not_loaded(tmp_path: Path) -> None:
    released("llama", tmp_path)
    torch.save({"model": tiny.model("llama")}, tmp_path / "remapping_weight.pt")
    with pytest.raises(CheckpointError, match=r"remapping_weight\.pt: not a file of tensors alone"):
        import_dobi(tmp_path, tmp_path / "made", "remap")
    (tmp_path / "remapping_weight.pt").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not a file of tensors alone"):
        import_dobi(tmp_path, tmp_path / "made", "remap")
    (tmp_path / "remapping_weight.pt").unlink()
    with pytest.raises(CheckpointError, match="not found"):
        import_dobi(tmp_path, tmp_path / "made", "remap")


def test_a_release_that_dropped_part_of_the_model_is_refused(tmp_path: Path) -> None:
    """qwen2 has biases inside attention, which the release does not hold."""
    released("qwen2", tmp_path)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is missing"):
        import_dobi(tmp_path, tmp_path / "made", "remap")


def test_another_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released("llama", tmp_path)
    remapped = torch.load(tmp_path / "remapping_weight.pt", weights_only=True)
    name = "model.layers.1.mlp.up_proj"
    for key, value, message in (
        ("us_quan", remapped[name]["us_quan"][:, 1:], r"us_quan: is torch\.uint8"),
        ("vt_absmax", remapped[name]["vt_absmax"].float(), r"vt_absmax: is torch\.float32"),
        ("tuple_info", None, r"tuple_info: is None"),
        ("more", 1, "must hold exactly"),
    ):
        torch.save(remapped | {name: remapped[name] | {key: value}}, tmp_path / "remapping_weight.pt")
        with pytest.raises(CheckpointError, match=rf"up_proj.*{message}"):
            import_dobi(tmp_path, tmp_path / "made", "remap")
    assert cli.main(["import-dobi", str(tmp_path), str(tmp_path / "made")]) == 1
    assert "must hold exactly" in capsys.readouterr().err
