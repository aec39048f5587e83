"""The structure of a model: where its blocks are, which of their linears are compressed, and how one is replaced.

This is the only file that walks or changes a model's module tree. A `layer` is one decoder block; a linear's name is
its full module path, such as ``model.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from spectrim.errors import ModelError
from spectrim.models.experts import ExpertLinears

if TYPE_CHECKING:  # spectrim/__init__.py loads this file while transformers itself is being imported
    from transformers import PreTrainedModel


UNREACHED = "spectrim_unreached"
"""Where the configuration of a prepared model lists linears that no gradient reaches, see compression/probe.py."""

WHOLE = "spectrim_whole"
"""Where it says why the model cannot be walked block by block, if it cannot."""


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's decoder blocks, such as ``("model.layers", ModuleList)``.

    It is the one outermost ModuleList with as many entries as ``config.num_hidden_layers``, so it holds for every
    decoder-only architecture whose blocks stand in one list.

    Raises:
        ModelError: no list, or more than one, has that many entries.
    """
    n_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not inside:
            found[name] = module
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__}: {len(found)} lists of {n_layers} blocks (config.num_hidden_layers) found"
            f"{': ' if found else ''}{', '.join(found)}; exactly one is required. Use a decoder-only language model "
            "such as Llama, OPT or Qwen2."
        )
    return next(iter(found.items()))


def linears_by_block(model: PreTrainedModel, exclude: Iterable[str] = ()) -> dict[str, dict[str, nn.Linear]]:
    """The compressible linears of every decoder block: block name -> linear name -> linear, in the model's order.

    A linear is compressible when it is an ``nn.Linear`` inside a decoder block, its name matches none of the shell
    patterns in ``exclude``, it is no gate, for what chooses among experts, or weighs a shared one, is small and decides
    much, and ``config.json`` does not name it as UNREACHED. A block whose linears are all excluded is present with an
    empty dictionary.

    Raises:
        ModelError: nothing is left to compress, or a pattern matches no linear.
    """
    patterns = list(exclude)
    prefix, blocks = decoder_blocks(model)
    every: dict[str, dict[str, nn.Linear]] = {}
    for index, block in enumerate(blocks):
        layer = f"{prefix}.{index}"
        dense = {f"{layer}.{name}" for name in gates_of(block)}.union(getattr(model.config, UNREACHED, ()))
        parts = {f"{layer}.{name}": part for name, part in block.named_modules() if type(part) is nn.Linear}
        every[layer] = {name: part for name, part in parts.items() if name not in dense}
    matched = {name: [p for p in patterns if fnmatchcase(name, p)] for linears in every.values() for name in linears}
    _check_selection(f"{prefix} of {type(model).__name__}", patterns, matched)
    return {
        layer: {name: linear for name, linear in linears.items() if not matched[name]}
        for layer, linears in every.items()
    }


def gates_of(block: nn.Module) -> set[str]:
    """Linears of ``block`` beside experts that have an output for each of them, or one output: their names."""
    found = set()
    for name, module in block.named_modules():
        if not isinstance(module, ExpertLinears):
            continue
        parent, _, _ = name.rpartition(".")
        holder = block.get_submodule(parent)
        for other, part in holder.named_modules():
            inside = other.startswith(f"{name.removeprefix(parent).lstrip('.')}.")
            if isinstance(part, nn.Linear) and not inside and part.out_features in (1, len(module)):
                found.add(f"{parent}.{other}" if parent else other)
    return found


def _check_selection(place: str, patterns: list[str], matched: dict[str, list[str]]) -> None:
    """Raise ModelError unless some linear is matched by no pattern, and every pattern matches some linear."""
    if not matched:
        raise ModelError(f"{place}: no nn.Linear to compress; use a model whose blocks are built of them")
    used = {pattern for found in matched.values() for pattern in found}
    if idle := [pattern for pattern in patterns if pattern not in used]:
        raise ModelError(
            f"compression.exclude: {', '.join(map(repr, idle))} matches none of the {len(matched)} nn.Linear in {place}"
            f"; correct or remove it. The first of them is {next(iter(matched))}"
        )
    if all(matched.values()):
        raise ModelError(
            f"compression.exclude: {patterns} matches all {len(matched)} nn.Linear in {place}; leave at least one"
        )


def compressible_linears(model: PreTrainedModel, exclude: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """``linears_by_block`` without the blocks: linear name -> linear, in the model's order."""
    return {name: linear for linears in linears_by_block(model, exclude).values() for name, linear in linears.items()}


def block_vectors(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Norms, biases and every other parameter of one dimension inside the decoder blocks: name -> parameter."""
    prefix = f"{decoder_blocks(model)[0]}."
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and parameter.dim() == 1 and parameter.is_floating_point()
    }


SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling modules that are called with the same input, in that order."""


def same_input(model: nn.Module) -> list[list[nn.Module]]:
    """The groups of modules under one parent that are called with the same input, one after the other."""
    found = []
    for parent in model.modules():
        children = dict(parent.named_children())
        found += [[children[name] for name in names] for names in SAME_INPUT if children.keys() >= set(names)]
    return found


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name`` of ``model``.

    Raises:
        ModelError: ``model`` has no submodule of that name.
    """
    try:
        model.set_submodule(name, module, strict=True)
    except (AttributeError, ValueError):
        raise ModelError(f"{name}: {type(model).__name__} has no module of that name; it cannot be replaced") from None
