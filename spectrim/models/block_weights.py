"""The weights of a model folder, block by block, without the rest of the model."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor

from spectrim.errors import ModelError, StorageError
from spectrim.models.experts import Slice, expert_groups
from spectrim.models.linearise import linearise
from spectrim.models.modules import decoder_blocks, linears_by_block


class BlockWeights:
    """A model folder whose blocks' weights are read from its files when they are asked for.

    Args:
        folder: a Hugging Face model folder with safetensors weights.
        device: where they are put.
        exclude: shell patterns of linears that are left out of ``linears``.

    Raises:
        StorageError: no model in ``folder``.
        ModelError: no decoder blocks, or nothing to compress.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", exclude: tuple[str, ...] = ()) -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        if not (file := self.folder / "config.json").is_file():  # transformers would ask the hub for it
            raise StorageError(f"{file}: not found; give a folder with a model in the Hugging Face layout")
        from transformers import AutoConfig, AutoModelForCausalLM  # seconds, which a finished result need not take

        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.dtype = config.dtype or torch.float32
        with init_empty_weights():
            self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        self._sources = linearise(self.model)
        self.prefix, self.blocks = decoder_blocks(self.model)
        self.names = [f"{self.prefix}.{i}" for i in range(len(self.blocks))]
        self.linears = list(linears_by_block(self.model, exclude).values())
        self._files = _weight_files(self.folder)

    def weights(self, index: int) -> dict[str, Tensor]:
        """Linear name -> weight (out, in) of block ``index`` in the model's dtype, read straight from the files."""
        wanted = [f"{name}.weight" for name in self.linears[index]]
        return {name.removesuffix(".weight"): value.to(self.device, self.dtype) for name, value in self._read(wanted)}

    def experts(self, index: int) -> list[list[str]]:
        """The compressible linears of the experts of block ``index``, a list for each kind."""
        groups = expert_groups(self.blocks[index], self.names[index])
        return [[name for name in names if name in self.linears[index]] for names in groups]

    def _load(self, names: Iterable[str]) -> None:
        for name, value in self._read(names):
            dtype = self.dtype if value.is_floating_point() else None
            set_module_tensor_to_device(self.model, name, self.device, value, dtype=dtype)

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the model from the files, one after the other; of many experts only the one that is asked for."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[self._source(name).name], []).append(name)
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as handle:
                for name in wanted:
                    yield name, self._source(name).read(handle)

    def _source(self, name: str) -> Slice:
        return self._sources.get(name, Slice(name))


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file of ``folder`` that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    file = folder / "model.safetensors"
    if not file.exists():
        raise ModelError(f"{folder}: no model.safetensors; prepare the model first")
    with safe_open(file, framework="pt") as handle:
        return dict.fromkeys(handle.keys(), file)
