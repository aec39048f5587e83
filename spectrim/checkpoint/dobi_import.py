"""A released Dobi-SVD checkpoint as a Spectrim checkpoint.

    config.json, tokenizer     as usual
    pytorch_model.bin          the state dict without what lies under self_attn. and mlp.
    remapping_weight.pt        linear name -> us_quan (r, n), vt_quan (r, n) uint8, us_absmax, vt_absmax (r,) float16,
                               tuple_info: ("us" | "vt", rest (m − n, r) or (r, m − n) float16), or None where m = n

W ≈ us @ vt, m >= n the sides of W: a number is table[code] · absmax of its direction, table the 256 numbers of the
dynamic 8-bit type below. The codes are no int8 of ours, so they are expanded and packed anew. Files are read as tensors
only.

Source: Dobi-SVD, Wang et al. 2025, arXiv:2502.02723 (its released code); the 8-bit type: Dettmers et al. 2021,
arXiv:2110.02861.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from spectrim.checkpoint.layout import Matrix
from spectrim.checkpoint.saving import write_checkpoint
from spectrim.errors import CheckpointError
from spectrim.formats.packing import Packed, pack
from spectrim.formats.stored_linear import narrow
from spectrim.maths.budget import Format, dense_bytes, resolve_format
from spectrim.maths.lowrank import Factors

STATE, REMAPPED = "pytorch_model.bin", "remapping_weight.pt"
KEYS = {"us_quan", "vt_quan", "us_absmax", "vt_absmax", "tuple_info"}


def import_dobi(folder: Path, destination: Path, format: Format, max_shard_size: str = "2GB") -> dict[str, Any]:
    """Write the released checkpoint in ``folder`` into ``destination``, its factors in ``format``.

    A matrix whose factors would cost as much as its dense weight is stored dense, as Dobi-SVD's own loader holds it.

    Args:
        destination: an empty or new folder.
        format: one of ``budget.FACTORED``; remap has the size of the release.

    Returns:
        what ``read_bytes`` measures on the written files.

    Raises:
        CheckpointError: a file is missing or holds more than tensors, a matrix is not in the layout above, or the model
            has tensors that the release lacks (it drops biases and norms inside attention and MLP).
    """
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination}: not empty; name a new folder")
    others, remapped = _read(folder / STATE), _read(folder / REMAPPED)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    others = _complete(model, others, remapped, folder)
    shapes: dict[str, tuple[int, int]] = {}
    for name in remapped:
        weight: Any = model.get_submodule(name).weight
        shapes[name] = (weight.shape[0], weight.shape[1])
    matrices, stored = {}, {}
    for name, entry in remapped.items():
        shape = shapes[name]
        factors = expanded(name, entry, shape)
        rank = factors.left.shape[1]
        wanted = resolve_format(format, *shape, rank)
        if wanted == "dense":
            matrices[name] = Matrix("dense", min(shape))
            stored[name] = Packed({"weight": narrow(factors.left @ factors.right, torch.float16)})
        else:
            matrices[name], stored[name] = Matrix(wanted, rank), pack(factors, wanted)
    whole = sum(dense_bytes(*shape) for shape in shapes.values())
    released = sum(tensor.nbytes for entry in remapped.values() for tensor in _tensors(entry))
    return write_checkpoint(
        folder, destination, others, stored, matrices, torch.float16,
        ratio_target=released / whole, provenance={"imported_from": "Dobi-SVD", "format": format},
        max_shard_size=max_shard_size, skip=(STATE, REMAPPED),
    )  # fmt: skip


def expanded(name: str, entry: Any, shape: tuple[int, int]) -> Factors:
    """left (out, r) and right (r, in), float32, of one matrix of the release.

    Raises:
        CheckpointError: the entry is not in the layout of this file's docstring.
    """
    short, out_is_long = min(shape), shape[0] > shape[1]
    if not isinstance(entry, Mapping) or set(entry) != KEYS:
        raise CheckpointError(f"{name}: {REMAPPED} must hold exactly {', '.join(sorted(KEYS))} of every linear")
    rank = len(entry["us_quan"])
    rest = entry["tuple_info"]
    side = None if shape[0] == shape[1] else "us" if out_is_long else "vt"
    wanted: dict[str, tuple[Any, tuple[int, ...], torch.dtype]] = {
        key: (entry[key], (rank, short), torch.uint8) for key in ("us_quan", "vt_quan")
    } | {key: (entry[key], (rank,), torch.float16) for key in ("us_absmax", "vt_absmax")}
    if side is not None:
        long = (max(shape) - short, rank)
        part = rest[1] if isinstance(rest, tuple) and len(rest) == 2 and rest[0] == side else rest
        wanted["tuple_info"] = (part, long if side == "us" else long[::-1], torch.float16)
    for key, (tensor, size, dtype) in wanted.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != size:
            found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)[:60]
            raise CheckpointError(f"{name}.{key}: is {found}; {dtype} {size} of a {shape} weight is required")
    table = dynamic_type()
    us = table[entry["us_quan"].long()].T * entry["us_absmax"].float()
    vt = entry["vt_absmax"].float()[:, None] * table[entry["vt_quan"].long()]
    if side == "us":
        us = torch.cat([us, rest[1].float()])
    elif side == "vt":
        vt = torch.cat([vt, rest[1].float()], dim=1)
    return Factors(us, vt)


def dynamic_type() -> Tensor:
    """The 256 numbers of the signed dynamic 8-bit type, ascending: 0, 1, and ± the middles of 2^i steps of a decade.

    Decade i = 0..6 reaches from 10^(i − 7) to 10^(i − 6) and is cut into 2^i equal steps (Dettmers et al. 2021).
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        numbers += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(numbers))


def _read(file: Path) -> dict[str, Any]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: not found; a folder released by Dobi-SVD is required") from None
    except Exception as error:  # a file made to harm fails in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file}: not a file of tensors alone ({reason}); nothing else is loaded, since it could run code"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}; a dict of tensors is required")
    return found


def _complete(
    model: nn.Module, others: Mapping[str, Any], remapped: Mapping[str, Any], folder: Path
) -> dict[str, Tensor]:
    """The tensors beside the remapped weights, all that the model has; what is tied to another is left out."""
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    expected = model.state_dict()
    wrong = [f"{name} is no linear" for name in sorted(remapped.keys() - linears)]
    needed = expected.keys() - {f"{name}.weight" for name in remapped}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    wrong += [f"{name} is missing" for name in sorted(needed - others.keys() - tied)]
    for name in needed & others.keys():
        shape = tuple(others[name].shape) if isinstance(others[name], Tensor) else None
        if shape != tuple(expected[name].shape):
            wrong.append(f"{name} is {shape}, must be {tuple(expected[name].shape)}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"{folder}: {', '.join(wrong[:8])}{more}; the release does not hold the whole model that config.json names"
        )
    return {name: others[name].contiguous() for name in sorted(needed & others.keys()) if name not in tied}


def _tensors(entry: Mapping[str, Any]) -> list[Tensor]:
    rest = entry["tuple_info"]
    return [*(entry[key] for key in sorted(KEYS - {"tuple_info"})), *([rest[1]] if rest else [])]
