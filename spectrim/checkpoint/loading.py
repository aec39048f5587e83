"""``AutoModelForCausalLM.from_pretrained`` for Spectrim checkpoints: the registration with transformers.

Importing this file registers the format; ``import spectrim`` arranges for that. Every listed linear is replaced by a
``StoredLinear`` on the meta device before transformers reads the weights, after the files' keys, shapes and dtypes
have been compared with the model's: what transformers itself only warns about is an error here. Only heads may differ:
a class that config.json does not name, such as the base model, gets what it has in common with the checkpoint.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from spectrim.checkpoint.layout import HALF, METHOD, Entry, SpectrimConfig, by_module, check_half, check_matrix, headers
from spectrim.errors import CheckpointError, ModelError
from spectrim.formats.coded_linear import CodedLinear
from spectrim.formats.kinds import kind_of
from spectrim.formats.shared_input import share
from spectrim.formats.stored_linear import StoredLinear, narrow
from spectrim.maths.storage_formats import FORMATS
from spectrim.models.linearise import linearise, restore
from spectrim.models.modules import replace, same_input

if TYPE_CHECKING:  # this file is loaded while transformers itself is being imported
    from transformers import PreTrainedModel

register_quantization_config(METHOD)(SpectrimConfig)


@register_quantizer(METHOD)
class SpectrimQuantizer(HfQuantizer):
    """Loads and saves Spectrim checkpoints; transformers calls it, nobody else needs to.

    ``save_pretrained`` stores a model of a 16-bit dtype in that. Of any model it rounds the tensors of the listed
    matrices to the dtypes which they had in the file; of a float32 model it stores any other one in 16 bit exactly when
    that loses nothing. What is offloaded is read for that, all of it at once.
    """

    requires_calibration = True  # a dense model is compressed by the pipeline, not while it loads
    quantization_config: SpectrimConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # 16-bit factors themselves, and adapters beside any format: gradients reach every input

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        module, _, suffix = param_name.rpartition(".")
        coded = model.get_submodule(module)
        if isinstance(coded, CodedLinear) and suffix == "weight":  # a byte a number once it is decoded
            return coded.out_features * coded.in_features / max(param.numel(), 1)
        return float(super().param_element_size(model, param_name, param))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        if model.dtype in HALF.values():  # loaded or cast to it, and all 16-bit tensors of a file are of one dtype
            self.quantization_config.stored_dtype = str(model.dtype).removeprefix("torch.")
            model.config.quantization_config = self.quantization_config
        half = HALF[self.quantization_config.stored_dtype]
        of_matrices = {
            f"{name}.{suffix}": half if dtype is None else getattr(torch, dtype)
            for name, matrix in self.quantization_config.listed.items()
            for suffix, dtype in FORMATS[matrix.format].dtypes().items()
        }
        return _as_stored(_whole_state(model), half, of_matrices), {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files is None or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise CheckpointError(
                f"{type(model).__name__}: a Spectrim checkpoint is loaded from the safetensors files of its folder, "
                "not from a state_dict or another file"
            )
        files = [Path(file) for file in checkpoint_files]
        _require_inside(files, model.name_or_path)
        entries = headers(files)
        check_half(entries, self.quantization_config)
        linearise(model)
        listed = self.quantization_config.listed
        weights = _names_in(model, [f"{name}.weight" for name in listed])
        places = {name: weights[f"{name}.weight"].removesuffix(".weight") for name in listed}
        self._replace_linears(model, entries, places)
        _check_keys(model, entries)
        self._rename_matrices(places)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # transformers forbids quantized models half() and float(); here integers and scales stay as they are
        setattr(model, "is_quantized", False)  # noqa: B010 - nn.Module declares every attribute a tensor or a module
        setattr(model, "_weight_conversions", [])  # noqa: B010 - saved under the names of the modules, as in the files
        _lay_out(model)
        share(same_input(model))
        return model

    def _rename_matrices(self, places: Mapping[str, str]) -> None:
        """List the matrices under the names which the model has, and is saved with."""
        config = self.quantization_config = copy.copy(self.quantization_config)
        config.matrices = {places[name]: matrix for name, matrix in config.matrices.items()}

    def _replace_linears(self, model: PreTrainedModel, entries: Mapping[str, Entry], places: Mapping[str, str]) -> None:
        """Put a stored linear into the place, by name, of every listed matrix."""
        modules = by_module(entries)
        for name, matrix in self.quantization_config.listed.items():
            try:
                linear = model.get_submodule(places[name])
            except AttributeError:
                linear = None
            if type(linear) is not nn.Linear:
                raise CheckpointError(
                    f"{name}: the checkpoint lists this linear, {type(model).__name__} has {type(linear).__name__}; "
                    "load it with the class in config.json's architectures, such as AutoModelForCausalLM, or with "
                    "another one that keeps its base model under the same name"
                )
            found = {suffix: entry[:2] for suffix, entry in modules.get(name, {}).items()}
            shape = check_matrix(name, matrix, found)
            if shape != (linear.out_features, linear.in_features):
                raise CheckpointError(f"{name}: stored weight {shape}, the model requires {tuple(linear.weight.shape)}")
            if matrix.format == "dense":
                continue
            weight, has_bias = linear.weight, linear.bias is not None
            kind, size = kind_of(matrix.format), (shape[1], shape[0])
            module = kind(*size, matrix.rank, matrix.format, has_bias, device=weight.device, dtype=weight.dtype)
            if isinstance(module, CodedLinear):
                module.expect(found["weight"][1][0])
            for parameter in module.parameters():  # else transformers draws random numbers for what stays on the disk
                setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 - torch declares no such attribute
            replace(model, places[name], module)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers passes on what it was given, "float16" as well as torch.float16
        chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        return _plain_linears(model, chosen)


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with plain weights where there were matrices in a storage format, changed in place.

    Products are formed in float32 and stored in the model's dtype; biases stay. What remains is an ordinary model that
    ``save_pretrained`` writes without a trace of Spectrim, with the bytes of the dense model.
    """
    _plain_linears(model, model.dtype)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, SpectrimQuantizer):
        quantizer.remove_quantization_config(model)
    return model


def _plain_linears(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    stored = [item for item in model.named_modules() if isinstance(item[1], StoredLinear)]
    if away := [name for name, module in stored if module.weight.is_meta]:
        raise ModelError(
            f"{away[0]}: its tensors are offloaded, as those of {len(away)} of {len(stored)} matrices, and a plain "
            "weight needs them in memory; load the model without device_map, or with one that offloads nothing"
        )
    for name, module in stored:
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        linear.weight = nn.Parameter(module.dense_weight().detach().to(dtype))
        linear.bias = module.bias
        replace(model, name, linear.train(module.training))
    restore(model)
    return model


def _lay_out(model: PreTrainedModel) -> None:
    """Let every stored linear take on its order in memory; codes are decoded by as many threads as torch has."""

    def lay_out(name: str, module: StoredLinear) -> None:
        try:
            module.lay_out(model.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{name}.weight: {error}; build or fetch the checkpoint again") from None

    # of what is offloaded accelerate puts the files' tensors into place, for each call
    items = [item for item in model.named_modules() if isinstance(item[1], StoredLinear)]
    stored = [(name, module) for name, module in items if not module.weight.is_meta]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for done in [threads.submit(lay_out, *item) for item in stored]:
            done.result()


def _whole_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state_dict, with what accelerate has put away."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    state = model.state_dict()
    away = {name for name, tensor in state.items() if tensor.is_meta}
    state |= {name: load_offloaded_parameter(model, name) for name in away}
    return state | {name: state[source] for name, source in model.all_tied_weights_keys.items() if name in away}


def _as_stored(
    state: Mapping[str, Tensor], half: torch.dtype, of_matrices: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """``state`` in a file's dtypes: those ``of_matrices``, else float32 in ``half`` where exact; ties stay ties."""
    done: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        wanted = of_matrices.get(name)
        if tensor.is_meta or tensor.dtype == wanted or (wanted is None and tensor.dtype != torch.float32):
            result[name] = tensor.contiguous()  # safetensors takes no other
            continue
        tie = (tensor.data_ptr(), tensor.shape)
        if tie not in done:
            done[tie] = (_in_half(tensor, half) if wanted is None else narrow(tensor, wanted)).contiguous()
        result[name] = done[tie]
    return result


def _in_half(tensor: Tensor, half: torch.dtype) -> Tensor:
    """``tensor`` in ``half`` where that is exact."""
    rounded = tensor.to(half)
    return rounded if torch.equal(rounded.float(), tensor) else tensor


def _require_inside(files: Iterable[Path], folder: str | None) -> None:
    """A local checkpoint's index may name files of its own folder only; a hub's files are where its cache puts them."""
    if not folder or not Path(folder).is_dir():
        return
    for file in files:
        if file.parent.resolve() != Path(folder).resolve():
            raise CheckpointError(
                f"{file}: outside the checkpoint's folder {folder}; its index must name its own files"
            )


def _names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name of a tensor in the files -> its name in ``model``, as transformers finds it: a base model has no prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    found = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        found[name] = name if renamed not in expected and name in expected else renamed
    return found


def _check_keys(model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
    """Every tensor of the model must be in the files and the reverse, under the names transformers gives them.

    Of a class that is not the checkpoint's only the base model must: transformers initialises a head that the files
    have not, leaves out one that the class has not, and reports both.
    """
    expected, found = model.state_dict(), set(_names_in(model, entries).values())
    missing = expected.keys() - found - model.all_tied_weights_keys.keys()
    missing = _unmatched(missing, model._keys_to_ignore_on_load_missing)
    unexpected = _unmatched(found - expected.keys(), model._keys_to_ignore_on_load_unexpected)
    if type(model).__name__ not in (model.config.architectures or [type(model).__name__]):
        base = f"{model.base_model_prefix}."
        if model.base_model is not model:
            missing = {name for name in missing if name.startswith(base)}
        if any(name.startswith(base) for name in entries):  # else the files are those of a base model
            unexpected = {name for name in unexpected if name.startswith(base)}
    if missing or unexpected:
        listed = [f"missing {name}" for name in sorted(missing)] + [f"unexpected {name}" for name in sorted(unexpected)]
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise CheckpointError(
            f"{type(model).__name__}: the files' tensors are not the model's: {', '.join(listed[:8])}{more}; build or "
            "fetch the checkpoint again, and load it with the class in config.json's architectures"
        )


def _unmatched(names: Iterable[str], patterns: Iterable[str] | None) -> set[str]:
    return {name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())}
