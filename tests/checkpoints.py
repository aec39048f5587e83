"""Checkpoints of the tiny models in every format, made without the pipeline."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from spectrim.checkpoint.layout import Matrix
from spectrim.checkpoint.saving import assemble
from spectrim.formats.kinds import kind_of
from spectrim.formats.packing import Packed, pack, pack_coded, pack_rounded
from spectrim.formats.stored_linear import StoredLinear
from spectrim.maths.budget import CODED, FACTORED, RESIDUAL, ROUNDED, Format, resolve_format
from spectrim.maths.compensation import compensated
from spectrim.maths.lowrank import Factors
from spectrim.maths.quantization import Quantized, dequantize, round_to_nearest
from spectrim.maths.storage_formats import Grid
from spectrim.maths.two_sided_rounding import side, two_sided_rounded
from spectrim.models.linearise import linearise
from spectrim.models.modules import compressible_linears
from tests import tiny

FORMATS: tuple[Format, ...] = (*FACTORED, *ROUNDED, *CODED)
CASES = [(family, format) for family in tiny.FAMILIES for format in FORMATS]
RANK = 7
UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(2, 42).reshape(2, 20)
Folders = dict[tuple[str, str], Path]


def gpt2() -> PreTrainedModel:
    """A model whose matrices are transposed linears, and whose base model has another name than "model"."""
    torch.manual_seed(tiny.SEED)
    config = GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def prepare(family: str, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """A dense folder as the pipeline prepares it: weights in ``dtype``, float32 in config.json."""
    model = gpt2() if family == "gpt2" else tiny.model(family)
    model.to(dtype).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


def truncated(weight: Tensor, rank: int) -> Factors:
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return Factors((left[:, :rank] * sigma[:rank]).float(), right[:rank].float())


def nearest(weight: Tensor, grid: Grid) -> Quantized:
    """``weight`` rounded to the nearest of a ``grid``."""
    if grid.asymmetric:  # a diagonal Gram
        return compensated(weight, torch.eye(weight.shape[1]), grid)
    return round_to_nearest(weight, grid.n_bits, grid.group_size(weight.shape[1]))


def packed_weight(weight: Tensor, format: Format) -> Packed:
    """A weight as ``format`` stores it, factors at RANK."""
    if format in CODED:  # the largest numbers do not fit a byte
        plain = (side(torch.eye(size, dtype=torch.float64), 0.0) for size in weight.shape)
        return pack_coded(two_sided_rounded(weight, *plain, float(weight.abs().max()) / 200))
    if format not in ROUNDED:
        return pack(truncated(weight, RANK), format)
    grid = ROUNDED[format]
    rounded = nearest(weight, grid)
    residual = truncated(weight - dequantize(rounded), RANK) if format in RESIDUAL else None
    return pack_rounded(rounded, format, residual)


def stored_linear(
    tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, int], bias: Tensor | None = None
) -> StoredLinear:
    """The module that holds them."""
    return kind_of(format).from_tensors(tensors, format, *shape, bias)


def chosen(dense: Path, format: Format) -> tuple[dict[str, Matrix], dict[str, Packed]]:
    """Every linear in ``format`` at one rank, the last one dense."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    linearise(model)
    matrices, packed = {}, {}
    for name, linear in compressible_linears(model).items():
        out_features, in_features = linear.weight.shape
        stored = format if format in CODED else resolve_format(format, out_features, in_features, RANK)
        assert stored == format
        without_factors = format in (*ROUNDED, *CODED) and format not in RESIDUAL
        matrices[name] = Matrix(stored, min(linear.weight.shape) if without_factors else RANK)
        packed[name] = packed_weight(linear.weight.detach(), stored)
    matrices[name] = Matrix("dense", min(linear.weight.shape))
    del packed[name]
    return matrices, packed


def build(dense: Path, destination: Path, format: Format, shard: str = "2GB") -> dict[str, Any]:
    matrices, packed = chosen(dense, format)
    return assemble(
        dense, destination, packed, matrices, ratio_target=0.5, provenance={"made": "here"}, max_shard_size=shard
    )


def build_all(root: Path) -> Folders:
    """(family, format or "prepared") -> folder, for every family and format."""
    made = {(family, "prepared"): prepare(family, root / f"{family}-prepared") for family in tiny.FAMILIES}
    for family, format in CASES:
        made[family, format] = root / f"{family}-{format}"
        build(made[family, "prepared"], made[family, format], format)
    return made


class Made(dict[tuple[str, str], Path]):
    """(family, format or "prepared") -> folder, made when it is first asked for; families are tiny's and gpt2."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, key: tuple[str, Any]) -> Path:
        family, format = key
        folder = self.root / f"{family}-{format}"
        if format == "prepared":
            prepare(family, folder)
        else:
            build(self[family, "prepared"], folder, format)
        self[key] = folder
        return folder


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits
