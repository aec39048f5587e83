"""One first product for linears of one input computes what each computes by itself, whatever is done to them."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spectrim.evaluation.speed import weight_bytes
from spectrim.formats.lowrank_linear import LowRankLinear
from spectrim.formats.shared_input import SharedInput, share
from spectrim.maths.budget import Format
from spectrim.models.modules import same_input
from tests.checkpoints import Folders, build_all, logits, packed_weight, stored_linear

SHARED: list[Format] = ["float16", "pifa", "int8", "pifa_int8"]


class Attention(nn.Module):
    """Three linears of one input, and one of another."""

    def __init__(self, format: Format) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, rows in {"q_proj": 48, "k_proj": 24, "v_proj": 24, "o_proj": 32}.items():
            weight = torch.randn(rows, 32, generator=generator)
            setattr(self, name, stored_linear(packed_weight(weight, format).tensors, format, (rows, 32)))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(x + 1)]


def pair(format: Format) -> tuple[Attention, Attention]:
    """The same modules, by themselves and sharing."""
    alone, sharing = Attention(format), Attention(format)
    share(same_input(sharing))
    assert isinstance(sharing.k_proj.shared, SharedInput) and sharing.o_proj.shared is None
    return alone, sharing


def compare(alone: nn.Module, sharing: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.5}
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
            torch.testing.assert_close(sharing(x), alone(x), **tolerance)


@pytest.mark.parametrize("format", SHARED)
def test_computes_what_each_computes_by_itself(format: Format) -> None:
    alone, sharing = pair(format)
    compare(alone, sharing)
    assert weight_bytes(sharing) == weight_bytes(alone)
    assert sharing.q_proj.weight.data_ptr() == sharing.q_proj.shared.weight.data_ptr()
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), sharing.parameters(), strict=True))


@pytest.mark.parametrize("format", SHARED)
def test_replaced_weights_are_seen(format: Format) -> None:
    alone, sharing = pair(format)
    compare(alone, sharing)
    for assign in (True, False):
        other = {name: tensor.flip(0) if "scale" in name else tensor for name, tensor in alone.state_dict().items()}
        other = {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in other.items()}
        for module in (alone, sharing):
            module.load_state_dict({name: tensor.clone() for name, tensor in other.items()}, assign=assign)
        compare(alone, sharing)
    compare(alone.to(torch.bfloat16), sharing.to(torch.bfloat16), torch.bfloat16)


def test_an_input_that_only_some_read_and_a_new_one_at_the_same_place() -> None:
    alone, sharing = pair("float16")
    with torch.no_grad():
        for seed in range(5):
            x = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(sharing.q_proj(x), alone.q_proj(x))
            del x
        y = torch.randn(1, 32)
        torch.testing.assert_close(sharing.k_proj(y), alone.k_proj(y))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_changed_in_place_is_a_new_one(mode: Any) -> None:
    alone, sharing = pair("float16")
    with mode():
        x = torch.randn(1, 32)
        for _ in range(3):
            torch.testing.assert_close(sharing.q_proj(x), alone.q_proj(x))
            x.add_(1)
    with torch.no_grad():
        x = torch.randn(1, 32)
        torch.testing.assert_close(sharing.q_proj(x), alone.q_proj(x))
        x.add_(1)
        torch.testing.assert_close(sharing.k_proj(x), alone.k_proj(x))


def test_copies_are_of_their_own() -> None:
    alone, sharing = pair("pifa")
    compare(alone, sharing)
    for copied in (copy.deepcopy(sharing), pickle.loads(pickle.dumps(sharing))):
        with torch.no_grad():
            copied.q_proj.weight.zero_()
        compare(alone, sharing)
        with torch.no_grad():
            assert not copied.q_proj(torch.ones(1, 32)).any()


def test_gradients_are_those_of_each_by_itself() -> None:
    alone, sharing = pair("float16")
    compare(alone, sharing)
    for module in (alone, sharing):
        sum(y.square().sum() for y in module(torch.ones(2, 32))).backward()
    for one, other in zip(alone.parameters(), sharing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_model_that_was_asked_in_inference_mode_is_trained_after_it() -> None:
    alone, sharing = pair("float16")
    for module in (alone, sharing):
        with torch.inference_mode():
            module(torch.ones(2, 32))
        sum(y.square().sum() for y in module(torch.ones(2, 32))).backward()
    for one, other in zip(alone.parameters(), sharing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_members_on_several_devices_multiply_by_themselves_and_hold_nothing_together() -> None:
    alone, sharing = pair("int8")
    compare(alone, sharing)
    shared = sharing.q_proj.shared
    assert isinstance(shared, SharedInput) and shared.weight is not None
    key = sharing.k_proj.weight
    sharing.k_proj.weight = nn.Parameter(key.to("meta"), requires_grad=False)
    with torch.no_grad():
        x = torch.randn(1, 32)
        for name in ("q_proj", "v_proj"):
            torch.testing.assert_close(getattr(sharing, name)(x), getattr(alone, name)(x))
    assert shared.weight is None and shared.scale is None
    sharing.k_proj.weight = key
    compare(alone, sharing)
    assert shared.weight is not None


def test_threads_do_not_see_one_another() -> None:
    alone, sharing = pair("int8")
    compare(alone, sharing)  # together before the threads start
    wrong: list[int] = []

    def work(seed: int) -> None:
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = alone(x)
            for _ in range(50):
                if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(sharing(x), expected, strict=True)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return build_all(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("format", SHARED)
def test_a_loaded_model_shares_and_computes_the_same(family: str, format: Format, folders: Folders) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[family, format])
    linears = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert sum(module.shared is not None for module in linears) >= len(linears) // 2
    found = logits(model)
    for module in linears:
        module.shared = None
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)
