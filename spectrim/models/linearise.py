"""Every matrix of a model as a plain ``nn.Linear``, whatever the architecture keeps it in.

    transformers.pytorch_utils.Conv1D      x W + b, W (in, out): the same with W transposed
    a subclass of nn.Linear                the same, where its forward is that of nn.Linear (asked, on random numbers)
    experts in 3-D parameters              see experts.py

The rest of Spectrim knows ``nn.Linear`` alone. What a linear's tensors are in the files of the original model is said
by a ``Slice`` each, so that blocks can still be read one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from spectrim.models.experts import Slice, as_linears
from spectrim.models.modules import compressible_linears

if TYPE_CHECKING:  # loading.py imports this file while transformers itself is being imported
    from transformers import PreTrainedModel


def linearise(model: nn.Module) -> dict[str, Slice]:
    """Put linears in the place of all of the above, in place; returns tensor name -> where the original has it.

    A tensor that is not listed has its name in the original.
    """
    found: dict[str, Slice] = {}
    for name, module in list(model.named_modules()):
        if made := as_linears(module):
            experts = made(module)
            model.set_submodule(name, experts)
            found |= dict(experts.slices(name))
        elif _is_conv1d(module):
            model.set_submodule(name, _linear(module.weight.mT, module.bias))
            found[f"{name}.weight"] = Slice(f"{name}.weight", transposed=True)
        elif _is_subclass(module):
            model.set_submodule(name, _linear(module.weight, module.bias))
    return found


def restore(model: PreTrainedModel) -> None:
    """Undo ``linearise`` in place: every module of the original's kind again, around the weights of its linears."""
    twin = _on_meta(model)
    for name, original in list(twin.named_modules()):
        if as_linears(original):
            experts: Any = model.get_submodule(name)
            model.set_submodule(name, experts.joined_in(original))
        elif _is_conv1d(original):
            linear: Any = model.get_submodule(name)
            conv: Any = original
            conv.weight = nn.Parameter(linear.weight.detach().mT.contiguous(), linear.weight.requires_grad)
            conv.bias = linear.bias
            model.set_submodule(name, conv.train(linear.training))


def matrices_of(model: PreTrainedModel) -> dict[str, Slice]:
    """Every compressible linear that ``linearise`` would make -> where ``model``, left as it is, has its weight.

    Raises:
        ModelError: there is none.
    """
    twin = _on_meta(model)
    found = linearise(twin)
    weights = {name: f"{name}.weight" for name in compressible_linears(twin)}
    return {name: found.get(weight, Slice(weight)) for name, weight in weights.items()}


def sources_of(folder: Path) -> dict[str, Slice]:
    """``linearise`` of the model that a folder's config.json describes, without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return linearise(_empty(AutoModelForCausalLM.from_config, config))


def read_linearised(entries: Mapping[str, Path], sources: Mapping[str, Slice]) -> dict[str, Tensor]:
    """Every tensor of a model whose matrices are linears, from the files of the original.

    Args:
        entries: tensor name in the original -> its safetensors file.
        sources: of ``linearise``.
    """
    of_linears = {name: source for name, source in sources.items() if source.name in entries}
    replaced = {source.name for source in of_linears.values()}
    wanted = {name: Slice(name) for name in entries if name not in replaced} | of_linears
    found: dict[str, Tensor] = {}
    for file in sorted(set(entries.values())):
        with safe_open(file, framework="pt") as handle:
            found |= {name: part.read(handle) for name, part in wanted.items() if entries[part.name] == file}
    return found


@cache
def behaves_as_linear(kind: Any) -> bool:
    """Whether ``kind``, a subclass of ``nn.Linear``, computes x Wᵀ + b and nothing else."""
    module = kind.__new__(kind)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        nn.Linear.__init__(module, 5, 3)
        x = torch.randn(2, 4, 5)
    try:
        y = module(x)
    except Exception:  # its forward needs what its own __init__ would have made
        return False
    expected = functional.linear(x, module.weight, module.bias)
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)


def _on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The model as its class makes it, without weights."""
    config = deepcopy(model.config)
    config.dtype = model.dtype  # saving makes it a string, which not every architecture can be built with
    return _empty(type(model), config)


def _empty(make: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    from accelerate import init_empty_weights

    with init_empty_weights():
        return make(config)


def _is_subclass(module: nn.Module) -> bool:
    kind: Any = type(module)
    return kind is not nn.Linear and issubclass(kind, nn.Linear) and behaves_as_linear(kind)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    linear.register_parameter("bias", bias)
    return linear
