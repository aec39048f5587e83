"""Which linears are compressed, and the module that takes their place."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from spectrim.errors import ModelError
from spectrim.formats.lowrank_linear import LowRankLinear, factors_of
from spectrim.formats.quantized_linear import QuantizedLinear
from spectrim.formats.stored_linear import StoredLinear, stored_tensors
from spectrim.maths.budget import FACTORED, ROUNDED, Format, break_even_rank, fills_bytes, matrix_bytes
from spectrim.maths.lowrank import Factors
from spectrim.models.modules import compressible_linears, decoder_blocks, linears_by_block, replace
from tests import tiny

FORMATS: tuple[Format, ...] = (*FACTORED, *ROUNDED)
SHAPES = ((24, 40), (40, 24), (32, 32))


def random_tensors(
    format: Format, out_features: int, in_features: int, rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Stored tensors of the right shapes and dtypes with random values."""
    generator = torch.Generator().manual_seed(out_features + in_features + rank)
    tensors = {}
    for suffix, stored in stored_tensors(format, out_features, in_features, rank).items():
        if stored.dtype == torch.int8:
            tensors[suffix] = torch.randint(-127, 128, stored.shape, generator=generator, dtype=torch.int8)
        elif stored.dtype == torch.uint8:
            tensors[suffix] = torch.randint(0, 256, stored.shape, generator=generator, dtype=torch.uint8)
        elif stored.dtype == torch.int32:
            tensors[suffix] = torch.randperm(*stored.shape, generator=generator, dtype=torch.int32)
        else:
            tensors[suffix] = torch.rand(stored.shape, generator=generator).to(stored.dtype or dtype) / 100
    return tensors


def reference_weight(tensors: dict[str, Tensor], format: Format) -> Tensor:
    """W in float64, element by element as the format says."""
    if tensors["weight"].dim() == 3:
        n_bits = ROUNDED[format].n_bits
        zeros = tensors.get("weight_zero", torch.zeros(tensors["weight_scale"].shape)) / 2 ** (8 - n_bits)
        weight = torch.tensor(
            [
                [
                    (value - float(zero)) * float(scale)
                    for group, scale, zero in zip(*row, strict=True)
                    for value in integers(group, n_bits)
                ]
                for row in zip(tensors["weight"], tensors["weight_scale"], zeros, strict=True)
            ],
            dtype=torch.float64,
        )
        return weight + side_of(tensors, "left") @ side_of(tensors, "right").mT if "left" in tensors else weight
    if "order" in tensors:
        rows = list(side_of(tensors, "weight").mT)
        rows += [sum(c * row for c, row in zip(line, rows, strict=True)) for line in side_of(tensors, "left")]
        return torch.stack([rows[at] for at in tensors["order"]])
    return side_of(tensors, "left") @ side_of(tensors, "weight").mT


def side_of(tensors: dict[str, Tensor], side: str) -> Tensor:
    scale = tensors.get(f"{side}_scale", torch.ones(())).double()
    scales = scale if side == "left" and scale.dim() else scale.expand(len(tensors[side]), *scale.shape)  # per row
    rows = [row.double() * factor for row, factor in zip(tensors[side], scales, strict=True)]
    return torch.stack(rows + [row.double() for row in tensors.get(f"{side}_tail", ())])


def integers(group: Tensor, n_bits: int) -> list[int]:
    """The numbers of a group: int8 as they are, fewer bits cut off one long binary number, in two's complement."""
    if group.dtype == torch.int8:
        return group.tolist()
    whole, count = int.from_bytes(bytes(group.tolist()), "little"), 8 * len(group) // n_bits
    digits = [whole >> n_bits * at & (2**n_bits - 1) for at in range(count)]
    return [digit - 2**n_bits if digit >= 2 ** (n_bits - 1) else digit for digit in digits]


def module_of(format: Format, out_features: int, in_features: int, bias: Tensor | None = None) -> StoredLinear:
    kind = QuantizedLinear if format in ROUNDED else LowRankLinear
    tensors = random_tensors(format, out_features, in_features, 5, torch.float32)
    return kind.from_tensors(tensors, format, out_features, in_features, bias)


@pytest.mark.parametrize(
    ("family", "prefix", "per_block"),
    [("llama", "model.layers", 7), ("opt", "model.decoder.layers", 6), ("qwen2", "model.layers", 7)],
)
def test_every_linear_of_every_block_and_nothing_else(family: str, prefix: str, per_block: int) -> None:
    model = tiny.model(family)
    name, blocks = decoder_blocks(model)
    assert name == prefix
    assert blocks is model.get_submodule(prefix)
    by_block = linears_by_block(model)
    assert list(by_block) == [f"{prefix}.{index}" for index in range(len(blocks))]
    assert all(len(linears) == per_block for linears in by_block.values())
    flat = compressible_linears(model)
    assert list(flat) == [name for linears in by_block.values() for name in linears]
    assert all(model.get_submodule(name) is linear for name, linear in flat.items())
    assert "lm_head" not in flat


def test_exclude_takes_shell_patterns_and_keeps_empty_blocks() -> None:
    model = tiny.model("llama")
    kept = compressible_linears(model, ["*.down_proj", "*.self_attn.?_proj"])
    assert {name.rpartition(".")[2] for name in kept} == {"gate_proj", "up_proj"}
    assert linears_by_block(model, ["model.layers.0.*"])["model.layers.0"] == {}


def test_nothing_to_compress_names_the_model() -> None:
    with pytest.raises(ModelError, match=r"'\*'.* matches all 21 nn\.Linear in model.layers of LlamaForCausalLM"):
        compressible_linears(tiny.model("llama"), ["*"])
    without_linears = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=16, n_positions=8))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: no nn\.Linear to compress"):
        compressible_linears(without_linears)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    message = r"'down_proj', 'mlp' matches none of the 21 nn\.Linear.* first of them is model.layers.0.self_attn.q_proj"
    with pytest.raises(ModelError, match=message):
        compressible_linears(tiny.model("llama"), ["down_proj", "*.up_proj", "mlp"])


def test_an_encoder_and_a_decoder_are_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=16))
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration: 2 lists of 2 blocks"):
        decoder_blocks(model)


def test_replace_puts_the_module_there_or_says_that_there_is_none() -> None:
    model = tiny.model("llama")
    other = nn.Identity()
    replace(model, "model.layers.1.mlp.up_proj", other)
    assert model.get_submodule("model.layers.1.mlp.up_proj") is other
    for name in ("model.layers.1.mlp.no_proj", "model.layers.9.mlp.up_proj"):
        with pytest.raises(ModelError, match=name):
            replace(model, name, nn.Identity())


sizes = st.integers(min_value=1, max_value=600)


@given(format=st.sampled_from(FORMATS), out_features=sizes, in_features=sizes, data=st.data())
def test_stored_tensors_take_the_budgeted_bytes_and_never_look_dense(
    format: Format, out_features: int, in_features: int, data: st.DataObject
) -> None:
    if format in ROUNDED and not fills_bytes(ROUNDED[format], in_features):
        return
    largest = (
        break_even_rank(format, out_features, in_features) if format in FACTORED else min(out_features, in_features)
    )
    if largest == 0:
        return  # always dense
    rank = data.draw(st.integers(min_value=1, max_value=largest))
    tensors = stored_tensors(format, out_features, in_features, rank)
    n_bytes = sum(torch.Size(t.shape).numel() * (t.dtype.itemsize if t.dtype else 2) for t in tensors.values())
    assert n_bytes == matrix_bytes(format, out_features, in_features, rank)
    assert tensors["weight"].shape != (out_features, in_features)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("out_features", "in_features"), [*SHAPES, (6, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_the_product_of_what_is_stored(
    format: Format, out_features: int, in_features: int, with_bias: bool
) -> None:
    bias = torch.randn(out_features) if with_bias else None
    module = module_of(format, out_features, in_features, bias)
    x = torch.randn(3, 7, in_features)
    weight = reference_weight(module.state_dict(), format)
    expected = x.double() @ weight.mT + (0 if bias is None else bias.double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(module.dense_weight().double(), weight, rtol=1e-5, atol=1e-4)
    if isinstance(module, LowRankLinear):
        factors = factors_of(module)
        assert factors.left.shape == (out_features, 5)
        assert factors.right.shape == (5, in_features)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_the_batch_does_not_depend_on_the_others(format: Format) -> None:
    module = module_of(format, 24, 40)
    x = torch.randn(6, 40)
    torch.testing.assert_close(module(x)[[4, 1]], module(x[[4, 1]]))


def test_from_factors_keeps_dtype_and_values() -> None:
    factors = Factors(torch.randn(9, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64))
    module = LowRankLinear.from_factors(factors, None)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x), x @ (factors.left @ factors.right).mT)
    assert (module.rank, module.in_features, module.out_features) == (2, 6, 9)


@pytest.mark.parametrize("format", [format for format in FORMATS if format not in ("float16", "pifa")])
@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double().float()])
def test_casts_leave_integers_and_scales_alone(format: Format, cast: Callable[[nn.Module], nn.Module]) -> None:
    module = module_of(format, 40, 24, torch.ones(40))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    after = cast(module).state_dict()
    for name, tensor in after.items():
        exact = not tensor.is_floating_point() or name.endswith("_scale")
        assert not exact or (tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])), name
    assert after["bias"].dtype == module.bias.dtype == after.get("left_tail", module.bias).dtype
    assert module(torch.ones(2, 24, dtype=module.bias.dtype)).dtype == module.bias.dtype


def test_a_plain_module_would_have_rounded_the_scales() -> None:
    scale = nn.Parameter(torch.full((1,), 1 / 3))
    plain = nn.ParameterDict({"weight_scale": scale}).half()
    assert plain["weight_scale"].float().item() != pytest.approx(1 / 3, abs=1e-6)


def test_gradients_reach_the_factors_and_int8_stays_fixed() -> None:
    module = LowRankLinear.from_factors(Factors(torch.randn(6, 2), torch.randn(2, 5)), torch.zeros(6))
    module(torch.randn(3, 5)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    int8 = LowRankLinear(5, 6, 2, "int8", bias=False)
    assert {name for name, p in int8.named_parameters() if not p.requires_grad} == {"weight", "left"}


@pytest.mark.parametrize(("rank", "format"), [(0, "float16"), (25, "float16"), (3, "dense"), (3, "int3")])
def test_impossible_modules_are_refused(rank: int, format: Format) -> None:
    with pytest.raises(ModelError, match=r"rank|is not one of LowRankLinear"):
        LowRankLinear(40, 24, rank, format, bias=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format", FORMATS)
def test_cuda_agrees_with_cpu(format: Format) -> None:
    module = module_of(format, 40, 24)
    x = torch.randn(3, 24)
    expected = module(x)
    torch.testing.assert_close(module.to("cuda")(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
