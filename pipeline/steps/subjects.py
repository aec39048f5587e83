"""The dense model and its quantizations, as `baseline` measures them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.steps.factor_files import read_rounded
from pipeline.steps.measure import Subject
from pipeline.steps.model_folders import load_model
from spectrim.maths.quantization import Quantized

if TYPE_CHECKING:
    import torch

N_BITS = {"int8": 8, "int4": 4}


def dense_subject(prepared: Path, device: "torch.device") -> Subject:
    """The model of `prepare` as it is."""
    return Subject(load_model(prepared, device))


def quantized_subject(
    prepared: Path, name: str, group_size: int | None, exclude: list[str], device: "torch.device"
) -> Subject:
    """The model of `prepare` with every compressible linear quantized, and what those take.

    Args:
        name: int8 or int4, rounded to nearest; or one of ``library_baselines.KINDS``.
        group_size: inputs that share a scale; None: all inputs of an output channel.
        exclude: shell patterns of linears left alone.
    """
    model = load_model(prepared, device)
    if name not in N_BITS:
        from spectrim.evaluation.library_baselines import quantize_by_library_  # needs an extra

        return Subject(model, quantize_by_library_(model, name, exclude=exclude))
    from spectrim.evaluation.perplexity import quantize_model_

    return Subject(model, quantize_model_(model, N_BITS[name], group_size=group_size, exclude=exclude))


def rounded_subject(
    prepared: Path, files: Sequence[Path], n_bits: int, exclude: list[str], device: "torch.device"
) -> Subject:
    """The model of `prepare` with the rounded weights in ``files``, one per block, and what those take."""
    from spectrim.evaluation.perplexity import store_quantized_

    read = {name: weight for file in files for name, (weight, _) in read_rounded(file).items()}
    rounded = {name: weight for name, weight in read.items() if isinstance(weight, Quantized)}
    model = load_model(prepared, device)
    return Subject(model, store_quantized_(model, rounded, n_bits, exclude))
