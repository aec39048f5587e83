"""A coded linear multiplies with the weight that its code holds, wherever it goes."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from spectrim.formats.coded_linear import CodedLinear
from spectrim.formats.packing import pack_coded
from spectrim.maths.two_sided_rounding import Stepped


def stepped(out: int = 20, in_: int = 24) -> Stepped:
    """Integers of which a few do not fit a byte."""
    draw = torch.Generator().manual_seed(0)
    values = (torch.randn(out, in_, generator=draw) * 9).round().int()
    values[3, 5], values[3, 6], values[-1, -1] = 1000, -128, 20_000
    steps = [torch.rand(size, generator=draw).add(0.1).half() / 9 for size in (out, in_)]
    return Stepped(values, *steps)


def linear(weight: Stepped, bias: Tensor | None = None) -> CodedLinear:
    return CodedLinear.from_tensors(pack_coded(weight).tensors, "coded", *weight.values.shape, bias)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rows", [(), (1,), (3, 40)])
def test_it_is_the_product_with_the_dense_weight(dtype: torch.dtype, allowed: float, rows: tuple[int, ...]) -> None:
    weight, bias = stepped(), torch.randn(20)
    module = linear(weight, bias).to(dtype)
    dense = weight.dense(torch.float64)
    torch.testing.assert_close(module.dense_weight().double(), dense, rtol=1e-6, atol=0)
    x = torch.randn(*rows, 24).to(dtype)
    expected = x.double() @ dense.T + bias.to(dtype).double()
    assert module(x).dtype == dtype and module(x).shape == (*rows, 20)
    assert (module(x).double() - expected).abs().max() < allowed * expected.abs().max()
    x = x.float().requires_grad_()
    module.float()(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).float().expand(x.shape), rtol=1e-4, atol=1e-3)


def test_a_byte_a_number_in_memory_and_the_code_in_every_file() -> None:
    tensors = pack_coded(stepped()).tensors
    module = linear(stepped())
    assert module.weight.dtype == torch.int8 and module.weight.shape == (20, 24)
    assert (len(module.places), len(module.beyond)) == (3, 3)
    state = module.state_dict()
    assert set(state) == set(tensors) and all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_copies_casts_and_loads_keep_the_integers() -> None:
    module, x = linear(stepped()), torch.randn(2, 24)
    expected = module(x)
    other = linear(Stepped(stepped().values // 2, *stepped()[1:]))
    assert not torch.equal(other(x), expected)
    other.load_state_dict(module.state_dict())
    again = linear(stepped())
    again.load_state_dict(module.state_dict(), assign=True)
    for one in (other, again, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half().float()):
        assert torch.equal(one(x), expected)
        assert (one.weight_scale.dtype, one.input_scale.dtype) == (torch.float16, torch.float16)


def test_a_module_whose_tensors_come_for_the_call_decodes_in_it() -> None:
    tensors = pack_coded(stepped()).tensors
    module = CodedLinear(24, 20, 20, "coded", False, device="meta")
    module.lay_out()
    module.load_state_dict(dict(tensors), assign=True)
    late = linear(stepped())
    late.weight = torch.nn.Parameter(tensors["weight"], requires_grad=False)
    x = torch.randn(2, 24)
    assert not late.decoded and torch.equal(late(x), module(x)) and not late.decoded
