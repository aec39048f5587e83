"""PEFT's LoRA adapters on a compressed model; importing this file needs the package `peft`.

    config = register(LoraConfig(target_modules=["q_proj", "up_proj"]))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    PeftModel.from_pretrained(model, adapter, config=register(LoraConfig.from_pretrained(adapter)))

The adapter stands beside the stored matrix, y = W x + s B A x, and trains while the matrix stays as it is, whatever its
format. PEFT keeps no record of foreign layers in the adapter's file: register the config again when it is loaded.

Source: LoRA, Hu et al. 2021, arXiv:2106.09685.
"""

from typing import Any

from peft import LoraConfig
from peft.tuners import lora

from spectrim.errors import ModelError
from spectrim.formats.stored_linear import StoredLinear


class StoredLora(lora.Linear):
    """An adapter beside a ``StoredLinear``."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a matrix in factors or integers cannot take up a sum.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "an adapter cannot be merged into a matrix that is stored in factors or integers; call spectrim.to_dense "
            "on the model before the adapter is attached, then merge"
        )


def register(config: LoraConfig) -> LoraConfig:
    """``config``, which now knows the linears of a compressed model."""
    layers: dict[Any, Any] = {StoredLinear: StoredLora}
    config._register_custom_module(layers)
    return config
