"""The experts of a mixture as linears of their own, where a model keeps all of them in one three-dimensional parameter.

    y_t = Σ_e p_te · down_e(gate(up_e(x_t)))          over the experts e that token t is routed to

transformers multiplies with ``gate_up_proj`` (experts, 2 · width, hidden) and ``down_proj`` (experts, hidden, width),
some architectures with both transposed, some with biases beside them. Here every expert has two ``nn.Linear``, named
``gate_up_proj.0``, ``down_proj.0`` and so on: what is known of linears then holds for experts, too. What stands between
the two products is the architecture's own.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Slice(NamedTuple):
    """Where a linear's tensor lies: in tensor ``name`` of the original, at ``expert`` where that is of many."""

    name: str
    expert: int | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The linear's tensor, cut out of the original's."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part.mT if self.transposed else part

    def read(self, handle: Any) -> Tensor:
        """The linear's tensor out of an open safetensors file, of which nothing else is read."""
        if self.expert is None:
            return self.of(handle.get_tensor(self.name)).contiguous()
        part = handle.get_slice(self.name)[self.expert]
        return (part.mT if self.transposed else part).clone(memory_format=torch.contiguous_format)


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds the experts of a mixture in the layout that transformers' own kernels multiply with."""
    layout = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    return all(hasattr(module, name) for name in layout) and not getattr(module, "has_post_expert_norm", False)


class ExpertLinears(nn.Module):
    """Stands in for a module of experts, whose parameters it takes over.

    Args:
        experts: as ``is_experts`` has it, on any device; its parameters are gone afterwards.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        source: Any = experts
        self.first = "gate_up_proj" if source.has_gate else "up_proj"
        self.transposed, self.has_bias = bool(source.is_transposed), bool(source.has_bias)
        for name in (self.first, "down_proj"):
            bias = getattr(source, f"{name}_bias") if self.has_bias else None
            setattr(self, name, nn.ModuleList(self._linears(getattr(source, name), bias)))
            for suffix in ("", "_bias") if self.has_bias else ("",):
                delattr(source, f"{name}{suffix}")
        self._original: tuple[Any] = (
            experts,
        )  # its activation, its limits and its way to gate; no submodule, for it is empty

    def __len__(self) -> int:
        """The number of experts."""
        return len(self._lists()[1])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden), with the experts of each token and their weights (tokens, k) -> (tokens, hidden)."""
        source, found = self._original[0], torch.zeros_like(hidden_states)
        first, down = self._lists()
        for index in top_k_index.unique().tolist():
            if not 0 <= index < len(down):  # what pads a token's experts
                continue
            tokens, places = torch.where(top_k_index == index)
            inner = first[index](hidden_states[tokens])
            inner = source._apply_gate(inner) if source.has_gate else source.act_fn(inner)
            weighted = down[index](inner) * top_k_weights[tokens, places, None]
            found.index_add_(0, tokens, weighted.to(found.dtype))
        return found

    def slices(self, prefix: str) -> Iterator[tuple[str, Slice]]:
        """Tensor name below ``prefix`` -> where the original module, whose name ``prefix`` is, has it."""
        for name in (self.first, "down_proj"):
            for index in range(len(self)):
                yield f"{prefix}.{name}.{index}.weight", Slice(f"{prefix}.{name}", index, self.transposed)
                if self.has_bias:
                    yield f"{prefix}.{name}.{index}.bias", Slice(f"{prefix}.{name}_bias", index)

    def joined_in(self, original: Any) -> nn.Module:
        """``original``, a module as this one was made of, with all its parameters put together from the linears."""
        for name in (self.first, "down_proj"):
            linears: Any = self.get_submodule(name)
            weights = torch.stack([linear.weight.detach() for linear in linears])
            setattr(original, name, nn.Parameter(weights.mT.contiguous() if self.transposed else weights))
            if self.has_bias:
                biases = torch.stack([linear.bias.detach() for linear in linears])
                setattr(original, f"{name}_bias", nn.Parameter(biases))
        joined: nn.Module = original.train(self.training)
        return joined

    def _lists(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        first, down = self.get_submodule(self.first), self.get_submodule("down_proj")
        assert isinstance(first, nn.ModuleList) and isinstance(down, nn.ModuleList)
        return first, down

    def _linears(self, weights: Tensor, biases: Tensor | None) -> Iterator[nn.Linear]:
        for index, weight in enumerate(weights.detach()):
            matrix = (weight.mT if self.transposed else weight).clone(memory_format=torch.contiguous_format)
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], biases is not None, device="meta", dtype=matrix.dtype)
            linear.weight = nn.Parameter(matrix, requires_grad=weights.requires_grad)
            if biases is not None:
                linear.bias = nn.Parameter(biases.detach()[index].clone(), requires_grad=biases.requires_grad)
            yield linear


def expert_groups(block: nn.Module, prefix: str) -> list[list[str]]:
    """The linears of all experts of one kind in ``block``, whose name is ``prefix``: a list of names for each kind."""
    return [
        [f"{prefix}.{name}.{kind}.{index}" for index in range(len(module))]
        for name, module in block.named_modules()
        if isinstance(module, ExpertLinears)
        for kind in (module.first, "down_proj")
    ]
