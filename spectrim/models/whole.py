"""A causal language model as transformers runs it, all of it in memory, its matrices as linears by block."""

from functools import cached_property
from typing import Any

from torch import nn

from spectrim.models.block_weights import BlockWeights
from spectrim.models.linearise import linearise


class WholeModel(BlockWeights):
    """A model folder run as a whole, for models whose blocks cannot be run one by one; see ``BlockWeights``."""

    @cached_property
    def running(self) -> Any:
        """The model with its weights."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype, trust_remote_code=False)
        linearise(model)
        return model.to(self.device).eval().requires_grad_(False)

    def running_linears(self, index: int) -> dict[str, nn.Linear]:
        """The ``linears`` of block ``index`` as they run."""
        return {name: self.running.get_submodule(name) for name in self.linears[index]}
