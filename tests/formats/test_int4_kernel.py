"""Four-bit weights in the order of torch's kernel: the same numbers, the same file, and only where it suits."""

import copy
import io
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from spectrim.checkpoint.layout import Matrix
from spectrim.errors import ModelError
from spectrim.formats.int4_kernel import BLOCK, file_order, int4_product, kernel_order, suits
from spectrim.formats.products import CAPABILITY, STEP
from spectrim.formats.quantized_linear import QuantizedLinear
from spectrim.integrations.vllm_plugin import FusedLinear
from spectrim.maths.quantization import unpack
from tests.checkpoints import build, prepare

pytestmark = pytest.mark.skipif(CAPABILITY not in STEP, reason="the kernel wants AVX2 or AVX512")
OUT, IN, GROUP = 48, 128, 64


def draw(seed: int, out: int, groups: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """weight (out, groups, g / 2) as in a file, scale (out, groups) float16."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 256, (out, groups, group // 2), generator=generator, dtype=torch.uint8)
    return weight, (torch.rand(out, groups, generator=generator) / 50 + 0.01).half()


def expanded(weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    zero = torch.zeros_like(scale) if zero is None else zero
    return ((unpack(weight, 4).double() - zero.double()[..., None]) * scale.double()[..., None]).flatten(1)


def linear(dtype: torch.dtype | None) -> tuple[QuantizedLinear, Tensor]:
    weight, scale = draw(3, OUT, IN // GROUP)
    module = QuantizedLinear.from_tensors({"weight": weight, "weight_scale": scale}, "dense_int4", OUT, IN, None)
    module.lay_out(dtype)
    return module, expanded(weight, scale)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12), st.integers(1, 5), st.sampled_from([32, 64, 128]), st.integers(1, 40), st.integers(0, 99),
    st.booleans(),
)  # fmt: skip
def test_is_the_product_with_the_scaled_integers(
    tiles: int, groups: int, group: int, rows: int, seed: int, asymmetric: bool
) -> None:
    weight, scale = draw(seed, 16 * tiles, groups, group)
    assert suits(weight, torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, rows, groups * group, generator=generator).bfloat16()
    zero = torch.randint(-128, 112, scale.shape, generator=generator, dtype=torch.int8) if asymmetric else None
    exact = expanded(weight, scale, None if zero is None else zero / 16).mT
    found = int4_product(x, kernel_order(weight), scale, zero)
    assert (found.shape, found.dtype) == ((1, rows, 16 * tiles), torch.bfloat16)
    size = x.double().abs() @ exact.abs()
    assert float((found.double() - x.double() @ exact).abs().max() / size.max()) < 1e-2
    unordered = int4_product(x, weight.flatten(1), scale, zero)  # negative control
    assert float((unordered.double() - x.double() @ exact).abs().max() / size.max()) > 2e-2


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3 * BLOCK // 16), st.integers(1, 5), st.integers(0, 99))
def test_the_order_of_a_file_comes_back_bit_for_bit(tiles: int, groups: int, seed: int) -> None:
    weight, _ = draw(seed, 16 * tiles, groups)
    ordered = kernel_order(weight)
    assert ordered.nbytes == weight.nbytes and not torch.equal(ordered, weight.flatten(1))
    assert torch.equal(file_order(ordered, groups), weight)


def test_an_order_of_larger_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = draw(0, 2 * BLOCK, 1)

    def halves_swapped(values: Tensor) -> Tensor:
        half = len(values) // 2
        values = torch.cat([values[half:], values[:half]])
        return (values[:, ::2] | values[:, 1::2] << 4).to(torch.uint8)

    monkeypatch.setattr("spectrim.formats.int4_kernel._reordered", halves_swapped)
    with pytest.raises(ModelError, match=r"\(128, 32\) cannot be brought back .* load the model in float32"):
        file_order(kernel_order(weight), 1)


@pytest.mark.parametrize(
    ("out", "group", "dtype"),
    [(OUT, GROUP, torch.float32), (OUT, GROUP, torch.float16), (40, GROUP, torch.bfloat16), (OUT, 48, torch.bfloat16)],
)
def test_what_does_not_suit_the_kernel_is_expanded(out: int, group: int, dtype: torch.dtype) -> None:
    weight, _ = draw(0, out, 2, group)
    assert not suits(weight, dtype) and suits(draw(0, OUT, 2)[0], torch.bfloat16)


def test_the_module_is_the_same_in_memory_and_in_a_file_whatever_its_order() -> None:
    module, exact = linear(torch.bfloat16)
    plain, _ = linear(torch.float32)
    assert module.reordered and not plain.reordered
    assert module.weight.nbytes == plain.weight.nbytes and module.weight.shape != plain.weight.shape
    for other in (module, copy.deepcopy(module), _through_pickle(module)):
        assert torch.equal(other.state_dict()["weight"], plain.weight)
        torch.testing.assert_close(other.dense_weight(), exact.float())
        x = torch.randn(2, IN, generator=torch.Generator().manual_seed(0)).bfloat16()
        torch.testing.assert_close(other(x).double(), x.double() @ exact.mT, rtol=2e-2, atol=2e-2)
        assert other.reordered
    assert not module.float().reordered and torch.equal(module.weight, plain.weight)
    x = torch.randn(2, IN)
    torch.testing.assert_close(module(x), plain(x))
    assert module.to(torch.bfloat16).reordered


def _through_pickle(module: QuantizedLinear) -> QuantizedLinear:
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    other: QuantizedLinear = torch.load(stream, weights_only=False)
    return other


def test_inputs_of_another_dtype_and_gradients_go_round_the_kernel() -> None:
    module, exact = linear(torch.bfloat16)
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x).double(), x.double() @ exact.mT, rtol=1e-4, atol=1e-4)
    leaf = x.bfloat16().requires_grad_()
    module(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, exact.sum(0).expand(2, -1).bfloat16(), rtol=2e-2, atol=2e-2)
    assert module.reordered


def test_state_is_loaded_over_a_reordered_weight() -> None:
    module, _ = linear(torch.bfloat16)
    weight, scale = draw(8, OUT, IN // GROUP)
    module.load_state_dict({"weight": weight, "weight_scale": scale})
    assert module.reordered and torch.equal(module.state_dict()["weight"], weight)
    torch.testing.assert_close(module.dense_weight(), expanded(weight, scale).float())


@pytest.mark.parametrize("format", ["dense_int4", "int4_residual"])
def test_a_checkpoint_in_bfloat16_is_packed_and_saved_as_it_was(format: str, tmp_path: Path) -> None:
    build(prepare("llama", tmp_path / "dense"), tmp_path / "made", format)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    modules = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {module.reordered for module in modules} == {True, False}
    assert all(module.reordered == (module.in_features % GROUP == 0) for module in modules)  # else one group a row
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / at / "model.safetensors") for at in ("made", "again"))
    packed = [name for name, tensor in first.items() if tensor.dtype == torch.uint8]
    assert packed and all(torch.equal(first[name], second[name]) for name in packed)
    ids = torch.arange(2, 22).reshape(1, 20)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    with torch.inference_mode():
        found, expected = model(ids).logits.float(), wide(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 3e-2


def test_the_order_is_known_by_the_tensor_and_not_by_the_module() -> None:
    """Whoever carries a weight somewhere else, as accelerate does, cannot make it compute wrong numbers."""
    module, exact = linear(torch.bfloat16)
    plain, _ = linear(None)
    plain.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(2))
    for inputs in (x, x.bfloat16()):
        expected = (inputs.double() @ exact.mT).to(inputs.dtype)
        torch.testing.assert_close(plain(inputs), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="shape"):
        set_module_tensor_to_device(module, "weight", "cpu", value=linear(None)[0].weight.data)


def test_an_offloaded_model_keeps_the_order_of_its_files(tmp_path: Path) -> None:
    build(prepare("llama", tmp_path / "dense"), tmp_path / "made", "dense_int4")
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    devices |= {f"model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
    arguments = {"dtype": torch.bfloat16, "device_map": devices, "offload_folder": str(tmp_path / "offloaded")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", **arguments)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    ids = torch.arange(2, 22).reshape(1, 20)
    with torch.inference_mode():
        found, expected = model(ids).logits, plain(ids).logits
    torch.testing.assert_close(found.float(), expected.float(), rtol=5e-2, atol=5e-2)


def test_the_kernel_is_part_of_one_graph() -> None:
    module, _ = linear(torch.bfloat16)
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(4)).bfloat16()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_of_vllm_keeps_them_in_the_order_of_its_dtype(dtype: torch.dtype) -> None:
    weight, scale = draw(3, OUT, IN // GROUP)
    layer = FusedLinear({"up_proj": Matrix("dense_int4", OUT)}, IN, [OUT], torch.float16, dtype)
    for suffix, tensor in {"weight": weight, "weight_scale": scale}.items():
        layer.load(suffix, torch.empty(0), tensor)
    layer.lay_out()
    assert layer.parts[0].reordered == (dtype == torch.bfloat16)
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ expanded(weight, scale).mT
    torch.testing.assert_close(layer(x).double(), exact, atol=0.02, rtol=0.02)
