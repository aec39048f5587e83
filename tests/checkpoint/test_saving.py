"""Packing, assembling and save_pretrained keep every value their format can hold."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spectrim.checkpoint.conversion import convert
from spectrim.checkpoint.layout import Matrix, read_bytes
from spectrim.checkpoint.saving import assemble
from spectrim.errors import CheckpointError, NumericalError
from spectrim.formats.packing import pack, pack_rounded
from spectrim.maths.budget import CODED, RESIDUAL, ROUNDED, Format
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import dequantize, round_to_nearest
from spectrim.maths.storage_formats import FORMATS as DECLARED
from spectrim.maths.storage_formats import named
from tests.checkpoints import (
    CASES,
    FORMATS,
    RANK,
    UP,
    Folders,
    build,
    build_all,
    chosen,
    logits,
    nearest,
    packed_weight,
    prepare,
    stored_linear,
    truncated,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every family in every format; read only."""
    return build_all(tmp_path_factory.mktemp("checkpoints"))


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize(("family", "format"), CASES)
def test_save_and_load_again_changes_no_byte(family: str, format: Format, folders: Folders, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[family, format])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert (tmp_path / "model.safetensors").read_bytes() == (folders[family, format] / "model.safetensors").read_bytes()
    assert read_bytes(tmp_path) == read_bytes(folders[family, format])


def test_what_does_not_fit_16_bits_is_saved_in_full_outside_the_matrices(folders: Folders, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama", "float16"])
    with torch.no_grad():
        model.model.norm.weight.add_(1e-6)
        model.model.layers[0].mlp.up_proj.left.add_(1e-7)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["model.norm.weight"], model.model.norm.weight.detach())
    assert saved["model.layers.0.mlp.up_proj.left"].dtype == torch.float16
    assert saved["model.layers.0.input_layernorm.weight"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_stored_dtypes_of_the_dense_model(dtype: torch.dtype, tmp_path: Path) -> None:
    dense = prepare("llama", tmp_path / "dense", dtype)
    build(dense, tmp_path / "made", "remap")
    prepared, written = load_file(dense / "model.safetensors"), load_file(tmp_path / "made" / "model.safetensors")
    matrices = json.loads((tmp_path / "made" / "spectrim.json").read_text())["matrices"]
    for name, tensor in written.items():
        module = name.rpartition(".")[0]
        if module not in matrices:
            assert torch.equal(tensor, prepared[name]) and tensor.dtype == dtype, name
        elif matrices[module]["format"] == "dense":
            assert tensor.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16), name
        elif not name.endswith("_scale"):
            assert tensor.dtype in (torch.float16, torch.int8), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_factors_of_a_bfloat16_model_are_float16_which_loses_a_fifth_of_what_bfloat16_would(
    tmp_path: Path,
) -> None:
    dense = prepare("llama", tmp_path / "dense", torch.bfloat16)
    build(dense, tmp_path / "made", "pifa")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    up = model.model.layers[0].mlp.up_proj
    best = truncated(AutoModelForCausalLM.from_pretrained(dense).model.layers[0].mlp.up_proj.weight.detach(), RANK)
    wanted = best.left @ best.right
    coarse = type(up).from_tensors(
        {name: tensor.to(torch.bfloat16).to(tensor.dtype) for name, tensor in up.state_dict().items()},
        "pifa", *wanted.shape, None,
    )  # fmt: skip
    stored, rounded = ((module.dense_weight() - wanted).norm() for module in (up, coarse))
    assert 5 * stored < rounded
    model.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again["model.layers.0.mlp.up_proj.left"].dtype == torch.float16
    assert again["model.norm.weight"].dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="bfloat16").state_dict()
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=smallest)


def test_a_factor_that_has_outgrown_float16_is_not_saved(folders: Folders, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama", "float16"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.left.mul_(1e8)
    with pytest.raises(CheckpointError, match="does not fit torch"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_shards_load_like_one_file_and_equal_arguments_give_equal_bytes(
    format: Format, folders: Folders, tmp_path: Path
) -> None:
    dense = folders["llama", "prepared"]
    build(dense, tmp_path / "one", format)
    assert digests(tmp_path / "one") == digests(folders["llama", format])
    measured = build(dense, tmp_path / "many", format, shard="20KB")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert measured["linears"] == read_bytes(tmp_path / "one")["linears"]
    assert all(shard.stat().st_size < 50_000 for shard in shards)
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert torch.equal(logits(one), logits(many))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_packing_loses_at_most_the_rounding_of_the_format(format: Format, shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    factors = truncated(torch.randn(shape), RANK)
    weight = torch.randn(shape) if format in (*ROUNDED, *CODED) else factors.left @ factors.right
    kept = stored_linear(packed_weight(weight, format).tensors, format, shape).dense_weight()
    error = torch.linalg.matrix_norm(kept - weight) / torch.linalg.matrix_norm(weight)
    declared = DECLARED[format]
    rounding = {
        8: 2e-2, 4: 0.12 if declared.has_factors else 0.15, 3: 0.3 if declared.has_factors else 0.4,
        None: 2e-2 if declared.in_int8 or declared.coded else 1e-3,
    }  # fmt: skip
    assert error < rounding[declared.grid and declared.grid.n_bits] * (4 if declared.pivoted else 1)
    if (
        not declared.factored or declared.pivoted
    ):  # the rows of pivoted factors are the matrix's own: it has no directions
        return
    # one scale for the whole left factor instead of one per row loses what the small rows hold
    spread = Factors(factors.left * torch.logspace(0, -4, shape[0])[:, None], factors.right)
    kept = stored_linear(pack(spread, format).tensors, format, shape).dense_weight()[-1]
    row = spread.left[-1] @ spread.right
    assert torch.linalg.vector_norm(kept - row) < 4e-2 * torch.linalg.vector_norm(row)
    naive = (spread.left[-1] / spread.left.abs().max() * 127).round() * spread.left.abs().max() / 127
    assert torch.linalg.vector_norm(naive @ spread.right - row) > 0.5 * torch.linalg.vector_norm(row)


@pytest.mark.parametrize("format", ROUNDED)
def test_a_rounded_weight_comes_back_number_by_number(format: Format) -> None:
    weight = torch.randn(6, 128)
    residual = Factors(torch.zeros(6, 2), torch.zeros(2, 128)) if format in RESIDUAL else None
    rounded = nearest(weight, ROUNDED[format])
    kept = stored_linear(pack_rounded(rounded, format, residual).tensors, format, weight.shape).dense_weight()
    assert torch.equal(kept, dequantize(rounded))


@pytest.mark.parametrize(
    ("format", "group", "factors"),
    [("dense_int4", None, 0), ("int8_residual", None, 0), ("dense_int8", None, 1), ("dense_int4_asym", 64, 0)],
)
def test_a_rounded_weight_of_another_format_is_refused(format: Format, group: int | None, factors: int) -> None:
    residual = Factors(torch.ones(6, factors), torch.ones(factors, 128)) if factors else None
    with pytest.raises(CheckpointError, match=rf"{format} of 128 inputs: .* required: groups of"):
        pack_rounded(round_to_nearest(torch.randn(6, 128), 4, group), format, residual)


@pytest.mark.parametrize("format", named(lambda format: format.pivoted))
def test_pivoted_matrices_say_how_well_their_rows_were_chosen(format: Format, folders: Folders, tmp_path: Path) -> None:
    """spectrim.json has ‖[I; C]‖₂ and the exchanged rows of every pivoted matrix, of no other."""
    table = json.loads((folders["llama", format] / "spectrim.json").read_text())["matrices"]
    stored = load_file(folders["llama", format] / "model.safetensors")
    for name, row in table.items():
        if row["format"] == "dense":
            assert "condition" not in row
            continue
        coefficients = stored[f"{name}.left"].double()
        if DECLARED[format].in_int8:
            coefficients *= stored[f"{name}.left_scale"][:, None]
        expected = (1 + float(torch.linalg.matrix_norm(coefficients, ord=2)) ** 2) ** 0.5
        assert row["condition"] == pytest.approx(expected, rel=1e-2) and row["condition"] > 1
        assert row["exchanges"] == 0
    convert(folders["llama", format], tmp_path / "same", format)
    assert json.loads((tmp_path / "same" / "spectrim.json").read_text())["matrices"] == table
    plain = json.loads((folders["llama", "int8"] / "spectrim.json").read_text())["matrices"]
    assert all("condition" not in row for row in plain.values())


def test_packing_refuses_what_it_cannot_hold() -> None:
    huge = Factors(torch.full((3, 1), 1e6), torch.full((1, 3), 1e6))
    with pytest.raises(CheckpointError, match=r"does not fit torch\.float16.*bfloat16"):
        pack(huge, "float16")
    with pytest.raises(NumericalError, match="finite"):
        pack(Factors(torch.full((3, 1), torch.nan), torch.ones(1, 3)), "int8")


def test_assembling_refuses_wrong_material(folders: Folders, tmp_path: Path) -> None:
    dense = folders["llama", "prepared"]
    matrices, packed = chosen(dense, "float16")

    def attempt(**changed: Any) -> None:
        arguments = {"packed": packed, "matrices": matrices, "max_shard_size": "2GB", **changed}
        assemble(dense, tmp_path / "out", ratio_target=0.5, provenance={}, **arguments)

    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.q: .* has no tensor model\.layers\.9\.q\.weight"):
        attempt(matrices={**matrices, "model.layers.9.q": Matrix("float16", 8)})
    with pytest.raises(CheckpointError, match=rf"{UP}\.left: missing \(float16\)"):
        attempt(packed={name: parts for name, parts in packed.items() if name != UP})
    with pytest.raises(CheckpointError, match=rf"{UP}\.left: is F16"):
        attempt(matrices={**matrices, UP: Matrix("int8", 8)})
    swapped = {**packed, UP: packed["model.layers.0.self_attn.q_proj"]}
    with pytest.raises(CheckpointError, match=rf"{UP}: factors of a \(64, 64\) weight, the dense weight is \(96, 64\)"):
        attempt(packed=swapped)
    with pytest.raises(CheckpointError, match="max_shard_size '2 pounds'"):
        attempt(max_shard_size="2 pounds")
    with pytest.raises(CheckpointError, match=r"no Spectrim quantization_config"):
        read_bytes(dense)
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        read_bytes(tmp_path)
