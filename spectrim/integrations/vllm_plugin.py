"""Spectrim checkpoints in vLLM, by its own plugin interface: vLLM needs no change, the user no flag.

    vllm serve artifacts/remap        or        vllm.LLM("artifacts/remap")

vLLM calls ``register`` in each of its processes (entry point ``vllm.general_plugins``). From then on the
``quant_method`` in a checkpoint's config.json leads to ``StoredConfig`` here, and that to the linears of the model.

vLLM makes one layer of q, k and v, and one of gate and up; a checkpoint has each of them in a format and at a rank of
its own. Such a layer therefore holds the modules that transformers would load, one per matrix, and joins their outputs.
The products are torch's own: no fused kernel expands integers. Tensor parallelism is refused. Importing this file does
not need vLLM. Written after the sources of vLLM 0.33.0; run with 0.32.0, on a CPU alone.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.checkpoint.layout import HALF, METHOD, Matrix, SpectrimConfig
from spectrim.errors import CheckpointError, ModelError, SpectrimError
from spectrim.formats.coded_linear import CodedLinear
from spectrim.formats.kinds import kind_of
from spectrim.formats.shared_input import share
from spectrim.formats.stored_linear import StoredLinear, stored_tensors
from spectrim.maths.budget import Format

SHARDS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of an attention layer; other layers' parts are numbers


def register() -> None:
    """Make vLLM know ``"quant_method": "spectrim"``; a second call changes nothing.

    Raises:
        SpectrimError: vLLM cannot be imported.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
    except ImportError as error:
        raise SpectrimError(f"vLLM is required and cannot be imported ({error}); `pip install vllm`") from error
    register_quantization_config(METHOD)(_stored_config())


def __getattr__(name: str) -> Any:
    if name == "StoredConfig":  # vLLM's worker processes unpickle one before they call `register`
        return _stored_config()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def part_names(prefix: str, packed: Mapping[str, Sequence[str]], listed: Mapping[str, Any]) -> list[str]:
    """The checkpoint's linears in the vLLM layer ``prefix``: itself, or those that vLLM fuses under that name."""
    parent, dot, last = prefix.rpartition(".")
    return [prefix] if prefix in listed or last not in packed else [f"{parent}{dot}{part}" for part in packed[last]]


class FusedLinear(nn.Module):
    """y = [x W₁ᵀ, x W₂ᵀ, …]: the linears of one vLLM layer, each in the format it has in the checkpoint's files.

    Args:
        matrices: name -> Matrix of every part, in the layer's order; None for one that the checkpoint does not list.
        in_features, sizes: inputs, the same for all parts, and outputs of each.
        half, dtype: the 16-bit dtype of dense matrices in the checkpoint, and that of the model, which factors take on.

    Raises:
        ModelError: the layer has another number of parts, or a rank exceeds a matrix.
    """

    def __init__(
        self, matrices: Mapping[str, Matrix | None], in_features: int, sizes: Sequence[int],
        half: torch.dtype, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(sizes) != len(matrices):
            raise ModelError(
                f"{', '.join(matrices)}: a layer of {len(sizes)} parts in vLLM, which must be these; use transformers"
            )
        self.names, self.parts, self.dtype = list(matrices), nn.ModuleList(), dtype
        self.dtypes: dict[str, set[torch.dtype]] = {}
        for size, (name, matrix) in zip(sizes, matrices.items(), strict=True):
            format, rank = matrix or Matrix("dense", 1)
            self.parts.append(_part(format, rank, size, in_features, dtype).requires_grad_(False))
            unlisted = set() if matrix else {torch.float32}  # what the checkpoint leaves as is may have any precision
            for suffix, stored in stored_tensors(format, size, in_features, rank).items():
                self.dtypes[f"{name}.{suffix}"] = {stored.dtype or half} | unlisted
        self.missing = set(self.dtypes)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., the parts' outputs), in x's dtype."""
        outputs = [part(x) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def load(self, suffix: str, _: Tensor, tensor: Tensor, shard: object = None) -> None:
        """Take over NAME.suffix of the files, as vLLM hands it out: to a parameter, with its word for the part if many.

        Raises:
            CheckpointError: there is no such part or tensor, or its shape or dtype is not that of the format.
        """
        index = 0 if shard is None and len(self.parts) == 1 else SHARDS.get(str(shard), shard)
        if not isinstance(index, int) or not 0 <= index < len(self.parts):
            raise CheckpointError(f"{suffix}: for part {shard!r} of {', '.join(self.names)}; one of these is required")
        name = f"{self.names[index]}.{suffix}"
        if name not in self.dtypes:
            raise CheckpointError(f"{name}: not part of the format in config.json; build or fetch the checkpoint again")
        part = self.parts[index]
        if isinstance(part, CodedLinear) and suffix == "weight" and tensor.dim() == 1:
            part.expect(len(tensor))  # how long a code is only its content says
        target, dtypes = part.get_parameter(suffix), self.dtypes[name]
        if tensor.shape != target.shape or tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{name}: is {tensor.dtype} {tuple(tensor.shape)}, config.json requires "
                f"{' or '.join(sorted(map(str, dtypes)))} {tuple(target.shape)}; build or fetch the checkpoint again"
            )
        target.data.copy_(tensor)
        self.missing.discard(name)

    def lay_out(self) -> None:
        """As transformers' loading does: the order in memory that products read, one first product for all parts."""
        for part in self.parts:
            if isinstance(part, StoredLinear):
                part.lay_out(self.dtype)
        share([list(self.parts)])


def _part(format: Format, rank: int, out_features: int, in_features: int, dtype: torch.dtype) -> nn.Module:
    """The uninitialised module of one linear, on torch's default device: where vLLM builds the model."""
    if format == "dense":
        device = torch.get_default_device()
        return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False, device=device, dtype=dtype)
    return kind_of(format)(in_features, out_features, rank, format, False, dtype=dtype)


@cache
def _linear_method() -> type:
    """vLLM's view of a ``FusedLinear``: it builds, loads and calls ``layer.stored``."""
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.utils import set_weight_attrs

    class StoredLinearMethod(LinearMethodBase):
        def __init__(self, matrices: Mapping[str, Matrix | None], half: torch.dtype) -> None:
            self.matrices, self.half = matrices, half

        def create_weights(
            self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
            output_size: int, params_dtype: torch.dtype, **_: Any,
        ) -> None:  # fmt: skip
            if layer.tp_size != 1:
                raise ModelError(f"tensor_parallel_size is {layer.tp_size}; set it to 1 for a Spectrim checkpoint")
            sizes = output_partition_sizes if len(self.matrices) > 1 else [output_size]
            layer.stored = FusedLinear(self.matrices, input_size, sizes, self.half, params_dtype)
            for suffix, tensor in [item for part in layer.stored.parts for item in part.named_parameters()]:
                # the files' q_proj.left reaches vLLM's layer as `left` and a shard: an empty parameter passes it on
                door = nn.Parameter(tensor.new_empty(0), requires_grad=False)
                set_weight_attrs(door, {"weight_loader": partial(layer.stored.load, suffix)})
                layer.register_parameter(suffix, door)

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Any:
            return layer.stored(x) if bias is None else layer.stored(x) + bias

        def process_weights_after_loading(self, layer: Any) -> None:
            if names := ", ".join(sorted(layer.stored.missing)):
                raise CheckpointError(f"{names}: missing in the files; build or fetch the checkpoint again")
            layer.stored.lay_out()

    return StoredLinearMethod


@cache
def _stored_config() -> type:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class StoredConfig(QuantizationConfig):
        def __init__(self, fields: Mapping[str, Any]) -> None:
            super().__init__()
            checked = SpectrimConfig(**fields)
            self.half, self.listed = HALF[checked.stored_dtype], checked.listed

        def get_name(self) -> str:
            return METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [*HALF.values(), torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0  # torch's own products run wherever vLLM does

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []  # everything is in config.json

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            return cls(config)

        def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
            self.listed = hf_to_vllm_mapper.apply_dict(self.listed)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            names = part_names(prefix, self.packed_modules_mapping, self.listed)
            if isinstance(layer, LinearBase):
                matrices = {name: self.listed.get(name) for name in names}
                return _linear_method()(matrices, self.half) if any(matrices.values()) else UnquantizedLinearMethod()
            for name in self.listed:
                if name in names or name.startswith(f"{prefix}."):
                    raise ModelError(f"{name}: in a {type(layer).__name__} of vLLM, where a linear layer is required")
            return None  # attention and embeddings are vLLM's own

    StoredConfig.__qualname__ = "StoredConfig"  # where pickle looks for it
    return StoredConfig
