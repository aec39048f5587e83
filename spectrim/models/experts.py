"""The experts of a mixture as linears of their own, where a model keeps all of them in one three-dimensional parameter.

    y_t = Σ_e p_te · down_e(gate(up_e(x_t)))          over the experts e that token t is routed to

transformers multiplies with ``gate_up_proj`` (experts, 2 · width, hidden) and ``down_proj`` (experts, hidden, width),
some architectures with both transposed, some with biases beside them. Here every expert has two ``nn.Linear``, named
``gate_up_proj.0``, ``down_proj.0`` and so on: what is known of linears then holds for experts, too. What stands between
the two products is the architecture's own. Architectures with a layout of their own have a class of their own.
"""

from collections.abc import Callable, Iterator, Mapping
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


class ExpertLinears(nn.Module):
    """Stands in for a module of experts, whose parameters it takes over; see its subclasses.

    Args:
        experts: on any device; its parameters are gone afterwards.
        kinds: the lists of linears to be made -> the parameter (experts, ., .) each is made of.
        transposed: whether that has (in, out) of every expert.
        has_bias: whether there is a parameter of biases beside each.
    """

    def __init__(self, experts: nn.Module, kinds: Mapping[str, str], transposed: bool, has_bias: bool = False) -> None:
        super().__init__()
        self.kinds, self.transposed, self.has_bias = dict(kinds), transposed, has_bias
        for kind, name in self.kinds.items():
            bias = getattr(experts, f"{name}_bias") if has_bias else None
            setattr(self, kind, nn.ModuleList(self._linears(getattr(experts, name), bias)))
            for suffix in ("", "_bias") if has_bias else ("",):
                delattr(experts, f"{name}{suffix}")
        # its activation, its limits and its way to gate; no submodule, for it is empty
        self._original: tuple[Any] = (experts,)

    def __len__(self) -> int:
        """The number of experts."""
        return len(self.linears(next(iter(self.kinds))))

    def linears(self, kind: str) -> nn.ModuleList:
        """Those of all experts, of one of ``kinds``."""
        found = self.get_submodule(kind)
        assert isinstance(found, nn.ModuleList)
        return found

    def slices(self, prefix: str) -> Iterator[tuple[str, Slice]]:
        """Tensor name below ``prefix`` -> where the original module, whose name ``prefix`` is, has it."""
        for kind, name in self.kinds.items():
            for index in range(len(self)):
                yield f"{prefix}.{kind}.{index}.weight", Slice(f"{prefix}.{name}", index, self.transposed)
                if self.has_bias:
                    yield f"{prefix}.{kind}.{index}.bias", Slice(f"{prefix}.{name}_bias", index)

    def joined_in(self, original: Any) -> nn.Module:
        """``original``, a module as this one was made of, with all its parameters put together from the linears."""
        for kind, name in self.kinds.items():
            linears: Any = self.linears(kind)
            weights = torch.stack([linear.weight.detach() for linear in linears])
            setattr(original, name, nn.Parameter(weights.mT.contiguous() if self.transposed else weights))
            if self.has_bias:
                biases = torch.stack([linear.bias.detach() for linear in linears])
                setattr(original, f"{name}_bias", nn.Parameter(biases))
        joined: nn.Module = original.train(self.training)
        return joined

    def _linears(self, weights: Tensor, biases: Tensor | None) -> Iterator[nn.Linear]:
        for index, weight in enumerate(weights.detach()):
            matrix = (weight.mT if self.transposed else weight).clone(memory_format=torch.contiguous_format)
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], biases is not None, device="meta", dtype=matrix.dtype)
            linear.weight = nn.Parameter(matrix, requires_grad=weights.requires_grad)
            if biases is not None:
                linear.bias = nn.Parameter(biases.detach()[index].clone(), requires_grad=biases.requires_grad)
            yield linear


class RoutedExperts(ExpertLinears):
    """In the layout that transformers' own kernels multiply with: tokens come with the experts they are routed to."""

    def __init__(self, experts: nn.Module) -> None:
        source: Any = experts
        self.first = "gate_up_proj" if source.has_gate else "up_proj"
        kinds = {name: name for name in (self.first, "down_proj")}
        super().__init__(experts, kinds, bool(source.is_transposed), bool(source.has_bias))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden), with the experts of each token and their weights (tokens, k) -> (tokens, hidden)."""
        source, found = self._original[0], torch.zeros_like(hidden_states)
        first, down = self.linears(self.first), self.linears("down_proj")
        for index in top_k_index.unique().tolist():
            if not 0 <= index < len(down):  # what pads a token's experts
                continue
            tokens, places = torch.where(top_k_index == index)
            inner = first[index](hidden_states[tokens])
            inner = source._apply_gate(inner) if source.has_gate else source.act_fn(inner)
            weighted = down[index](inner) * top_k_weights[tokens, places, None]
            found.index_add_(0, tokens, weighted.to(found.dtype))
        return found


class RepeatedExperts(ExpertLinears):
    """Llama 4: all tokens come once for each expert, as zeros where they are not routed to it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__(experts, {name: name for name in ("gate_up_proj", "down_proj")}, transposed=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(experts · tokens, hidden) -> the same."""
        found = []
        lists = (self.linears("gate_up_proj"), self.linears("down_proj"), hidden_states.chunk(len(self)))
        for first, down, entering in zip(*lists, strict=True):
            tokens = entering.detach().any(-1).nonzero()[:, 0]  # of zeros the linears would make zeros
            gate, up = first(entering[tokens]).chunk(2, dim=-1)
            leaving = down(up * self._original[0].act_fn(gate))
            found.append(torch.zeros_like(entering).index_add(0, tokens, leaving))
        return torch.cat(found)


class SortedExperts(ExpertLinears):
    """JetMoE: one matrix of every expert; tokens come sorted by their expert."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__(experts, {"experts": "weight"}, transposed=False)

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """(tokens, in), of which each expert takes its number -> (tokens, out)."""
        parts = zip(self.linears("experts"), inputs.split(expert_size), strict=True)
        return torch.cat(
            [linear(part) if len(part) else part.new_zeros(0, linear.out_features) for linear, part in parts]
        )


OF_ONE_ARCHITECTURE = {"Llama4TextExperts": RepeatedExperts, "JetMoeParallelExperts": SortedExperts}
"""By the name of the original's class."""


def as_linears(experts: nn.Module) -> Callable[[nn.Module], ExpertLinears] | None:
    """What makes linears of the module ``experts``; None where it holds no experts in a layout that is known."""
    layout = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    if all(hasattr(experts, name) for name in layout) and not getattr(experts, "has_post_expert_norm", False):
        return RoutedExperts
    return OF_ONE_ARCHITECTURE.get(type(experts).__name__)


def expert_groups(block: nn.Module, prefix: str) -> list[list[str]]:
    """The linears of all experts of one kind in ``block``, whose name is ``prefix``: a list of names for each kind."""
    return [
        [f"{prefix}.{name}.{kind}.{index}" for index in range(len(module))]
        for name, module in block.named_modules()
        if isinstance(module, ExpertLinears)
        for kind in module.kinds
    ]
